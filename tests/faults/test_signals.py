"""Signals to a rank, to all ranks and to the driver, and processes that are stopped: what is at work saves and ends,
the same command goes on, and what hangs is ended and tried again."""

from __future__ import annotations

import os
import random
import re
import signal
import time
from collections.abc import Callable
from typing import Any

import pytest

from tests.faults.driver import Fault
from tests.faults.runs import Case, Driver, cells, faults, state, until

MOMENTS = {"import": 1, "loading": 1, "reference": 1, "training": 3, "saving": 2}
EARLY = ("import", "loading", "reference")
LATE = ("finishing", "model", "summary", "tracker", "result")  # training is over
NUMBERS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
EVERYWHERE = [f"{NUMBERS[i % 3].name} {moment}" for i, moment in enumerate(("training", "saving"))]
FEW = [f"{number.name} {moment}" for number in NUMBERS for moment in (*MOMENTS, *LATE)]


@pytest.mark.fault("a rank gets {what}")
@pytest.mark.quick("sft-zero3-SIGTERM training", "dpo-single-SIGINT reference")
@faults(
    EVERYWHERE,
    [what for what in FEW if what not in EVERYWHERE],
    {("dpo", "single"), ("dpo", "ddp")},
    further=EVERYWHERE[:1],
)
def test_a_rank_that_is_asked_to_stop_has_all_of_them_save(
    kind: str, engine: str, what: str, make: Callable[..., Case]
) -> None:
    """Once training is over there is nothing to stop for: the stage ends well."""
    number, moment = what.split()
    case = make(kind, engine)
    rank = 0 if engine == "single" or moment in ("tracker", "result") else 1
    options = {"moment": moment, "nth": MOMENTS.get(moment, 1), "do": "signal_self", "number": signal.Signals[number]}
    case.run(code=0 if moment in LATE else 75, faults=[Fault("at", options, rank)])
    if moment not in LATE:
        saved = max(0, case.reached())
        assert saved == 0 if moment in EARLY else saved >= MOMENTS[moment]
        case.run(code=0)
        assert case.outcomes() == ["preempted", "done"]
        assert case.begun() == [0, saved]
    case.require_same()


@pytest.mark.fault("all ranks get SIGTERM")
@cells(engines=("ddp", "zero3"))
def test_all_ranks_asked_at_once_are_one_request(kind: str, engine: str, make: Callable[..., Case]) -> None:
    case = make(kind, engine)
    options = {"moment": "training", "nth": 3, "do": "signal_self", "number": signal.SIGTERM}
    case.run(code=75, faults=[Fault("at", options)])
    assert case.reached() == 3
    case.run(code=0)
    assert case.outcomes() == ["preempted", "done"]
    assert case.begun() == [0, 3]
    case.require_same()


@pytest.mark.fault("a rank gets SIGTERM before it listens")
@cells(kinds=("sft",), engines=("single", "zero3"))
def test_a_request_to_a_rank_that_still_starts_waits_for_it(kind: str, engine: str, make: Callable[..., Case]) -> None:
    case = make(kind, engine)
    options = {"moment": "start", "do": "signal_self", "number": signal.SIGTERM}
    case.run(code=75, faults=[Fault("at", options, 0 if engine == "single" else 1)])
    case.run(code=0)
    assert case.outcomes() == ["preempted", "done"]
    case.require_same()


@pytest.mark.fault("a rank gets two signals")
@cells(kinds=("dpo",), engines=("single", "zero1"))
def test_a_rank_that_is_asked_twice_ends_at_once_and_nothing_whole_is_lost(
    kind: str, engine: str, make: Callable[..., Case]
) -> None:
    case = make(kind, engine, "checkpoint.asynchronous=false")
    options = {"moment": "training", "nth": 4, "do": "insist", "number": signal.SIGTERM}
    rank = 0 if engine == "single" else 1
    driver = case.run(code=0, faults=[Fault("at", options, rank)])
    assert f"rank {rank} was asked to stop a second time, and ended at once; attempt 2" in driver.told
    assert case.outcomes() == ["lost", "done"]
    assert case.begun() == [0, 3]
    case.require_same()


# When it comes: in which step the attempt before was killed, the exit code and what is said.
TIME_LIMITS = {
    "while it trains": (None, 75, r"launcher.time_limit.*saved at"),
    "between two attempts": (4, 75, r"stopped \(launcher.time_limit\) between two"),
    "before another attempt, with nothing saved": (1, 6, r"error: (dpo|rank 0) (was killed|ended without)"),
}


