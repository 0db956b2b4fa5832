"""Memory of each process of a stage that trains, before it is queued.

The formulas are those of training/memory.py, and what `auto` comes to is asked of the function that training asks, for
the machine that the stage will run on.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from alignment.config.execution import Engine
from alignment.config.schema import Experiment
from alignment.config.stages.training import Reference, Train
from alignment.estimating.sizes import Sample, tensors_of
from alignment.training import engine
from alignment.training.memory import Device, Load, Parts, parts_of

UNKNOWN = 2**62  # bytes: room where nobody knows it


@dataclass(frozen=True)
class Estimate:
    """Of one process of a node, the one that takes most. room: bytes that it has; None: nobody knows."""

    node: str
    parts: Parts
    load: Load
    checkpointing: bool
    room: int | None

    @property
    def fits(self) -> bool:
        return self.room is None or self.parts.total <= self.room


def processes(experiment: Experiment, name: str) -> tuple[int, int]:
    """Nodes of a stage, and processes on each."""
    node = experiment.pipeline.nodes[name]
    settings = experiment.stage[node.stage]
    return experiment.launcher.layout(node.stage, name, distributed=settings.distributed)


def of_stage(
    experiment: Experiment,
    name: str,
    config: Any,
    sample: Sample,
    device: Device,
    room: int | None,
    setup: Engine | None = None,
) -> Estimate:
    """config: a transformers configuration of the model. setup: in the place of the experiment's engine."""
    settings, setup = experiment.stage[experiment.pipeline.nodes[name].stage], setup or experiment.engine
    assert isinstance(settings, Train | Reference)
    tensors = tensors_of(config, settings)
    nodes, each = processes(experiment, name)
    lengths, widths = sample.lengths.tolist(), sample.widths.tolist()
    sharers = setup.sequence_parallel
    largest = engine.largest_forward(lengths, widths, settings.global_batch_size)
    of_one = -(-max(lengths) // sharers), -(-largest // sharers)  # tokens that one process computes
    available = UNKNOWN if room is None else room
    choice = engine.choose(settings, setup, tensors, config, nodes * each, *of_one, available, device)
    load = choice.load
    if load.scored is None:
        share = sample.scored.sum() / sample.lengths.sum()
        load = load._replace(scored=round(load.tokens * float(share)))
    parts = parts_of(config, load, choice.checkpointing)
    return Estimate(name, parts, load, choice.checkpointing, room)
