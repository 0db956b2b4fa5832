"""How often SLURM is asked by who looks on for long, and how soon what has happened is seen. Time is a test's own."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from alignment.pipeline.store import Store
from alignment.reporting import logs, watching
from tests.reporting.fake_slurm import FakeSlurm, commit, key_of, note, write, write_run, write_sweep

MINUTES = 60.0


class Enough(Exception):
    pass


class Clock:
    """Goes on as somebody sleeps; at some times something happens."""

    def __init__(self) -> None:
        self.now = 0.0
        self.sleeps: list[float] = []
        self._happens: list[tuple[float, Callable[[], object]]] = []

    def at(self, when: float, what: Callable[[], object]) -> None:
        self._happens.append((when, what))

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.sleeps.append(seconds)
        for event in [event for event in self._happens if event[0] <= self.now]:
            self._happens.remove(event)
            event[1]()

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def store(tmp_path: Path, slurm: FakeSlurm) -> Path:
    """A run of which SFT is job 12 and runs, and its evaluation is job 13 and waits."""
    write_run(tmp_path / "store", "run", {"sft": "queued", "evaluate": "queued"}, {"sft": "12", "evaluate": "13"})
    slurm.queue(("12", "RUNNING"), ("13", "PENDING", "Dependency"))
    return tmp_path / "store"


def watch(store: Path, clock: Clock) -> int:
    return watching.watch(Store(store), lambda: ([store / "runs" / "run"], []), clock.sleep, clock)


def enough() -> None:
    raise Enough


def tell(store: Path, step: int, file: str = "progress.json") -> None:
    write(store / "work" / key_of("run", "sft")[:16] / file, {"step": step, "total": 100})


def test_while_nothing_happens_it_is_asked_twice_a_minute(store: Path, slurm: FakeSlurm, clock: Clock) -> None:
    for second in range(0, 1200, 2):
        clock.at(second, lambda second=second: tell(store, second))  # type: ignore[misc]
    clock.at(20 * MINUTES, enough)
    with pytest.raises(Enough):
        watch(store, clock)
    assert len(slurm.calls("squeue")) <= 20 * 2 + 4
    assert set(clock.sleeps) == {watching.EVERY}, "the store is looked at more often"


def test_where_much_happens_it_is_asked_no_more_than_every_ten_seconds(
    store: Path, slurm: FakeSlurm, clock: Clock
) -> None:
    for second in range(0, 1200, 2):
        clock.at(second, lambda second=second: tell(store, second, "attempts.jsonl"))  # type: ignore[misc]
    clock.at(20 * MINUTES, enough)
    with pytest.raises(Enough):
        watch(store, clock)
    assert 20 * 3 < len(slurm.calls("squeue")) < 20 * 6.5


def test_a_result_is_seen_without_asking(
    store: Path, slurm: FakeSlurm, clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    commit(store, "run", "evaluate")
    clock.at(10 * MINUTES, lambda: commit(store, "run", "sft"))
    assert watch(store, clock) == 0
    assert clock.now == 10 * MINUTES
    assert "evaluate  done" in capsys.readouterr().out


def test_what_an_attempt_s_end_brings_with_it_is_seen_soon(store: Path, slurm: FakeSlurm, clock: Clock) -> None:
    """The driver notes it before its job ends, and the job that waits is cancelled after that."""
    clock.at(10 * MINUTES + 1, lambda: tell(store, 7, "attempts.jsonl"))
    clock.at(10 * MINUTES + 3, lambda: slurm.queue(("12", "FAILED"), ("13", "PENDING", "Dependency")))
    clock.at(10 * MINUTES + 5, lambda: slurm.queue(("12", "FAILED"), ("13", "CANCELLED")))
    assert watch(store, clock) == 1
    assert clock.now <= 10 * MINUTES + 10


def test_an_end_that_no_file_tells_of_is_seen_within_half_a_minute(store: Path, slurm: FakeSlurm, clock: Clock) -> None:
    clock.at(10 * MINUTES, lambda: slurm.queue(("12", "NODE_FAIL"), ("13", "CANCELLED")))
    assert watch(store, clock) == 1
    assert clock.now <= 10 * MINUTES + 32


def test_a_job_submitted_meanwhile_is_asked_for_at_once(store: Path, slurm: FakeSlurm, clock: Clock) -> None:
    def again() -> None:
        note(store, "run", "sft", "21")
        slurm.queue(("21", "FAILED"), ("13", "CANCELLED"))

    clock.at(10 * MINUTES, again)
    assert watch(store, clock) == 1
    assert clock.now == 10 * MINUTES


@pytest.fixture
def here(store: Path) -> Path:
    """The store, with a run whose stages wait, and none is a job."""
    shutil.rmtree(store / "jobs")
    write_run(store, "run", {"sft": "waiting", "evaluate": "waiting"})
    return store


def test_a_run_that_waits_for_another_process_is_watched_until_it_has_ended(
    here: Path, clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    """That one ends, and the driver sees so only some time later."""
    driver, other = Store(here).run_lock("run"), Store(here).lock(key_of("run", "sft"))
    assert driver.acquire("run") and other.acquire("another/sft")

    def ends() -> None:
        commit(here, "run", "evaluate")
        write_run(here, "run", {"sft": "reused", "evaluate": "done"})
        driver.release()

    clock.at(10 * MINUTES - 10, lambda: commit(here, "run", "sft"))
    clock.at(10 * MINUTES - 10, other.release)
    clock.at(10 * MINUTES, ends)
    assert watch(here, clock) == 0
    assert clock.now == 10 * MINUTES
    assert "evaluate  done" in capsys.readouterr().out


def test_a_search_is_watched_between_its_trials_too_and_the_new_ones_with_it(
    store: Path, slurm: FakeSlurm, clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    write_run(store, "run", {"sft": "done"})
    commit(store, "run", "sft")
    file = store / "runs" / "run" / "run.json"
    write(file, {**json.loads(file.read_text()), "sweep": "search"})
    driver = Store(store).driver_lock("search")
    assert driver.acquire("search")

    def another() -> None:
        commit(store, "next", "sft")
        write_run(store, "next", {"sft": "done"})

    clock.at(5 * MINUTES, another)
    clock.at(10 * MINUTES, driver.release)
    assert watching.watch(Store(store), lambda: (sorted((store / "runs").iterdir()), []), clock.sleep, clock) == 0
    assert clock.now == 10 * MINUTES
    assert "next  SFT  done" in capsys.readouterr().out


def test_a_run_whose_driver_is_gone_is_over_once_nobody_makes_what_it_waited_for(here: Path, clock: Clock) -> None:
    other = Store(here).lock(key_of("run", "sft"))
    assert other.acquire("another/sft")
    clock.at(10 * MINUTES, other.release)
    assert watch(here, clock) == 1
    assert clock.now == 10 * MINUTES
    assert watch(here, clock) == 1
    assert clock.now == 10 * MINUTES, "at once"


def test_a_run_that_has_failed_is_over_though_another_tries_the_stage_again(here: Path, clock: Clock) -> None:
    write_run(here, "run", {"sft": "failed", "evaluate": "waiting"})
    other = Store(here).lock(key_of("run", "sft"))
    assert other.acquire("another/sft")
    assert (watch(here, clock), clock.now) == (1, 0)
    other.release()


def test_the_accounting_is_asked_once_for_a_job_that_has_ended(store: Path, slurm: FakeSlurm, clock: Clock) -> None:
    slurm.queue(("13", "RUNNING"))
    slurm.accounts(("12", "FAILED", "2026-11-26T10:00:00"))
    clock.at(20 * MINUTES, enough)
    with pytest.raises(Enough):
        watch(store, clock)
    assert len(slurm.calls("sacct")) == 1
    assert all("12" not in call.split("--jobs=")[1].split()[0] for call in slurm.calls("squeue")[1:])


def test_a_controller_that_does_not_answer_is_not_asked_more_often(
    store: Path, slurm: FakeSlurm, clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    clock.at(1 * MINUTES, lambda: slurm.script("squeue", "echo down >&2; exit 1"))
    clock.at(10 * MINUTES, lambda: slurm.queue(("12", "FAILED"), ("13", "CANCELLED")))
    assert watch(store, clock) == 1
    assert len(slurm.calls("squeue")) <= 10 * 2 + 6
    said = capsys.readouterr().out
    assert "SFT  queued" not in said, "it is at work, as SLURM last said"


def test_what_was_completed_without_a_time_is_waited_for_no_longer_than_else(
    store: Path, slurm: FakeSlurm, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("alignment.reporting.jobs.time.time", lambda: 1e9 + clock.now)
    slurm.queue(("12", "COMPLETED"), ("13", "CANCELLED"))
    assert watch(store, clock) == 1
    assert 150 <= clock.now <= 200


def test_logs_of_a_sweep_are_those_of_the_run_at_work(
    store: Path, slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    write_run(store, "other", {"sft": "done"})
    (commit(store, "other", "sft") / "log.txt").write_text("of the other\n")
    write_sweep(store, "sweep-1", ["other", "run"])
    (store / "work" / key_of("run", "sft")[:16]).mkdir(parents=True)
    (store / "work" / key_of("run", "sft")[:16] / "log.txt").write_text("of this\n")
    assert logs.show("sweep-1", None, store, 100, False) == 0
    assert "of this" in capsys.readouterr().out
    for stage in (None, "sft", "SFT"):  # as it is called in the store, and as people are told
        assert logs.show("other", stage, store, 100, False) == 0
        assert "of the other" in capsys.readouterr().out


def test_logs_are_followed_twice_a_second_and_slurm_is_not(
    store: Path, slurm: FakeSlurm, clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    log = store / "work" / key_of("run", "sft")[:16] / "log.txt"
    log.parent.mkdir(parents=True)
    seen: list[float] = []

    def grow() -> None:
        log.write_text("a line\n")
        clock.at(clock.now + 0.5, lambda: seen.append("a line" in capsys.readouterr().out))

    clock.at(5 * MINUTES, grow)
    clock.at(10 * MINUTES, lambda: (commit(store, "run", "sft") / "log.txt").write_text("a line\nthe last\n"))
    assert logs.show("run", "sft", store, 100, True, clock.sleep, clock) == 0
    assert seen == [True]
    assert "the last" in capsys.readouterr().out
    assert clock.now <= 10 * MINUTES + 2.5 and set(clock.sleeps) == {0.5}
    assert len(slurm.calls("squeue")) <= 10 * 2 + 4


def test_a_sweep_whose_command_has_not_come_to_a_point_yet_is_waited_for(store: Path, clock: Clock) -> None:
    """Its runs have no folder that could say which sweep they are of."""
    here, folders = Store(store), [store / "runs" / "not-begun"]
    lock = here.driver_lock("mine-1234")
    assert lock.acquire("mine-1234")
    clock.at(6.0, lock.release)
    assert watching.watch(here, lambda: (folders, ["mine-1234"]), clock.sleep, clock) == 1
    assert clock.now == 6.0
