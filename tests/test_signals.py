"""Whole runs that are asked to stop, lose processes or hang: they end as they should, and the next run goes on."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from alignment import life
from tests.conftest import Command, environment, runs, states
from tests.faults import runs as faults
from tests.test_kills import TWO_RANKS, keys, processes_of, run_of, start, until

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shared: what one test has made, the next one reuses."""
    return tmp_path_factory.mktemp("signals") / "store"


def listening(pid: int) -> bool:
    status = Path(f"/proc/{pid}/status").read_text()
    caught = int(status.partition("SigCgt:")[2].split()[0], 16)
    return bool(caught >> (signal.SIGUSR1 - 1) & 1)


def at_work(store: Path, work: Path | None = None, seconds: float = 60) -> life.Beat:
    """A process that works in this folder, or in any, once there is one; it then listens to signals."""
    found: list[life.Beat] = []

    def look() -> bool:
        for folder in [work] if work else (store / "work").glob("*"):
            found.extend(beat for beat in life.beats(folder).values() if not beat.ended and not beat.gone)
        return bool(found)

    until(look, seconds)
    return found[0]


def ended(driver: subprocess.Popen[str], code: int, seconds: float = 60) -> str:
    output, _ = driver.communicate(timeout=seconds)
    assert driver.returncode == code, output
    return output


def test_stages_that_do_not_train_stop_at_a_signal_or_a_limit_and_are_made_by_the_same_command(
    store: Path, command: Command, short_settings: list[str]
) -> None:
    at_once = start(store, *short_settings)
    until(lambda: listening(at_once.pid), 10)
    at_once.send_signal(signal.SIGUSR1)
    assert len(ended(at_once, 75, 10).splitlines()) <= 2

    import_model = keys(command, store, short_settings)["start"]
    work = store / "work" / import_model
    late = command(store, "run", *short_settings, "launcher.time_limit=1", code=75)
    assert "asked to stop (launcher.time_limit)" in late.stdout
    assert states(runs(command, store)[0])["start"] == "preempted"
    assert "in 1 s it has left nothing new" in late.stderr and "gets no further" in late.stderr
    again = command(store, "run", *short_settings, "launcher.time_limit=1", code=2)
    assert "launcher.time_limit: start has come to its time limit 2 times" in again.stderr
    assert states(runs(command, store)[0])["start"] == "failed"

    driver = start(store, *short_settings)
    at_work(store, work)
    driver.send_signal(signal.SIGINT)
    output = ended(driver, 75, 30)
    assert "start  asked to stop (SIGINT): saves what it can, and ends; a second signal ends it at once" in output
    assert output.splitlines()[-1].startswith("alignment: start has stopped")
    assert not processes_of(work)
    assert [row["outcome"] for row in map(json.loads, (work / "attempts.jsonl").read_text().splitlines())] == [
        *("preempted", "preempted", "preempted")
    ]

    driver = start(store, *short_settings, "retries=0")
    os.kill(at_work(store, work).pid, signal.SIGKILL)
    output = ended(driver, 6, 30)
    assert "start was killed by signal 9 (see " in output
    assert "out of memory is the usual cause of signal 9" in output
    node = runs(command, store)[0]["nodes"][0]
    assert (node["state"], node["attempts"]) == ("failed", 4)
    assert [cause[:29] for cause in node["causes"]] == [
        *["start has stopped (launcher.t"] * 2,
        "start has stopped (SIGINT)",
        "start was killed by signal 9 ",
    ]
    assert "4 attempts" in command(store, "status").stdout


def test_a_signal_in_training_is_an_end_in_order_and_the_same_command_finishes(
    store: Path, command: Command, forked: Command, short_settings: list[str]
) -> None:
    settings = [*short_settings, "stage.sft.max_steps=150"]
    work = store / "work" / keys(command, store, settings)["sft"]
    first = faults.start(store.parent, ["run", *settings], environment(store))
    until(lambda: (work / "metrics.jsonl").exists(), 90)
    first.kill(signal.SIGTERM)
    assert first.wait() == 75, first.told
    run = run_of(command, store, work.name)
    assert (run["state"], states(run)["sft"]) == ("preempted", "preempted")
    # A second signal ends even a process that cannot answer to the first one.
    driver = start(store, *settings)
    rank = at_work(store, work)
    os.kill(rank.pid, signal.SIGSTOP)
    driver.send_signal(signal.SIGTERM)
    time.sleep(2.5)
    assert driver.poll() is None
    driver.send_signal(signal.SIGTERM)
    ended(driver, 130, 10)
    assert rank.gone
    assert not processes_of(work)
    assert states(run_of(command, store, work.name)) == {"start": "reused", "rows": "reused", "sft": "interrupted"}
    forked(store, "run", *settings)
    record = json.loads((store / "store" / work.name / "record.json").read_text())
    tried = record["attempts"]
    assert [row["outcome"] for row in tried] == ["preempted", "interrupted", "done"]
    assert record["seconds"] == pytest.approx(sum(row["ended"] - row["started"] for row in tried), abs=1.0), "of all"


