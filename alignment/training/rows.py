"""Lengths and weights of tokenised rows, read from Arrow without making Python lists of tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow.compute as pc

from alignment.training.packing import IGNORED


@dataclass(frozen=True)
class Sizes:
    """Of each row. lengths: tokens to compute when packed; widths: when padded beside rows no longer; weights: its part
    in the divisor of the loss."""

    lengths: np.ndarray
    widths: np.ndarray
    weights: np.ndarray


def sft_sizes(rows: Any) -> Sizes:
    """rows: a datasets.Dataset with input_ids, labels. A row weighs its trained tokens."""
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
    return Sizes(np.concatenate(lengths), np.concatenate(lengths), np.concatenate(trained))


def pair_sizes(rows: Any) -> Sizes:
    """rows: a datasets.Dataset with prompt_ids, chosen_ids, rejected_ids. A pair weighs 1; packed, it has its prompt
    once, padded it has two rows as long as the longer one."""
    lengths, widths = [], []
    for table in _tables(rows):
        prompt, chosen, rejected = (_lengths(table, f"{part}_ids") for part in ("prompt", "chosen", "rejected"))
        lengths.append(prompt + chosen + rejected)
        widths.append(2 * (prompt + np.maximum(chosen, rejected)))
    return Sizes(np.concatenate(lengths), np.concatenate(widths), np.ones(len(rows), dtype=np.int64))


def scored_sizes(rows: Any) -> Sizes:
    """rows: a datasets.Dataset with prompt_ids, completion_ids. A row weighs 1."""
    lengths = np.concatenate(
        [_lengths(table, "prompt_ids") + _lengths(table, "completion_ids") for table in _tables(rows)]
    )
    return Sizes(lengths, lengths, np.ones(len(rows), dtype=np.int64))


def column_lengths(rows: Any, column: str) -> np.ndarray:
    """[rows]: tokens of that column of a datasets.Dataset."""
    return np.concatenate([_lengths(table, column) for table in _tables(rows)])


def _tables(rows: Any) -> Any:
    return rows.with_format("arrow").iter(batch_size=10_000)


def _lengths(table: Any, column: str) -> np.ndarray:
    return pc.list_value_length(table.column(column)).to_numpy().astype(np.int64)
