"""Numbers that prepared rows have beside their tokens: margins of pairs, scores of answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from datasets import load_from_disk

from alignment.errors import InputError
from alignment.files import read_json, read_jsonl


def check_margins(data: Path) -> int:
    """That each pair has one. Returns how many are below 0. Raises InputError."""
    columns = [_column(data, split, "margin") for split in ("train", "heldout") if (data / split).is_dir()]
    if None not in columns:
        return sum(value < 0 for column in columns for value in column or ())
    told = _report(data).get("margins") or {}
    where = str(_report(data).get("source") or data)
    if told.get("rows"):
        what = f"`margin` is not of all pairs: {told['rows']} have one"
        one = f"one without is {told['one_without']}" if "one_without" in told else "data_report.json counts them"
        raise InputError(what, where=where, fix=one)
    raise InputError("no pair has a `margin`", where=where, fix="the rows need one each, or margin=0.0")


def check_scores(data: Path, split: str, bounds: tuple[float, float] | None = None) -> None:
    """That each answer of a split has one, within the bounds. Raises InputError that names the first bad row as its
    source has it."""
    scores = _column(data, split, "score")
    if scores is None:
        raise InputError("the rows have no `score`", where=str(data / split), fix="prepare them with task=scored")
    if bounds is None:
        return
    low, high = bounds
    for number, value in enumerate(scores):
        if not low <= value <= high:
            named = data / f"{split}.jsonl"
            name = [row["id"] for row in read_jsonl(named)][number] if named.is_file() else number + 1
            what = f"`score` is {value:g}, not from {low:g} to {high:g}, as chances are"
            where = f"{_report(data).get('source') or data}, row {name}"
            raise InputError(what, where=where, fix="bring the scores there, or train by loss=mse")


def _column(data: Path, split: str, name: str) -> list[float] | None:
    rows = load_from_disk(str(data / split))
    return list(rows[name]) if name in rows.column_names else None


def _report(data: Path) -> dict[str, Any]:
    path = data / "data_report.json"
    return dict(read_json(path)) if path.is_file() else {}
