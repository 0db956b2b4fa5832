"""The figures of a sweep's page, each from plain values to one SVG. Combinations keep their colour in all of them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from markupsafe import Markup, escape

from alignment.config.varied import level
from alignment.reporting import sweep_curves
from alignment.reporting.charts import Panel, thinned
from alignment.reporting.settings import UNSET, numeric, shown
from alignment.reporting.svg import Frame, marker, padded, path, tag, tick_labels, ticks
from alignment.reporting.words import interval, metric, metric_value, number

Row = dict[str, Any]
COLOURED = 12  # combinations with a colour of their own; the others are grey
MOST_AXES, LONGEST_NAME = 9, 32
BUDGET = 6000  # points of all lines of one panel of curves
APART = 15.0  # least distance of two tick labels, in units of the drawing


def colour(group: int) -> str:
    """The class that sets a combination's colour, by its place in the leaderboard."""
    return f"g{group}" if group < COLOURED else "rest"


def mean_chart(values: list[tuple[int, Row | None]], name: str) -> list[Markup]:
    """For each row of the leaderboard its mean and interval on one scale for all, the best's mean as a line."""
    known = [value for _, value in values if value]
    if not known:
        return [Markup("") for _ in values]
    ends = [end for value in known for end in (value["mean"], value["low"], value["high"]) if end is not None]
    frame = Frame(170, 26, padded(ends), (0, 1), 6, 6, 0, 0)
    home = frame.fx(known[0]["mean"])
    drawn = []
    for group, value in values:
        if not value:
            drawn.append(Markup(""))
            continue
        parts = [tag("line", class_="level", x1=home, x2=home, y1=1, y2=25)]
        if value["low"] is not None and value["high"] is not None:
            parts.append(
                tag("line", class_="whisker", x1=frame.fx(value["low"]), x2=frame.fx(value["high"]), y1=13, y2=13)
            )
        parts.append(marker(group, frame.fx(value["mean"]), 13.0, 4, class_="point"))
        told = f"{metric_value(name, value['mean'])} {interval(name, value)}"
        drawn.append(frame.svg(*parts, name=told, class_=f"plot small {colour(group)}"))
    return drawn


# --- reward against KL -----------------------------------------------------------------------------------------------


def frontier(content: Row) -> Markup | None:
    """Every point at (KL, reward), the combinations' means, and the line of those that no other beats in both."""
    told, groups = content["frontier"], content["groups"]
    if not told["points"]:
        return None
    kls, rewards = ([point[name] for point in told["points"]] for name in ("kl", "reward"))
    wide = padded(kls, 0.1)
    frame = Frame(720, 400, (min(wide[0], 0.0), wide[1]), padded(rewards, 0.12), left=48, top=30, bottom=44)
    parts = [frame.axes("log-ratio to the reference (nats per answer)", "mean reward", x_about=7, y_about=5)]
    means = {one["group"]: (frame.fx(one["kl"]), frame.fy(one["reward"])) for one in told["groups"]}
    parts.append(tag("path", class_="front", d=_steps([means[group] for group in told["pareto"]], frame)))
    for point in reversed(told["points"]):
        dot = tag("circle", cx=frame.fx(point["kl"]), cy=frame.fy(point["reward"]), r=2.6, class_="dot seed")
        tip = f"{groups[point['group']]['label']}, point {point['number']}\n{_place(point)}"
        parts.append(tag("g", dot, class_=f"hot {colour(point['group'])}", data_tip=tip))
    names = _names(frame, [(i, groups[i]["label"], means[i]) for i in sorted(told["pareto"]) if i < COLOURED])
    for one in reversed(told["groups"]):
        x, y = means[one["group"]]
        label = groups[one["group"]]["label"]
        on = "\non the frontier" if one["group"] in told["pareto"] else ""
        shape = marker(one["group"], x, y, 6 if one["group"] < COLOURED else 4, class_="point")
        name = names.get(one["group"], Markup(""))
        tip = f"{label}, mean\n{_place(one)}{on}"
        parts.append(tag("g", shape, name, class_=f"hot {colour(one['group'])}", data_tip=tip, tabindex=0))
    return frame.svg(*parts, name="Mean reward against log-ratio to the reference, every point and the Pareto frontier")


def _place(one: Row) -> str:
    return f"reward {metric_value('reward', one['reward'])}\nKL {metric_value('kl', one['kl'])} nats"


def _steps(points: list[tuple[float, float]], frame: Frame) -> str:
    """A stair from the first to the right edge: what is reached at a KL is the best that needs no more than that."""
    if not points:
        return ""
    corners = [points[0]]
    for (_, y0), (x1, y1) in pairwise(points):
        corners += [(x1, y0), (x1, y1)]
    return path([*corners, (frame.width - frame.right, corners[-1][1])])


