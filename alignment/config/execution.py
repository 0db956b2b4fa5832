"""How the work is done, where metrics stream to and which trials of a sweep end early: no result depends on it."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

from alignment.config.settings import Settings, execution
from alignment.config.sources import LocalPath


class Engine(Settings):
    """How training is spread over processes. Nothing here can change a result beyond rounding."""

    strategy: Literal["single", "ddp", "zero1", "zero2", "zero3"] = execution()
    tokens_per_micro_batch: Literal["auto"] | Annotated[int, Field(gt=0)] = execution()
    gradient_checkpointing: Literal["auto"] | bool = execution()
    compile: bool = execution()
    offload: Literal["none", "optimizer", "all"] = execution()
    nvme_path: LocalPath | None = execution(min_length=1)
    param_persistence_threshold: int | None = execution(ge=0)
    hpz: int = execution(ge=1)
    quantized_weights: bool = execution()
    quantized_gradients: bool = execution()
    sequence_parallel: int = execution(ge=1)
    threads: int | None = execution(gt=0)
    adapt: bool = execution()
    watchdog_s: float = execution(ge=2)  # a process beats every second

    @field_validator("quantized_weights", "quantized_gradients")
    @classmethod
    def _is_exact(cls, value: bool) -> bool:
        """Recipes of ZeRO++ (Wang et al. 2023, arXiv:2306.10209) name them, so they are known here."""
        if value:
            fix = "8 or 4 bits a number change results beyond rounding, and no engine may; engine.hpz is exact"
            raise PydanticCustomError("exact", "must be false", {"fix": fix})
        return value

    @field_validator("tokens_per_micro_batch", "gradient_checkpointing", mode="wrap")
    @classmethod
    def _or_auto(cls, value: Any, validate: Any, info: ValidationInfo) -> Any:
        """One fault where a union would tell one for each of its sides."""
        try:
            return validate(value)
        except ValueError:
            other = ", true or false" if info.field_name == "gradient_checkpointing" else " or a whole number above 0"
            raise PydanticCustomError("or_auto", "must be auto{other}", {"other": other}) from None


class Checkpoint(Settings):
    """When training saves its whole state beside itself, and which of these checkpoints stay."""

    every_minutes: float | None = execution(gt=0)
    every_steps: int | None = execution(gt=0)
    asynchronous: bool = execution()
    keep_last: int = execution(ge=1)
    keep_best: int = execution(ge=0)
    best_by: str = execution(min_length=1)
    best_is: Literal["lowest", "highest"] = execution()
    max_failures: int = execution(ge=1)


class Tracking(Settings):
    """Where metrics stream to, beside metrics.jsonl in every stage folder."""

    kind: Literal["none", "wandb"] = execution()
    mode: Literal["offline", "online"] = execution()
    project: str = execution(min_length=1)
    entity: str | None = execution()


class NoPruning(Settings):
    """Every trial of a sweep is trained to its end."""

    kind: Literal["none"] = execution()


class PercentilePruning(Settings):
    """A trial of a sweep is stopped while it trains if most others were better at the same step."""

    kind: Literal["percentile"] = execution()
    metric: str = execution(min_length=1)
    direction: Literal["minimize", "maximize"] = execution()
    node: str | None = execution()
    percentile: float = execution(ge=0, le=100)
    warmup_steps: int = execution(ge=0)
    min_trials: int = execution(ge=1)


Pruning = Annotated[NoPruning | PercentilePruning, Field(discriminator="kind")]