@pytest.mark.fault("the time limit comes {when}")
@pytest.mark.parametrize("when", TIME_LIMITS)
@cells(kinds=("dpo",), engines=("single", "zero2"))
def test_a_time_limit_is_of_all_attempts_and_is_no_loss(
    kind: str, engine: str, when: str, make: Callable[..., Case]
) -> None:
    long = f"stage.{kind}.max_steps=400"
    case = make(kind, engine, long, "checkpoint.asynchronous=false")
    killed_at, code, why = TIME_LIMITS[when]
    options = {"moment": "training", "nth": killed_at, "do": "signal_self", "number": signal.SIGKILL}
    faults = [Fault("at", options, 0)] if killed_at else []
    driver = case.run(f"launcher.time_limit={30 if faults else 15}", "retry_wait_s=60", code=code, faults=faults)
    assert re.search(why, driver.told), driver.told
    saved = max(0, case.reached())
    assert (saved > 0) is (killed_at != 1)
    case.run(code=0)
    assert case.outcomes() == ["lost" if faults else "preempted", "done"]
    assert case.begun() == [0, saved]
    case.require_same(long)


@pytest.mark.fault("the driver gets a signal, at {times} random moments")
@pytest.mark.parametrize(("kind", "engine", "times"), [("dpo", "single", 12), ("sft", "ddp", 6), ("dpo", "zero3", 6)])
def test_a_driver_that_is_asked_at_any_moment_ends_in_order(
    kind: str, engine: str, times: int, make: Callable[..., Case]
) -> None:
    long, steps = f"stage.{kind}.max_steps=80", 80
    case, chance = make(kind, engine, long), random.Random(times)
    for number in range(times):
        driver = case.start()
        until(lambda driver=driver: "to run" in driver.told)  # before, it is an interpreter that starts
        if number % 2:  # else any moment, which may be while it loads
            before = case.reached()
            until(lambda before=before: case.reached() > before)
        case.pass_time(chance, 4.0, most=int(0.8 * steps * (number + 1) / times))
        driver.kill(NUMBERS[number % 3])
        assert driver.wait() == 75, driver.told
        assert driver.told.rstrip().splitlines()[-1].startswith("alignment: ")
    assert case.reached() > 0
    case.run(code=0)
    assert set(case.outcomes()[:-1]) == {"preempted"}
    case.require_same(long)


@pytest.mark.fault("the driver gets two signals")
@cells(kinds=("sft",), engines=("single", "zero3"))
def test_a_second_signal_ends_it_at_once(kind: str, engine: str, make: Callable[..., Case]) -> None:
    """The ranks do not get to save: they are stopped meanwhile."""
    case = make(kind, engine, "checkpoint.asynchronous=false")
    driver = case.start(faults=[Fault("at", {"moment": "training", "nth": 3, "do": "signal_self", "number": 19})])
    until(lambda: [state(rank) for rank in driver.ranks()] == ["T"] * (1 if engine == "single" else 2))
    _ask_twice(driver)
    case.run(code=0)
    case.require_same()


@pytest.mark.fault("the driver gets two signals, the second while all save")
@cells(kinds=("dpo",), engines=("single", "zero3"))
def test_a_second_signal_does_not_wait_for_a_save(kind: str, engine: str, make: Callable[..., Case]) -> None:
    case = make(kind, engine, f"stage.{kind}.max_steps=100")
    driver = case.start(faults=[Fault("at", {"moment": "saving", "nth": 4, "do": "rest", "seconds": 1000})])
    until(lambda: case.reached() >= 3)
    _ask_twice(driver)
    reached = case.reached()  # by three saves; at some steps one was still under way
    assert reached >= 3
    case.run(code=0)
    assert case.outcomes() == ["interrupted", "done"]
    assert case.begun() == [0, reached]
    case.require_same(f"stage.{kind}.max_steps=100")


def _ask_twice(driver: Driver) -> None:
    """It and its ranks are gone soon."""
    ranks = driver.ranks()
    driver.kill(signal.SIGTERM)
    time.sleep(2.5)
    driver.kill(signal.SIGTERM)
    assert driver.wait(20) == 130
    assert not [rank for rank in ranks if os.path.exists(f"/proc/{rank}")]


