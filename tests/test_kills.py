"""Whole runs that are killed, and two at once: nothing half-done counts, nobody works on, the next run goes on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Command, environment, runs, states, tiny_stages

pytestmark = pytest.mark.slow


def start(store: Path, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "alignment.cli", "run", *arguments],
        env=environment(store), cwd=store.parent, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def processes_of(folder: Path) -> list[int]:
    """Ids of all processes that were given this work folder on their command line."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if str(folder).encode() in (process / "cmdline").read_bytes().split(b"\0"):
                found.append(int(process.name))
        except OSError:
            continue
    return found


def until(condition: Callable[[], Any], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize("victim", ["driver", "rank"])
def test_after_kill_9_in_training_on_two_ranks_nobody_works_on_and_the_next_run_goes_on(
    victim: str, tmp_path: Path, command: Command, tiny_settings: list[str]
) -> None:
    store = tmp_path / "store"
    settings = [setting for setting in tiny_settings if setting != "tracking=none"]  # W&B's helper must die as well
    settings += ["pipeline=sft", *tiny_stages("prepare_sft", "sft", "evaluate", "compare")]
    settings += ["launcher=torchrun", "launcher.processes=2", "engine=ddp", "stage.sft.max_steps=200"]
    plan = {row["name"]: row["key"] for row in json.loads(command(store, "plan", "--json", *settings).stdout)["nodes"]}
    work = store / "work" / plan["sft"][:16]
    driver = start(store, *settings)
    until(lambda: (work / "metrics.jsonl").exists(), 120)
    ranks = sorted(processes_of(work))[1:]  # torchrun came first
    assert len(ranks) == 2
    os.kill(driver.pid if victim == "driver" else ranks[-1], signal.SIGKILL)
    assert driver.wait(60) == (-9 if victim == "driver" else 1)
    until(lambda: not processes_of(work), 10)
    (run,) = runs(command, store)
    assert states(run)["sft"] == ("interrupted" if victim == "driver" else "failed")
    assert not (store / "store" / plan["sft"][:16]).exists()
    command(store, "run", *settings)
    (run,) = runs(command, store)
    assert [states(run)[name] for name in ("start", "rows", "sft")] == ["reused", "reused", "done"]
    rows = (store / "store" / plan["sft"][:16] / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(row)["step"] for row in rows] == list(range(1, 201))


def test_two_runs_at_once_make_each_stage_once(tmp_path: Path, command: Command, tiny_settings: list[str]) -> None:
    store = tmp_path / "store"
    settings = ["pipeline=sft", *tiny_settings, *tiny_stages("prepare_sft", "sft", "evaluate", "compare")]
    both = [start(store, *settings, f"name={name}") for name in ("one", "two")]
    outputs = [driver.communicate(timeout=300)[0] for driver in both]
    assert [driver.returncode for driver in both] == [0, 0], outputs
    first, second = (states(run) for run in runs(command, store))
    for name in first:
        assert sorted((first[name], second[name])) == ["done", "reused"], (name, outputs)
