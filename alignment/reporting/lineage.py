"""The lineage graph: three lanes (data, models, evaluation), one row a generation, drawn as one SVG."""

from __future__ import annotations

from markupsafe import Markup, escape

from alignment.reporting.gather import MAKES_MODEL, Report, Stage
from alignment.reporting.svg import tag
from alignment.reporting.words import duration, label

LANES = ("Data", "Models", "Evaluation")
BOX, TALL, LANE, ROW, EDGE, TOP = 158.0, 44.0, 226.0, 66.0, 26.0, 34.0


def lane(kind: str) -> int:
    if kind in MAKES_MODEL:
        return 1
    return 2 if kind in ("evaluate", "compare") else 0


def places(stages: list[Stage]) -> dict[str, tuple[int, int]]:
    """Stage -> (lane, row): below all its parents, and alone in its place."""
    found: dict[str, tuple[int, int]] = {}
    for stage in stages:
        row = max((found[parent][1] + 1 for parent in stage.inputs.values() if parent in found), default=0)
        column = lane(stage.kind)
        while (column, row) in found.values():
            row += 1
        found[stage.name] = (column, row)
    return found


def ancestors(stages: list[Stage]) -> dict[str, list[str]]:
    """Stage -> all it was made from, in order; stages come in topological order."""
    found: dict[str, list[str]] = {}
    for stage in stages:
        names = dict.fromkeys(n for p in stage.inputs.values() if p in found for n in (*found[p], p))
        found[stage.name] = list(names)
    return found


def graph(report: Report) -> Markup | None:
    """The drawing; the way to the final model is drawn strong. None for a run without stages."""
    if not report.stages:
        return None
    where, made_from = places(report.stages), ancestors(report.stages)
    final = report.run.get("final", "")
    strong = {final, *made_from.get(final, [])}
    height = TOP + (max(row for _, row in where.values()) + 1) * ROW
    width = 2 * EDGE + 2 * LANE + BOX
    parts = [
        tag("text", escape(name), class_="lane", x=EDGE + i * LANE + BOX / 2, y=14, text_anchor="middle")
        for i, name in enumerate(LANES)
        if any(column == i for column, _ in where.values())
    ]
    taken = set(where.values())
    for stage in report.stages:
        for role, parent in stage.inputs.items():
            if parent in where:
                on = stage.name in strong and parent in strong
                parts.append(_edge(where[parent], where[stage.name], parent, stage.name, role, on, taken))
    parts += [_node(stage, where[stage.name], made_from[stage.name], report) for stage in report.stages]
    return tag(
        "svg", *parts, class_="lineage", viewBox=f"0 0 {width:g} {height:g}", role="group", aria_label="Lineage graph"
    )


def corner(place: tuple[int, int]) -> tuple[float, float]:
    return EDGE + place[0] * LANE, TOP + place[1] * ROW


def _edge(
    a: tuple[int, int], b: tuple[int, int], parent: str, child: str, role: str, on: bool, taken: set[tuple[int, int]]
) -> Markup:
    """A curve from parent to child: straight down in a lane, past other boxes round the outside, else sideways."""
    (ax, ay), (bx, by) = corner(a), corner(b)
    if a[0] == b[0]:
        if any((a[0], row) in taken for row in range(a[1] + 1, b[1])):
            side, bow = (ax + BOX, 1) if a[0] == 2 else (ax, -1)
            out = side + bow * (12 + 2.5 * min(b[1] - a[1], 5))
            y0, y1 = ay + TALL * 0.7, by + TALL * 0.3
            d = f"M{side:g} {y0:g}C{out:g} {y0:g} {out:g} {y0 + 6:g} {out:g} {y0 + 16:g}V{y1 - 16:g}"
            d += f"C{out:g} {y1 - 6:g} {out:g} {y1:g} {side + bow * 5:g} {y1:g}"
        else:
            d = f"M{ax + BOX / 2:g} {ay + TALL:g}V{by - 5:g}"
    else:
        right = b[0] > a[0]
        x0, x1 = (ax + BOX, bx - 5) if right else (ax, bx + BOX + 5)
        y0, y1 = ay + TALL / 2, by + TALL / 2
        bend = (LANE - BOX) * 0.75 * (1 if right else -1)
        d = f"M{x0:g} {y0:g}C{x0 + bend:g} {y0:g} {x1 - bend:g} {y1:g} {x1:g} {y1:g}"
    head = tag("path", class_="edge" + (" strong" if on else ""), d=d, marker_end="url(#arrow)")
    tip = f"{label(parent)} → {label(child)}\nas its {role}"
    catch = tag("path", class_="catch-line", d=d)
    return tag("g", head, catch, class_="hot link", data_from=parent, data_to=child, data_tip=tip)


def _node(stage: Stage, place: tuple[int, int], made_from: list[str], report: Report) -> Markup:
    x, y = corner(place)
    colour = report.colours.get(stage.name)
    final = stage.name == report.run.get("final")
    small = f"{stage.key[:8]} · {'reused' if stage.state == 'reused' else duration(stage.seconds)}"
    if stage.state not in ("done", "reused"):
        small = f"{stage.key[:8]} · {stage.state}"
    parts = [
        tag("rect", class_="box", x=x, y=y, width=BOX, height=TALL, rx=7),
        tag("rect", class_="swatch", x=x, y=y + 9, width=4, height=TALL - 18, rx=2) if colour is not None else "",
        tag("text", escape(_short(label(stage.name))), class_="node-name", x=x + 14, y=y + 19),
        tag("text", escape(small), class_="node-small", x=x + 14, y=y + 34),
    ]
    if final:
        parts.append(tag("text", "final", class_="node-final", x=x + BOX - 10, y=y + 19, text_anchor="end"))
    classes = f"hot node {stage.state}" + (f" m{colour}" if colour is not None else "")
    tip = f"{stage.kind}\n{stage.key[:16]}"
    return tag(
        "g",
        *parts,
        class_=classes,
        data_node=stage.name,
        data_ancestors=" ".join(made_from),
        data_tip=tip,
        tabindex=0,
        role="button",
        aria_label=f"{label(stage.name)}, {stage.kind}, {stage.state}",
    )


def _short(text: str, most: int = 19) -> str:
    return text if len(text) <= most else text[: most - 1] + "\N{HORIZONTAL ELLIPSIS}"