def _names(frame: Frame, wanted: list[tuple[int, str, tuple[float, float]]]) -> dict[int, Markup]:
    """The names of the first that have room for theirs beside those before them. wanted: (group, label, its place)."""
    drawn, taken = {}, list[tuple[float, float, float]]()
    for group, label, (x, y) in wanted:
        text = label if len(label) <= LONGEST_NAME else f"{label[: LONGEST_NAME - 1]}…"
        left, wide = x > 0.7 * frame.width, 7.5 * len(text)
        start = x - 11 - wide if left else x + 11
        if all(abs(y - other) > 17 or start > end or start + wide < begin for begin, end, other in taken):
            taken.append((start, start + wide, y))
            place = {"x": x + (-11 if left else 11), "y": y - 9, "text_anchor": "end" if left else "start"}
            drawn[group] = tag("text", escape(text), class_="name", **place)
    return drawn


# --- settings and what came of them ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Axis:
    """An upright axis of parallel coordinates. places: level of a value -> share of the height from below, for every
    value that there is. marks: (share, text) of its ticks."""

    title: str
    note: str
    places: dict[str, float]
    marks: list[tuple[float, str]]


def axis(title: str, values: list[Any], absent: bool) -> Axis:
    """Of all values of a setting. absent: some points lack it; they stand at the foot."""
    distinct = list({level(value): value for value in values}.values())
    foot = 0.12 if absent else 0.0
    marks = [(0.0, UNSET)] if absent else []
    if distinct and all(numeric(value) for value in distinct):
        low, high = min(distinct), max(distinct)
        log = low > 0 and high >= 10 * low
        place = _log if log else _linear
        shares = {level(v): foot + (1 - foot) * place(v, low, high) for v in distinct}
        few = sorted(distinct) if len(distinct) <= 8 else _round(low, high, log)
        marks += [(foot + (1 - foot) * place(v, low, high), shown(v)) for v in few]
        return Axis(title, "log" if log else "", {**shares, "": 0.0}, _spread(marks))
    ordered = sorted(distinct, key=lambda value: (not numeric(value), value if numeric(value) else 0, level(value)))
    last = max(1, len(ordered) - 1)
    shares = {level(v): foot + (1 - foot) * i / last for i, v in enumerate(ordered)}
    marks += [(shares[level(v)], shown(v)) for v in ordered]
    return Axis(title, "", {**shares, "": 0.0}, _spread(marks))


def _linear(value: float, low: float, high: float) -> float:
    return (value - low) / (high - low) if high > low else 0.5


def _log(value: float, low: float, high: float) -> float:
    return math.log(value / low) / math.log(high / low)


def _round(low: float, high: float, log: bool) -> list[float]:
    """Round values of a long axis, between its ends."""
    if not log:
        return ticks(low, high, 6)
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    decades = [float(f"{factor}e{power}") for power in powers for factor in ((1,) if len(powers) > 3 else (1, 2, 5))]
    return [value for value in decades if low <= value <= high]


HEIGHT = 320.0  # of the drawing; its axes stand between TOP and FOOT
TOP, FOOT = 44.0, 24.0


def _spread(marks: list[tuple[float, str]]) -> list[tuple[float, str]]:
    """Those that can be read beside each other, from below."""
    kept: list[tuple[float, str]] = []
    for share, text in sorted(marks, key=lambda mark: mark[0]):
        if not kept or (share - kept[-1][0]) * (HEIGHT - TOP - FOOT) >= APART:
            kept.append((share, text))
    return kept


def parallel(content: Row) -> Markup | None:
    """Parallel coordinates: a line a combination through its settings to its mean of the objective, at the right."""
    name = content["objective"]["metric"]
    known = [(i, group) for i, group in enumerate(content["groups"]) if name in group["values"]]
    keys = drawn_keys(content)
    if len(known) < 2 or not keys:
        return None
    axes = []
    for key in keys:
        values = [group["settings"][key] for _, group in known if key in group["settings"]]
        axes.append(axis(content["keys"][key], values, len(values) < len(known)))
    means = [group["values"][name]["mean"] for _, group in known]
    low, high = padded(means)
    marks = [
        (_linear(v, low, high), t) for v, t in zip(ticks(low, high, 6), tick_labels(ticks(low, high, 6)), strict=True)
    ]
    frame = Frame(860, HEIGHT, (0, len(axes)), (0, 1), left=70, right=90, top=TOP, bottom=FOOT)
    parts = []
    for i, group in reversed(known):
        shares = [
            one.places[level(group["settings"][k]) if k in group["settings"] else ""]
            for k, one in zip(keys, axes, strict=True)
        ]
        shares.append(_linear(group["values"][name]["mean"], low, high))
        line = path([(frame.fx(x), frame.fy(share)) for x, share in enumerate(shares)])
        tip = f"{group['label']}\n{metric(name).title} {metric_value(name, group['values'][name]['mean'])}"
        drawn = tag("path", class_="line", d=line)
        catch = tag("path", class_="catch-line", d=line) if i < COLOURED else Markup("")
        parts.append(tag("g", catch, drawn, class_=f"hot {colour(i)}", data_tip=tip))
    better = "lower is better" if content["objective"]["direction"] == "minimize" else "higher is better"
    axes.append(Axis(metric(name).title, better, {}, marks))
    parts += [_axis(frame, x, one, last=x == len(axes) - 1) for x, one in enumerate(axes)]
    return frame.svg(*parts, name=f"Parallel coordinates: varied settings and {metric(name).title}")


