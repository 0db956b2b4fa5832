"""Memory of each process of a stage that trains, before it is queued.

The formulas are those of training/memory.py, and what `auto` comes to is asked of the function that training asks, for
the machine that the stage will run on.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from alignment.config.execution import Engine
from alignment.config.schema import Experiment
from alignment.config.stages.training import Reference, Train
from alignment.estimating.machine import UNLIMITED, Machine, machine_of, processes
from alignment.estimating.rewards import held_bytes
from alignment.estimating.seen import Lengths
from alignment.estimating.sizes import ONE_TOKEN, Footprints, footprints_of, tensors_of
from alignment.training import engine
from alignment.training.batching import GlobalBatches
from alignment.training.memory import Load, Parts, parts_of
from alignment.training.shape import attention_share

STEPS = 20  # of training, whose micro-batches are looked at


@dataclass(frozen=True)
class MemoryEstimate:
    """Of one process of a node, the one that takes most. room: bytes that it has; None: nobody knows. least: bytes with
    the smallest micro-batches there can be, and checkpointing; where the rows are not known yet, of rows of one token.
    """

    parts: Parts
    load: Load
    checkpointing: bool
    room: int | None
    least: int
    known: bool = True

    @property
    def fits(self) -> bool:
        return self.room is None or self.parts.total <= self.room


def trained_in(experiment: Experiment) -> list[str]:
    """Nodes that train or score, in the order of the pipeline."""
    nodes = experiment.pipeline.nodes
    return [name for name, node in nodes.items() if isinstance(experiment.stage[node.stage], Train | Reference)]


def of_stage(experiment: Experiment, name: str, config: Any, sample: Footprints, machine: Machine) -> MemoryEstimate:
    """Of the node `name`. config: a transformers configuration of its model. Raises InputError for an architecture that
    transformers itself does not have."""
    settings: Any = experiment.stage[experiment.pipeline.nodes[name].stage]
    machines, each = processes(experiment, name)
    tensors = tensors_of(config, settings)
    held = held_bytes(experiment, name, config)
    smallest = experiment.engine.model_copy(update={"tokens_per_micro_batch": 1, "gradient_checkpointing": True})

    def chosen(setup: Engine, sample: Footprints) -> tuple[Parts, engine.Choice]:
        sharers = setup.sequence_parallel
        lengths, widths = sample.lengths.tolist(), sample.widths.tolist()
        largest = engine.largest_forward(lengths, widths, settings.global_batch_size)
        of_one = -(-max(lengths) // sharers), -(-largest // sharers)  # tokens that one process computes
        room = UNLIMITED if machine.room is None else max(0, machine.room - held)  # training finds them there already
        choice = engine.choose(settings, setup, tensors, config, machines * each, *of_one, room, machine.device)
        budget = choice.tokens_per_micro_batch * sharers
        tokens, scored = _largest(sample, settings, budget, machines * each // sharers, attention_share(config))
        load = choice.load._replace(tokens=-(-tokens // sharers))
        if load.scored is None:
            load = load._replace(scored=-(-scored // sharers))
        return parts_of(config, load, choice.checkpointing)._replace(rewards=held), choice._replace(load=load)

    parts, choice = chosen(experiment.engine, sample)
    least = chosen(smallest, sample if sample.known else ONE_TOKEN)[0].total
    return MemoryEstimate(parts, choice.load, choice.checkpointing, machine.room, least, sample.known)


def _largest(sample: Footprints, settings: Any, budget: int, shares: int, quadratic: float) -> tuple[int, int]:
    """Most tokens that autograd keeps something of in a micro-batch, and most that are scored, in the first steps that
    these rows would make."""
    lengths, seed = sample.lengths.tolist(), settings.seed
    plan = settings.global_batch_size, STEPS, seed, shares, budget
    batches = GlobalBatches(lengths, lengths, *plan, quadratic=quadratic)
    every = [micro for step in range(STEPS) for share in batches.micro_batches(step) for micro in share]
    tokens, scored = (max(int(one[micro].sum()) for micro in every) for one in (sample.trained, sample.scored))
    return tokens, scored


def of_experiment(experiment: Experiment, config: Any, seen: Mapping[str, Lengths]) -> dict[str, MemoryEstimate]:
    """Of all nodes that train. seen: node that prepares rows -> how long they are, where that is known."""
    return {
        name: of_stage(experiment, name, config, footprints_of(experiment, name, seen), machine_of(experiment, name))
        for name in trained_in(experiment)
    }
