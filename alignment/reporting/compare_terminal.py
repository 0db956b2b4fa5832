"""A sweep in the terminal: what it says in one sentence, the leaderboard, and every point that has no result."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from alignment.files import near
from alignment.reporting import words
from alignment.reporting.comparison import AS_GOOD, BEST, LEVEL, NOTHING, TIED, UNKNOWN, WORSE
from alignment.reporting.inference import CONFIDENCE
from alignment.reporting.settings import called, shown_of
from alignment.reporting.terminal import styled

Row = dict[str, Any]
MOST_ROWS, MOST_SETTINGS, COLUMN = 30, 4, 14
STANDINGS = {BEST: "bold green", AS_GOOD: "green", TIED: "green", WORSE: "red", UNKNOWN: "magenta", NOTHING: "dim"}
BY = {"paired": "paired by seed", "welch": "by Welch's test", "prompts": "by the prompts' noise alone"}


def show(content: Row, console: Console | None = None) -> None:
    """content: of `comparison.compare`."""
    console = console or Console(highlight=False)
    name, points = content["objective"]["metric"], len(content["points"])
    kinds = [*content["keys"].values(), *content["seeds"]]
    varied = f"varied: {', '.join(kinds)}" if kinds else "nothing varied"
    head = (f"  {points} points; {varied}; {content['objective']['direction']} {name}", "dim")
    console.print(Text.assemble((str(content["sweep"]), "bold"), head), soft_wrap=True)
    console.print(Text(content["conclusion"], "bold"))
    if content["groups"]:
        console.print(leaderboard(content, console.width))
        for line in notes(content):
            console.print(Text(line, "dim"), soft_wrap=True)
    if left := [point for point in content["points"] if point["state"] != "done" or not point["measured"]]:
        console.print(points_table(left, content))
    if content.get("wandb_group"):
        console.print(Text(f"the same grouped in W&B: group {content['wandb_group']}", "dim"), soft_wrap=True)


def show_page(page: Path, console: Console | None = None) -> None:
    (console or Console(highlight=False)).print(Text.assemble(("page  ", "dim"), near(page)), soft_wrap=True)


def leaderboard(content: Row, width: int) -> Table:
    """A row a combination of settings, the best first; as many metrics as the width bears, the objective always."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold", padding=(0, 1, 0, 0))
    names = content["keys"]
    separate = len(names) <= MOST_SETTINGS
    for name in names.values() if separate else ("settings",):
        table.add_column(Text(name), overflow="fold")
    table.add_column("seeds", justify="right", no_wrap=True)
    taken = sum(max(len(name), 7) + 2 for name in names.values()) if separate else 40
    shown = content["metrics"][: max(1, (width - taken - 24) // COLUMN)]
    for name in shown:
        table.add_column(Text(words.metric(name).title), justify="right")
    table.add_column("to the best")
    for group in content["groups"][:MOST_ROWS]:
        settings = [shown_of(group["settings"], key) for key in names] if separate else [group["label"]]
        done = f"{len(group['counted'])}/{group['of']}"
        cells = [_cell(name, group["values"].get(name)) for name in shown]
        table.add_row(*map(Text, settings), done, *cells, _standing(group, content))
    return table


def _cell(name: str, value: Row | None) -> Text:
    if not value:
        return Text(words.NOTHING, "dim")
    interval = words.interval(name, value)
    mark = "*" if value["noise"] == "prompts" else ""
    return Text.assemble(words.metric_value(name, value["mean"]), (f"\n{interval}{mark}" if interval else "", "dim"))


def _standing(group: Row, content: Row) -> Text:
    text = Text(group["standing"], STANDINGS[group["standing"]])
    if found := group["difference"]:
        name = content["objective"]["metric"]
        by = {"paired": "", "welch": " w", "prompts": " *"}[found["by"]]
        text.append(f"\n{words.metric_value(name, found['mean'], sign=True)}, p {p_value(found['p_holm'])}{by}", "dim")
    if broken := group["verdicts"].get("broken"):
        text.append(f"\nverdict broken {broken}/{len(group['counted'])}", "red")
    return text


def p_value(p: float) -> str:
    return "<0.001" if p < 0.001 else f"{p:.3f}"


def notes(content: Row) -> list[str]:
    """What the table's brackets and marks are: the same words as on the page."""
    values = [value for group in content["groups"] for value in group["values"].values()]
    by = {group["difference"]["by"] for group in content["groups"] if group["difference"]}
    lines = []
    if any(value["noise"] == "seeds" for value in values):
        lines.append(f"[ ] {100 * CONFIDENCE:.0f} % interval of the mean over seeds (Student's t)")
    prompts = {value["confidence"] for value in values if value["noise"] == "prompts"}
    if prompts:
        given = " or ".join(f"{100 * confidence:g} %" for confidence in sorted(c for c in prompts if c))
        lines.append(f"*   one seed: its own {given} interval over prompts, which says nothing of other seeds")
    if any(value["noise"] is None for value in values):
        lines.append("    without brackets: one seed, so no interval over seeds")
    if apart := content["apart"]:
        lines.append(f"    {', '.join(apart)}: not measured by one judge, rows cannot be compared in it")
    if by:
        how = ", ".join(BY[one] for one in BY if one in by)
        lines.append(f"p   of the difference to the best, {how}; Holm's correction over all pairs of rows")
        lines.append(f"    as good: p is not below {LEVEL:g}; intervals of differences are of each alone, uncorrected")
    if len(content["groups"]) > MOST_ROWS:
        lines.append(f"    {len(content['groups']) - MOST_ROWS} further rows are on the page and in --json")
    return lines


def points_table(points: list[Row], content: Row) -> Table:
    """Points without a result, or whose run is not done: state, settings, run, and what is known of why."""
    names = {**content["keys"], **{key: key for key in content["seeds"]}}
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for column in ("state", "point", "run", "because"):
        table.add_column(column, overflow="fold")
    for point in points:
        name = called(point["settings"], names) if point["settings"] else f"point {point['number']}"
        table.add_row(
            styled(point["state"]), Text(name), Text(point["run"] or words.NOTHING), Text(point["note"] or "")
        )
    return table


def show_list(sweeps: list[Row], store: Path, console: Console | None = None) -> None:
    console = console or Console(highlight=False)
    if not sweeps:
        console.print(Text(f"no sweeps in {near(store)}"), soft_wrap=True)
        return
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold")
    for column in ("sweep", "points", "created", "command"):
        table.add_column(column, overflow="fold", justify="right" if column == "points" else "left")
    for sweep in sweeps:
        told = Text(sweep["problem"], "red") if sweep["problem"] else Text(str(sweep["command"] or ""), "dim")
        table.add_row(Text(sweep["sweep"]), str(sweep["points"]), words.moment(sweep["created"]), told)
    console.print(table)
