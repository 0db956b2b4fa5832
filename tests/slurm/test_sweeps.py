"""Sweeps as one graph of jobs on a real cluster."""

from __future__ import annotations

import json
import os
import signal
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

import pytest

from tests.conftest import tiny_stages
from tests.slurm.cluster import Cluster
from tests.slurm.project import ON_SLURM, Project

PIPELINE = """# @package _global_
defaults:
  - /stage@stage.import_model: import_model
  - /stage@stage.prepare_sft: prepare_sft
  - /stage@stage.sft: sft
  - /stage@stage.prepare_preference: prepare_preference
  - /stage@stage.reference: reference
  - /stage@stage.dpo: dpo
  - /stage@stage.evaluate: evaluate
  - _self_
stage:
  prepare_preference: {dataset: preferences}
pipeline:
  nodes:
    start: {stage: import_model, inputs: {}}
    rows: {stage: prepare_sft, inputs: {model: start}}
    sft: {stage: sft, inputs: {model: start, data: rows}}
    pairs: {stage: prepare_preference, inputs: {model: start}}
    reference: {stage: reference, inputs: {model: sft, data: pairs}}
    dpo: {stage: dpo, inputs: {model: sft, data: pairs, reference: reference}}
    evaluate_dpo: {stage: evaluate, inputs: {model: dpo, data: rows, reference: start}}
  final: dpo
"""
SEEDS = ("stage.prepare_sft.seed=0", "stage.prepare_preference.seed=0", "stage.evaluate.seed=0", "stage.dpo.seed=0")
POINT = {"dpo": 1, "evaluate_dpo": 1}
WHOLE = Counter({"start": 1, "rows": 1, "pairs": 1, "sft": 2, "reference": 2, "dpo": 6, "evaluate_dpo": 6})


@pytest.fixture
def project(slurm: Cluster, tiny_settings: list[str], tmp_path: Path) -> Project:
    short = ["stage.sft.max_steps=2", "stage.dpo.max_steps=2"]
    stages = tiny_stages("prepare_sft", "sft", "dpo", "evaluate")
    made = Project(tmp_path, [*tiny_settings, "pipeline=sweep", *stages, *short, *SEEDS], slurm)
    (made.folder / "conf" / "pipeline" / "sweep.yaml").write_text(PIPELINE)
    return made


def submitted(project: Project) -> Counter[str]:
    """The nodes of the last submission."""
    last = max(project.store.glob("jobs/2*"), key=lambda folder: folder.stat().st_mtime)
    return Counter(task["node"] for path in last.glob("*.json") for task in json.loads(path.read_text()).values())


def made(project: Project) -> Counter[str]:
    return Counter(json.loads(path.read_text())["name"] for path in project.store.glob("store/*/record.json"))


def kill_the_stage_of(project: Project, key: str) -> None:
    """As soon as it lives."""
    beat = project.store / "work" / key[:16] / "beats" / "rank-00000.json"
    end = time.monotonic() + 200
    while time.monotonic() < end:
        with suppress(OSError, ValueError, KeyError):
            os.kill(json.loads(beat.read_text())["pid"], signal.SIGKILL)
            return
        time.sleep(0.02)
    raise AssertionError(f"it never lived\n{project.said()}")


