"""How a stage will be spread: decided before it runs by the function that decides then, for the machine that it is
for."""

from __future__ import annotations

from typing import Any

from alignment.config.execution import Engine
from alignment.config.stages.training import Reference, Train
from alignment.estimating.hardware import Device
from alignment.estimating.sizes import tensors_of
from alignment.estimating.time import Layout
from alignment.estimating.work import Records
from alignment.training import engine as engines

UNKNOWN = 2**62  # bytes: room where nobody knows it


def layout_of(
    settings: Train | Reference,
    engine: Engine,
    config: Any,
    records: Records,
    device: Device | None,
    processes: tuple[int, int],
    here: bool,
) -> Layout:
    """config: of the start model. processes: nodes, and processes on each. here: they run on this machine. Of an
    accelerator of unknown memory micro-batches are as large as they may be, and nothing is computed twice."""
    (nodes, node), sizes, sharers = processes, records.sizes, engine.sequence_parallel
    largest = engines.largest_forward(sizes.lengths.tolist(), sizes.widths.tolist(), settings.global_batch_size)
    longest, largest = -(-int(sizes.lengths.max()) // sharers), -(-largest // sharers)
    where: dict[str, Any] = {}
    if not here or (device is not None and device.room is not None):
        room = None if device is None else device.room
        where = {"available": UNKNOWN if room is None else int(room), "device": "cuda"}
    choice = engines.choose(
        settings, engine, tensors_of(config, settings), config, nodes * node, longest, largest, **where
    )
    return Layout(choice.load, choice.tokens_per_micro_batch, choice.checkpointing, nodes, sharers)
