"""Pairs and settings that the tests of losses share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from alignment.config.stages.preference import Dpo
from tests.training import tiny


def micro_batch(seed: int = 0, count: int = 5) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(log-probs, reference, labels, log sum of squares) of 5 pairs, as a padded micro-batch: [10, width]."""
    random = torch.Generator().manual_seed(seed)
    width, lengths = 14, torch.randint(2, 9, (2 * count,), generator=random)
    labels = torch.full((2 * count, width), -100)
    for row, length in enumerate(lengths.tolist()):
        labels[row, 4 : 4 + length] = 7
    scored = labels[:, 1:] != -100
    log_probs, reference = (-3 * torch.rand(2 * count, width - 1, generator=random) * scored for _ in range(2))
    squares = -2 * torch.rand(2 * count, width - 1, generator=random) * scored
    return log_probs, reference, labels, squares


def settings_of(name: str, **changes: Any) -> Dpo:
    """Of stage.dpo with this loss; labels are smoothed where the loss is nothing without."""
    return tiny.dpo(loss=name, **{"label_smoothing": 0.1 if name in ("exo_pair", "robust") else 0.0, **changes})
