"""Reward models: TRL's trainer with losses of ours, on pairs or on single answers that have a score."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import trl
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from alignment.training.losses import reward as losses
from alignment.training.metrics import reward_sums, score_sums
from alignment.training.packing import IGNORED
from alignment.training.trainers import AlignedTrainer

Pointwise = Literal["mse", "bce"]
POINTWISE = {"mse": losses.squared_error, "bce": losses.binary_cross_entropy}


@dataclass(frozen=True)
class Collator:
    """Rows with prompt_ids -> input_ids, attention_mask [rows, width], padded on the right: the first side of all rows,
    then the next. number: a column with one number a row, kept as fp32 [rows]; None: there is none."""

    pad: int
    sides: tuple[str, ...]
    number: str | None

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        ids = [torch.tensor([*row["prompt_ids"], *row[f"{side}_ids"]]) for side in self.sides for row in rows]
        made = {
            "input_ids": pad_sequence(ids, batch_first=True, padding_value=self.pad),
            "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], batch_first=True),
        }
        if self.number:
            made[self.number] = torch.tensor([row[self.number] for row in rows], dtype=torch.float32)
        return made


class _Rewards(AlignedTrainer, trl.RewardTrainer):
    """The mean over the records of the global batch, of which each has as many rows as `sides`.

    number: the column of what a record's rewards are compared with.
    """

    sides: ClassVar[tuple[str, ...]]
    number: ClassVar[str]

    def __init__(self, *, processing_class: Any, with_number: bool, **kwargs: Any) -> None:
        collator = Collator(processing_class.pad_token_id, self.sides, self.number if with_number else None)
        super().__init__(processing_class=processing_class, data_collator=collator, **kwargs)

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """DeepSpeed's precision is for activations, not for what they are compared with."""
        exact = {self.number: inputs[self.number].to(self.args.device)} if self.number in inputs else {}
        rest = {name: value for name, value in inputs.items() if name not in exact}
        return {**super()._prepare_inputs(rest), **exact}

    def _loss(self, model: Any, inputs: dict[str, Any], divisor: Tensor) -> Tensor:
        given = {name: inputs[name] for name in ("input_ids", "attention_mask", "pack") if name in inputs}
        rewards = model(**given, use_cache=False).logits.squeeze(-1).float()
        return self._losses_of(rewards, inputs.get(self.number)).sum()

    def _losses_of(self, rewards: Tensor, numbers: Tensor | None) -> Tensor:
        """rewards: [rows]; numbers: [records]. [records]."""
        raise NotImplementedError

    def _labels(self, rows: dict[str, Any]) -> Tensor:
        return torch.full_like(rows["input_ids"], IGNORED)

    def _scale(self, inputs: dict[str, Any], divisor: Tensor) -> float:
        return self.accelerator.num_processes / self._divisor


class Reward(_Rewards):
    """Bradley-Terry on pairs. Rows: prompt_ids, chosen_ids, rejected_ids, and margin where `margin` is above 0.

    margin: times the row's own one, rewards must be so far apart; centring: coefficient of that loss; label_smoothing:
    share of labels taken to be wrong. All three as in training/losses/reward.py.
    """

    branches = 2
    sides = ("chosen", "rejected")
    number = "margin"

    def __init__(
        self, *, margin: float = 0.0, centring: float = 0.0, label_smoothing: float = 0.0, **kwargs: Any
    ) -> None:
        self.margin, self.centring, self.label_smoothing = margin, centring, label_smoothing
        super().__init__(with_number=margin > 0, **kwargs)

    def _losses_of(self, rewards: Tensor, numbers: Tensor | None) -> Tensor:
        chosen, rejected = rewards.chunk(2)
        margins = None if numbers is None else self.margin * numbers
        loss = losses.bradley_terry(chosen, rejected, margins, self.label_smoothing)
        return loss + self.centring * losses.centring(chosen, rejected) if self.centring else loss

    def _measure(self, inputs: dict[str, Any]) -> dict[str, Tensor | float]:
        return reward_sums(self._output.logits)


class Regression(_Rewards):
    """Rewards that are, or whose sigmoid is, a score. Rows: prompt_ids, completion_ids, score. loss: mse or bce."""

    sides = ("completion",)
    number = "score"

    def __init__(self, *, loss: Pointwise, **kwargs: Any) -> None:
        self.kind = loss
        super().__init__(with_number=True, **kwargs)

    def _losses_of(self, rewards: Tensor, numbers: Tensor | None) -> Tensor:
        assert numbers is not None
        return POINTWISE[self.kind](rewards, numbers)

    def _measure(self, inputs: dict[str, Any]) -> dict[str, Tensor | float]:
        return score_sums(self._output.logits, inputs[self.number], self.kind == "bce")
