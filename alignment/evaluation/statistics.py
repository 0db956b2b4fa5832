"""Means with confidence intervals, and differences between models answering the same prompts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from alignment.evaluation.signals import Column

BLOCK = 1 << 20  # values drawn at once: 16 MB


@dataclass(frozen=True)
class Interval:
    """A mean and the bounds of its confidence interval; of what says nothing about how sure it is, infinite ones."""

    mean: float
    low: float
    high: float

    def told(self) -> dict[str, float | None]:
        """As results hold it: bounds that are not known are None."""
        return {name: value if np.isfinite(value) else None for name, value in asdict(self).items()}


def bootstrap_mean(values: Sequence[float], *, confidence: float, resamples: int, seed: int) -> Interval:
    """Mean of the values with the percentile bootstrap interval (Efron & Tibshirani 1993, ch. 13).

    Each resample draws as many values as there are, with replacement; the bounds are quantiles of the resamples' means.
    Deterministic in seed. With fewer than about 20 values the interval is too narrow, and of equal values it has no
    width: it says nothing about what was never seen. One value has no bounds. Raises ValueError without values.
    """
    if not len(values):
        raise ValueError("no values")
    sample = np.asarray(values, dtype=np.float64)
    if len(sample) == 1:
        return Interval(float(sample[0]), -math.inf, math.inf)
    draw = np.random.default_rng(seed)
    block = max(1, BLOCK // len(sample))
    resampled = [
        sample[draw.integers(0, len(sample), (min(block, resamples - start), len(sample)))].mean(1)
        for start in range(0, resamples, block)
    ]
    low, high = np.quantile(np.concatenate(resampled), [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(float(sample.mean()), float(low), float(high))


def paired_difference(
    candidate: Sequence[float], baseline: Sequence[float], *, confidence: float, resamples: int, seed: int
) -> Interval:
    """Mean of candidate[i] - baseline[i] with its interval: prompts are resampled, what makes one hard cancels."""
    differences = [c - b for c, b in zip(candidate, baseline, strict=True)]
    return bootstrap_mean(differences, confidence=confidence, resamples=resamples, seed=seed)


@dataclass(frozen=True)
class Comparison:
    """Models on the same prompts. values: model -> metric -> one value a prompt, prompts in one order for all.
    better: metric -> whether more of it is better, None: neither; what it lacks is better high."""

    values: Mapping[str, Mapping[str, Column]]
    better: Mapping[str, bool | None]
    confidence: float
    resamples: int
    seed: int

    @property
    def metrics(self) -> list[str]:
        """Those for which at least one prompt has a value of every model."""
        first = next(iter(self.values.values()))
        return [name for name in first if all(name in m for m in self.values.values()) and self._shared(name)]

    def prompts(self, metric: str) -> int:
        """How many have a value of every model: those that its means and intervals are of."""
        return len(self._shared(metric))

    def mean(self, metric: str, model: str) -> Interval:
        return bootstrap_mean(self._of(metric, model), **self._how())

    def difference(self, metric: str, model: str, against: str) -> Interval:
        return paired_difference(self._of(metric, model), self._of(metric, against), **self._how())

    def table(self, baseline: str) -> list[dict[str, Any]]:
        """A row a metric: every model's mean, and every other model's difference from the baseline. prompts: of how
        many, those with a value of every model."""
        return [
            {
                "metric": metric,
                "higher_is_better": self.better.get(metric, True),
                "prompts": self.prompts(metric),
                "values": {model: self.mean(metric, model).told() for model in self.values},
                "difference": {m: self.difference(metric, m, baseline).told() for m in self.values if m != baseline},
            }
            for metric in self.metrics
        ]

    def _how(self) -> dict[str, Any]:
        return {"confidence": self.confidence, "resamples": self.resamples, "seed": self.seed}

    def _shared(self, metric: str) -> list[int]:
        """Prompts with a value of every model: a mean over other prompts than its neighbour's is no comparison."""
        table = [model[metric] for model in self.values.values()]
        return [i for i, values in enumerate(zip(*table, strict=True)) if None not in values]

    def _of(self, metric: str, model: str) -> list[float]:
        column = self.values[model][metric]
        return [value for i in self._shared(metric) if (value := column[i]) is not None]
