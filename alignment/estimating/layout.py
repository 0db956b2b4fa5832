"""How a stage will be spread: decided before it runs by the function that decides then, for the machine that it is
for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from alignment.config.execution import Engine
from alignment.config.stages.training import Reference, Train
from alignment.estimating import operations
from alignment.estimating.hardware import Device
from alignment.estimating.time import Layout
from alignment.estimating.work import Records
from alignment.training import engine as engines
from alignment.training.shape import shape_of

UNKNOWN = 2**62  # bytes: room where nobody knows it


def layout_of(
    settings: Train | Reference,
    engine: Engine,
    start: Path,
    config: Any,
    records: Records,
    device: Device | None,
    processes: tuple[int, int],
    here: bool,
) -> Layout:
    """start: folder of the start model; processes: nodes, and processes on each. here: they run on this machine. Of an
    accelerator of unknown memory micro-batches are as large as they may be, and nothing is computed twice."""
    (nodes, node), sizes, sharers = processes, records.sizes, engine.sequence_parallel
    largest = engines.largest_forward(sizes.lengths.tolist(), sizes.widths.tolist(), settings.global_batch_size)
    longest, largest = -(-int(sizes.lengths.max()) // sharers), -(-largest // sharers)
    where: dict[str, Any] = {}
    if not here or (device is not None and device.room is not None):
        room = None if device is None else device.room
        where = {"available": UNKNOWN if room is None else int(room), "device": "cuda"}
    choice = engines.choose(settings, engine, start, config, nodes * node, longest, largest, **where)
    load = choice.load
    if not load.parameters:  # the model's files do not say
        count = operations.parameters(shape_of(config), bool(getattr(config, "tie_word_embeddings", False)))
        load = load._replace(parameters=count, trainable=load.trainable or count)
    return Layout(load, choice.tokens_per_micro_batch, choice.checkpointing, nodes, sharers)
