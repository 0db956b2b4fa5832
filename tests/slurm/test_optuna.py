"""A search by Optuna on a cluster: six trials, three at a time, of which the hopeless are pruned."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Command, environment, runs, states
from tests.faults.runs import start
from tests.slurm.cluster import Cluster

RATE = "stage.sft.learning_rate"
# By this seed the rates of the first three train, those of the others do not. Each of the first has only two others.
SEARCH = [
    *("hydra/sweeper=optuna", "hydra/sweeper/sampler=random", "hydra.sweeper.sampler.seed=8"),
    *("hydra.sweeper.n_trials=6", "hydra.sweeper.n_jobs=3", "hydra.sweeper.direction=minimize"),
    *("objective=[heldout_nll]", f"{RATE}=tag(log, interval(1e-9, 0.01))"),
    *("pruning=median", "pruning.min_trials=3", "pruning.warmup_steps=5"),
]
SLURM = [
    *("launcher=slurm", "launcher.processes=1", "launcher.gpus_per_node=null", "launcher.cpus_per_process=1"),
    *("launcher.memory=1400M", "launcher.time_limit=30:00"),
]


@pytest.fixture(autouse=True)
def commands_find_the_cluster(slurm: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in slurm.environment().items():
        monkeypatch.setenv(name, value)


def sweep_of(store: Path) -> dict[str, Any]:
    (file,) = store.glob("sweeps/*/sweep.json")
    return dict(json.loads(file.read_text()))


def test_six_trials_of_which_the_hopeless_are_pruned(
    slurm: Cluster, tmp_path: Path, command: Command, small_settings: list[str]
) -> None:
    store = tmp_path / "store"
    given = ["run", "-m", *small_settings, *SEARCH, *SLURM, "stage.sft.epochs=100.0"]
    out = command(store, *given).stdout
    points = sweep_of(store)["points"]
    pruned = [point for point in points if point.get("pruned")]
    others = [point for point in points if not point.get("pruned")]
    assert "6 trials: 3 done, 3 pruned" in out
    assert (others, pruned) == (points[:3], points[3:])

    found = {run["run"]: run for run in runs(command, store)}
    assert {found[point["run"]]["state"] for point in others} == {"done"}
    for point in pruned:
        run = found[point["run"]]
        assert run["state"] == "pruned" and "of " in run["pruned"]
        assert states(run)["start"] in ("done", "reused"), "what others need has not been cancelled"
        assert {states(run)["sft"], states(run)["measured"]} == {"cancelled"}
        jobs = [node["job"] for node in run["nodes"] if node.get("job")]
        assert {slurm.states(job)[job] for job in jobs} == {"CANCELLED"}

    before = slurm.run("squeue", "-h", "-t", "all").stdout
    again = command(store, *given).stdout
    assert "6 trials: 3 done, 3 pruned" in again
    assert slurm.run("squeue", "-h", "-t", "all").stdout.count("\n") == before.count("\n"), "nothing was submitted"
    assert [point["run"] for point in sweep_of(store)["points"]] == [point["run"] for point in points]


def test_a_search_that_is_cancelled_asks_for_no_more_trials(
    slurm: Cluster, tmp_path: Path, command: Command, small_settings: list[str]
) -> None:
    store = tmp_path / "store"
    given = ["run", "-m", *small_settings, *SEARCH, *SLURM, "+launcher.options.begin=now+1hour"]
    search = start(tmp_path, given, environment(store))
    end = time.monotonic() + 120
    while len(list(store.glob("jobs/keys/*.json"))) < 3 or list(store.glob("jobs/*/begun")):
        assert search.alive and time.monotonic() < end, search.told + search.errors
        time.sleep(0.3)
    name = sweep_of(store)["sweep"]
    said = command(store, "cancel", name).stdout
    assert f"the command of {name}, {search.pid} on " in said
    assert search.wait(60) == 75, search.told
    assert "stopped (alignment cancel); the same command goes on" in search.told + search.errors
    assert len(sweep_of(store)["points"]) == 3, "the second three were not asked for"
    for run in runs(command, store):
        assert set(states(run).values()) == {"cancelled"}
