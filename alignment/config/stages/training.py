"""Stages that train, and the one that computes what training compares itself with."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import field_validator
from pydantic_core import PydanticCustomError

from alignment.config.settings import Settings, execution, identity
from alignment.config.stages.base import Stage


class Lora(Settings):
    """Low-rank adapters (Hu et al. 2021, arXiv:2106.09685): W + (alpha / rank) B A."""

    rank: int = identity(gt=0)
    alpha: float = identity(gt=0)
    dropout: float = identity()
    target_modules: str | list[str] = identity()

    @field_validator("dropout")
    @classmethod
    def _is_off(cls, value: float) -> float:
        """Recipes name the key, so it is known here; but random masks would make a result depend on the engine."""
        if value != 0:
            fix = "its masks would make results depend on micro-batches and processes; DPO's reference has none"
            raise PydanticCustomError("dropout", "must be 0.0", {"fix": fix})
        return value


class Train(Stage):
    """task: of the rows that are trained on."""

    makes = "a model"
    inputs: ClassVar[dict[str, str]] = {"model": "a model", "data": "rows"}
    task: ClassVar[str]
    distributed = True
    packages = ("torch", "transformers", "trl", "peft", "accelerate", "deepspeed", "numpy")
    global_batch_size: int = identity(gt=0)
    epochs: float = identity(gt=0)
    max_steps: int | None = identity(gt=0)
    learning_rate: float = identity(gt=0, lt=1)
    schedule: Literal["constant", "linear", "cosine"] = identity()
    warmup_ratio: float = identity(ge=0, le=1)
    weight_decay: float = identity(ge=0)
    adam_beta1: float = identity(ge=0, lt=1)
    adam_beta2: float = identity(ge=0, lt=1)
    adam_epsilon: float = identity(gt=0)
    max_grad_norm: float = identity(gt=0)
    precision: Literal["fp32", "bf16"] = identity()
    lora: Lora | None = identity()
    nonfinite: Literal["halt", "skip", "rollback"] = identity()
    max_nonfinite: int = identity(ge=1)
    seed: int = identity(ge=0)
    log_every: int = execution(gt=0)
    spike_alarm: float | None = execution(gt=0)


class Sft(Train):
    """Supervised fine-tuning: cross-entropy on the assistant's tokens."""

    task = "sft"
    kind: Literal["sft"] = identity()


class Reference(Stage):
    """Log-probs of DPO's reference, its start model, of the pairs that such a DPO sees: kept for whoever needs them."""

    makes = "log-probs"
    inputs: ClassVar[dict[str, str]] = {"model": "a model", "data": "rows"}
    distributed = True
    packages = ("torch", "transformers")
    kind: Literal["reference"] = identity()
    precision: Literal["fp32", "bf16"] = identity()
    global_batch_size: int = identity(gt=0)
    epochs: float = identity(gt=0)
    max_steps: int | None = identity(gt=0)
    seed: int = identity(ge=0)

    def sees_all(self) -> bool:
        return self.max_steps is None and self.epochs >= 1

    def idle(self) -> frozenset[str]:
        """Where all pairs are seen it does not matter when."""
        return frozenset({"global_batch_size", "epochs", "seed"} if self.sees_all() else ())
