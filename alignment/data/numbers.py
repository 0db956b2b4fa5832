"""Numbers that prepared rows have beside their tokens: margins of pairs, scores of answers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from datasets import load_from_disk

from alignment.errors import InputError
from alignment.files import read_json, read_jsonl

SPLITS = ("train", "heldout")


def check_margins(data: Path) -> int:
    """That each pair has one. Returns how many are below 0. Raises InputError."""
    report = _report(data)
    if any(column is None for _, column, _ in _columns(data, "margin")):
        told = report.get("margins") or {}
        what = (
            f"`margin` is not of all pairs: {told['rows']} have one" if told.get("rows") else "no pair has a `margin`"
        )
        first = told.get("first_without")
        fix = f"the first without is {first}" if told.get("rows") and first else "the rows need one each, or margin=0.0"
        raise InputError(what, where=str(report.get("source") or data), fix=fix)
    return sum(value < 0 for _, column, _ in _columns(data, "margin") for value in column or ())


def check_scores(data: Path, low: float | None = None, high: float | None = None) -> None:
    """That each answer has one, from low to high; also of those held out. Raises InputError that names the first bad
    row as its source has it."""
    for split, column, ids in _columns(data, "score"):
        if column is None:
            raise InputError("the rows have no `score`", where=str(data / split), fix="prepare them with task=scored")
        for value, name in zip(column, ids, strict=True):
            if (low is not None and value < low) or (high is not None and value > high):
                what = f"`score` is {value:g}, not from {low:g} to {high:g}, as chances are"
                where = f"{_report(data).get('source') or data}, row {name}"
                raise InputError(what, where=where, fix="bring the scores there, or loss=mse")


def _columns(data: Path, name: str) -> Iterator[tuple[str, list[float] | None, list[Any]]]:
    """Of each split: its name, the numbers, and what the rows are called; None where rows have no such number."""
    for split in SPLITS:
        if (data / split).is_dir():
            rows, named = load_from_disk(str(data / split)), data / f"{split}.jsonl"
            ids = [row["id"] for row in read_jsonl(named)] if named.is_file() else list(range(1, len(rows) + 1))
            yield split, list(rows[name]) if name in rows.column_names else None, ids


def _report(data: Path) -> dict[str, Any]:
    path = data / "data_report.json"
    return dict(read_json(path)) if path.is_file() else {}
