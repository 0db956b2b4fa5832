"""What the supervisor makes of a job, with a clock of our own: nobody waits, nobody is killed but by rule."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path

import pytest

from alignment.errors import LostError
from alignment.life import BEATS, STACKS, Beat, started_by, unheard
from alignment.pipeline.supervisor import Patience, Supervisor
from alignment.signals import PASSED_ON, Listener

NO_PID = 2**22 + 1  # above what the kernel gives


class World:
    """A job on another host, so that no process is touched; what happens at a second is scripted."""

    def __init__(self, folder: Path, watchdog_s: float = 60.0, time_limit: float | None = None):
        self.now, self.code, self.killed_at = 0.0, None, None
        self.folder, self.said, self.facts = folder, [], []
        self.started: dict[int, Beat] = {}
        self.script: dict[float, Callable[[], None]] = {}
        self.each: Callable[[], None] = lambda: None
        self.stop = Listener()
        for name in (BEATS, STACKS):
            (folder / name).mkdir(exist_ok=True)
        self.watched = Supervisor(
            self, folder, Patience(watchdog_s, time_limit), self.stop, self.facts.append, self.said.append,
            clock=lambda: self.now, sleep=self.sleep,
        )  # fmt: skip

    def status(self) -> int | None:
        return self.code

    def ranks(self) -> dict[int, Beat]:
        return self.started

    def kill(self) -> None:
        if self.code is None:
            self.code, self.killed_at = -9, self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.each()
        for at in [at for at in self.script if at <= self.now]:
            self.script.pop(at)()
        assert self.now < 10_000

    def beat(
        self, rank: int = 0, *, ticks: int = 0, ended: bool = False, host: str = "far", pid: int = NO_PID, born: int = 1
    ) -> None:
        beat = Beat(rank, pid, born, host, int(self.now), ticks, ended)
        (self.folder / BEATS / f"rank-{rank:05d}.json").write_text(json.dumps(asdict(beat)))

    def step(self, step: int, total: int = 100) -> None:
        (self.folder / "progress.json").write_text(json.dumps({"step": step, "total": total}))

    def end(self, code: int = 0) -> None:
        self.code = code


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def test_a_job_that_gets_on_is_let_alone_and_its_progress_told(world: World) -> None:
    world.each = lambda: (world.beat(ticks=int(world.now)), world.step(int(world.now) // 10))
    world.script[600] = world.end
    assert world.watched.watch() == 0
    assert (world.watched.fault, world.said, world.killed_at) == (None, [], None)
    assert [facts["step"] for facts in world.facts] == list(range(60))


def test_a_rank_without_a_beat_is_hung_and_named(world: World) -> None:
    world.each = lambda: (world.beat(0, ticks=int(world.now)), world.beat(1) if world.now < 100 else None)
    assert world.watched.watch() < 0
    assert isinstance(world.watched.fault, LostError)
    assert "rank 1 has shown no life for 60 s" in str(world.watched.fault)
    assert world.killed_at == pytest.approx(159, abs=2)


def test_a_job_that_beats_but_does_not_get_on_has_six_times_as_long_until_its_first_step(tmp_path: Path) -> None:
    loading = World(tmp_path)
    loading.each = lambda: (loading.beat(0, ticks=3), loading.beat(1, ticks=2))
    loading.watched.watch()
    assert loading.killed_at == pytest.approx(360, abs=2)
    assert "no process has got on (behind: rank 1)" in str(loading.watched.fault)
    (tmp_path / "training").mkdir()
    training = World(tmp_path / "training")
    training.each = lambda: (
        training.beat(0, ticks=min(20, int(training.now))),
        training.step(min(20, int(training.now))),
    )
    training.watched.watch()
    assert training.killed_at == pytest.approx(80, abs=2)


def test_another_count_has_as_long_until_its_first_step_as_the_first_one(world: World) -> None:
    """From the reference pass to training, say: a first step may compile, or allocate."""

    def gets_on() -> None:
        world.beat(ticks=min(30, int(world.now)))
        world.step(int(world.now), total=100) if world.now < 30 else world.step(0, total=8)

    world.each = gets_on
    world.watched.watch()
    assert world.killed_at == pytest.approx(390, abs=2)


def test_a_warning_is_passed_on_as_it_comes_and_once(world: World) -> None:
    world.each = lambda: world.beat(ticks=int(world.now))
    when: list[float] = []
    world.watched._say = lambda line: (world.said.append(line), when.append(world.now))
    path = world.folder / "warnings.txt"
    world.script[20] = lambda: path.write_text("first\nsec")
    world.script[40] = lambda: path.write_text("first\nsecond\n")
    world.script[60] = world.end
    world.watched.watch()
    world.watched.tell_warnings(world.folder)
    assert world.said == ["first", "second"]
    assert when == pytest.approx([20, 40], abs=1)


def test_who_slept_itself_starts_to_count_anew(world: World) -> None:
    world.each = lambda: world.beat(ticks=int(world.now)) if not 100 < world.now < 6140 else None

    def asleep() -> None:
        world.now += 6000

    world.script[110] = asleep
    world.script[6200] = world.end
    assert world.watched.watch() == 0


def test_a_failed_rank_takes_the_job_down_in_seconds(world: World) -> None:
    world.each = lambda: world.beat(ticks=int(world.now))
    world.script[30] = lambda: (world.folder / "error.json").write_text("{}")
    world.watched.watch()
    assert world.killed_at == pytest.approx(38, abs=1)
    assert world.watched.fault is None, "the error itself is the cause"


def test_torchrun_says_how_it_ended_once_those_that_are_left_are_killed(world: World) -> None:
    """Rank 1 has a word to say and ends, rank 0 hangs without it: what the driver kills is not the cause."""
    left = subprocess.Popen(["sleep", "100"])
    here = unheard(0, left.pid)
    assert here is not None

    def each() -> None:
        if left.poll() is None:
            world.beat(0, ticks=int(world.now), host=here.host, pid=left.pid, born=here.born)
        elif world.code is None and world.now > 7:  # torchrun
            world.end(1)

    world.each = each
    world.script[1] = lambda: (world.folder / "lost.json").write_text("{}")
    assert world.watched.watch() == 1
    assert left.poll() == -signal.SIGKILL
    assert world.killed_at is None
    assert world.watched.fault is None


def test_a_rank_that_is_gone_without_a_word_takes_the_job_down_and_is_named(world: World) -> None:
    mine = os.uname().nodename
    world.each = lambda: (
        world.beat(0, ticks=int(world.now)),
        world.beat(1, host=mine),
        world.beat(2, host=mine, ended=True),
    )
    (world.folder / "log.txt").write_text(f"failed (exitcode: -11) local_rank: 1 (pid: {NO_PID}) of binary\n")
    world.watched.watch()
    assert world.killed_at == pytest.approx(8.5, abs=1)
    assert str(world.watched.fault).startswith("rank 1 was killed by signal 11")


@pytest.mark.parametrize(("code", "named"), [(-9, True), (-15, False), (1, False)])
def test_a_rank_of_another_host_is_named_by_what_torchrun_says_there_however_late(
    world: World, code: int, named: bool
) -> None:
    """Rank 0 has said that it lost contact long before. Torchrun itself ends who is left with 15."""
    world.each = lambda: (world.beat(0, ticks=int(world.now)), world.beat(1, pid=NO_PID + 1))
    world.script[1] = lambda: (world.folder / "error.json").write_text("{}")
    said = f"failed (exitcode: {code}) local_rank: 0 (pid: {NO_PID + 1}) of binary\n"
    world.script[8] = lambda: (world.folder / "log.txt").write_text(said)
    world.watched.watch()
    assert world.killed_at == pytest.approx(9, abs=1)
    assert str(world.watched.fault).startswith("rank 1 on far was killed by signal 9") == named
    assert (world.watched.fault is not None) == named


def test_a_rank_that_is_gone_before_its_first_beat_is_lost_in_seconds(world: World) -> None:
    """torchrun would give the others half a minute."""
    world.each = lambda: world.beat(0, ticks=int(world.now))
    world.started = {0: Beat(0, NO_PID, 1, "far", 0, 0, False), 1: Beat(1, NO_PID, 1, os.uname().nodename, 0, 0, False)}
    world.watched.watch()
    assert world.killed_at == pytest.approx(8.5, abs=1)
    assert type(world.watched.fault) is LostError
    assert str(world.watched.fault).startswith("rank 1 ended without a word")


def test_a_rank_whose_first_beat_was_its_last_or_that_lives_is_not_lost(world: World) -> None:
    mine = os.uname().nodename
    world.started = {1: Beat(1, NO_PID, 1, mine, 0, 0, False)}
    world.beat(1, host=mine, ended=True)
    living = unheard(2, os.getpid())
    assert living is not None and not living.gone
    world.started[2] = living
    world.each = lambda: world.beat(0, ticks=int(world.now))
    world.script[30] = lambda: (world.started.clear(), world.watched._started.pop(2), world.end())
    assert world.watched.watch() == 0
    assert world.watched.fault is None


def test_of_the_processes_that_one_has_started_its_ranks_are_known_before_they_beat() -> None:
    with ExitStack() as ends:
        for rank in ("0", "11", None):
            given = {name: value for name, value in os.environ.items() if name != "RANK"}
            process = subprocess.Popen(["sleep", "60"], env={**given, **({"RANK": rank} if rank else {})})
            ends.callback(process.wait)
            ends.callback(process.kill)
        found = started_by(os.getpid())
        assert sorted(found) == [0, 11]
        assert not any(beat.gone or beat.ended for beat in found.values())
        found[11].signal(signal.SIGKILL)
        os.waitid(os.P_PID, found[11].pid, os.WEXITED | os.WNOWAIT)  # it stays as a zombie
        assert found[11].gone
        assert sorted(started_by(os.getpid())) == [0]


def test_ranks_that_end_while_the_first_one_commits_are_not_lost(world: World) -> None:
    world.beat(0, host=os.uname().nodename)
    world.watched._read_beats(0.0)
    (world.folder / BEATS / "rank-00000.json").unlink()
    world.script[20] = world.end
    assert world.watched.watch() == 0
    assert world.watched.fault is None


@pytest.mark.parametrize("by", ["signal", "limit"])
def test_a_request_to_stop_is_passed_on_to_each_rank_once_also_to_one_that_comes_later(
    by: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = World(tmp_path, time_limit=50.0 if by == "limit" else None)
    told: list[tuple[int, int, float]] = []
    monkeypatch.setattr(Beat, "signal", lambda beat, number: told.append((beat.rank, number, world.now)))
    world.each = lambda: (world.beat(0, pid=NO_PID), world.beat(1, pid=NO_PID + 1) if world.now > 70 else None)
    world.script[50] = lambda: setattr(world.stop, "asked", "SIGUSR1") if by == "signal" else None
    world.script[300] = world.end
    world.watched.watch()
    assert [(rank, number) for rank, number, _ in told] == [(0, PASSED_ON), (1, PASSED_ON)]
    assert [at for _, _, at in told] == pytest.approx([50, 70.5], abs=1)
    why = "launcher.time_limit" if by == "limit" else "SIGUSR1"
    assert world.watched.asked == why
    more = "" if by == "limit" else "; a second signal ends it at once"
    assert world.said == [f"asked to stop ({why}): saves what it can, and ends{more}"]
