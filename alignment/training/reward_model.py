"""Reward models: TRL's trainer on pairs."""

from __future__ import annotations

from typing import Any

import torch
import trl
from torch import Tensor

from alignment.training.metrics import reward_sums
from alignment.training.packing import IGNORED
from alignment.training.preference import Pairs


class Reward(Pairs, trl.RewardTrainer):
    """Bradley-Terry on pairs. Rows: chosen_ids, rejected_ids, each with its prompt before it."""

    def _labels(self, rows: dict[str, Any]) -> Tensor:
        return torch.full_like(rows["input_ids"], IGNORED)

    def _measure(self, inputs: dict[str, Any]) -> dict[str, Tensor | float]:
        return reward_sums(self._output.logits)
