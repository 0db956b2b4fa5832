"""The plot: for each task a panel, for each shape of lengths a bar an arm. SVG by hand, readable on light and dark."""

from __future__ import annotations

from typing import Any
from xml.sax.saxutils import escape

from bench.plan import ARMS

COLOURS = {
    "trl_default": "#9a9a9a", "trl_tuned": "#c98b2b", "ours": "#2f7dc4", "ours_no_sharing": "#8fb8dd",
    "ours_no_packing": "#6fb39b", "ours_warm": "#1d4f80", "ours_trl_head": "#d68fa8",
    "ours_whole_last_layer": "#c9a15a",
}  # fmt: skip
UNIT = {"dpo": "pairs a second", "sft": "rows a second", "reward": "pairs a second", "sweep": "pairs a second"}
WIDTH, LEFT, RIGHT = 860, 210, 90  # pixels
BAR, GAP, GROUP_GAP, PANEL_GAP = 14, 3, 14, 44
TEXT = 'font-family="sans-serif" font-size="12" fill="#808080"'


def svg(groups: list[dict[str, Any]]) -> str:
    """groups: of results.json. Bars are medians, whiskers the slowest and fastest repeat; refused arms have none."""
    parts: list[str] = []
    bottom = _legend(parts, groups)
    for task in dict.fromkeys(group["task"] for group in groups):
        bottom = _panel(parts, task, [group for group in groups if group["task"] == task], bottom + PANEL_GAP)
    height = bottom + 20
    inside = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" '
        f'role="img" aria-label="Speed of the arms">\n{inside}\n</svg>\n'
    )


def _text(x: float, y: float, words: str, anchor: str = "start", extra: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" {TEXT}{extra}>{escape(words)}</text>'


def _legend(parts: list[str], groups: list[dict[str, Any]]) -> int:
    """The arms that have a bar somewhere, two a line. Returns the y below."""
    shown = [arm for arm in ARMS if any("time" in group["arms"].get(arm, {}) for group in groups)]
    for number, arm in enumerate(shown):
        x, y = 20 + number % 2 * 420, 14 + number // 2 * 20
        parts.append(f'<rect x="{x}" y="{y}" width="12" height="12" fill="{COLOURS[arm]}"/>')
        parts.append(_text(x + 20, y + 11, f"{arm}: {ARMS[arm].meaning}"))
    return 14 + (len(shown) + 1) // 2 * 20


def _panel(parts: list[str], task: str, groups: list[dict[str, Any]], top: int) -> int:
    """One task, with its own scale from 0. Returns the y below."""
    bars = [(group, arm, row) for group in groups for arm, row in group["arms"].items() if "time" in row]
    largest = max((row["rows_per_s_high"] for _, _, row in bars), default=1.0)
    scale = (WIDTH - LEFT - RIGHT) / largest
    parts.append(_text(20, top, f"{task}, {UNIT[task]}", extra=' font-weight="bold"'))
    y, before = top + 12, None
    for group, arm, row in bars:
        if group is not before:
            y += GROUP_GAP if before is not None else 0
            parts.append(_text(LEFT - 10, y + BAR - 3, group["lengths"], "end"))
            before = group
        _bar(parts, arm, row, y, scale)
        y += BAR + GAP
    if not bars:
        parts.append(_text(LEFT, y + BAR, "no speed to show"))
        y += BAR + GAP
    return y


def _bar(parts: list[str], arm: str, row: dict[str, Any], y: int, scale: float) -> None:
    end = LEFT + row["rows_per_s"] * scale
    low, high = (LEFT + row[name] * scale for name in ("rows_per_s_low", "rows_per_s_high"))
    middle = y + BAR / 2
    title = escape(f"{arm}: {row['rows_per_s']:.3g} ({row['rows_per_s_low']:.3g} to {row['rows_per_s_high']:.3g})")
    parts.append(
        f'<rect x="{LEFT}" y="{y}" width="{end - LEFT:.1f}" height="{BAR}" fill="{COLOURS[arm]}">'
        f"<title>{title}</title></rect>"
    )
    whisker = f"M{low:.1f} {middle}H{high:.1f}M{low:.1f} {y + 3}v{BAR - 6}M{high:.1f} {y + 3}v{BAR - 6}"
    parts.append(f'<path d="{whisker}" stroke="#505050" fill="none"/>')
    parts.append(_text(high + 6, y + BAR - 3, f"{row['rows_per_s']:.3g}"))
