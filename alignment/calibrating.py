"""`alignment check --calibrate`: a few real steps of each stage that trains, on this machine, in a store of their own.

Each stage is run as a run would run it, by the same launcher, engine and worker, from the start model (whose weights do
not matter to time) on the first rows; so what is measured is what a run would take. What comes of it is told to the
process that estimates (alignment/preflight/).
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from alignment.config.execution import NoPruning
from alignment.config.hardware import AUTO
from alignment.config.launchers import SlurmLauncher
from alignment.config.schema import Experiment, Node, Pipeline
from alignment.config.stages.online import Online
from alignment.config.stages.preference import Dpo
from alignment.config.stages.preparing import ImportModel, Prepare
from alignment.config.stages.training import Train
from alignment.errors import AlignmentError, ConfigError, Finding, unusable
from alignment.files import read_jsonl
from alignment.pipeline import runner
from alignment.pipeline.store import METRICS

STEPS = 5  # timed; one before them warms up
START, ROWS = "start", "rows"


class Calibrations:
    """The steps that were run, in a store that is there until `close`. timed: node -> what is told of them."""

    def __init__(self, experiment: Experiment):
        """Raises ConfigError where steps on this machine would say nothing of the run's, MachineError where the store
        cannot be written, on whose disk there is room for models."""
        launcher, fix = experiment.launcher, "without --calibrate the estimate is by figures (docs/estimate.md)"
        if isinstance(launcher, SlurmLauncher):
            raise ConfigError("--calibrate measures this machine, jobs run elsewhere", where="launcher", fix=fix)
        if launcher.layout(distributed=True)[0] > 1:
            raise ConfigError("--calibrate measures one machine, not several", where="launcher.nodes", fix=fix)
        if experiment.hardware.name != AUTO:
            what = f"--calibrate measures this machine, not {experiment.hardware.name}"
            raise ConfigError(what, where="hardware", fix=fix)
        self.experiment, self.timed = experiment, dict[str, Any]()
        root = Path(experiment.store)
        try:
            root.mkdir(parents=True, exist_ok=True)
            self._store = tempfile.TemporaryDirectory(prefix=".calibration-", dir=root)
        except OSError as error:
            raise unusable(error) from error

    def close(self) -> None:
        self._store.cleanup()

    def run(self) -> Iterator[Finding]:
        """Of each stage that trains on rows which can be prepared now."""
        for name in calibrated(self.experiment):
            try:
                told = self._run(name)
            except AlignmentError as error:
                where = {"what": f"could not be run: {error.what}", "where": error.where, "fix": error.fix}
                yield {"check": f"steps {name}", "state": "warning", **where}
                continue
            self.timed[name] = told
            each = f"{len(told['seconds'])} steps of {median(told['seconds']):.3g} s"
            what = f"{each}, after {told['start_s']:.0f} s from the launch to the first"
            yield {"check": f"steps {name}", "state": "ok", "what": what, "facts": told}

    def _run(self, name: str) -> dict[str, Any]:
        run = runner.Run(shortened(self.experiment, name, self._store.name), "")
        runner.execute(run, Silent())
        key = run.node(name).key
        folder, record = run.store.result(key), run.store.record(key) or {}
        moments = [row["time"] for row in read_jsonl(folder / METRICS)]
        seconds = [after - before for before, after in pairwise(moments)]
        return {
            "settings": run.node(name).settings.model_dump(),
            "data": str(run.store.result(run.node(ROWS).key)),
            "seconds": seconds,
            "start_s": max(0.0, moments[0] - record["started"] - median(seconds)),
            "end_s": record["finished"] - moments[-1],
        }


def calibrated(experiment: Experiment) -> list[str]:
    """Nodes that train on rows of a data set, one of those whose steps are alike. Not those that ask the policy: their
    rewards may be models that are not there yet."""
    found: dict[str, str] = {}
    for name, node in experiment.pipeline.nodes.items():
        settings, parent = experiment.stage[node.stage], experiment.pipeline.nodes.get(node.inputs.get("data", ""))
        prepare = experiment.stage[parent.stage] if parent else None
        trains = isinstance(settings, Train) and not isinstance(settings, Online)
        if trains and isinstance(prepare, Prepare) and prepare.datasets:
            found.setdefault(f"{node.stage} {node.inputs['data']}", name)
    return list(found.values())


def shortened(experiment: Experiment, name: str, store: str) -> Experiment:
    """An experiment of that node's first steps: on the first rows of its data sets, from the start model."""
    nodes, stage = experiment.pipeline.nodes, experiment.stage
    node = nodes[name]
    rows = nodes[node.inputs["data"]]
    settings, prepare = stage[node.stage], stage[rows.stage]
    assert isinstance(settings, Train) and isinstance(prepare, Prepare)
    start = next(one.stage for one in nodes.values() if isinstance(stage[one.stage], ImportModel))
    changes: dict[str, Any] = {"max_steps": STEPS + 1, "log_every": 1}
    if isinstance(settings, Dpo):  # it would never move, which is an error
        changes["reference_update"] = None
    most = max(200, 2 * settings.global_batch_size * (STEPS + 1))
    first = {"limit": most, "cap": None, "epochs": 1.0, "weight": None}
    graph = {
        START: Node(stage=start, inputs={}),
        ROWS: Node(stage=rows.stage, inputs={"model": START}),
        name: Node(stage=node.stage, inputs={"model": START, "data": ROWS}),
    }
    splits = prepare.splits.model_copy(update={"heldout": 0, "prompts": 0, "train": None})
    return experiment.model_copy(
        update={
            "name": "calibration", "store": store, "min_free_gb": 0.0, "retries": 0, "pruning": NoPruning(kind="none"),
            "pipeline": Pipeline(nodes=graph, final=name),
            "data": {
                one: data.model_copy(update={**first, "limit": min(most, data.limit or most)})
                for one, data in experiment.data.items()
            },
            "checks": experiment.checks.model_copy(update={"max_dropped": 1.0}),
            "stage": {
                **stage,
                node.stage: settings.model_copy(update=changes),
                rows.stage: prepare.model_copy(update={"splits": splits}),
            },
            "checkpoint": experiment.checkpoint.model_copy(
                update={"every_minutes": None, "every_steps": None, "keep_best": 0}
            ),
            "tracking": experiment.tracking.model_copy(update={"kind": "none"}),
        }
    )  # fmt: skip


class Silent:
    """Nobody is told what happens."""

    def started(self, name: str, kind: str) -> None: ...
    def progress(self, name: str, facts: dict[str, Any]) -> None: ...
    def waiting(self, name: str, holder: dict[str, Any]) -> None: ...
    def done(self, name: str, state: str, seconds: float, facts: dict[str, Any]) -> None: ...
    def warning(self, name: str, text: str) -> None: ...
