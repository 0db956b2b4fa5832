from __future__ import annotations

import math

import numpy as np
import pytest

from alignment.evaluation.statistics import Comparison, Interval, bootstrap_mean, paired_difference

HOW = {"confidence": 0.95, "resamples": 2000, "seed": 0}


def test_of_two_values_the_bootstrap_distribution_is_known() -> None:
    """Means of two draws from {0, 1} are 0, 1/2, 1 with probabilities 1/4, 1/2, 1/4.

    So the quantiles at 2.5 % and 97.5 % are 0 and 1; those at 30 % and 70 % are both 1/2.
    """
    assert bootstrap_mean([0.0, 1.0], **HOW) == Interval(0.5, 0.0, 1.0)
    assert bootstrap_mean([0.0, 1.0], **{**HOW, "confidence": 0.4}) == Interval(0.5, 0.5, 0.5)


def test_of_one_in_five_the_quantiles_are_those_of_the_binomial() -> None:
    """Five draws with one 1 in five values: the count of ones is Binomial(5, 1/5).

    P(0) = .328, P(<=2) = .942, P(<=3) = .9933: the 97.5 % quantile is 3 of 5, the 2.5 % quantile 0.
    """
    assert bootstrap_mean([0.0, 0.0, 1.0, 0.0, 0.0], **HOW) == Interval(0.2, 0.0, 0.6)


def test_of_equal_values_the_interval_has_no_width() -> None:
    assert bootstrap_mean([3.0] * 9, **HOW) == Interval(3.0, 3.0, 3.0)


def test_one_value_says_nothing_about_how_sure_it_is() -> None:
    """No bounds, and None where results hold them: a single prompt is no interval without width."""
    found = bootstrap_mean([10.0], confidence=0.95, resamples=100, seed=0)
    assert (found.mean, found.low, found.high) == (10.0, -math.inf, math.inf)
    assert found.told() == {"mean": 10.0, "low": None, "high": None}
    values = {"start": {"reward": [1.0, None]}, "dpo": {"reward": [11.0, 3.0]}}
    (row,) = Comparison(values, {}, 0.95, 100, 0).table("start")
    assert row["prompts"] == 1 and row["difference"] == {"dpo": {"mean": 10.0, "low": None, "high": None}}


def test_for_many_values_the_interval_is_that_of_the_normal_distribution() -> None:
    """Of 400 values with standard deviation s: mean +- 1.96 s / 20."""
    values = np.random.default_rng(1).normal(2.0, 3.0, 400)
    found = bootstrap_mean(values.tolist(), **HOW)
    half = 1.96 * values.std() / 20
    assert found.low == pytest.approx(values.mean() - half, abs=0.03)
    assert found.high == pytest.approx(values.mean() + half, abs=0.03)


def test_the_interval_covers_the_true_mean_as_often_as_it_says() -> None:
    """300 samples of 40 from a skewed distribution of mean 1: about 95 % should cover it."""
    draw = np.random.default_rng(2)
    intervals = [
        bootstrap_mean(draw.exponential(1.0, 40).tolist(), confidence=0.95, resamples=300, seed=i) for i in range(300)
    ]
    covered = sum(i.low <= 1.0 <= i.high for i in intervals) / 300
    assert 0.88 <= covered <= 0.98


def test_a_seed_gives_the_same_interval_and_no_values_none() -> None:
    values = np.random.default_rng(3).normal(size=30).tolist()
    assert bootstrap_mean(values, **HOW) == bootstrap_mean(values, **HOW)
    assert bootstrap_mean(values, **HOW) != bootstrap_mean(values, **{**HOW, "seed": 1})
    with pytest.raises(ValueError, match="no values"):
        bootstrap_mean([], **HOW)


def test_pairing_cancels_what_makes_a_prompt_hard() -> None:
    """Values that spread over 100, the candidate always 1 or 3 better: 2 on average, known closely."""
    base = [float(10 * i) for i in range(10)]
    candidate = [value + (1.0 if i % 2 else 3.0) for i, value in enumerate(base)]
    found = paired_difference(candidate, base, **HOW)
    assert found.mean == 2.0
    assert 1.0 < found.low < 2.0 < found.high < 3.0
    unpaired = bootstrap_mean(base, **HOW)
    assert unpaired.high - unpaired.low > 10 * (found.high - found.low)


def test_pairs_must_be_complete() -> None:
    with pytest.raises(ValueError, match="zip"):
        paired_difference([1.0, 2.0], [1.0], **HOW)


def comparison() -> Comparison:
    values = {
        "start": {"reward": [0.0, 0.0, 0.0], "heldout_nll": [1.0, None, 3.0], "odd": [None, 1.0, None]},
        "dpo": {"reward": [1.0, 1.0, 1.0], "heldout_nll": [2.0, 5.0, 4.0], "odd": [1.0, None, 1.0]},
    }
    return Comparison(values, {"heldout_nll": False}, 0.95, 100, 0)


def test_the_table_has_a_row_a_metric_with_differences_from_the_baseline() -> None:
    """heldout_nll is compared on the prompts that both models have (1, 3 against 2, 4); `odd` has no such prompt."""
    reward, nll = comparison().table("start")
    assert reward == {
        "metric": "reward",
        "higher_is_better": True,
        "prompts": 3,
        "values": {"start": {"mean": 0.0, "low": 0.0, "high": 0.0}, "dpo": {"mean": 1.0, "low": 1.0, "high": 1.0}},
        "difference": {"dpo": {"mean": 1.0, "low": 1.0, "high": 1.0}},
    }
    assert (nll["metric"], nll["higher_is_better"], nll["prompts"]) == ("heldout_nll", False, 2)
    assert (nll["values"]["start"]["mean"], nll["values"]["dpo"]["mean"]) == (2.0, 3.0)
    assert nll["difference"]["dpo"] == {"mean": 1.0, "low": 1.0, "high": 1.0}
