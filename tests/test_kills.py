"""Whole runs that are killed, and two at once: nothing half-done counts, nobody works on, the next run goes on."""

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
from typing import Any

import pytest

from alignment.pipeline.attempts import checkpoint
from tests.conftest import Command, environment, runs, states
from tests.faults import runs as faults

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


TWO_RANKS = ["launcher=torchrun", "launcher.processes=2", "engine=ddp", "retry_wait_s=0"]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shared: the stages before the one that is killed are made once."""
    return tmp_path_factory.mktemp("kills") / "store"


def keys(command: Command, store: Path, settings: list[str]) -> dict[str, str]:
    plan = json.loads(command(store, "plan", "--json", *settings).stdout)
    return {row["name"]: row["key"][:16] for row in plan["nodes"]}


def run_of(command: Command, store: Path, key: str) -> dict[str, Any]:
    """The run whose last stage has this key."""
    (run,) = (run for run in runs(command, store) if run["nodes"][-1]["key"].startswith(key))
    return run


@pytest.mark.parametrize("victim", ["driver", "rank"])
def test_after_kill_9_in_training_on_two_ranks_nobody_works_on_and_the_run_goes_on(
    victim: str, store: Path, command: Command, forked: Command, short_settings: list[str]
) -> None:
    """A killed rank takes its job down in seconds, and the driver tries again; a killed driver needs to be started."""
    settings = [setting for setting in short_settings if setting != "tracking=none"]  # W&B's helper must die as well
    settings += [*TWO_RANKS, "stage.sft.max_steps=100", "checkpoint.every_steps=10", f"stage.sft.seed={len(victim)}"]
    sft = keys(command, store, settings)["sft"]
    work = store / "work" / sft
    driver = start(store, *settings)
    until(lambda: checkpoint(work) > 0, 120)
    ranks = sorted(processes_of(work))[1:]  # torchrun came first
    assert len(ranks) == 2
    os.kill(driver.pid if victim == "driver" else ranks[-1], signal.SIGKILL)
    until(lambda: not set(ranks) & set(processes_of(work)), 15)
    if victim == "driver":
        assert driver.wait(10) == -9
        assert states(run_of(command, store, sft))["sft"] == "interrupted"
        assert not (store / "store" / sft).exists()
        told = f"goes on from step {checkpoint(work)}, which an earlier attempt has left"
        assert told in forked(store, "run", *settings).stdout
        assert states(run_of(command, store, sft))["rows"] == "reused"
    else:
        output, _ = driver.communicate(timeout=300)
        assert driver.returncode == 0, output
        assert "rank 1 was killed by signal 9; attempt 2 of up to 4 in 0 s" in output
    run = run_of(command, store, sft)
    assert states(run)["sft"] == "done"
    rows = (store / "store" / sft / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(row)["step"] for row in rows] == list(range(1, 101))
    tried = json.loads((store / "store" / sft / "record.json").read_text())["attempts"]
    assert [row["outcome"] for row in tried] == ["interrupted" if victim == "driver" else "lost", "done"]
    assert [(row["attempt"], row["processes"], row["strategy"]) for row in tried] == [(1, 2, "ddp"), (2, 2, "ddp")]
    node = next(node for node in run["nodes"] if node["name"] == "sft")
    assert (node["attempts"], len(node["causes"])) == (2, 1)


def test_two_runs_at_once_make_each_stage_once(tmp_path: Path, forked: Command, short_settings: list[str]) -> None:
    store = tmp_path / "store"
    both = [
        faults.start(tmp_path, ["run", *short_settings, f"name={name}"], environment(store)) for name in ("one", "two")
    ]
    assert [driver.wait() for driver in both] == [0, 0], [driver.told for driver in both]
    outputs = [driver.told for driver in both]
    first, second = (states(run) for run in runs(forked, store))
    for name in first:
        assert sorted((first[name], second[name])) == ["done", "reused"], (name, outputs)


def test_a_rank_that_dies_before_it_shows_life_takes_the_others_down_in_seconds(
    store: Path, command: Command, short_settings: list[str]
) -> None:
    settings = [*short_settings, *TWO_RANKS, "retries=0", "stage.sft.seed=7"]
    work = store / "work" / keys(command, store, settings)["sft"]
    driver = start(store, *settings)
    until(lambda: len(starting(work)) == 2, 120)
    victim = max(starting(work))
    os.kill(victim, signal.SIGSTOP)  # before it gets to its first beat
    time.sleep(1)
    assert len(list(work.glob("beats/rank-*"))) < 2
    os.kill(victim, signal.SIGKILL)
    until(lambda: (work / "attempts.jsonl").exists(), 15)  # torchrun itself would give the others 30 s
    output = driver.communicate(timeout=240)[0]
    assert driver.returncode == 6, output
    assert re.search(r"rank [01] (was killed by signal 9|ended without a word)", " ".join(output.split())), output


def starting(work: Path) -> list[int]:
    """Interpreters that are just starting, for the ranks of a stage."""
    return [
        pid for pid in processes_of(work) if b"torch.distributed.run" not in Path(f"/proc/{pid}/cmdline").read_bytes()
    ]
