"""Rows of unlike length, computed together with padding: which of them. Below the rooms that compute some."""

from __future__ import annotations

from collections.abc import Sequence


def by_budget(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Rows by falling length, cut so that rows x longest stays within the budget (a longer row goes alone)."""
    batches: list[list[int]] = []
    longest = 0
    for row in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if not batches or (len(batches[-1]) + 1) * longest > budget:
            batches.append([])
            longest = lengths[row]
        batches[-1].append(row)
    return batches
