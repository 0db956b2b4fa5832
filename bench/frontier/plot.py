"""Reward against KL, a line a method: its means over seeds, whiskers a standard deviation. SVG by hand."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import Any

COLOURS = ("#808080", "#c98b2b", "#2f7dc4", "#6fb39b", "#d68fa8", "#8a6fc4", "#c4452f", "#4f8f2f")
WIDTH, HEIGHT, LEFT, BOTTOM, TOP, RIGHT = 860, 480, 60, 50, 20, 250  # pixels
TEXT = 'font-family="sans-serif" font-size="12" fill="#808080"'


def svg(points: Any, methods: Mapping[str, str]) -> str:
    """points: method -> pull -> measurements. The horizontal axis is the root of KL: rewards rise straight along it."""
    means = {
        method: sorted(
            (statistics.fmean(row["kl"] for row in rows), [row["reward"] for row in rows])
            for rows in points[method].values()
        )
        for method in methods
    }
    start = [row["reward"] for rows in points["start"].values() for row in rows]
    every = [reward for line in means.values() for _, rewards in line for reward in rewards] + start
    low, high = min(every), max(every)
    widest = max(kl for line in means.values() for kl, _ in line) ** 0.5

    def place(kl: float, reward: float) -> tuple[float, float]:
        x = LEFT + (WIDTH - LEFT - RIGHT) * kl**0.5 / widest
        return x, TOP + (HEIGHT - TOP - BOTTOM) * (high - reward) / (high - low)

    parts = [_axes(place, widest, low, high)]
    for number, (method, label) in enumerate(methods.items()):
        colour = COLOURS[number % len(COLOURS)]
        line = [(0.0, start), *means[method]]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(kl, statistics.fmean(rs)) for kl, rs in line))
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        for kl, rewards in line:
            x, y = place(kl, statistics.fmean(rewards))
            off = statistics.stdev(rewards) if len(rewards) > 1 else 0.0
            above, below = place(kl, statistics.fmean(rewards) + off)[1], place(kl, statistics.fmean(rewards) - off)[1]
            parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="{colour}"/>')
            parts.append(f'<path d="M{x:.1f} {above:.1f}V{below:.1f}" stroke="{colour}"/>')
        y = TOP + 20 + 20 * number
        parts.append(f'<rect x="{WIDTH - RIGHT + 20}" y="{y - 10}" width="12" height="12" fill="{colour}"/>')
        parts.append(f'<text x="{WIDTH - RIGHT + 38}" y="{y}" {TEXT}>{label.replace("`", "")}</text>')
    inside = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
        f'role="img" aria-label="Reward against KL">\n{inside}\n</svg>\n'
    )


def _axes(place: Any, widest: float, low: float, high: float) -> str:
    x, y = place(0, low)
    right = place(widest**2, low)[0]
    parts = [f'<path d="M{x:.1f} {TOP}V{y:.1f}H{right:.1f}" fill="none" stroke="#808080"/>']
    parts.append(f'<text x="{x}" y="{HEIGHT - 10}" {TEXT}>KL to the start, nats an answer (root scale)</text>')
    for kl in (0.1, 0.5, 1, 2, 4, 8):
        if kl**0.5 <= widest:
            parts.append(
                f'<text x="{place(kl, low)[0]:.1f}" y="{y + 18:.1f}" text-anchor="middle" {TEXT}>{kl:g}</text>'
            )
    for step in range(5):
        reward = low + (high - low) * step / 4
        parts.append(
            f'<text x="{x - 8}" y="{place(0, reward)[1] + 4:.1f}" text-anchor="end" {TEXT}>{reward:.2f}</text>'
        )
    return "\n".join(parts)
