"""How many rows a stage will train on, where preparation has looked at the first ones only."""

from __future__ import annotations

from collections.abc import Mapping

from alignment.config.sources import Dataset
from alignment.config.stages.preparing import Splits


def trained_on(
    data: Mapping[str, Dataset], found: Mapping[str, int | None], fit: Mapping[str, float], splits: Splits
) -> int | None:
    """Rows of the split `train`, about. found: data set -> its rows; fit: the share of those looked at that passed.

    As data/splitting.py mixes them: each as often as its epochs say, and no more of them than its weight allows. None
    where the rows of one are not known, and train is all that is left.
    """
    if any(found[name] is None for name in data):
        return splits.train
    taken: dict[str, float] = {}
    for name, one in data.items():
        count = min(found[name] or 0, one.limit or 1 << 62) * fit[name]
        taken[name] = min(count, one.cap or 1 << 62)
    whole = sum(taken.values())
    left = max(1 - (splits.heldout + splits.prompts) / whole, 0.0) if whole else 0.0
    wanted = {name: count * left * data[name].epochs for name, count in taken.items()}
    weights = {name: one.weight for name, one in data.items() if one.weight is not None}
    if weights:
        most = sum(weights.values())
        total = min(wanted[name] * most / weight for name, weight in weights.items())
        wanted = {name: total * weight / most for name, weight in weights.items()}
    rows = round(sum(wanted.values()))
    return rows if splits.train is None else min(rows, splits.train)
