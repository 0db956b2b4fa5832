"""How a stage will be spread: decided before it runs by the function that decides then, for the machine that it is
for."""

from __future__ import annotations

from typing import Any

from alignment.config.execution import Engine
from alignment.config.stages.training import Reference, Train
from alignment.estimating.machine import UNLIMITED, Machine
from alignment.estimating.sizes import tensors_of
from alignment.estimating.time import Layout
from alignment.estimating.work import Records
from alignment.training import engine as engines


def layout_of(
    settings: Train | Reference,
    engine: Engine,
    config: Any,
    records: Records,
    machine: Machine,
    processes: tuple[int, int],
) -> Layout:
    """config: of the start model. processes: nodes, and processes on each. On a machine of unknown memory micro-batches
    are as large as they may be, and nothing is computed twice."""
    (nodes, node), sizes, sharers = processes, records.sizes, engine.sequence_parallel
    largest = engines.largest_forward(sizes.lengths.tolist(), sizes.widths.tolist(), settings.global_batch_size)
    longest, largest = -(-int(sizes.lengths.max()) // sharers), -(-largest // sharers)
    tensors, room = tensors_of(config, settings), UNLIMITED if machine.room is None else machine.room
    of_rows = longest, largest
    choice = engines.choose(settings, engine, tensors, config, nodes * node, *of_rows, room, machine.device)
    return Layout(choice.load, choice.tokens_per_micro_batch, choice.checkpointing, nodes, sharers)
