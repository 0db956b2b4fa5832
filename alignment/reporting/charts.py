"""The report's figures, each from plain values to one SVG."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup, escape

from alignment.reporting.gather import Model, Row, Stage, curve_rows
from alignment.reporting.svg import Frame, marker, padded, path, tag, tick_labels, ticks
from alignment.reporting.words import finite, interval, label, metric_value, number

MOST_POINTS = 600
SMOOTH_FROM = 80


@dataclass(frozen=True)
class Panel:
    """One small chart of a training stage. keys: the metrics drawn in it; the second one is dashed."""

    title: str
    unit: str
    keys: tuple[str, ...]
    names: tuple[str, ...] = ()
    level: tuple[float, str] | None = None
    digits: int = 3


LN2 = (math.log(2), "ln 2: no preference yet")
OF_LN2 = ("sigmoid", "bradley_terry")  # losses that begin there
SFT_PANELS = (
    Panel("Loss", "nats per token", ("loss",)),
    Panel("Token accuracy", "share of tokens", ("mean_token_accuracy",)),
    Panel("Entropy", "nats per token", ("entropy",)),
)
DPO_PANELS = (
    Panel("Loss", "nats per pair", ("loss",), level=LN2),
    Panel("Log-probability", "nats per answer", ("logps/chosen", "logps/rejected"), ("chosen", "rejected"), digits=1),
    Panel("Implicit reward", "nats", ("rewards/chosen", "rewards/rejected"), ("chosen", "rejected")),
    Panel("Reward margin", "nats, chosen − rejected", ("rewards/margins",), level=(0.0, "no margin")),
    Panel("Preference accuracy", "share of pairs", ("rewards/accuracies",), level=(0.5, "chance")),
    Panel("KL to the reference", "nats per token", ("kl",)),
    *SFT_PANELS[1:],
)
KTO_PANELS = (
    Panel("Loss", "per answer, weighted", ("loss",)),
    Panel("Implicit reward", "nats", ("rewards/desirable", "rewards/undesirable"), ("wanted", "unwanted")),
    Panel("Reference point", "nats per answer", ("reference_point",)),
    Panel("KL to the reference", "nats per token", ("kl",)),
    *SFT_PANELS[1:],
)
ONLINE_PANELS = (
    Panel("Reward", "mean of the answers", ("reward",)),
    Panel("Spread of rewards", "deviation among answers to a prompt", ("reward_std",)),
    Panel("KL to the start", "nats per answer", ("kl_answer",)),
    Panel("Answer length", "tokens", ("answer_tokens",), digits=1),
    Panel("Answers that end", "share", ("stop_rate",)),
    Panel("Prompts without signal", "share", ("no_signal",)),
    Panel("Entropy", "nats per token", ("entropy",)),
    Panel("Clipped", "share of tokens", ("clip_fraction",)),
    Panel("Decoding against training", "log-prob apart, nats per token", ("mismatch",), digits=5),
    Panel("Loss", "about 0", ("loss",)),
    Panel("Value loss", "of the value head", ("value_loss",)),
)
REWARD_PANELS = (
    Panel("Loss", "per pair or answer", ("loss",), level=LN2),
    Panel("Accuracy", "share of pairs", ("accuracy",), level=(0.5, "chance")),
    Panel("Margin", "chosen − rejected", ("margin",), level=(0.0, "no margin")),
    Panel("Squared error", "of the score", ("squared_error",)),
    Panel("Reward", "mean", ("mean_reward",)),
)
OWN_PANELS: tuple[tuple[tuple[Panel, ...], str], ...] = (  # by a metric that no other has, the first that is there
    (REWARD_PANELS, "mean_reward"),
    (ONLINE_PANELS, "reward_std"),
    (DPO_PANELS, "rewards/margins"),
    (KTO_PANELS, "rewards/desirable"),
    (KTO_PANELS, "rewards/undesirable"),
)
OTHER_PANELS = (
    Panel("Gradient norm", "before clipping", ("grad_norm",)),
    Panel("Learning rate", "per step", ("learning_rate",)),
    Panel("Speed", "tokens per second", ("tokens_per_s",), digits=0),
)


def curves(stage: Stage, colour: int) -> list[Row]:
    """The learning curves of one stage, as far as its metrics hold them: [{"title", "last", "legend", "svg"}]."""
    rows = curve_rows(stage)
    told = set().union(*rows)
    own = next((panels for panels, key in OWN_PANELS if key in told), SFT_PANELS)
    drawn = []
    for panel in own + OTHER_PANELS:
        series = [(name, [finite(row.get(key)) for row in rows]) for key, name in _keys(panel)]
        series = [(name, values) for name, values in series if any(v is not None for v in values)]
        if series:
            drawn.append(_curve(stage, panel, [row["step"] for row in rows], series, colour))
    return drawn


def _keys(panel: Panel) -> list[tuple[str, str]]:
    return list(zip(panel.keys, panel.names or ("",), strict=True))


def _curve(stage: Stage, panel: Panel, steps: list[float], series: list[tuple[str, list]], colour: int) -> Row:
    level = (
        panel.level if panel.level and not (panel.level is LN2 and stage.settings.get("loss") not in OF_LN2) else None
    )
    known = [v for _, values in series for v in values if v is not None]
    y = padded([*known, level[0]] if level else known)
    frame = Frame(300, 200, (min(steps), max(steps) if len(steps) > 1 else min(steps) + 1), y)
    parts = [frame.axes("optimiser step", panel.unit, whole_x=True), _legend(frame, [name for name, _ in series])]
    if level:
        at = frame.fy(level[0])
        parts.append(tag("line", class_="level", x1=frame.left, x2=frame.width - frame.right, y1=at, y2=at))
        parts.append(
            tag("text", escape(level[1]), class_="note", x=frame.width - frame.right, y=at - 5, text_anchor="end")
        )
    smooth = len(steps) >= SMOOTH_FROM
    for index, (_, values) in enumerate(series):
        class_ = "line second" if index else "line"
        if smooth:
            parts.append(_line(frame, steps, values, f"{class_} raw"))
            values = running_mean(values, max(3, len(values) // 25))
        parts.append(_line(frame, steps, values, class_))
    parts.append(_cross(frame, len(series)))
    hover = {"rows": [_hover_row(frame, panel, steps, series, i) for i in thinned(len(steps))]}
    final = [number(next(v for v in reversed(values) if v is not None), panel.digits) for _, values in series]
    return {
        "title": panel.title,
        "last": " / ".join(final),
        "smooth": smooth,
        "svg": frame.svg(
            *parts, name=f"{label(stage.name)}: {panel.title} by step", hover=hover, class_=f"plot m{colour}"
        ),
    }


def _legend(frame: Frame, names: list[str]) -> Markup:
    """Which line is which, right of the y title; nothing for a single line."""
    parts = [Markup("")]
    for i, name in enumerate(names if len(names) > 1 else []):
        x = frame.width - frame.right - 74 * (len(names) - i)
        parts.append(tag("line", class_="line second" if i else "line", x1=x, x2=x + 17, y1=7, y2=7))
        parts.append(tag("text", escape(name), class_="title", x=x + 23, y=11))
    return Markup("").join(parts)


def _line(frame: Frame, steps: list[float], values: list, class_: str) -> Markup:
    kept = thinned(len(steps))
    points = [None if values[i] is None else (frame.fx(steps[i]), frame.fy(values[i])) for i in kept]
    if sum(p is not None for p in points) == 1:
        return tag("circle", class_="dot", cx=points[-1][0], cy=points[-1][1], r=3) if points[-1] else Markup("")
    return tag("path", class_=class_, d=path(points))


def _hover_row(frame: Frame, panel: Panel, steps: list[float], series: list[tuple[str, list]], i: int) -> list[Any]:
    text = [f"step {steps[i]:g}", *(f"{name} {number(v[i], panel.digits)}".strip() for name, v in series)]
    heights = [None if v[i] is None else round(frame.fy(v[i]), 1) for _, v in series]
    return [round(frame.fx(steps[i]), 1), "\n".join(text), heights]


def _cross(frame: Frame, count: int) -> Markup:
    dots = [tag("circle", class_="second" if i else None, r=3.5) for i in range(count)]
    return tag("g", tag("line", y1=frame.top, y2=frame.base), *dots, class_="cross")


def thinned(length: int, most: int = MOST_POINTS) -> list[int]:
    """At most `most` positions of a long curve, evenly, the last one always there."""
    every = max(1, math.ceil(length / most))
    return sorted({*range(0, length, every), length - 1} - {-1})


def running_mean(values: Sequence[float | None], width: int) -> list[float | None]:
    """Centred mean over `width` neighbours, fewer at the ends; gaps stay gaps."""
    half, smooth = width // 2, list[float | None]()
    for i, value in enumerate(values):
        near = [v for v in values[max(0, i - half) : i + half + 1] if v is not None]
        smooth.append(None if value is None else sum(near) / len(near))
    return smooth


def reward_against_kl(models: list[Model], table: dict[str, Row]) -> Markup | None:
    """Each model a point at (KL, reward) with its intervals; None if either number is missing everywhere."""
    found = []
    for model in models:
        x, y = (table.get(name, {}).get("values", {}).get(model.name) for name in ("kl", "reward"))
        if x and y and finite(x.get("mean")) is not None and finite(y.get("mean")) is not None:
            found.append((model, x, y))
    if not found:
        return None
    ends = [
        [v for value in column for v in _ends(value)] for column in zip(*((x, y) for _, x, y in found), strict=True)
    ]
    wide = padded(ends[0], 0.1)
    frame = Frame(600, 340, (min(wide[0], 0.0), wide[1]), padded(ends[1], 0.12), left=48, top=30, bottom=44)
    points = [(frame.fx(x["mean"]), frame.fy(y["mean"])) for _, x, y in found]
    parts = [frame.axes("log-ratio to the reference (nats per answer)", "mean reward", x_about=7, y_about=5)]
    parts.append(tag("path", class_="route", d=path(points)))
    for i, ((model, x, y), (px, py)) in enumerate(zip(found, points, strict=True)):
        whiskers = []
        for low, high, horizontal in ((*_ends(x), True), (*_ends(y), False)):
            a = (frame.fx(low), py) if horizontal else (px, frame.fy(low))
            b = (frame.fx(high), py) if horizontal else (px, frame.fy(high))
            whiskers.append(tag("line", class_="whisker", x1=a[0], y1=a[1], x2=b[0], y2=b[1]))
        tip = "\n".join(
            [
                model.label,
                f"reward {metric_value('reward', y['mean'])} {interval('reward', y)}",
                f"log-ratio {metric_value('kl', x['mean'])} nats {interval('kl', x)}",
            ]
        )
        rising = i + 1 < len(points) and points[i + 1][1] < py  # the route leaves upwards, so the name stands below
        left = px > 0.85 * frame.width
        place = {
            "x": px + (-12 if left else 12),
            "y": py + (22 if rising else -11),
            "text_anchor": "end" if left else "start",
        }
        name = tag("text", escape(model.label), class_="name", **place)
        point = marker(model.colour, px, py, 6.5, class_="point")
        parts.append(tag("g", *whiskers, point, name, class_=f"hot m{model.colour}", data_tip=tip, tabindex=0))
    return frame.svg(*parts, name="Mean reward against log-ratio to the reference, one point per model")


def _ends(value: Row) -> tuple[float, float]:
    mean = float(value["mean"])
    low, high = finite(value.get("low")), finite(value.get("high"))
    return (mean if low is None else low, mean if high is None else high)


def lengths(models: list[Model]) -> Markup | None:
    """Histogram of answer lengths in tokens, one row per model; answers that were cut off stand hollow on top."""
    rows = [(model, *_lengths(model)) for model in models]
    rows = [row for row in rows if row[1] or row[2]]
    if not rows:
        return None
    longest = max(max(ended + cut) for _, ended, cut in rows)
    width = max(1, next(w for w in _round_widths() if longest / w <= 30))
    bins = longest // width + 1
    counts = [(model, _binned(ended, width, bins), _binned(cut, width, bins)) for model, ended, cut in rows]
    pitch, bars = 104.0, 62.0
    frame = Frame(600, len(rows) * pitch + 34, (0, bins * width), (0, 1), left=2, right=2, top=0, bottom=0)
    parts = []
    for i, ((model, ended, cut), (_, all_ended, all_cut)) in enumerate(zip(counts, rows, strict=True)):
        floor = i * pitch + 26 + bars
        tallest = max(e + c for e, c in zip(ended, cut, strict=True))
        for j, (e, c) in enumerate(zip(ended, cut, strict=True)):
            parts.append(_bar(frame, model.colour, j, width, e, c, floor, bars / tallest))
        parts.append(_length_row(frame, model, sorted(all_ended + all_cut), len(all_cut), floor))
    x_ticks = ticks(0, bins * width, 8)
    for value, text in zip(x_ticks, tick_labels(x_ticks), strict=True):
        parts.append(
            tag("text", escape(text), class_="tick", x=frame.fx(value), y=frame.height - 20, text_anchor="middle")
        )
    title = tag(
        "text",
        "answer length (tokens)",
        class_="title",
        x=frame.width - frame.right,
        y=frame.height - 4,
        text_anchor="end",
    )
    return frame.svg(*parts, title, name="Histogram of answer lengths in tokens, one row per model")


def _lengths(model: Model) -> tuple[list[int], list[int]]:
    ended, cut = list[int](), list[int]()
    for row in model.answers:
        if (tokens := finite(row.get("tokens"))) is not None and tokens >= 0:
            (cut if row.get("finished") is False else ended).append(int(tokens))
    return ended, cut


def _round_widths() -> list[int]:
    return [factor * 10**power for power in range(7) for factor in (1, 2, 5)]


def _binned(values: list[int], width: int, bins: int) -> list[int]:
    counts = [0] * bins
    for value in values:
        counts[value // width] += 1
    return counts


def _bar(frame: Frame, colour: int, j: int, width: int, ended: int, cut: int, floor: float, scale: float) -> Markup:
    if not ended + cut:
        return Markup("")
    x, right = frame.fx(j * width) + 0.75, frame.fx((j + 1) * width) - 0.75
    wide = max(1.0, right - x)
    last = (j + 1) * width - 1
    range_ = f"{j * width} tokens" if width == 1 else f"{j * width} to {last} tokens"
    tip = f"{range_}\n{ended} ended by themselves" + (f"\n{cut} cut off" if cut else "")
    solid = tag("rect", class_="bar", x=x, y=floor - ended * scale, width=wide, height=ended * scale) if ended else ""
    top = floor - (ended + cut) * scale
    hollow = tag("rect", class_="bar hollow", x=x + 0.5, y=top, width=wide - 1, height=cut * scale) if cut else ""
    catch = tag("rect", class_="catch", x=x, y=floor - 62, width=wide, height=62.0)
    return tag("g", solid, hollow, catch, class_=f"hot m{colour}", data_tip=tip)


def _length_row(frame: Frame, model: Model, values: list[int], cut: int, floor: float) -> Markup:
    """Base line, name, median mark and what was cut, for one model of the histogram."""
    median = (values[(len(values) - 1) // 2] + values[len(values) // 2]) / 2
    at = frame.fx(median)
    right = frame.width - frame.right
    said = f"median {median:g} tokens" + (f" · {cut} of {len(values)} cut off" if cut else " · none cut off")
    return tag(
        "g",
        tag("line", class_="axis", x1=frame.left, x2=right, y1=floor, y2=floor),
        tag("path", class_="median", d=f"M{at:.1f} {floor + 2:.1f}l-4.5 7h9z"),
        tag("text", escape(model.label), class_="name", x=frame.left, y=floor - 75),
        tag("text", escape(said), class_="note", x=right, y=floor - 75, text_anchor="end"),
        class_=f"m{model.colour}",
    )


def intervals(row: Row, models: list[Model]) -> Markup:
    """The table's last column: each model's mean and interval on one small scale, the baseline's mean as a line."""
    values = [(model, row["values"].get(model.name) or {}) for model in models]
    values = [(model, value) for model, value in values if finite(value.get("mean")) is not None]
    if not values:
        return Markup("")
    frame = Frame(190, 12 + 14 * len(values), padded([e for _, v in values for e in _ends(v)]), (0, 1), 6, 6, 0, 0)
    home = frame.fx(values[0][1]["mean"])
    parts = [tag("line", class_="level", x1=home, x2=home, y1=2, y2=frame.height - 2)]
    for i, (model, value) in enumerate(values):
        y = 13.0 + 14 * i
        low, high = _ends(value)
        mean = metric_value(row["metric"], value["mean"])
        line = tag("line", class_="whisker", x1=frame.fx(low), x2=frame.fx(high), y1=y, y2=y)
        point = marker(model.colour, frame.fx(value["mean"]), y, 4, class_="point")
        catch = tag("rect", class_="catch", x=0, y=y - 7, width=frame.width, height=14)
        tip = f"{model.label} {mean} {interval(row['metric'], value)}"
        parts.append(tag("g", catch, line, point, class_=f"hot m{model.colour}", data_tip=tip))
    return frame.svg(*parts, name=f"{row['metric']}: means and intervals", class_="plot small")


