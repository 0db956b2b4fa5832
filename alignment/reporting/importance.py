"""How much of the differences between a sweep's points each setting explains: one-way sums of squares.

The share of a setting is eta squared: the sum of squares between its levels over the total one. On a full grid, where
every combination was measured equally often, settings are orthogonal, so their shares, that of their interactions and
that of repetitions (seed and noise) add up to 1 (Fisher's analysis of variance). Elsewhere (random search, Optuna, a
grid with holes) each share is one-way: settings that moved together share what they explain, and nothing need add up.
Chance alone explains something too; how much is said by shuffling the results.
"""

from __future__ import annotations

import math
import random
from collections import Counter, defaultdict
from collections.abc import Sequence
from itertools import groupby
from typing import Any

from alignment.config.varied import level_of
from alignment.reporting.inference import mean
from alignment.reporting.settings import numeric

Row = dict[str, Any]
MOST_LEVELS, BINS, SHUFFLES = 6, 5, 200
Rows = Sequence[tuple[Row, float]]  # a point's settings and its result


def importance(rows: Rows, keys: Sequence[str]) -> Row:
    """{"method": "grid" | "one-way" | None, "points", "settings": [{"key", "share", "by_chance", "levels", "binned"}],
    "interactions", "noise": shares, or None where they cannot be told}.

    keys: the varied settings but the seeds. The biggest share comes first. by_chance: what 1 of 20 shufflings of the
    results over the points exceeds. method is None where there is nothing to explain: all results equal, or one point.
    """
    results = [result for _, result in rows]
    told: Row = {"method": None, "points": len(rows), "settings": [], "interactions": None, "noise": None}
    total = _squares(results)
    if total <= 0:
        return told
    combined = [tuple(level_of(settings, key) for key in keys) for settings, _ in rows]
    grid = is_grid(combined)
    levels = {key: [one[i] for one in combined] if grid else _levels(rows, key) for i, key in enumerate(keys)}
    chance = _by_chance(levels, results)
    for key in keys:
        one: Row = {"key": key, "share": between(levels[key], results) / total, "by_chance": chance[key] / total}
        binned = len(set(levels[key])) < len({level_of(settings, key) for settings, _ in rows})
        told["settings"].append({**one, "levels": len(set(levels[key])), "binned": binned})
    told["settings"].sort(key=lambda one: -one["share"])
    told["method"] = "grid" if grid else "one-way"
    explained = between(combined, results)
    repeated = len(rows) - len(set(combined))
    if grid:
        main = sum(one["share"] for one in told["settings"])
        told["interactions"] = max(0.0, explained / total - main) if len(keys) > 1 else None
    if repeated:  # the variance within combinations, as if each point had its own; on a grid the exact rest
        within = (total - explained) / (1 if grid else repeated / (len(rows) - 1))
        told["noise"] = min(1.0, max(0.0, within / total))
    return told


def is_grid(combined: Sequence[tuple[str, ...]]) -> bool:
    """Whether all combinations of the levels are there, each equally often."""
    counts = Counter(combined)
    sizes = [len(set(column)) for column in zip(*combined, strict=True)]
    return len(counts) == math.prod(sizes) and len(set(counts.values())) == 1


def between(levels: Sequence[Any], results: Sequence[float]) -> float:
    """Sum over levels of n_level (mean of the level - mean of all)^2."""
    found = defaultdict(list)
    for one, result in zip(levels, results, strict=True):
        found[one].append(result)
    centre = mean(results)
    return math.fsum(len(few) * (sum(few) / len(few) - centre) ** 2 for few in found.values())


def _squares(results: Sequence[float]) -> float:
    if len(results) < 2 or all(result == results[0] for result in results):
        return 0.0
    centre = mean(results)
    return math.fsum((result - centre) ** 2 for result in results)


def _levels(rows: Rows, key: str) -> list[str]:
    """A level for each point; numbers of more than MOST_LEVELS values fall into bins of about equal size by rank.

    Points that lack the setting are a level of their own.
    """
    levels = [level_of(settings, key) for settings, _ in rows]
    values = {i: settings[key] for i, (settings, _) in enumerate(rows) if key in settings}
    if len(set(levels)) <= MOST_LEVELS or not all(numeric(value) for value in values.values()):
        return levels
    bins = max(2, min(BINS, len(values) // 4))
    rank = 0
    for _, equal in groupby(sorted(values, key=values.__getitem__), key=values.__getitem__):
        few = list(equal)
        for i in few:  # equal values fall into one bin, that of their first
            levels[i] = str(rank * bins // len(values))
        rank += len(few)
    return levels


def _by_chance(levels: dict[str, list[str]], results: list[float]) -> dict[str, float]:
    """For each setting the sum of squares between its levels that 5 % of shufflings exceed; the same every time."""
    chance, shuffled = random.Random(0), list(results)
    found: dict[str, list[float]] = {key: [] for key in levels}
    for _ in range(SHUFFLES):
        chance.shuffle(shuffled)
        for key, one in levels.items():
            found[key].append(between(one, shuffled))
    return {key: sorted(few)[math.ceil(0.95 * SHUFFLES) - 1] for key, few in found.items()}
