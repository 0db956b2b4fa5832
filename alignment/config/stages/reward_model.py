"""Reward models: the stage that trains one, and the one that measures one or several together."""

from __future__ import annotations

from typing import ClassVar, Literal

from alignment.config.settings import identity
from alignment.config.stages.base import Stage
from alignment.config.stages.training import Train

MEMBERS = ("model", *(f"model_{number}" for number in range(2, 9)))  # roles of an ensemble
POINTWISE = ("mse", "bce")
# What a sweep may look at where the final model is a reward model -> whether more of it is better.
OF_REWARD_MODELS = {
    "accuracy": True,
    "heldout_loss": False,
    "ece": False,
    "mse": False,
    "pearson": True,
    "spearman": True,
}


class RewardModel(Train):
    """A model with one number for an answer, trained on pairs (Bradley-Terry) or on scores."""

    makes = "a reward model"
    kind: Literal["reward_model"] = identity()
    loss: Literal["bradley_terry", "mse", "bce"] = identity()
    margin: float = identity(ge=0)
    centring: float = identity(ge=0)
    label_smoothing: float = identity(ge=0, lt=0.5)

    @property
    def task(self) -> str:  # type: ignore[override]
        return "scored" if self.loss in POINTWISE else "preference"


class EvaluateReward(Stage):
    """Reward models on held-out rows: how often they are right, how sure, and by what else they might be led."""

    makes = "a reward evaluation"
    inputs: ClassVar[dict[str, str]] = {"model": "a reward model", "data": "rows"}
    optional_inputs: ClassVar[dict[str, str]] = dict.fromkeys(MEMBERS[1:], "a reward model")
    reads: ClassVar[dict[str, Literal["heldout", "prompts"]]] = {"data": "heldout"}
    packages = ("torch", "transformers", "numpy")
    kind: Literal["evaluate_reward"] = identity()
    batch_size: int = identity(gt=0)
    precision: Literal["fp32", "bf16"] = identity()
