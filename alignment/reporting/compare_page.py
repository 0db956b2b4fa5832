"""compare.html: what a sweep has taught, one file with everything in it, in the look of report.html."""

from __future__ import annotations

import base64
import hashlib
from pathlib import Path
from typing import Any
from urllib.parse import quote

from alignment.files import write_text
from alignment.reporting import compare_charts, words
from alignment.reporting.compare_terminal import notes, p_value
from alignment.reporting.comparison import AS_GOOD, BEST, NOTHING, TIED, UNKNOWN, WORSE
from alignment.reporting.page import HERE, template_of
from alignment.reporting.settings import called, shown, shown_of

Row = dict[str, Any]
TONES = {BEST: "good", AS_GOOD: "moved", TIED: "moved", WORSE: "bad", UNKNOWN: "same", NOTHING: "same"}
BY = {"paired": "paired by seed", "welch": "Welch", "prompts": "prompts' noise alone"}
METHODS = {
    "grid": "Every combination was measured equally often, so the shares are exact and add up to all of the variance.",
    "one-way": "The combinations are no full grid, so each share is one-way: settings that changed together share what "
    "they explain, and the shares need not add up.",
}


def write_page(content: Row, folder: Path) -> Path:
    """Render <folder>/compare.html from the content of `comparison.compare`, and return its path."""
    path = folder / "compare.html"
    write_text(path, render(content))
    return path


def render(content: Row) -> str:
    """The page as text. Every text of settings and errors is escaped; scripts run only if their hash is the page's."""
    from markupsafe import Markup

    style, script = ((HERE / name).read_text(encoding="utf-8") for name in ("report.css", "report.js"))
    template = template_of("compare.html.jinja", colour=compare_charts.colour, shown=shown)
    return template.render(
        content=content,
        style=Markup(style + (HERE / "compare.css").read_text(encoding="utf-8")),
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        headline=headline(content),
        rows=rows(content),
        notes=notes(content),
        frontier=compare_charts.frontier(content),
        parallel=compare_charts.parallel(content),
        axes=len(compare_charts.drawn_keys(content)),
        importance=importance(content),
        curves=compare_charts.curves(content),
        points=points(content),
    )


def headline(content: Row) -> Row:
    """{"class", "word", "claim", "because"}: the conclusion, its first part large."""
    standings = [group["standing"] for group in content["groups"] if group["standing"] != NOTHING]
    if not standings:
        class_, word = "same", "No result yet"
    elif len(standings) == 1:
        class_, word = "same", "Nothing to compare"
    elif content["objective"]["metric"] in content["apart"]:
        class_, word = "same", "Not comparable"
    elif standings[0] == TIED:
        class_, word = "same", "Tied"
    elif set(standings[1:]) == {WORSE}:
        class_, word = "good", "Clear lead"
    else:
        class_, word = "same", "Within noise" if AS_GOOD in standings else "Noise not known"
    claim, _, because = content["conclusion"].partition("; ")
    return {"class": class_, "word": word, "claim": f"{claim.rstrip('.')}.", "because": because}


def rows(content: Row) -> list[Row]:
    """The leaderboard's rows, ready to be written."""
    groups, name = content["groups"], content["objective"]["metric"]
    charts = compare_charts.mean_chart([(i, group["values"].get(name)) for i, group in enumerate(groups)], name)
    found = []
    for i, (group, chart) in enumerate(zip(groups, charts, strict=True)):
        cells = [_cell(metric, group["values"].get(metric)) for metric in content["metrics"]]
        told: Row = {"settings": [shown_of(group["settings"], key) for key in content["keys"]], "cells": cells}
        broken = group["verdicts"].get("broken", 0)
        warning = f"verdict broken in {broken} of {len(group['counted'])}" if broken else ""
        told.update(colour=compare_charts.colour(i), chart=chart, group=group, broken=warning)
        told.update(tone=TONES[group["standing"]], difference=_difference(name, group["difference"]))
        found.append(told)
    return found


def _cell(metric: str, value: Row | None) -> Row:
    if not value:
        return {"mean": words.NOTHING, "interval": ""}
    mark = "*" if value["noise"] == "prompts" else ""
    interval = words.interval(metric, value)
    return {"mean": words.metric_value(metric, value["mean"]), "interval": interval + mark if interval else ""}


def _difference(metric: str, found: Row | None) -> Row | None:
    if not found:
        return None
    how = f"{BY[found['by']]}, {found['n']} seeds" if found["by"] != "prompts" else BY["prompts"]
    mean = words.metric_value(metric, found["mean"], sign=True)
    return {
        "mean": mean,
        "interval": words.interval(metric, found, sign=True),
        "p": p_value(found["p_holm"]),
        "how": how,
    }


def importance(content: Row) -> Row:
    """{"bars": [{"name", "share", "chance", "text", "class", "tip"}], "method": a sentence, or None, "noise": ...}."""
    told, names = content["importance"], content["keys"]
    bars = []
    for one in told["settings"]:
        chance = 100 * one["by_chance"]
        kind = "real" if one["share"] > one["by_chance"] else "chance"
        tip = (
            f"{one['key']}\n{_percent(one['share'])} of the variance; chance alone reaches {_percent(one['by_chance'])}"
        )
        bars.append(_bar(names[one["key"]], one["share"], kind, tip) | {"chance": min(100.0, chance)})
    if told["interactions"] is not None:
        name = "interactions" if told["noise"] is not None else "interactions and noise"
        bars.append(_bar(name, told["interactions"], "other", f"{name}: what settings do only together"))
    if told["noise"] is not None:
        bars.append(_bar("seed and noise", told["noise"], "other", "between points that differ in nothing but seeds"))
    binned = [names[one["key"]] for one in told["settings"] if one["binned"]]
    return {"bars": bars, "method": METHODS.get(told["method"] or ""), "binned": binned, "told": told}


def _bar(name: str, share: float, kind: str, tip: str) -> Row:
    return {"name": name, "share": 100 * share, "text": _percent(share), "class": kind, "tip": tip, "chance": None}


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def points(content: Row) -> list[Row]:
    """Every point of the sweep by number: {"point", "name", "value", "link", "note"}."""
    names = {**content["keys"], **{key: key for key in content["seeds"]}}
    place = {point["number"]: i for i, group in enumerate(content["groups"]) for point in group["points"]}
    found = []
    for point in content["points"]:
        value = point["metrics"].get(content["objective"]["metric"])
        note = point["note"] or ""
        if point.get("repeats"):
            note = f"the same result as point {point['repeats']}: counted once"
        name = called(point["settings"], names) if point["settings"] else ""
        link = f"../../runs/{quote(point['run'])}/report.html" if point["report"] else None
        mean = words.metric_value(content["objective"]["metric"], value["mean"]) if value else words.NOTHING
        group = place.get(point["number"])
        colour = compare_charts.colour(group) if group is not None else "rest"
        found.append({"point": point, "name": name, "value": mean, "link": link, "note": note, "colour": colour})
    return found
