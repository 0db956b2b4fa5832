"""Lengths and weights of tokenised rows, read from Arrow without making Python lists of tokens."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow.compute as pc

IGNORED = -100


def sft_sizes(rows: Any) -> tuple[list[int], list[int]]:
    """rows: a datasets.Dataset with input_ids, labels. Returns tokens and trained tokens of each row."""
    lengths, trained = [], []
    for table in _tables(rows):
        lengths.append(_lengths(table, "input_ids"))
        labels = table.column("labels").combine_chunks()
        counts = _lengths(table, "labels")
        firsts = np.concatenate([[0], np.cumsum(counts)])
        marked = labels.flatten().to_numpy(zero_copy_only=False) != IGNORED
        before = np.concatenate([[0], np.cumsum(marked)])
        # the first token of a row has no position before it to be predicted from
        first = np.where(counts > 0, np.append(marked, False)[firsts[:-1]], False)
        trained.append(before[firsts[1:]] - before[firsts[:-1]] - first)
    return np.concatenate(lengths).tolist(), np.concatenate(trained).tolist()


def pair_sizes(rows: Any) -> tuple[list[int], list[int]]:
    """rows: a datasets.Dataset with prompt_ids, chosen_ids, rejected_ids. Returns tokens of both sides, and 1s."""
    lengths = []
    for table in _tables(rows):
        longer = np.maximum(_lengths(table, "chosen_ids"), _lengths(table, "rejected_ids"))
        lengths.append(2 * (_lengths(table, "prompt_ids") + longer))
    return np.concatenate(lengths).tolist(), [1] * len(rows)


def _tables(rows: Any) -> Any:
    return rows.with_format("arrow").iter(batch_size=10_000)


def _lengths(table: Any, column: str) -> np.ndarray:
    return pc.list_value_length(table.column(column)).to_numpy().astype(np.int64)
