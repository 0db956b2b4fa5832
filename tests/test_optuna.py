"""A search by Optuna whose stages run here, as forks: what fails and what is pruned does not stop the others."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Command, runs, states

pytestmark = pytest.mark.slow
OPTUNA = ["hydra/sweeper=optuna", "hydra.sweeper.n_jobs=1", "hydra.sweeper.max_failure_rate=1.0"]


def sweep_of(store: Path) -> dict[str, Any]:
    (file,) = store.glob("sweeps/*/sweep.json")
    return dict(json.loads(file.read_text()))


def test_a_failed_trial_is_one_line_and_the_others_go_on(
    tmp_path: Path, command: Command, forked: Command, small_settings: list[str]
) -> None:
    store = tmp_path / "store"
    grid = ["hydra/sweeper/sampler=grid", "stage.prepare_sft.splits.train=choice(24,5000)", "stage.sft.epochs=1.0"]
    grid += ["stage.prepare_sft.max_prompt_length=choice(96,100000)", "hydra.sweeper.n_jobs=4"]  # longer than a row
    both = ["objective=[heldout_nll,kl]", "hydra.sweeper.direction=[minimize,minimize]"]
    done = forked(store, "run", "-m", *small_settings, *OPTUNA, *grid, *both, code=2)
    assert "4 trials: 1 done, 3 failed" in done.stdout and "best: held-out loss" in done.stdout
    lines = [line for line in done.stdout.splitlines() if line.startswith("✗")]
    assert len([line for line in lines if " ask for 6 held-out" in line]) == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("alignment: error: ") and "3 of 4 points failed; the first: " in line
    long = [line for line in lines if "  command line: `stage.prepare_sft.max_prompt_length` is 100000, more" in line]
    points = [f"✗ train={train}, max_prompt_length=100000" for train in (24, 5000)]
    assert sorted(line.partition("  ")[0] for line in long) == points, "each says which it is"
    assert done.stdout.count("  train=24, max_prompt_length=96  ") == 1
    assert sorted(run["state"] for run in runs(command, store)) == ["done", "failed"]
    assert sweep_of(store)["objective"] == [
        {"metric": "heldout_nll", "direction": "minimize"},
        {"metric": "kl", "direction": "minimize"},
    ]
    again = forked(store, "run", "-m", *small_settings, *OPTUNA, *grid, *both, code=2).stdout
    assert "1 done, 3 failed" in again and "running" not in again


def test_a_hopeless_trial_stops_and_goes_on_without_pruning(
    tmp_path: Path, command: Command, forked: Command, small_settings: list[str]
) -> None:
    store = tmp_path / "store"
    search = [
        *("hydra/sweeper/sampler=random", "hydra.sweeper.sampler.seed=6", "hydra.sweeper.n_trials=2"),
        *("hydra.sweeper.direction=minimize", "objective=[heldout_nll]"),
        "stage.sft.learning_rate=tag(log, interval(1e-9, 0.02))",  # by this seed first one that trains, then another
    ]
    pruning = ["pruning=median", "pruning.min_trials=1", "pruning.warmup_steps=5"]
    given = ["run", "-m", *small_settings, *OPTUNA, *search, *pruning]
    out = forked(store, *given).stdout
    assert "2 trials: 1 done, 1 pruned" in out
    good, bad = sweep_of(store)["points"]
    assert ("pruned" in good, bad["pruned"]) == (False, True)
    assert good["settings"]["stage.sft.learning_rate"] > 100 * bad["settings"]["stage.sft.learning_rate"]
    found = {run["run"]: run for run in runs(command, store)}
    assert (found[good["run"]]["state"], found[bad["run"]]["state"]) == ("done", "pruned")
    assert states(found[bad["run"]])["measured"] == "waiting"
    assert "loss " in found[bad["run"]]["pruned"]

    again = forked(store, *given).stdout
    assert "2 trials: 1 done, 1 pruned" in again and "was pruned by this command" in again
    assert "started" not in again, "nothing is made twice, and the same trials are asked for"
    assert sweep_of(store)["points"] == [good, bad]

    without = [setting for setting in given if not setting.startswith("pruning")]
    out = forked(store, *without).stdout
    assert "2 trials: 2 done" in out and "SFT             done" not in out.split(bad["run"])[0]
    assert {run["state"] for run in runs(command, store)} == {"done"}
    key = next(node["key"] for node in found[bad["run"]]["nodes"] if node["name"] == "sft")
    (attempt,) = json.loads((store / "store" / key[:16] / "record.json").read_text())["attempts"][:1]
    assert attempt["outcome"] == "preempted" and "pruned" in attempt["cause"] and attempt["checkpoint"] > 0