def test_a_signal_to_a_rank_of_torchrun_that_still_starts_waits_for_it(
    store: Path, command: Command, forked: Command, short_settings: list[str]
) -> None:
    """Its interpreter is not up yet; torchrun's own start hands the blocked signals on."""
    settings = [*short_settings, *TWO_RANKS, "stage.sft.seed=5"]
    work = store / "work" / keys(command, store, settings)["sft"]
    driver = start(store, *settings)

    def ranks() -> dict[int, life.Beat]:
        return {rank: beat for pid in processes_of(work) for rank, beat in life.started_by(pid).items()}

    until(lambda: 1 in ranks(), 120)
    early = ranks()[1]
    assert not life.beats(work), "it has not shown life yet"
    early.signal(signal.SIGTERM)
    output = ended(driver, 75, 60)
    assert "SIGTERM on rank 1: nothing was made yet" in output
    forked(store, "run", *settings)


def test_a_process_that_stands_still_has_all_write_their_stacks(
    store: Path, command: Command, short_settings: list[str]
) -> None:
    """The stage would be tried again: tests/faults/test_signals.py."""
    settings = [*short_settings, *TWO_RANKS, "retries=0", "stage.sft.max_steps=100", "engine.watchdog_s=6"]
    work = store / "work" / keys(command, store, settings)["sft"]
    driver = start(store, *settings)
    until(lambda: (work / "metrics.jsonl").exists(), 90)
    os.kill(life.beats(work)[1].pid, signal.SIGSTOP)
    assert "hung: rank 1 has shown no life for 6 s" in ended(driver, 6, 120)
    for rank in (0, 1):
        written = life.stacks(work, rank).read_text()
        assert "rank 1 has shown no life" in written
        assert "most recent call first" in written


def test_a_run_whose_output_nobody_takes_is_made_all_the_same(
    store: Path, command: Command, short_settings: list[str]
) -> None:
    settings = [*short_settings, "stage.sft.seed=6"]
    with open("/dev/full", "w") as full:
        driver = subprocess.Popen(
            [sys.executable, "-m", "alignment.cli", "run", *settings],
            env=environment(store), cwd=store.parent, stdout=full, stderr=full,
        )  # fmt: skip
        assert driver.wait(120) == 0
    assert states(runs(command, store)[0])["sft"] == "done"


def test_the_first_signal_in_a_sweep_ends_the_sweep(store: Path, command: Command, short_settings: list[str]) -> None:
    sweep = ["-m", *short_settings, "stage.sft.seed=1,2", "stage.sft.max_steps=401"]
    driver = start(store, *sweep)
    at_work(store)
    driver.send_signal(signal.SIGTERM)
    ended(driver, 75)
    assert sum(run["state"] == "preempted" for run in runs(command, store)) == 1


def test_a_terminal_that_goes_away_is_a_request_to_stop(
    store: Path, command: Command, short_settings: list[str]
) -> None:
    """As when a connection breaks: the driver saves though it can say nothing any more."""
    settings = [*short_settings, "stage.sft.max_steps=149"]
    work = store / "work" / keys(command, store, settings)["sft"]
    pid, terminal = pty.fork()
    if pid == 0:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests may run under nohup
        os.execve(sys.executable, [sys.executable, "-m", "alignment.cli", "run", *settings], environment(store))
    os.set_blocking(terminal, False)

    def training() -> bool:
        with suppress(BlockingIOError):
            os.read(terminal, 1 << 16)
        return (work / "metrics.jsonl").exists()

    until(training, 90)
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 75
    (tried,) = map(json.loads, (work / "attempts.jsonl").read_text().splitlines())
    assert tried["cause"].startswith("sft has stopped (SIGHUP: saved at step ")
    assert list(work.glob("checkpoints/step-*/manifest.json"))
    assert not processes_of(work)
