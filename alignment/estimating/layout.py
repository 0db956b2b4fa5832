"""How a stage will be spread, decided before it runs: as it decides itself, or, for accelerators that this machine has
not got, by their figures."""

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
from alignment.training.memory import needs_checkpointing
from alignment.training.shape import shape_of


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
    """start: folder of the start model; processes: nodes, and processes on each. here: they run on this machine."""
    (nodes, node), sizes, sharers = processes, records.sizes, engine.sequence_parallel
    largest = engines.largest_forward(sizes.lengths.tolist(), sizes.widths.tolist(), settings.global_batch_size)
    longest, largest = -(-int(sizes.lengths.max()) // sharers), -(-largest // sharers)
    choice = engines.choose(settings, engine, start, config, nodes * node, longest, largest)
    load, tokens, checkpointing = choice.load, choice.tokens_per_micro_batch, choice.checkpointing
    if not load.parameters:  # the model's files do not say
        count = operations.parameters(shape_of(config), bool(getattr(config, "tie_word_embeddings", False)))
        load = load._replace(parameters=count, trainable=load.trainable or count)
    if not here or (device is not None and device.on_gpu):
        tokens, checkpointing = _on_gpu(engine, config, load, device, longest, largest)
    return Layout(load, tokens, checkpointing, nodes, sharers)


def _on_gpu(
    engine: Engine, config: Any, load: Any, device: Device | None, longest: int, largest: int
) -> tuple[int, bool]:
    """In the order in which engine.choose prefers them: rather fewer tokens than computing twice. Of a GPU of unknown
    memory: as many as there may be, nothing computed twice."""
    setting, auto = engine.gradient_checkpointing, engine.gradient_checkpointing == "auto"
    given = engine.tokens_per_micro_batch
    candidates = engines.GPU_TOKENS if given == "auto" else (given,)
    if device is None or device.room is None:
        return candidates[0], setting is True
    fitting = []
    for tokens in candidates:
        held = load._replace(tokens=max(min(tokens, largest), longest))
        on, _, fits = needs_checkpointing(setting, config, held, int(device.room))
        if fits:
            fitting.append((tokens, on))
    return next((one for one in fitting if not (auto and one[1])), (fitting or [(candidates[-1], setting is not False)])[0])
