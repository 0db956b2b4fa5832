"""What benches write into the pages of docs/: text between markers, and means over seeds."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def markers(name: str) -> tuple[str, str]:
    return f"<!-- {name}:begin -->", f"<!-- {name}:end -->"


def between_markers(page: str, name: str, inside: str) -> str:
    """The page with this text between the markers of that name. Raises ValueError if it has not got them."""
    begin, end = markers(name)
    if page.count(begin) != 1 or page.count(end) != 1 or page.index(begin) > page.index(end):
        raise ValueError(f"the page must have {begin} and after it {end}, once each")
    before, after = page[: page.index(begin)], page[page.index(end) + len(end) :]
    return f"{before}{begin}\n{inside.strip()}\n{end}{after}"


def fill(path: Path, name: str, inside: str) -> None:
    path.write_text(between_markers(path.read_text(), name, inside))


def once_a_seed(rows: Sequence[dict[str, Any]], folder: Path) -> None:
    """Raises SystemExit where runs of other settings lie in the same store."""
    seeds = [row["seed"] for row in rows]
    if len(set(seeds)) < len(seeds):
        raise SystemExit(f"{folder} has runs of other settings too: give --work another folder")


def over_seeds(rows: Sequence[dict[str, Any]], name: str) -> tuple[float, float]:
    """Mean and standard deviation of a number of each seed; the latter is 0 of one seed."""
    values = [row[name] for row in rows]
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0