@pytest.mark.fault("SIGSTOP of a rank: {what}")
@pytest.mark.quick("sft-single-training")
@faults(["training"], ["loading", "saving", "model"], {("dpo", "single"), ("dpo", "zero3")})
def test_a_rank_that_stands_still_is_ended_and_tried_again(
    kind: str, engine: str, what: str, make: Callable[..., Case]
) -> None:
    long = f"stage.{kind}.max_steps=100"  # or it would end in the moment between its awakening and its end
    case = make(kind, engine, long)
    options = {"moment": what, "nth": MOMENTS.get(what, 1), "do": "signal_self", "number": signal.SIGSTOP}
    rank = 0 if engine == "single" else 1
    driver = case.run("engine.watchdog_s=8", code=0, faults=[Fault("at", options, rank)])
    # One that has but to end may do so when it is woken to say where it stands.
    assert case.outcomes() in (["lost", "done"], *([["done"]] if what == "model" else []))
    if len(case.outcomes()) == 2:
        assert re.search(rf"hung: rank {rank} has shown no life for \d s", driver.told)
    assert (case.place / "stacks" / f"rank-{rank:05d}.txt").read_text().count("most recent call first")
    case.require_same(long)


@pytest.mark.fault("a collective that never comes")
@cells(kinds=("sft",), engines=("ddp", "zero2"))
def test_a_rank_that_lives_and_does_not_come_is_ended_with_all_and_tried_again(
    kind: str, engine: str, make: Callable[..., Case]
) -> None:
    case = make(kind, engine)
    driver = case.run(
        "engine.watchdog_s=5",
        code=0,
        faults=[Fault("at", {"moment": "training", "nth": 4, "do": "rest", "seconds": 1000}, 1)],
    )
    assert re.search(r"hung: no process has got on \(behind: rank 1\) for \d+ s; attempt 2", driver.told), driver.told
    stacks = [(case.place / "stacks" / f"rank-{rank:05d}.txt").read_text() for rank in (0, 1)]
    assert "torch/nn/parallel" in stacks[0] or "torch/distributed" in stacks[0], "it waits for the other one"
    assert "in rest" in stacks[1]
    assert case.outcomes() == ["lost", "done"]
    case.require_same()


@pytest.mark.fault("a disk that does not answer: {what}")
@pytest.mark.parametrize("what", ["saving", "committing"])
@cells(kinds=("sft",), engines=("single", "zero3"))
def test_a_save_that_never_ends_is_a_hang(kind: str, engine: str, what: str, make: Callable[..., Case]) -> None:
    case = make(kind, engine)
    rest = {"moment": what, "nth": 2, "do": "rest", "seconds": 1000}
    driver = case.run("engine.watchdog_s=5", code=0, faults=[Fault("at", rest, 0)])
    note = r", in: saving step \d+" + ("" if what == "saving" else "|")  # a slow disk may be at the one before still
    assert re.search(rf"hung: no process has got on .*for \d+ s({note}); attempt 2", driver.told), driver.told
    assert case.outcomes() == ["lost", "done"]
    assert case.begun()[1] >= 1
    case.require_same()


@pytest.mark.fault("{what} takes longer than the watchdog's patience")
@pytest.mark.parametrize(("kind", "engine"), [("sft", "single"), ("dpo", "zero3")])
@pytest.mark.parametrize("what", ["saving", "writing", "result"])
def test_one_long_operation_is_no_hang(kind: str, engine: str, what: str, make: Callable[..., Case]) -> None:
    case = make(kind, engine, "checkpoint.asynchronous=false")
    slow: dict[str, Any] = {"do": "rest", "seconds": 12}
    if what == "saving":  # piece by piece
        slow = {"do": "slow_disk", "seconds": 0.2}
    driver = case.run("engine.watchdog_s=5", code=0, faults=[Fault("at", {"moment": what, **slow}, 0)])
    assert case.outcomes() == ["done"], driver.told
    case.require_same()


@pytest.mark.fault("SIGSTOP of the driver, then SIGCONT")
@cells(kinds=("dpo",), engines=("single", "ddp"))
def test_a_driver_that_slept_does_not_take_its_ranks_for_dead(
    kind: str, engine: str, make: Callable[..., Case]
) -> None:
    case = make(kind, engine)
    driver = case.start("engine.watchdog_s=3")
    until(driver.ranks)
    driver.kill(signal.SIGSTOP)
    time.sleep(8)
    driver.kill(signal.SIGCONT)
    assert driver.wait() == 0
    assert case.outcomes() == ["done"]
    case.require_same()