def change_strip(change: dict[str, float], shown: dict[str, int], colour: int) -> Markup | None:
    """Every held-out prompt as a dot at its change in reward; those shown below are filled and lead to their card."""
    if not change:
        return None
    span = max(max(abs(v) for v in change.values()) * 1.05, 0.1)
    columns = 74
    stacks = [list[str]() for _ in range(columns)]
    for name in sorted(change, key=lambda key: (change[key], key)):
        place = (change[name] + span) / (2 * span) * columns
        stacks[min(columns - 1, int(place))].append(name)
    pitch = min(10.0, 150 / max(len(stack) for stack in stacks))
    tallest = max(len(stack) for stack in stacks) * pitch
    frame = Frame(860, tallest + 52, (-span, span), (0, 1), left=10, right=10, top=6, bottom=40)
    parts = [frame.axes("change in reward, prompt by prompt", "", x_about=9, y_about=0)]
    parts.append(tag("line", class_="level", x1=frame.fx(0), x2=frame.fx(0), y1=0, y2=frame.base))
    for i, stack in enumerate(stacks):
        x = frame.fx(-span + (i + 0.5) * 2 * span / columns)
        for j, name in enumerate(stack):
            y = frame.base - 6 - j * pitch
            dot = tag("circle", cx=x, cy=y, r=min(4.2, pitch * 0.42), class_="chosen" if name in shown else "other")
            tip = f"prompt {name}\n{number(change[name], 2, sign=True)}"
            group = tag("g", dot, class_="hot", data_tip=tip)
            parts.append(tag("a", group, href=f"#sample-{shown[name]}") if name in shown else group)
    return frame.svg(*parts, name="Change in reward of every held-out prompt", class_=f"plot m{colour}")
