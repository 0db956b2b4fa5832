"""A loss, or a gradient behind a loss that is well, that is no number, at chosen steps and on chosen ranks."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch

from alignment.training import online, preference, reward_model, trainers


class _Poison(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loss: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return gradient * torch.nan


def into(monkeypatch: Any, where: str, steps: Sequence[int], rank: int | None = None) -> None:
    """where: loss | gradient. steps: from 1. rank: of several; None: on all. In a step the first micro-batch has it."""
    mine = rank is None or rank == int(os.environ.get("RANK", 0))
    for kind in (trainers.SFT, preference.Referenced, reward_model._Rewards, online.OnlineTrainer):
        monkeypatch.setattr(kind, "_scale", _poisoned(kind._scale, where, steps if mine else ()))


def _poisoned(scale: Any, where: str, steps: Sequence[int]) -> Any:
    def wrapped(self: Any, inputs: Any, divisor: Any) -> Any:
        right = scale(self, inputs, divisor)
        if self.state.global_step + 1 not in steps or self._micro_losses:
            return right
        return _Times(right, where)

    return wrapped


class _Times:
    """What a loss is multiplied by."""

    def __init__(self, right: float, where: str) -> None:
        self._right, self._where = right, where

    def __rmul__(self, loss: torch.Tensor) -> torch.Tensor:
        scaled = loss * self._right
        return scaled * torch.nan if self._where == "loss" else _Poison.apply(scaled)