def drawn_keys(content: Row) -> list[str]:
    """The settings with an axis: all, or those that explain most, in the order of the sweep."""
    by_share = [one["key"] for one in content["importance"]["settings"]]
    most = (by_share + [key for key in content["keys"] if key not in by_share])[:MOST_AXES]
    return [key for key in content["keys"] if key in most]


def _axis(frame: Frame, at: int, one: Axis, *, last: bool) -> Markup:
    x = frame.fx(at)
    parts = [tag("line", class_="axis", x1=x, x2=x, y1=frame.top, y2=frame.base)]
    title = one.title if len(one.title) <= 22 else f"…{one.title[-21:]}"
    parts.append(tag("text", escape(title), class_="title strong", x=x, y=14, text_anchor="middle"))
    parts.append(tag("text", escape(one.note), class_="note", x=x, y=29, text_anchor="middle"))
    for share, text in one.marks:
        y = frame.fy(share)
        side, anchor = (8.0, "start") if last else (-7.0, "end")
        short = text if len(text) <= 16 else f"{text[:15]}…"
        parts.append(tag("line", class_="notch", x1=x - 3, x2=x + 3, y1=y, y2=y))
        parts.append(tag("text", escape(short), class_="tick over", x=x + side, y=y + 3.5, text_anchor=anchor))
    return tag("g", *parts)


# --- learning curves -------------------------------------------------------------------------------------------------


def curves(content: Row) -> Row:
    """{"panels": [{"title", "svg"}], "groups": places of those that have a curve and a colour, "others": how many have
    a grey one, "seeds": whether any line is a mean over seeds}."""
    found = sweep_curves.read_curves(content["groups"])
    drawn = []
    for panel, name in sweep_curves.panels(found):
        lines = sweep_curves.lines(found, name, COLOURED)
        if any(line["curve"] for line in lines):
            drawn.append({"title": panel.title, "svg": _curves(panel, lines, content)})
    places = [group["group"] for group in found]
    coloured = [place for place in places if place < COLOURED]
    seeds = any(sum(seed["done"] for seed in group["seeds"]) > 1 for group in found)
    return {"panels": drawn, "groups": coloured, "others": len(places) - len(coloured), "seeds": seeds}


def _curves(panel: Panel, lines: list[Row], content: Row) -> Markup:
    steps = [step for line in lines for step, _ in line["curve"]]
    y = padded([value for line in lines for _, value in line["curve"]])
    frame = Frame(300, 200, (min(steps), max(steps) if max(steps) > min(steps) else min(steps) + 1), y)
    parts = [frame.axes("optimiser step", panel.unit, whole_x=True)]
    most = max(12, min(150, BUDGET // len(lines)))
    for line in lines:
        curve = line["curve"]
        points = [(frame.fx(curve[i][0]), frame.fy(curve[i][1])) for i in thinned(len(curve), most)]
        raw = " raw" if line["kind"] == "seed" and line["group"] < COLOURED else ""
        dashed = " dashed" if 6 <= line["group"] < COLOURED and not raw else ""
        class_ = f"line{raw}{dashed} {colour(line['group'])}"
        if len(points) == 1:
            parts.append(tag("circle", class_=f"dot {colour(line['group'])}", cx=points[0][0], cy=points[0][1], r=2.5))
        else:
            parts.append(tag("path", class_=class_, d=path(points)))
    means = sorted((n for n in lines if n["kind"] == "mean" and n["group"] < COLOURED), key=lambda n: n["group"])
    dots = [tag("circle", class_=colour(line["group"]), r=3.5) for line in means]
    parts.append(tag("g", tag("line", y1=frame.top, y2=frame.base), *dots, class_="cross"))
    hover = {"rows": _hover(frame, panel, means, content)} if means else None
    return frame.svg(*parts, name=f"{panel.title} by step, a line a combination", hover=hover)


def _hover(frame: Frame, panel: Panel, means: list[Row], content: Row) -> list[list[Any]]:
    """[x, text, heights] at the steps of the longest line, at most 40 of them."""
    longest = max((line["curve"] for line in means), key=len)
    rows = []
    for i in thinned(len(longest), 40):
        step = longest[i][0]
        values = [sweep_curves.at(line["curve"], step) for line in means]
        labels = [content["groups"][line["group"]]["label"] for line in means]
        known = [f"{label} {number(v, panel.digits)}" for label, v in zip(labels, values, strict=True) if v is not None]
        heights = [None if v is None else round(frame.fy(v), 1) for v in values]
        rows.append([round(frame.fx(step), 1), "\n".join([f"step {step:g}", *known]), heights])
    return rows
