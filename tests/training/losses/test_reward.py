"""Losses of reward models against values derived by hand, TRL's own, and finite differences."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.autograd import gradcheck

from alignment.training.losses import reward
from tests.training import models, trainers

LN2, LN3 = math.log(2), math.log(3)


def numbers(*values: float) -> Any:
    return torch.tensor(values, dtype=torch.float64)


def test_bradley_terry_by_hand() -> None:
    """-log sigmoid(x) = log(1 + exp(-x)). x = 0: log 2. x = ln 3: log(1 + 1/3) = log(4/3). x = -ln 3: log 4."""
    chosen, rejected = numbers(1, LN3 + 2, 0), numbers(1, 2, LN3)
    wanted = numbers(LN2, math.log(4 / 3), math.log(4))
    assert torch.allclose(reward.bradley_terry(chosen, rejected), wanted, atol=1e-12)


def test_a_margin_by_hand() -> None:
    """Rewards 2 ln 3 apart, a margin of ln 3: x = ln 3. A margin as large as they are apart: log 2."""
    apart, none = numbers(2 * LN3, 0.7), numbers(0, 0)
    wanted = numbers(math.log(4 / 3), LN2)
    assert torch.allclose(reward.bradley_terry(apart, none, numbers(LN3, 0.7)), wanted, atol=1e-12)


def test_label_smoothing_by_hand() -> None:
    """x = ln 3, a tenth of the labels turned round: 0.9 log(4/3) + 0.1 log 4. With a margin of ln 3 beside rewards
    2 ln 3 apart the turned pair is -3 ln 3 from where it should be: 0.9 log(4/3) + 0.1 log(1 + 27)."""
    apart, none = numbers(LN3), numbers(0)
    smooth = reward.bradley_terry(apart, none, None, 0.1)
    assert smooth.item() == pytest.approx(0.9 * math.log(4 / 3) + 0.1 * math.log(4), abs=1e-12)
    both = reward.bradley_terry(2 * apart, none, numbers(LN3), 0.1)
    assert both.item() == pytest.approx(0.9 * math.log(4 / 3) + 0.1 * math.log(28), abs=1e-12)


def test_with_smoothed_labels_the_best_margin_is_their_log_odds() -> None:
    """d/dx is 0 where sigmoid(x) = 1 - share: x = ln((1 - share) / share), ln 9 at a tenth; without, more is better."""
    at = numbers(math.log(9)).requires_grad_()
    reward.bradley_terry(at, numbers(0), None, 0.1).backward()
    assert at.grad.abs().item() < 1e-12
    values = reward.bradley_terry(torch.linspace(-3, 3, 13, dtype=torch.float64), numbers(*[0] * 13))
    assert (values.diff() < 0).all(), "the loss falls with the margin"


def test_centring_and_pointwise_losses_by_hand() -> None:
    """(2 - 5)^2 = 9; (1.5 - 1)^2 = 0.25. Cross-entropy at logit ln 3 (sigmoid 3/4) with score 1/2: half of log(4/3) and
    half of log 4, which is log(16/3) / 2."""
    assert reward.centring(numbers(2), numbers(-5)).tolist() == [9]
    assert reward.squared_error(numbers(1.5), numbers(1)).tolist() == [0.25]
    crossed = reward.binary_cross_entropy(numbers(LN3), numbers(0.5)).item()
    assert crossed == pytest.approx(math.log(16 / 3) / 2, abs=1e-12)


def test_gradients_are_those_of_finite_differences() -> None:
    one, other, third = (torch.randn(5, dtype=torch.float64, requires_grad=True) for _ in range(3))
    assert gradcheck(lambda c, r, m: reward.bradley_terry(c, r, m, 0.2), (one, other, third))
    assert gradcheck(reward.centring, (one, other))
    assert gradcheck(reward.squared_error, (one, third))
    scores = torch.rand(5, dtype=torch.float64)
    assert gradcheck(lambda r: reward.binary_cross_entropy(r, scores), (one,))


@pytest.mark.parametrize(("margin", "coefficient"), [(False, None), (True, None), (False, 0.01), (True, 0.3)])
def test_pairs_cost_what_trl_makes_them_cost(
    margin: bool, coefficient: float | None, tmp_path: Path, tiny_model: Path
) -> None:
    """Both are given the rewards of a model that is not there. Equal to 1e-6."""
    rewards, margins = torch.randn(12, 1) * 3, torch.rand(6)
    inputs = {"input_ids": torch.zeros(12, 1), "attention_mask": torch.ones(12, 1)} | (
        {"margin": margins} if margin else {}
    )
    stock = trainers.stock("reward", models.make_classifier(), tmp_path, tiny_model, steps=1)
    stock.args.center_rewards_coefficient = coefficient
    wanted = stock.compute_loss(lambda **given: SimpleNamespace(logits=rewards), dict(inputs))
    chosen, rejected = rewards[:, 0].chunk(2)
    loss = reward.bradley_terry(chosen, rejected, margins if margin else None)
    loss = loss + (coefficient or 0.0) * reward.centring(chosen, rejected)
    assert loss.mean().item() == pytest.approx(wanted.item(), abs=1e-6)
