"""kill -9, of one rank, of all, of the driver, at named moments and at random ones: the same command goes on, and ends
in the bits of the run that nobody disturbed."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable
from contextlib import suppress

import pytest

from alignment.pipeline.attempts import checkpoint
from tests.faults.driver import Fault
from tests.faults.runs import Case, Driver, cells, faults

# moment -> which time it comes
MOMENTS = {
    "start": 1, "loading": 1, "trial": 1, "reference": 1, "training": 4, "saving": 3, "committing": 3, "removing": 4,
    "model": 1, "result": 1, "fsync": 7, "rename": 3, "replace": 9,
}  # fmt: skip
ONLY_MAIN = {"committing", "removing", "result", "rename", "replace"}
EVERYWHERE = ["training", "saving", "model"]


@pytest.mark.fault("kill -9 of a rank: {what}")
@pytest.mark.quick("sft-zero3-saving", "dpo-single-reference", "dpo-single-removing", "dpo-single-result")
@faults(EVERYWHERE, [moment for moment in MOMENTS if moment not in EVERYWHERE], {("dpo", "single"), ("dpo", "zero3")})
def test_a_rank_that_is_killed_costs_an_attempt_and_nothing_else(
    kind: str, engine: str, what: str, make: Callable[..., Case]
) -> None:
    case = make(kind, engine)
    rank = 0 if engine == "single" or what in ONLY_MAIN else 1
    options = {"moment": what, "nth": MOMENTS[what], "do": "signal_self", "number": signal.SIGKILL}
    case.run(code=0, faults=[Fault("at", options, rank)])
    assert case.outcomes() == ["lost", "done"]
    case.require_same()


def victims(driver: Driver, who: str) -> list[int]:
    ranks = driver.ranks()
    if who == "driver":
        return [driver.pid] if ranks else []
    return ranks if who == "all" else random.sample(ranks, min(1, len(ranks)))


def killed(case: Case, who: str, kills: int, steps: int, seed: int) -> int:
    """Run to the end, `kills` times disturbed; a driver that dies is started again. Returns the number of attempts.

    Moments are random from an attempt's birth on. How late they may come is turned until the steps last as long as the
    kills do.
    """
    chance, done, life = random.Random(seed), 0, 3.0
    driver = case.start("retries=1000000")
    while done < kills:
        seen = driver.ranks()
        while driver.alive and not driver.ranks():
            time.sleep(0.005)
        time.sleep(chance.uniform(0, life))
        assert driver.alive, f"it has ended after {done} of {kills} kills: {driver.told[-2000:]}"
        for pid in (targets := victims(driver, who)):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        done += bool(targets)
        seen = targets
        if who == "driver":
            driver.wait()
            driver = case.start("retries=1000000")
        else:
            while driver.alive and set(seen) & set(driver.ranks()):
                time.sleep(0.005)
        ahead = checkpoint(case.work) / steps > done / kills if case.work else False
        life = max(0.2, min(10.0, life * (0.8 if ahead else 1.15)))
    assert driver.wait() == 0, driver.told
    return done


@pytest.mark.fault("kill -9 of {who}, at 20 random moments")
@pytest.mark.parametrize("who", ["one rank", "all", "driver"])
@cells(engines=("ddp", "zero3"))
def test_twenty_kills_of_two_ranks(kind: str, engine: str, who: str, make: Callable[..., Case]) -> None:
    steps = 60
    long = f"stage.{kind}.max_steps={steps}"
    case = make(kind, engine, long)
    killed(case, who, 20, steps, seed=len(kind + engine + who))
    assert len(case.outcomes()) >= 21
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
    killed(case, who, kills, steps, seed=kills)
    assert len(case.outcomes()) >= kills + 1
    case.require_same(*long)
