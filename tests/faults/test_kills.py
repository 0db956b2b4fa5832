"""kill -9, of one rank, of all, of the driver, at named moments and at random ones: the same command goes on, and ends
in the bits of the run that nobody disturbed."""

from __future__ import annotations

import os
import random
import re
import signal
import time
from collections.abc import Callable

import pytest

from tests.faults.driver import Fault
from tests.faults.runs import ATTEMPT, STEPS, Case, Driver, cells, faults, until

# moment -> which time it comes
MOMENTS = {
    "start": 1, "loading": 1, "trial": 1, "reference": 1, "sampling": 2, "judging": 2, "training": 4, "saving": 3,
    "committing": 3, "removing": 4, "finishing": 1, "model": 1, "summary": 1, "tracker": 1, "result": 1, "fsync": 7,
    "rename": 3, "replace": 9,
}  # fmt: skip
LATE = {"finishing", "model", "summary", "tracker", "result"}  # training is over
ONLY_MAIN = {"committing", "removing", "tracker", "result", "fsync", "rename", "replace"}
EVERYWHERE = ["training", "saving", "model"]
SAMPLES = ["sampling", "judging"]
LEAST = {"saving": 2, "committing": 2, "removing": 2}  # checkpoints that count when the moment comes


@pytest.mark.fault("kill -9 of a rank: {what}")
@pytest.mark.quick(
    "sft-zero3-saving", "dpo-single-reference", "dpo-single-removing", "dpo-single-result", "ppo-zero3-sampling"
)
@faults(
    EVERYWHERE,
    [moment for moment in MOMENTS if moment not in (*EVERYWHERE, *SAMPLES)],
    {("dpo", "single"), ("dpo", "zero3")},
    further=["training", "saving"],
    of_online=SAMPLES,
)
def test_a_rank_that_is_killed_costs_an_attempt_and_nothing_else(
    kind: str, engine: str, what: str, make: Callable[..., Case]
) -> None:
    case = make(kind, engine, *(["checkpoint.asynchronous=false"] if what in LATE else []))
    rank = 0 if engine == "single" or what in ONLY_MAIN else 1
    options = {"moment": what, "nth": MOMENTS[what], "do": "signal_self", "number": signal.SIGKILL}
    case.run(code=0, faults=[Fault("at", options, rank)])
    assert case.outcomes() == ["lost", "done"]
    began, went_on = case.begun()
    assert (began, went_on) == (0, STEPS - 1) if what in LATE else went_on >= LEAST.get(what, 0)
    case.require_same()


@pytest.mark.fault("an error in one rank: {what}")
@faults(["training"], ["loading", "committing"], {("dpo", "ddp"), ("dpo", "zero3")})
def test_an_error_in_one_rank_ends_all_in_seconds_with_its_words(
    kind: str, engine: str, what: str, make: Callable[..., Case]
) -> None:
    case = make(kind, engine)
    rank = 0 if engine == "single" or what in ONLY_MAIN else 1
    began = time.monotonic()
    broken = Fault("at", {"moment": what, "nth": min(2, MOMENTS[what]), "do": "fail", "what": "it is broken"}, rank)
    driver = case.run("--debug", code=1, faults=[broken])
    assert time.monotonic() - began < 30, "of which most is its start"
    first, *trace = driver.told[driver.told.index("alignment: error: ") :].splitlines()
    assert "RuntimeError: it is broken" in first
    assert any("inside.py" in line for line in trace), "where it happened"
    case.run(code=0)
    assert case.outcomes() == ["failed", "done"]
    case.require_same()


@pytest.mark.fault("a rank is out of memory, engine.adapt=true")
@cells(kinds=("dpo",))
def test_a_rank_without_memory_has_all_of_them_go_on_with_less(
    kind: str, engine: str, make: Callable[..., Case]
) -> None:
    case = make(kind, engine, "checkpoint.asynchronous=false")
    empty = Fault("at", {"moment": "training", "nth": 4, "do": "exhaust"}, 0 if engine == "single" else 1)
    settings = ["engine.adapt=true", "engine.tokens_per_micro_batch=512"]
    driver = case.run(*settings, code=0, faults=[empty])
    assert "out of memory: 512 tokens a micro-batch" in driver.told
    assert case.outcomes() == ["lost", "done"]
    assert case.begun() == [0, 3]
    assert "256 tokens a micro-batch" in case.trained_log()
    for one, other in zip(case.ground.whole(kind, engine).rows, case.result().rows, strict=True):
        assert other["loss"] == pytest.approx(one["loss"], abs=1e-5)


def _kill(pid: int) -> bool:
    """Whether it lived; a rank may have been ended meanwhile, as another one was killed before."""
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return False
    return True


