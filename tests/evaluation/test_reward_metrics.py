"""What is said of reward models, against values by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from alignment.evaluation import reward_metrics as metrics

LN3 = math.log(3)


def numbers(*values: float) -> np.ndarray:
    return np.array(values, dtype=np.float64)


def test_calibration_by_hand() -> None:
    """Margins +-ln 3 are a confidence of 3/4, in the sixth of ten bins over [0.5, 1]; three of four are right there: no
    error. A margin of 0 is a confidence of 1/2 and, as a tie, not right: an error of 1/2, which weighs one fifth."""
    error, bins = metrics.calibration(numbers(LN3, LN3, LN3, -LN3, 0.0))
    assert error == pytest.approx(0.1)
    assert [(row["pairs"], row["confidence"], row["accuracy"]) for row in bins] == [
        (1, pytest.approx(0.5), 0.0),
        (4, pytest.approx(0.75), 0.75),
    ]
    assert bins[1]["low"] <= 0.75 < bins[1]["high"]


def test_who_is_sure_and_wrong_is_badly_calibrated_and_chances_that_come_true_are_well() -> None:
    assert metrics.calibration(numbers(*[-20.0] * 5))[0] == pytest.approx(1.0)
    random = np.random.default_rng(0)
    margins = random.normal(0, 2, 20_000)
    right = random.uniform(size=20_000) < 1 / (1 + np.exp(-margins))  # turned round where the label is the other
    assert metrics.calibration(np.where(right, margins, -margins))[0] < 0.02


def test_pairs_by_hand() -> None:
    """Margins 2, -1, 1, 0: two of four right. Differences in length 3, 1, -2, 0: of the three unequal pairs the model
    prefers the longer answer in the first alone, the data chose it in the first two. Held-out loss: log(1 + exp(-x)).
    """
    chosen, rejected = numbers(2, 0, 3, 1)[None], numbers(0, 1, 2, 1)[None]
    found = metrics.of_pairs(chosen, rejected, numbers(5, 4, 2, 3, 2, 3, 4, 3).reshape(2, 4), log_odds=True)
    assert (found["accuracy"], found["margin"], found["pairs"]) == (0.5, 0.5, 4)
    assert (found["longer_preferred"], found["longer_chosen"]) == (pytest.approx(1 / 3), pytest.approx(2 / 3))
    wanted = np.mean([math.log(1 + math.exp(-x)) for x in (2, -1, 1, 0)])
    assert found["heldout_loss"] == pytest.approx(wanted)
    assert found["length_margin_correlation"] == pytest.approx(np.corrcoef([2, -1, 1, 0], [3, 1, -2, 0])[0, 1])
    assert "uncertainty" not in found


def test_an_interval_of_a_share_by_hand() -> None:
    """Wilson 1927 for 8 of 10, as statsmodels' proportion_confint gives it."""
    assert metrics.wilson(8, 10) == (pytest.approx(0.4901625), pytest.approx(0.9433178))


def test_members_that_differ_by_a_constant_of_each_prompt_are_of_one_mind() -> None:
    chosen, rejected = np.random.default_rng(0).normal(size=(2, 1, 6))
    apart = np.arange(6.0)
    found = metrics.of_pairs(
        np.concatenate([chosen, chosen + apart]), np.concatenate([rejected, rejected + apart]), np.ones((2, 6)), True
    )
    assert found["members"] == 2 and found["uncertainty"] == pytest.approx(0, abs=1e-12)


def test_uncertainty_and_errors_by_hand() -> None:
    """Two members. Margins 3 and 1, 2 and 2, -4 and 0: means 2, 2, -2, deviations 1, 0, 2. The one error has the
    largest: a chance of 1 that it lies above a right one."""
    members = np.array([[3.0, 2.0, -4.0], [1.0, 2.0, 0.0]])
    found = metrics.of_pairs(members, np.zeros((2, 3)), np.ones((2, 3)), True)
    assert found["accuracy"] == pytest.approx(2 / 3) and found["uncertainty"] == pytest.approx(1)
    assert (found["uncertainty_right"], found["uncertainty_wrong"], found["uncertainty_auroc"]) == (0.5, 2, 1)
    assert (found["member_accuracy_mean"], found["member_accuracy_min"]) == (pytest.approx(2 / 3), pytest.approx(2 / 3))


def test_scores_by_hand() -> None:
    """Rewards in the order of the scores but not in proportion: ranks correlate fully. Equal ones share a rank."""
    scores, rewards = numbers(0, 1, 2, 3), numbers(0, 1, 4, 9)
    found = metrics.of_scores(rewards[None], scores, numbers(1, 1, 1, 1), "mse")
    assert found["spearman"] == 1 and found["pearson"] == pytest.approx(np.corrcoef(scores, rewards)[0, 1])
    assert found["mse"] == (0 + 0 + 4 + 36) / 4 and found["mse_of_the_mean_score"] == 1.25
    assert "length_correlation" not in found, "all answers are as long"
    assert metrics.ranks(numbers(5, 5, 7)).tolist() == [1.5, 1.5, 3]
    chance = metrics.of_scores(numbers(LN3, -LN3)[None], numbers(0.75, 0.25), numbers(1, 2), "bce")
    assert chance["mse"] == pytest.approx(0)
    assert chance["mean_reward"] == pytest.approx(0) and chance["std_reward"] == pytest.approx(LN3)
