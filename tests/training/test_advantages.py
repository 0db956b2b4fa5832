"""Advantages against values derived by hand."""

from __future__ import annotations

import math

import pytest
import torch

from alignment.training import advantages

REWARDS = torch.tensor([[1.0, 2.0, 6.0], [5.0, 5.0, 5.0]], dtype=torch.float64)
ALL = torch.ones(2, 3, dtype=torch.bool)


def test_leave_one_out() -> None:
    """Of 1, 2, 6 the others' means are 4, 3.5, 1.5; of three equal ones nothing is left."""
    assert advantages.leave_one_out(REWARDS, ALL).tolist() == [[-3.0, -1.5, 4.5], [0.0, 0.0, 0.0]]


def test_leave_one_out_is_g_over_g_less_one_times_the_distance_from_the_mean() -> None:
    apart = REWARDS - REWARDS.mean(1, keepdim=True)
    torch.testing.assert_close(advantages.leave_one_out(REWARDS, ALL), apart * 3 / 2)


def test_group_relative() -> None:
    """Mean 3; deviations -2, -1, 3; variance of the sample (4 + 1 + 9) / 2 = 7."""
    assert advantages.group_relative(REWARDS, ALL, scale=False).tolist() == [[-2.0, -1.0, 3.0], [0.0, 0.0, 0.0]]
    scaled = advantages.group_relative(REWARDS, ALL, scale=True)
    assert scaled[0].tolist() == pytest.approx([x / (math.sqrt(7) + 1e-4) for x in (-2, -1, 3)], abs=1e-12)
    assert scaled[1].tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("of", [advantages.leave_one_out, lambda r, v: advantages.group_relative(r, v, True)])
def test_an_answer_without_a_reward_has_no_part(of) -> None:  # type: ignore[no-untyped-def]
    rewards = torch.tensor([[1.0, 99.0, 2.0, 6.0]], dtype=torch.float64)
    valid = torch.tensor([[True, False, True, True]])
    found, wanted = of(rewards, valid)[0].tolist(), of(REWARDS[:1], ALL[:1])[0].tolist()
    assert found[1] == 0.0 and found[:1] + found[2:] == pytest.approx(wanted)


@pytest.mark.parametrize("of", [advantages.leave_one_out, lambda r, v: advantages.group_relative(r, v, False)])
def test_of_a_single_answer_nothing_is_learned(of) -> None:  # type: ignore[no-untyped-def]
    assert of(REWARDS[:1], torch.tensor([[True, False, False]])).tolist() == [[0.0, 0.0, 0.0]]


def test_signal_is_where_known_rewards_differ() -> None:
    valid = torch.tensor([[True, False, False], [True, True, True]])
    assert advantages.has_signal(REWARDS, ALL).tolist() == [True, False]
    assert advantages.has_signal(REWARDS, valid).tolist() == [False, False]


@pytest.mark.parametrize("rewards", [(1000.0, 1000.0, 1000.0, 1000.0009), (0.5, 0.5 + 1e-7, 0.5, 0.5 - 1e-7)])
def test_rounding_is_no_advantage(rewards: tuple[float, ...]) -> None:
    """However small the deviation is that it is divided by: what has no signal is not trained on."""
    given, valid = torch.tensor([rewards], dtype=torch.float64), torch.ones(1, 4, dtype=torch.bool)
    assert advantages.has_signal(given, valid).tolist() == [False]
    for found in (advantages.group_relative(given, valid, True), advantages.leave_one_out(given, valid)):
        assert found.tolist() == [[0.0] * 4]


def test_whitened() -> None:
    """Of 1, 2, 3 (the others do not count): mean 2, deviation of the sample 1."""
    values, valid = torch.tensor([1.0, 9.0, 2.0, 3.0]), torch.tensor([True, False, True, True])
    assert advantages.whiten(values, valid).tolist() == pytest.approx([-1 / 1.0001, 0.0, 0.0, 1 / 1.0001])


def test_generalized() -> None:
    """gamma 0.5, lambda 0.5: deltas from the end are 3 - 2 = 1; 0 + 0.5 * 2 - 1 = 0; 1 + 0.5 * 1 - 0 = 1.5.
    A_3 = 1, A_2 = 0 + 0.25 * 1 = 0.25, A_1 = 1.5 + 0.25 * 0.25 = 1.5625. Returns add V = 0, 1, 2."""
    rewards, values = torch.tensor([1.0, 0.0, 3.0]), torch.tensor([0.0, 1.0, 2.0])
    found, returns = advantages.generalized(rewards, values, gamma=0.5, lam=0.5)
    assert found.tolist() == [1.5625, 0.25, 1.0] and returns.tolist() == [1.5625, 1.25, 3.0]


def test_generalized_with_lambda_one_is_the_return_less_the_value_and_with_zero_the_error_of_one_step() -> None:
    random = torch.Generator().manual_seed(0)
    rewards, values = (torch.rand(6, generator=random, dtype=torch.float64) for _ in range(2))
    whole, _ = advantages.generalized(rewards, values, gamma=1.0, lam=1.0)
    torch.testing.assert_close(whole, rewards.flip(0).cumsum(0).flip(0) - values)
    one, _ = advantages.generalized(rewards, values, gamma=0.9, lam=0.0)
    torch.testing.assert_close(one, rewards + 0.9 * torch.cat([values[1:], torch.zeros(1)]) - values)
