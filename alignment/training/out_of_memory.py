"""Out of memory: what would help, the cheapest first, with numbers; and, if asked for, the first of it done."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from alignment.config.execution import Engine
from alignment.errors import AlignmentError, MachineError, is_out_of_memory
from alignment.files import size_text
from alignment.training.memory import Load, forward_bytes, state_bytes
from alignment.training.shape import adapter_parameters

TOKENS = "tokens_per_micro_batch"  # what an attempt tells the next one
RANK = 8  # of the adapters that are advised


def adapted(setup: Engine, told: Mapping[str, Any]) -> Engine:
    """The engine's settings, with the micro-batches to which an earlier attempt has come down."""
    tokens = told.get(TOKENS)
    return setup.model_copy(update={TOKENS: tokens}) if setup.adapt and isinstance(tokens, int) else setup


@contextmanager
def advising(
    setup: Engine, load: Load, checkpointing: bool, config: Any, longest: int, tell_next: Callable[..., None]
) -> Iterator[None]:
    """Raises MachineError with advice for an allocation that failed inside.

    load: what the estimate assumes. longest: tokens of the longest record; fewer no micro-batch can have. With
    engine.adapt the error is one to try again, at half the tokens: tell_next(tokens_per_micro_batch=...).
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, AlignmentError) or not is_out_of_memory(error):
            raise
        now = f"{load.tokens} tokens a micro-batch take about {size_text(_total(load, checkpointing, config))}"
        told = MachineError(f"out of memory: {now}", fix=advice(load, checkpointing, config))
        if setup.adapt and load.tokens > longest:
            tell_next(**{TOKENS: max(longest, load.tokens // 2)})
            told.retry = True
        raise told from error


def advice(load: Load, checkpointing: bool, config: Any) -> str:
    """What to set, each with the bytes that the estimate gives for it alone, cheapest first."""
    choices = []
    if load.tokens > 1:
        half = load._replace(tokens=load.tokens // 2)
        choices.append((f"engine.{TOKENS}={half.tokens}", _total(half, checkpointing, config)))
    if not checkpointing:
        choices.append(("engine.gradient_checkpointing=true", _total(load, True, config)))
    if load.strategy != "zero3":
        sharded = load._replace(strategy="zero3", world_size=max(2, load.world_size))
        choices.append((f"engine=zero3 on {sharded.world_size} processes", _total(sharded, checkpointing, config)))
    if load.strategy.startswith("zero") and load.offload == "none" and load.device == "cuda":
        choices.append(("engine.offload=optimizer", _total(load._replace(offload="optimizer"), checkpointing, config)))
    if load.trainable == load.parameters:
        few = load._replace(trainable=adapter_parameters(config, RANK, "all-linear"), frozen=0)
        choices.append((f"LoRA of rank {RANK} (stage.*.lora)", _total(few, checkpointing, config)))
    return "; or ".join(f"{what}: about {size_text(total)}" for what, total in choices)


def _total(load: Load, checkpointing: bool, config: Any) -> int:
    return state_bytes(load) + sum(forward_bytes(config, load, checkpointing))