def test_a_sweep_makes_what_is_equal_once_and_again_only_what_failed(project: Project) -> None:
    """3 betas x 2 seeds, and one DPO is killed. What waits for it is taken from the queue, the others go on."""
    sweep = (*ON_SLURM, "retries=0", "-m", "stage.dpo.beta=0.05,0.1,0.5", "seed=0,1")
    assert "6 runs, 19 stages: 19 submitted" in project.run(*sweep)
    assert submitted(project) == WHOLE
    assert len(list(project.store.glob("jobs/2*/*.sbatch"))) == 9, "arrays: SFT 1, references 1, DPO 2, evaluations 2"
    (file,) = project.store.glob("sweeps/*/sweep.json")
    points = json.loads(file.read_text())["points"]
    assert points[3]["settings"] == {"stage.dpo.beta": 0.1, "seed": 1}
    bad = json.loads((project.store / "runs" / points[3]["run"] / "run.json").read_text())
    kill_the_stage_of(project, next(node["key"] for node in bad["nodes"] if node["name"] == "dpo"))
    said = project.command("status", file.parent.name, "--watch", code=1)
    assert "killed" in said
    states = {run["run"]: {node["name"]: node["state"] for node in run["nodes"]} for run in project.runs()}
    assert (states[bad["run"]]["dpo"], states[bad["run"]]["evaluate_dpo"]) == ("failed", "cancelled")
    assert made(project) == WHOLE - Counter(POINT)
    assert "1 of 6 points" in project.command("compare", file.parent.name)

    project.run("--wait", *sweep)
    assert submitted(project) == POINT
    assert made(project) == WHOLE
    assert len(project.runs()) == 6
    assert "nothing to check: all stages are in the store or queued already" in project.plan("--check", *sweep)


def test_five_hundred_points_are_queued_in_a_few_submissions(slurm: Cluster, project: Project) -> None:
    """Held, so that none of the thousand jobs starts. The bounds are for a busy machine; docs/sweeps.md has figures."""
    betas = ",".join(str(round(0.01 * number, 2)) for number in range(1, 101))
    began = time.monotonic()
    project.run(*ON_SLURM, "+launcher.options.hold=true", "-m", f"stage.dpo.beta={betas}", "seed=0,1,2,3,4")
    took = time.monotonic() - began
    scripts = list(project.store.glob("jobs/2*/*.sbatch"))
    assert submitted(project) == WHOLE | Counter({"sft": 5, "reference": 5, "dpo": 500, "evaluate_dpo": 500})
    assert len(scripts) == 3 + 1 + 1 + 5 + 5
    queued = slurm.run("squeue", "--noheader", "--array", "--format=%i").stdout.split()
    assert len(queued) == 1013
    began = time.monotonic()
    slurm.run("sinfo")
    assert time.monotonic() - began < 2, "the scheduler answers"
    (sweep,) = project.store.glob("sweeps/*/sweep.json")
    began = time.monotonic()
    project.command("cancel", sweep.parent.name)
    print(f"planned and submitted in {took:.1f} s, cancelled in {time.monotonic() - began:.1f} s")
    project.until(lambda: not slurm.run("squeue", "--noheader").stdout, "all are cancelled")
    assert took < 30


def test_what_two_sweeps_wait_for_goes_with_the_second(slurm: Cluster, project: Project) -> None:
    """The second one has a point of the first, whose jobs it has found in the queue. All is held."""
    held = (*ON_SLURM, "+launcher.options.hold=true", "-m")
    project.run(*held, "stage.dpo.beta=0.05,0.1", "seed=0,1")
    (first,) = project.store.glob("sweeps/*/sweep.json")
    assert "2 submitted, 7 queued already" in project.run(*held, "stage.dpo.beta=0.1,0.5", "seed=0")
    (second,) = (path for path in project.store.glob("sweeps/*/sweep.json") if path != first)
    said = project.command("cancel", first.parent.name)
    assert f"stays: {second.parent.name} waits for it" in said
    queued = Counter(
        line.split(".")[-1] for line in slurm.run("squeue", "--noheader", "--array", "--format=%j").stdout.split()
    )
    assert queued == {"start": 1, "rows": 1, "pairs": 1, "sft": 1, "reference": 1, "dpo": 2, "evaluate_dpo": 2}
    states = {node["state"] for run in project.runs() for node in run["nodes"] if node["name"] == "dpo"}
    assert states == {"queued", "cancelled"}
    project.command("cancel", second.parent.name)
    project.until(lambda: not slurm.run("squeue", "--noheader").stdout, "all are cancelled")
