"""Rows as the model sees them, in the terminal and as a page: what is trained on is coloured."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from alignment.files import write_text
from alignment.reporting import svg
from alignment.reporting.page import HERE, template_of

BAR, MARKS = "│", ("⟦", "⟧")
WIDTH, HEIGHT = 640, 150  # of a histogram, in units of its picture


def show(row: dict[str, Any]) -> None:
    """Trained tokens green, others dim; two shades, so that each token is seen. Without colours bars stand between
    tokens, and what is trained between MARKS."""
    from rich.console import Console
    from rich.text import Text

    console, text = Console(highlight=False), Text()
    plain = console.no_color or console.color_system is None
    facts = ", ".join([f"{row['tokens']} tokens, {row['trained']} trained", *(_said(row))])
    console.print(Text(f"\n{row['source']}  {row['where']}  {facts}", style="bold"))
    for name, pieces in row["parts"].items():
        if len(row["parts"]) > 1:
            text.append(f"{name}: ", style="bold")
        if plain:
            text.append(_marked(pieces))
        for number, (piece, _, trained) in enumerate(pieces if not plain else ()):
            colour = ("green", "bright_green") if trained else ("white", "bright_black")
            text.append(_visible(piece), style=colour[number % 2])
        text.append("\n")
    console.print(text, end="")


def _marked(pieces: Sequence[tuple[str, Any, bool]]) -> str:
    found = []
    for trained, run in groupby(pieces, key=lambda piece: bool(piece[2])):
        text = BAR.join(_visible(piece) for piece, *_ in run)
        found.append(f"{MARKS[0]}{text}{MARKS[1]}" if trained else text)
    return BAR.join(found)


def _said(row: dict[str, Any]) -> list[str]:
    return [f"{name} {value}" for name, value in row["said"].items()]


def _visible(piece: str) -> str:
    return piece.replace("\n", "⏎\n") or "∅"


def write_page(findings: list[dict[str, Any]], path: Path) -> None:
    from markupsafe import Markup

    stages: dict[str, dict[str, Any]] = {}
    for finding in findings:
        stage = stages.setdefault(finding["check"], {"rows": [], "told": [], "charts": []})
        if finding["state"] == "row":
            stage["rows"].append({**finding["row"], "said": _said(finding["row"])})
        elif finding["state"] == "lengths":
            stage["charts"] = [
                {"name": name, "picture": _histogram(bins)} for name, bins in finding["histograms"].items()
            ]
        else:
            stage["told"].append(finding)
    style = Markup((HERE / "report.css").read_text(encoding="utf-8"))
    write_text(path, template_of("rows.html.jinja", visible=_visible).render(stages=stages, style=style))


def _histogram(bins: list[list[int]]) -> Any:
    """Rows by length. Bars have their numbers as titles."""
    if not bins:
        return ""
    most, wide = max(rows for *_, rows in bins), WIDTH / len(bins)
    bars = []
    for number, (low, high, rows) in enumerate(bins):
        height = (HEIGHT - 24) * rows / most
        title = svg.tag("title", f"{low} to {high} tokens: {rows} rows")
        place = {"x": round(number * wide, 1), "y": round(HEIGHT - 20 - height, 1)}
        bars.append(svg.tag("rect", title, **place, width=round(wide - 1, 1), height=round(height, 1)))
    labels = [
        svg.tag("text", str(bins[0][0]), x=0, y=HEIGHT - 4),
        svg.tag("text", str(bins[-1][1]), x=WIDTH, y=HEIGHT - 4, text_anchor="end"),
    ]
    return svg.tag("svg", *bars, *labels, viewBox=f"0 0 {WIDTH} {HEIGHT}", class_="lengths m1", role="img")
