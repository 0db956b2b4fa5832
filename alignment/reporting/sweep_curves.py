"""Learning curves of a sweep's points: read thinly, averaged over the seeds of a combination."""

from __future__ import annotations

import json
from bisect import bisect_left
from pathlib import Path
from typing import Any

from alignment.pipeline.store import METRICS
from alignment.reporting.charts import DPO_PANELS, OTHER_PANELS, SFT_PANELS, Panel, thinned
from alignment.reporting.words import finite

Row = dict[str, Any]
Curve = list[tuple[float, float]]  # (step, value), steps rising
MOST_ROWS = 200  # read of one metrics.jsonl, evenly
LEFT_OUT = ("learning_rate", "tokens_per_s")  # they say how the work was done, not what came of it


def read_curves(groups: list[Row]) -> list[Row]:
    """Of each group that has any: {"group": its place, "seeds": [{"done", "curves": {metric: Curve}}]}.

    groups: the leaderboard of `comparison.compare`. A result that stands for several points is there once. done: the
    stage has ended with its result; a curve that is not done may still grow, or broke off.
    """
    found = []
    for i, group in enumerate(groups):
        training = [point["training"] for point in group["points"] if point["training"] and point["repeats"] is None]
        by_folder = {one["folder"]: one for one in training}
        seeds = [{"done": one["done"], "curves": read(Path(folder))} for folder, one in by_folder.items()]
        seeds = [seed for seed in seeds if seed["curves"]]
        if seeds:
            found.append({"group": i, "seeds": seeds})
    return found


def read(folder: Path) -> dict[str, Curve]:
    """metric -> its curve, of at most MOST_ROWS rows of metrics.jsonl, first and last among them."""
    try:
        lines = (folder / METRICS).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return {}
    rows: dict[float, Row] = {}
    for i in thinned(len(lines), MOST_ROWS):
        try:
            row = json.loads(lines[i])
        except ValueError:  # the last one may still be being written
            continue
        step = finite(row.get("step")) if isinstance(row, dict) else None
        if step is not None:
            rows[step] = row
    curves: dict[str, Curve] = {}
    for step in sorted(rows):
        for name, value in rows[step].items():
            if name != "step" and (known := finite(value)) is not None:
                curves.setdefault(name, []).append((step, known))
    return curves


def average(curves: list[Curve]) -> Curve:
    """The mean of curves at the steps of the first one, where all of them are; between its steps a curve is linear."""
    if len(curves) == 1:
        return curves[0]
    places = [(step, [at(curve, step) for curve in curves]) for step, _ in curves[0]]
    return [(step, sum(known) / len(known)) for step, values in places if len(known := _known(values)) == len(curves)]


def _known(values: list[float | None]) -> list[float]:
    return [value for value in values if value is not None]


def at(curve: Curve, step: float) -> float | None:
    """The curve's value there; None before its first and after its last step."""
    i = bisect_left(curve, step, key=lambda place: place[0])
    if i < len(curve) and curve[i][0] == step:
        return curve[i][1]
    if i in (0, len(curve)):
        return None
    (x0, y0), (x1, y1) = curve[i - 1], curve[i]
    return y0 + (y1 - y0) * (step - x0) / (x1 - x0)


def panels(curves: list[Row]) -> list[tuple[Panel, str]]:
    """Which charts the curves bear, with the metric of each: those of the report that show one metric."""
    known = {name for group in curves for seed in group["seeds"] for name in seed["curves"]}
    own = DPO_PANELS if "rewards/margins" in known else SFT_PANELS
    single = [(panel, panel.keys[0]) for panel in own + OTHER_PANELS if len(panel.keys) == 1]
    return [(panel, name) for panel, name in single if name in known and name not in LEFT_OUT]


def lines(curves: list[Row], metric: str, coloured: int) -> list[Row]:
    """[{"group", "kind", "curve"}] of one metric, those that matter most last: the others' means, seeds, means.

    kind: "mean" (over the seeds that are done), or "seed": one curve that goes into a mean or is not done. Of the
    groups from `coloured` on only means, and what is not done.
    """
    found: list[Row] = []
    for group in curves:
        done = [s["curves"][metric] for s in group["seeds"] if s["done"] and metric in s["curves"]]
        open_ = [s["curves"][metric] for s in group["seeds"] if not s["done"] and metric in s["curves"]]
        thin = open_ + (done if len(done) > 1 and group["group"] < coloured else [])
        found += [{"group": group["group"], "kind": "seed", "curve": curve} for curve in thin]
        if done and (mean := average(done)):
            found.append({"group": group["group"], "kind": "mean", "curve": mean})
    rank = {"seed": 1, "mean": 2}
    return sorted(found, key=lambda one: (rank[one["kind"]] if one["group"] < coloured else 0, -one["group"]))
