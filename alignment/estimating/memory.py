"""Memory of each process of a stage that trains, before it is queued.

The formulas are those of training/memory.py, and what `auto` comes to is asked of the function that training asks, for
the machine that the stage will run on.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from alignment.config.execution import Engine
from alignment.config.hardware import AUTO
from alignment.config.schema import Experiment
from alignment.config.stages.training import Reference, Train
from alignment.estimating.seen import Lengths
from alignment.estimating.sizes import Sample, sample_of, tensors_of
from alignment.training import engine
from alignment.training.batching import GlobalBatches
from alignment.training.memory import Device, Load, Parts, attention_share, parts_of
from alignment.training.room import host_bytes

UNLIMITED = 2**62  # bytes, where nobody knows the room
STEPS = 20  # of training, whose micro-batches are looked at


@dataclass(frozen=True)
class Machine:
    """What the processes of the stages that train run on. room: bytes of a process; None: nobody knows."""

    device: Device
    room: int | None


@dataclass(frozen=True)
class Estimate:
    """Of one process of a node, the one that takes most. room: bytes that it has; None: nobody knows. least: bytes with
    the smallest micro-batches there can be, and checkpointing."""

    parts: Parts
    load: Load
    checkpointing: bool
    room: int | None
    least: int

    @property
    def fits(self) -> bool:
        return self.room is None or self.parts.total <= self.room


def trained_in(experiment: Experiment) -> list[str]:
    """Nodes that train or score, in the order of the pipeline."""
    nodes = experiment.pipeline.nodes
    return [name for name, node in nodes.items() if isinstance(experiment.stage[node.stage], Train | Reference)]


def processes(experiment: Experiment, name: str) -> tuple[int, int]:
    """Machines of a stage, and its processes on each."""
    return experiment.launcher.layout(experiment.pipeline.nodes[name].stage, name, distributed=True)


def machine_of(experiment: Experiment, name: str, told: int | None) -> Machine:
    """For one node. A cluster's is what the settings say of its hardware, else it is this one with what is free now.
    told: bytes of a process, where somebody knows better."""
    gigabytes, named = experiment.hardware.memory_gb, experiment.hardware.name != AUTO
    if told is None and gigabytes is not None:
        told = int(gigabytes * 1e9)
    if experiment.launcher.kind == "slurm":
        asked = experiment.launcher.resources(experiment.pipeline.nodes[name].stage, name, distributed=True)
        return Machine("cuda" if asked.gpus_per_node or named else "cpu", told)
    if torch.cuda.is_available():
        return Machine("cuda", told or int(torch.cuda.mem_get_info()[0]))
    if named:  # the estimate is of another machine
        return Machine("cuda", told)
    each = processes(experiment, name)[1]
    return Machine("cpu", told or host_bytes(Path("/proc"), Path("/sys/fs/cgroup")) // each)


def of_stage(experiment: Experiment, name: str, config: Any, sample: Sample, machine: Machine) -> Estimate:
    """Of the node `name`. config: a transformers configuration of its model. Raises InputError for an architecture that
    transformers itself does not have."""
    settings: Any = experiment.stage[experiment.pipeline.nodes[name].stage]
    machines, each = processes(experiment, name)
    tensors = tensors_of(config, settings)
    smallest = experiment.engine.model_copy(update={"tokens_per_micro_batch": 1, "gradient_checkpointing": True})

    def chosen(setup: Engine) -> tuple[Parts, engine.Choice]:
        sharers = setup.sequence_parallel
        lengths, widths = sample.lengths.tolist(), sample.widths.tolist()
        largest = engine.largest_forward(lengths, widths, settings.global_batch_size)
        of_one = -(-max(lengths) // sharers), -(-largest // sharers)  # tokens that one process computes
        room = UNLIMITED if machine.room is None else machine.room
        choice = engine.choose(settings, setup, tensors, config, machines * each, *of_one, room, machine.device)
        budget = choice.tokens_per_micro_batch * sharers
        tokens, scored = _largest(sample, settings, budget, machines * each // sharers, attention_share(config))
        load = choice.load._replace(tokens=-(-tokens // sharers))
        if load.scored is None:
            load = load._replace(scored=-(-scored // sharers))
        return parts_of(config, load, choice.checkpointing), choice._replace(load=load)

    parts, choice = chosen(experiment.engine)
    return Estimate(parts, choice.load, choice.checkpointing, machine.room, chosen(smallest)[0].total)


def _largest(sample: Sample, settings: Any, budget: int, shares: int, quadratic: float) -> tuple[int, int]:
    """Most tokens that autograd keeps something of in a micro-batch, and most that are scored, in the first steps that
    these rows would make."""
    lengths, seed = sample.lengths.tolist(), settings.seed
    plan = settings.global_batch_size, STEPS, seed, shares, budget
    batches = GlobalBatches(lengths, lengths, *plan, quadratic=quadratic)
    every = [micro for step in range(STEPS) for share in batches.micro_batches(step) for micro in share]
    tokens, scored = (max(int(one[micro].sum()) for micro in every) for one in (sample.trained, sample.scored))
    return tokens, scored


def of_experiment(
    experiment: Experiment, config: Any, seen: Mapping[str, Lengths], room: int | None = None
) -> dict[str, Estimate]:
    """Of all nodes that train. seen: node that prepares rows -> how long they are, where that is known. room: bytes of
    a process; None: as `machine_of` finds."""
    return {
        name: of_stage(experiment, name, config, sample_of(experiment, name, seen), machine_of(experiment, name, room))
        for name in trained_in(experiment)
    }
