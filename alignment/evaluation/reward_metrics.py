"""How good reward models are on rows that they were not trained on. Several together are an ensemble: its reward is the
mean of its members', its uncertainty their standard deviation (over the members themselves: divided by their number).

Of pairs only margins count, chosen minus rejected: Bradley-Terry leaves a constant of each prompt's rewards open, so
members may differ by it and agree about everything.
"""

from __future__ import annotations

from typing import Any

import numpy as np

BINS = 10
Z = 1.959964  # of a two-sided interval of 95 %


def of_pairs(chosen: np.ndarray, rejected: np.ndarray, lengths: np.ndarray, log_odds: bool) -> dict[str, float]:
    """chosen, rejected: [members, pairs]. lengths: [2, pairs], tokens of the chosen and of the rejected answers.
    log_odds: the sigmoid of a margin is the chance that chosen is better, as Bradley-Terry trains it."""
    members = chosen - rejected
    margins, right = members.mean(0), members.mean(0) > 0  # a tie is not right
    low, high = wilson(int(right.sum()), len(right))
    rewards, longer = np.concatenate([chosen.mean(0), rejected.mean(0)]), lengths[0] - lengths[1]
    unequal = longer != 0
    found = {
        "pairs": float(len(margins)),
        "accuracy": float(right.mean()),
        "accuracy_low": low,
        "accuracy_high": high,
        "margin": float(margins.mean()),
        "mean_reward": float(rewards.mean()),
        "std_reward": float(rewards.std()),
        "length_correlation": pearson(rewards, lengths.reshape(-1)),
        "length_margin_correlation": pearson(margins, longer),
        "longer_preferred": _mean((margins * longer > 0)[unequal]),
        "longer_chosen": _mean((longer > 0)[unequal]),
    }
    if log_odds:
        found |= {"heldout_loss": float(np.logaddexp(0, -margins).mean()), "ece": calibration(margins)[0]}
    if len(members) > 1:
        found |= _ensemble(members, right)
    return {name: value for name, value in found.items() if np.isfinite(value)}


def of_scores(rewards: np.ndarray, scores: np.ndarray, lengths: np.ndarray, loss: str) -> dict[str, float]:
    """rewards: [members, rows]. scores, lengths (tokens of the answers): [rows]. loss: what the members were trained
    with; a reward of Bradley-Terry has no scale to be compared with a score, but an order. mean_reward and std_reward
    are of rewards as they are given, whatever is compared with the scores."""
    predicted = _sigmoid(rewards) if loss == "bce" else rewards
    mean = predicted.mean(0)
    found = {
        "rows": float(len(scores)),
        "pearson": pearson(mean, scores),
        "spearman": pearson(ranks(mean), ranks(scores)),
        "mean_reward": float(rewards.mean(0).mean()),
        "std_reward": float(rewards.mean(0).std()),
        "length_correlation": pearson(mean, lengths),
        "score_length_correlation": pearson(scores, lengths),
    }
    if loss != "bradley_terry":
        found |= {"mse": float(((mean - scores) ** 2).mean()), "mse_of_the_mean_score": float(scores.var())}
    if len(rewards) > 1:
        spread = predicted.std(0)
        found |= {"members": float(len(rewards)), "uncertainty": float(spread.mean())}
        if loss != "bradley_terry":
            found["uncertainty_error_correlation"] = pearson(ranks(spread), ranks(np.abs(mean - scores)))
    return {name: value for name, value in found.items() if np.isfinite(value)}


def _ensemble(members: np.ndarray, right: np.ndarray) -> dict[str, float]:
    """members: [members, pairs], margins. Whether its uncertainty tells where it errs."""
    spread, each = members.std(0), (members > 0).mean(1)
    return {
        "members": float(len(members)),
        "member_accuracy_mean": float(each.mean()),
        "member_accuracy_min": float(each.min()),
        "uncertainty": float(spread.mean()),
        "uncertainty_right": _mean(spread[right]),
        "uncertainty_wrong": _mean(spread[~right]),
        "uncertainty_auroc": auroc(spread[~right], spread[right]),
    }


def calibration(margins: np.ndarray, bins: int = BINS) -> tuple[float, list[dict[str, Any]]]:
    """Expected calibration error (Guo et al. 2017, arXiv:1706.04599, eq. 3) of the chance that a reward model gives to
    the answer that it prefers, sigmoid(|margin|), in equal bins over [0.5, 1]; and its bins, without empty ones:
    {"low", "high", "pairs", "confidence", "accuracy"}."""
    confidence, right = _sigmoid(np.abs(margins)), margins > 0
    number = np.minimum(((confidence - 0.5) * 2 * bins).astype(int), bins - 1)
    found, error = [], 0.0
    for bin_ in np.unique(number):
        inside = number == bin_
        mean, accuracy = float(confidence[inside].mean()), float(right[inside].mean())
        ends = {"low": 0.5 + 0.5 * bin_ / bins, "high": 0.5 + 0.5 * (bin_ + 1) / bins}
        found.append({**ends, "pairs": int(inside.sum()), "confidence": mean, "accuracy": accuracy})
        error += inside.mean() * abs(accuracy - mean)
    return float(error), found


def pearson(one: np.ndarray, other: np.ndarray) -> float:
    """Correlation; NaN where either is constant, or there are fewer than two."""
    if len(one) < 2 or np.ptp(one) == 0 or np.ptp(other) == 0:
        return float("nan")
    return float(np.corrcoef(one, other)[0, 1])


def ranks(values: np.ndarray) -> np.ndarray:
    """From 1; equal values share their mean rank."""
    _, which, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[which]


def auroc(positive: np.ndarray, negative: np.ndarray) -> float:
    """The chance that one of the positives is above one of the negatives, ties half (Mann and Whitney 1947); NaN where
    there are none of either."""
    if not len(positive) or not len(negative):
        return float("nan")
    place = ranks(np.concatenate([positive, negative]))[: len(positive)].sum()
    return float((place - len(positive) * (len(positive) + 1) / 2) / (len(positive) * len(negative)))


def wilson(successes: int, count: int) -> tuple[float, float]:
    """95 % interval of a share (Wilson 1927)."""
    share, square = successes / count, Z**2 / count
    middle, half = share + square / 2, Z * np.sqrt(share * (1 - share) / count + square / (4 * count))
    return max(0.0, float((middle - half) / (1 + square))), min(1.0, float((middle + half) / (1 + square)))


def _sigmoid(values: np.ndarray) -> np.ndarray:
    return np.exp(-np.logaddexp(0, -values))


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if len(values) else float("nan")
