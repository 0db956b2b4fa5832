"""What `alignment check` says of the time that each stage which trains will take."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from datasets import load_from_disk

from alignment.config.schema import Experiment
from alignment.config.stages.online import Online
from alignment.config.stages.preparing import Prepare
from alignment.config.stages.training import Reference, Train
from alignment.errors import Finding
from alignment.estimating import calibration, hardware
from alignment.estimating.generated import generated, stages_on
from alignment.estimating.hardware import Processor
from alignment.estimating.layout import layout_of
from alignment.estimating.machine import machine_of, processes
from alignment.estimating.samples import AT_MOST, KnownRows, trained
from alignment.estimating.time import Stage, TimeEstimate, estimate
from alignment.estimating.work import Records, records_of
from alignment.files import size_text
from alignment.training.batching import count_steps

FIX = "hardware=h100, or another of conf/hardware, gives times"


def unknown(experiment: Experiment, looked_at: Sequence[str]) -> Iterator[Finding]:
    """Of stages whose rows nobody has yet. looked_at: nodes that prepare rows."""
    later = [name for one in looked_at for name, *_ in generated(experiment, one)]
    known = {name for one in (*looked_at, *later) for name in stages_on(experiment, one)}
    for name, node in experiment.pipeline.nodes.items():
        if isinstance(experiment.stage[node.stage], Train | Reference) and name not in known:
            what = f"its rows are made by stages before `{node.inputs['data']}`: how many is not known yet"
            yield {"check": f"time {name}", "state": "note", "what": what}


def findings(
    experiment: Experiment, prepared: str, sample: KnownRows, config: Any, timed: Mapping[str, Any]
) -> Iterator[Finding]:
    """Of the stages that train on the rows of `prepared`, or on answers to its prompts. config: of the start model.
    timed: node -> steps of it that were run on this machine (alignment/calibrating.py)."""
    devices: dict[Any, Processor | None] = {}
    for name, rows in trained(experiment, prepared, sample):
        one = _Node(experiment, name, config)
        key = one.settings.precision, one.threads
        if key not in devices:
            devices[key] = hardware.device(experiment.hardware, one.settings.precision, one.here, one.threads)
        yield one.finding(rows, devices[key], timed.get(name))


class _Node:
    def __init__(self, experiment: Experiment, name: str, config: Any):
        node = experiment.pipeline.nodes[name]
        self.experiment, self.name, self.config = experiment, name, config
        self.settings: Any = experiment.stage[node.stage]
        self.processes, self.machine = processes(experiment, name), machine_of(experiment, name)
        self.here = experiment.launcher.kind != "slurm"
        self.threads = hardware.threads_of(experiment.engine.threads, self.processes[1])
        self.finds_reference = "reference" in node.inputs

    def finding(self, sample: KnownRows, device: Processor | None, timed: Mapping[str, Any] | None) -> Finding:
        stage = self._stage(self._records(sample), self.settings)
        measured = self._calibration(stage, device, timed)
        count = self._count(sample)
        limit = count_steps(count or 1, *self._schedule())
        steps = limit * (self.settings.epochs_per_rollout if self._reuses() else 1)
        if measured:
            how = measured.device, measured.scale, measured.around
            found = replace(estimate(stage, count or 1, steps, *how), told=measured.told())
        else:
            found = estimate(stage, count or 1, steps, device)
        known = count is not None or self.settings.max_steps is not None
        facts = {**asdict(found), "seconds": found.seconds, "process_hours": found.process_hours, "kwh": found.kwh}
        facts["rows_are"] = sample.how.strip() or "exact"
        told: Finding = {
            "check": f"time {self.name}",
            "state": "ok",
            "what": says(found, known, AT_MOST if isinstance(self.settings, Online) else sample.how),
            "facts": facts,
        }
        return told if device is not None else {**told, "state": "note", "fix": FIX}

    def _records(self, sample: KnownRows) -> Records:
        if isinstance(self.settings, Online):
            return records_of(self.settings, sample.prompts)
        records = records_of(self.settings, sample.rows)
        return replace(records, reference=None) if self.finds_reference else records

    def _stage(self, records: Records, settings: Any) -> Stage:
        where = self.machine, self.processes
        layout = layout_of(settings, self.experiment.engine, self.config, records, *where)
        return Stage(settings, self.config, records, layout)

    def _count(self, sample: KnownRows) -> int | None:
        if not isinstance(self.settings, Online):
            return sample.count
        node = self.experiment.pipeline.nodes[self.name]
        prepare = self.experiment.stage[self.experiment.pipeline.nodes[node.inputs["data"]].stage]
        return prepare.splits.prompts if isinstance(prepare, Prepare) else None

    def _schedule(self) -> tuple[int, float, int | None]:
        return self.settings.global_batch_size, self.settings.epochs, self.settings.max_steps

    def _reuses(self) -> bool:
        return isinstance(self.settings, Online) and self.settings.max_steps is None

    def _calibration(self, stage: Stage, device: Processor | None, timed: Mapping[str, Any] | None) -> Any:
        """What was timed just now, which is kept for the next time; or what was kept."""
        if device is None or not self.here:
            return None
        place = calibration.place(Path(self.experiment.store), stage, self.experiment.engine, device)
        if timed is None:
            return calibration.kept(place)
        settings = type(self.settings).model_validate(timed["settings"])
        data = Path(timed["data"])
        if isinstance(settings, Online):
            return None
        ran = self._stage(records_of(settings, load_from_disk(str(data / "train"))), settings)
        made = calibration.calibrated(ran, timed["seconds"], device, timed["start_s"] + timed["end_s"])
        if made is not None:
            with suppress(OSError):  # a store that cannot be written is a finding of its own
                calibration.keep(place, made)
        return made


def says(found: TimeEstimate, known: bool, about: str) -> str:
    """known: how many steps there are. about: exactly, about or at most so many."""
    if found.step_s is None:
        step = f"{_count(found.operations)} operations a step"
    else:
        step = f"{time_text(found.step_s)} a step"
    if not known:
        return f"{step}; how many rows there are is not known; {found.told}"
    parts = [f"{about}{found.steps} steps, {step}" if found.seconds is None else f"{about}{_cost(found)}"]
    if not found.operations and found.seconds is None:  # a reference has no steps
        parts = [f"{about}a forward of {found.rows} rows"]
    if found.operations:
        parts.append(f"{_count(found.tokens)} tokens, {found.epochs:.3g} epochs")
    if found.sent:
        took = "at an unknown rate" if found.sent_s is None else time_text(found.sent_s)
        parts.append(f"communication {size_text(found.sent)} a step ({took})")
    parts.append(found.told)
    if found.around_s is not None:
        parts.append(f"{time_text(found.around_s)} to start and end; checkpoints are not counted")
    elif found.seconds is not None:
        parts.append("start and end are not counted")
    return "; ".join(parts)


def _cost(found: TimeEstimate) -> str:
    work = f"{found.steps} steps of {time_text(found.step_s)}" if found.step_s else f"a forward of {found.rows} rows"
    hours = f", {found.process_hours:.2g} GPU-hours" if found.on_gpu else ""
    energy = f", {found.kwh:.2g} kWh" if found.kwh is not None else ""
    return f"{work}: {time_text(found.seconds)}{hours}{energy}"


def time_text(seconds: float | None) -> str:
    """For people, in two or three digits."""
    seconds = seconds or 0.0
    for unit, name in ((86400.0, "d"), (3600.0, "h"), (60.0, "min")):
        if seconds >= 2 * unit:
            return f"{seconds / unit:.3g} {name}"
    return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"


def _count(value: float) -> str:
    for size, name in ((1e18, "e18"), (1e15, "e15"), (1e12, "e12"), (1e9, "e9"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g}{name}"
    return f"{value:.0f}"
