"""Numbers that are none, clocks that jump, two drivers, a W&B server that goes: and the command line under torchrun."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.faults.driver import Fault
from tests.faults.runs import ENGINES, Case, cells, children, faults, until
from tests.tracking.conftest import WandbServer


@pytest.mark.fault("NaN in the {what}, nonfinite=halt")
@pytest.mark.quick("sft-single-loss")
@faults(["loss"], ["gradient"], {("dpo", engine) for engine in ENGINES}, further=["loss"])
def test_a_nan_halts_before_it_does_harm(kind: str, engine: str, what: str, make: Callable[..., Case]) -> None:
    """It was a fault of the machine: the same command goes on, and ends as if it had not been."""
    case = make(kind, engine, "checkpoint.asynchronous=false")
    driver = case.run(code=5, faults=[Fault("poisoned", {"where": what, "steps": [3]})])
    assert "step 3, " in driver.told.splitlines()[-1]
    assert [path.name for path in case.checkpoints()] == ["step-00000001", "step-00000002"]
    case.run(code=0)
    assert case.outcomes() == ["failed", "done"]
    case.require_same()


@pytest.mark.fault("NaN in the {what}, nonfinite=rollback")
@faults([], ["loss", "gradient"], {("dpo", engine) for engine in ENGINES}, further=["gradient"])
def test_a_nan_that_does_not_come_again_leaves_no_trace(
    kind: str, engine: str, what: str, make: Callable[..., Case]
) -> None:
    back = f"stage.{kind}.nonfinite=rollback"
    case = make(kind, engine, back)
    case.run(code=0, faults=[Fault("poisoned", {"where": what, "steps": [4]})])
    assert len(case.outcomes()) == 2
    case.require_same(back)


@pytest.mark.fault("the clock jumps by {hours} hours")
@pytest.mark.parametrize("hours", [-24, 24])
@pytest.mark.parametrize("moment", ["start", "training"])
@cells(kinds=("sft",), engines=("single", "zero3"))
def test_a_clock_that_is_set_decides_nothing(
    kind: str, engine: str, moment: str, hours: int, make: Callable[..., Case]
) -> None:
    case = make(kind, engine, "launcher.time_limit=300")
    options = {"moment": moment, "nth": 3, "do": "set_clock", "seconds": 3600.0 * hours}
    case.run(code=0, faults=[Fault("at", options)])
    assert case.outcomes() == ["done"]
    case.require_same()


@pytest.mark.fault("two drivers on one store")
@cells(engines=("single", "ddp"))
def test_two_drivers_make_it_once(kind: str, engine: str, make: Callable[..., Case]) -> None:
    case = make(kind, engine)
    both = [case.start(f"name={name}") for name in ("one", "two")]
    assert [driver.wait() for driver in both] == [0, 0]
    assert sorted(bool(re.search(rf"{kind} +reused", driver.told, re.I)) for driver in both) == [False, True]
    assert case.outcomes() == ["done"]
    case.require_same()


@pytest.mark.fault("two drivers, and the one at work is killed")
@cells(kinds=("dpo",), engines=("single", "zero3"))
def test_a_driver_that_waits_takes_over(kind: str, engine: str, make: Callable[..., Case]) -> None:
    case = make(kind, engine, "checkpoint.asynchronous=false")
    stops = [Fault("at", {"moment": "training", "nth": 4, "do": "signal_self", "number": signal.SIGSTOP})]
    first = case.start("name=one", faults=stops)
    until(case.checkpoints)
    second = case.start("name=two")
    time.sleep(3)
    assert second.alive
    first.kill()
    assert second.wait() == 0, second.told
    assert case.outcomes() == ["interrupted", "done"]
    case.require_same()


# --- another machine --------------------------------------------------------------------------------------------------


@pytest.mark.fault("killed, and adapters gone on with on another engine")
@pytest.mark.quick("dpo-single-zero2")
@pytest.mark.parametrize(
    ("kind", "engine", "other"),
    [("dpo", "single", "zero2"), ("sft", "ddp", "zero3"), ("dpo", "zero3", "ddp"), ("sft", "zero1", "single")],
)
def test_adapters_go_on_on_another_engine(kind: str, engine: str, other: str, make: Callable[..., Case]) -> None:
    """Engines differ in what they make of a group of parameters that is empty, as that without decay is here."""
    adapters = f"stage.{kind}.lora.rank=2"
    case = make(kind, engine, adapters, "checkpoint.asynchronous=false")
    options = {"moment": "training", "nth": 4, "do": "signal_self", "number": signal.SIGKILL}
    case.run("retries=0", code=6, faults=[Fault("at", options, 0)])
    assert (saved := case.reached()) > 0
    case.engine = other
    case.run(code=0)
    assert case.begun() == [0, saved]
    whole, mine = case.ground.whole(kind, engine, adapters).rows, case.result().rows
    assert [row["step"] for row in mine] == [row["step"] for row in whole]
    for one, row in zip(whole, mine, strict=True):
        assert {name: row[name] for name in one} == pytest.approx(one, rel=1e-5, abs=1e-5)


# --- W&B --------------------------------------------------------------------------------------------------------------


@pytest.mark.fault("the W&B server is {how}")
@pytest.mark.parametrize(
    ("kind", "engine", "how"),
    [
        ("sft", "single", "down at the start"),
        ("sft", "single", "silent"),
        ("sft", "single", "gone in the middle"),
        ("sft", "zero3", "gone in the middle"),
        ("sft", "single", "gone at the end"),
    ],
)
def test_a_server_that_fails_costs_nothing_of_the_result(
    kind: str, engine: str, how: str, make: Callable[..., Case], server: WandbServer, silent_url: str, closed_url: str
) -> None:
    case = make(kind, engine)
    url = {"down at the start": closed_url, "silent": silent_url}.get(how, server.url)
    online = ["tracking=wandb", "tracking.mode=online"]
    home = {"HOME": str(case.folder), "WANDB_API_KEY": "0f" * 20, "WANDB_BASE_URL": url}
    when = {"moment": "model", "nth": 1} if how == "gone at the end" else {"moment": "training", "nth": 3}
    waits = Fault("at", {**when, "do": "wait_for", "path": str(case.folder / "go")}, 0)
    driver = case.start(*online, faults=[waits], **home)
    if how.startswith("gone"):
        until(lambda: (case.folder / "go-waits").exists(), 120)
        server.die()
    (case.folder / "go").touch()
    assert driver.wait() == 0, driver.told
    assert case.outcomes() == ["done"]
    case.require_same()


# --- the command line, under torchrun ---------------------------------------------------------------------------------


def command(case: Case, *settings: str) -> subprocess.Popen[str]:
    environment = {"ALIGNMENT_STORE": str(case.store), "ALIGNMENT_CACHE": str(case.folder / "cache")}
    return subprocess.Popen(
        [sys.executable, "-m", "alignment.cli", "run", *case.arguments(*settings)],
        env={**os.environ, **environment}, cwd=case.folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def rows(case: Case) -> int:
    return sum(len(path.read_text().splitlines()) for path in case.store.glob("work/*/metrics.jsonl"))


@pytest.mark.fault("under torchrun: torchrun is killed, then the driver asked to stop")
@cells(kinds=("dpo",), engines=("zero3",))
def test_the_real_command_line_comes_to_the_same_bits(kind: str, engine: str, make: Callable[..., Case]) -> None:
    """Which also shows that forks, as all others here are, compute what a job of torchrun does."""
    long = f"stage.{kind}.max_steps=40"
    case = make(kind, engine, long)
    first = command(case)
    until(lambda: rows(case) > 2, 120)
    (agent,) = children(first.pid)
    ranks = children(agent)
    assert len(ranks) == 2
    os.kill(agent, signal.SIGKILL)
    until(lambda: not any(Path(f"/proc/{rank}").exists() for rank in ranks), 15)
    before = rows(case)
    until(lambda: rows(case) > before + 2, 120)
    first.send_signal(signal.SIGTERM)
    told, _ = first.communicate(timeout=120)
    assert first.returncode == 75, told
    second = command(case)
    told, _ = second.communicate(timeout=240)
    assert second.returncode == 0, told
    assert case.outcomes() == ["lost", "preempted", "done"]
    case.require_same(long)


@pytest.mark.fault("under torchrun: nothing")
@cells(kinds=("sft",), engines=("single", "ddp"))
def test_an_undisturbed_command_comes_to_the_same_bits(kind: str, engine: str, make: Callable[..., Case]) -> None:
    case = make(kind, engine)
    done = command(case)
    told, _ = done.communicate(timeout=240)
    assert done.returncode == 0, told
    case.require_same()
    assert json.loads((case.place / "record.json").read_text())["world_size"] == (1 if engine == "single" else 2)