class Kills:
    """Kills in a row, at random moments, of a run that must not end meanwhile.

    A moment is a time since the attempt's birth, at every second kill since its first checkpoint. It comes sooner where
    training is ahead of its share of the steps, so that these last as long as the kills do.
    """

    def __init__(self, case: Case, who: str, wanted: int, steps: int):
        self._case, self._who, self._wanted, self._steps = case, who, wanted, steps
        self._chance = random.Random(wanted + len(who + case.kind + case.engine))
        self.hit = 0  # kills of who lived
        self.newest: dict[int, int] = {}  # attempt -> step of the newest checkpoint when it died
        self.trained: set[int] = set()  # attempts that were seen to train

    def run(self) -> None:
        """To the end; a driver that dies is started again."""
        driver = self._case.start("retries=1000000")
        while self.hit < self._wanted:
            targets = self._aim(driver)
            attempt = self._note(None)
            self.hit += sum(map(_kill, targets)) > 0
            if self._who == "driver":
                driver.wait()
            until(
                lambda driver=driver, targets=targets: (
                    not {driver.pid, *driver.ranks()} & {*targets} or not driver.alive
                )
            )
            self._note(attempt)
            if self._who == "driver":
                driver = self._case.start("retries=1000000")
        assert driver.wait() == 0, driver.told

    def _aim(self, driver: Driver) -> list[int]:
        """Wait for the moment. Returns whom it befalls, one at least."""
        until(driver.ranks)
        if self.hit % 2:
            before = self._case.reached()
            until(lambda: self._case.reached() > before, 120)
        self._case.pass_time(self._chance, 4.0, most=int(0.8 * self._steps * (self.hit + 1) / self._wanted))
        time.sleep(self._chance.uniform(0, 0.1))
        until(lambda: driver.ranks() or not driver.alive)
        assert driver.alive, f"it has ended after {self.hit} of {self._wanted} kills: {driver.told[-2000:]}"
        ranks = driver.ranks()
        return {"driver": [driver.pid], "all": ranks, "one rank": [self._chance.choice(ranks)]}[self._who]

    def _note(self, attempt: int | None) -> int:
        """What the attempt, by default the one at work, has come to. Returns its number."""
        attempt = attempt or int(re.findall(ATTEMPT, self._case.trained_log())[-1])
        self.newest[attempt] = max(self.newest.get(attempt, -1), self._case.reached())
        told = self._case.progress()
        if told.get("total") == self._steps and told.get("step", 0) > 0:
            self.trained.add(attempt)
        return attempt

    def require_nothing_lost(self) -> None:
        """Who trained went on from the newest checkpoint that those before had, or from a newer one."""
        assert self.hit == self._wanted
        _, *parts = re.split(ATTEMPT, self._case.trained_log())
        told, newest = dict(zip(map(int, parts[::2]), parts[1::2], strict=True)), 0
        for attempt in sorted(told):
            begun = re.search(r"going on from the checkpoint of step (\d+)", told[attempt])
            assert begun or newest <= 0 or attempt not in {*self.trained, max(told)}, f"attempt {attempt} began anew"
            if begun:
                assert int(begun[1]) >= newest, f"attempt {attempt} went back to {begun[1]} from {newest}"
                newest = int(begun[1])
            newest = max(newest, self.newest.get(attempt, 0))
        assert newest >= self._wanted // 2, "half of the kills come while it trains"


@pytest.mark.fault("kill -9 of {who}, at 20 random moments")
@pytest.mark.parametrize("who", ["one rank", "all", "driver"])
@cells(engines=("ddp", "zero3"))
def test_twenty_kills_of_two_ranks(kind: str, engine: str, who: str, make: Callable[..., Case]) -> None:
    steps = 60
    long = f"stage.{kind}.max_steps={steps}"
    case = make(kind, engine, long)
    kills = Kills(case, who, 20, steps)
    kills.run()
    kills.require_nothing_lost()
    case.require_same(long)


@pytest.mark.fault("kill -9 of {who}, at {kills} random moments, saving {how}")
@pytest.mark.parametrize(
    ("kind", "engine", "who", "how", "kills", "steps"),
    [
        ("dpo", "single", "one rank", "asynchronously", 200, 400),
        ("dpo", "single", "one rank", "at once", 40, 100),
        ("sft", "single", "driver", "asynchronously", 20, 60),
        ("dpo", "single", "driver", "at once", 20, 60),
    ],
)
def test_kills_in_a_row(
    kind: str, engine: str, who: str, how: str, kills: int, steps: int, make: Callable[..., Case]
) -> None:
    long = [f"stage.{kind}.max_steps={steps}", f"checkpoint.asynchronous={how == 'asynchronously'}".lower()]
    case = make(kind, engine, *long)
    killing = Kills(case, who, kills, steps)
    killing.run()
    killing.require_nothing_lost()
    case.require_same(*long)
