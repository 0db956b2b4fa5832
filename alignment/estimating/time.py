"""Seconds of an optimiser step and of a whole stage, from operations, bytes and rates.

A step is the longer of computing and of what the links carry meanwhile, and after it what nothing hides: the rest of
the communication, and the optimiser. Not counted: launches of kernels and Python's own time, collating, latencies of
collectives, what a judge takes; of a stage also its start, evaluation and what is saved. A calibration (calibration.py)
measures some steps: the ratio to what is said here has all of a step in it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from alignment.config.stages.online import Online
from alignment.config.stages.training import Reference, Train
from alignment.estimating import traffic
from alignment.estimating.hardware import Processor
from alignment.estimating.traffic import Traffic
from alignment.estimating.work import Operations, Records, operations_of, trained_of
from alignment.training.batching import GlobalBatches
from alignment.training.memory import Load
from alignment.training.shape import attention_share, shape_of

LOOKED_AT = 32  # steps whose batches are made out: the others are like them


class Layout(NamedTuple):
    """How a stage is spread. load: what a process holds; tokens: of a micro-batch at most; nodes: machines, of
    world_size / nodes processes each; sharers: processes that share a sequence."""

    load: Load
    tokens: int
    checkpointing: bool
    nodes: int = 1
    sharers: int = 1

    @property
    def node(self) -> int:
        return self.load.world_size // self.nodes


class Step(NamedTuple):
    """Seconds. sampling: of online training, its part of a step; links: what computing may hide; after: what it can
    not. Unknown where a rate is: links and optimiser are left out then."""

    computing: float
    sampling: float = 0.0
    links: float = 0.0
    after: float = 0.0
    optimiser: float = 0.0

    @property
    def seconds(self) -> float:
        return max(self.computing, self.links) + self.sampling + self.after + self.optimiser


class Loads(NamedTuple):
    """Of the process with most to do, the mean over steps. micro: its micro-batches."""

    operations: float
    sampling: float
    tokens: float
    micro: float


@dataclass(frozen=True)
class Stage:
    """A stage that trains, and the rows that are known of it, as it would train on them."""

    settings: Train | Reference
    config: Any
    records: Records
    layout: Layout

    def batches(self, steps: int) -> GlobalBatches:
        sizes, layout, settings = self.records.sizes, self.layout, self.settings
        return GlobalBatches(
            lengths=sizes.lengths.tolist(),
            weights=sizes.weights.tolist(),
            global_batch_size=settings.global_batch_size,
            steps=steps,
            seed=settings.seed,
            world_size=layout.load.world_size // layout.sharers,
            tokens_per_micro_batch=layout.tokens * layout.sharers,
            quadratic=attention_share(self.config),
        )

    def operations(self, on_gpu: bool) -> Operations:
        shape = shape_of(self.config)
        trained = trained_of(self.settings, self.config, shape, self.layout.checkpointing, on_gpu)
        work = operations_of(shape, self.records, trained, _rounds(self.settings))
        return work if isinstance(self.settings, Train) else work._replace(step=np.zeros(len(self.records)))

    def loads(self, steps: int, on_gpu: bool) -> list[Loads]:
        """Of each of the first steps, of which there are so many."""
        batches, work, sharers = self.batches(steps), self.operations(on_gpu), self.layout.sharers
        found = []
        for step in range(steps):
            shares = batches.micro_batches(step)
            rows = [[row for part in share for row in part] for share in shares]
            most = max(float(work.step[share].sum()) for share in rows) / sharers
            sampling = max(float(work.sampling[share].sum()) for share in rows) / sharers
            tokens = float(work.tokens[batches.rows(step)].sum())
            found.append(Loads(most, sampling, tokens, len(shares[0])))
        return found

    def traffic(self, micro: float) -> Traffic:
        return traffic.traffic(self.layout.load, round(micro), self.layout.node)

    def step(self, loads: Loads, device: Processor) -> Step | None:
        """None where nothing is known of what computes."""
        if device.rate is None:
            return None
        sent = traffic.seconds(self.traffic(loads.micro), device, self.layout.nodes, self.layout.node) or (0.0, 0.0)
        moved = traffic.optimiser(self.layout.load, round(loads.micro), device, self.layout.nodes) or 0.0
        sampling = max(loads.sampling / device.rate, self._reading(device)) if loads.sampling else 0.0
        return Step(loads.operations / device.rate, sampling, *sent, moved)

    def _reading(self, device: Processor) -> float:
        """Seconds in which the weights are read that the sampling of a step's answers wants: all of them for each token
        of the answers that are sampled together."""
        settings, load = self.settings, self.layout.load
        if not isinstance(settings, Online) or device.memory is None:
            return 0.0
        together = max(1, settings.sampling_batch_size // settings.completions_per_prompt) * load.world_size
        rounds = -(-settings.batches_per_rollout * settings.global_batch_size // together)
        weights = (2 if load.dtype == "bf16-weights" else 4) * load.parameters
        return rounds * settings.max_new_tokens * weights / device.memory / settings.steps_per_rollout()


@dataclass(frozen=True)
class TimeEstimate:
    """Of a whole stage. steps: of the optimiser; rows: that it trains on, an epoch. step_s, before_s: seconds of a
    step, and of the pass before the first one; None: nothing is known of what computes. sent, sent_s: bytes that a
    process sends in a step, and the seconds that they take, None where no rate is known. processes: GPUs, where it runs
    on GPUs. scale: of a calibration, measured over predicted by figures, which is in the seconds. around_s: from the
    launch to the first step and from the last one to the end, where that was measured. told: whose figures these are.
    """

    steps: int
    rows: int
    epochs: float
    tokens: float
    operations: float
    step_s: float | None
    before_s: float | None
    sent: float
    sent_s: float | None
    processes: int
    on_gpu: bool
    watts: float | None
    scale: float | None
    around_s: float | None
    told: str

    @property
    def seconds(self) -> float | None:
        """Of the whole stage, as far as it is known."""
        if self.step_s is None:
            return None
        return self.steps * self.step_s + (self.before_s or 0.0) + (self.around_s or 0.0)

    @property
    def process_hours(self) -> float | None:
        return None if self.seconds is None else self.seconds * self.processes / 3600

    @property
    def kwh(self) -> float | None:
        """At most: by what the accelerators may draw, without their hosts."""
        if self.process_hours is None or self.watts is None:
            return None
        return self.process_hours * self.watts / 1000


def estimate(
    stage: Stage,
    rows: int,
    steps: int,
    device: Processor | None,
    scale: float | None = None,
    around: float | None = None,
) -> TimeEstimate:
    """rows: that it trains on, of which those of the stage may be a sample. scale: seconds measured over predicted;
    around: seconds before the first step and after the last."""
    on_gpu = device is None or device.on_gpu  # of unknown machines it is most likely
    looked = stage.loads(max(1, min(steps, LOOKED_AT)), on_gpu)
    mean = Loads(*np.mean(looked, axis=0).tolist())
    step = None if device is None else stage.step(mean, device)
    seconds = None if step is None else step.seconds * (scale or 1.0) if mean.operations else 0.0
    before = _before(stage, rows, steps, device, scale or 1.0)
    moved = stage.traffic(mean.micro) if mean.operations else Traffic(0.0, 0.0)  # a reference has no steps
    sent = None if device is None else traffic.seconds(moved, device, stage.layout.nodes, stage.layout.node)
    batch, world = stage.settings.global_batch_size, stage.layout.load.world_size
    return TimeEstimate(
        steps=steps,
        rows=rows,
        epochs=steps * batch / rows / _rounds(stage.settings),
        tokens=steps * mean.tokens,
        operations=mean.operations * world,
        step_s=seconds,
        before_s=before,
        sent=moved.across + moved.inside,
        sent_s=None if sent is None else sum(sent),
        processes=world,
        on_gpu=device is not None and device.on_gpu,
        watts=None if device is None else device.watts,
        scale=scale,
        around_s=around,
        told="nothing is known of what computes" if device is None else device.told,
    )


def _rounds(settings: Train | Reference) -> int:
    return settings.epochs_per_rollout if isinstance(settings, Online) else 1


def _before(stage: Stage, rows: int, steps: int, device: Processor | None, scale: float) -> float | None:
    """Of the pass over the rows that are seen, for their reference's log-probs."""
    if device is None or device.rate is None:
        return None
    work = stage.operations(device.on_gpu)
    seen = min(rows, steps * stage.settings.global_batch_size)
    return float(work.before.mean()) * seen / stage.layout.load.world_size / device.rate * scale
