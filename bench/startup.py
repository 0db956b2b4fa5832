"""From the launch of a process to the end of its first optimiser step: imports, model, trainer, reference pass, step.

The model is the tiny one, so that what is measured is what every run pays, whatever its size.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.group import order
from bench.pool import Pool
from bench.summary import spread
from bench.workloads import Workload

ARMS = ("trl_default", "trl_tuned", "ours")
TASKS = ("sft", "dpo")
OPTIONS = {task: {"micro_batch": 4, "padding_free": False} for task in TASKS}


def measure(logs: Path, repeats: int, precision: str, say: Callable[[str], None]) -> list[dict[str, Any]]:
    """Rows {task, arm, seconds: {median, low, high}}: a new process each time, arms in turn, one untimed round."""
    rows = []
    for task in TASKS:
        seconds: dict[str, list[float]] = {arm: [] for arm in ARMS}
        for repeat in range(repeats + 1):
            for arm in ARMS:
                taken = launch(logs, arm, task, precision)
                if repeat:  # the first round fills the file cache
                    seconds[arm].append(taken)
        for arm in ARMS:
            rows.append({"task": task, "arm": arm, "seconds": spread(seconds[arm])})
            say(f"  launch to first step, {task}, {arm}: {rows[-1]['seconds']['median']:.2f} s")
    return rows


def launch(logs: Path, arm: str, task: str, precision: str) -> float:
    """Seconds from starting a process to the end of its only step."""
    workload = Workload(task=task, lengths="hh", size="tiny", rows=4, steps=1)
    began = time.monotonic()
    with Pool(logs) as pool:
        answer = pool.ask(arm, order(workload, OPTIONS, precision))
        taken = time.monotonic() - began
    if "seconds" not in answer:
        raise RuntimeError(f"{arm}: {answer}")
    return taken


def table(rows: list[dict[str, Any]]) -> str:
    lines = ["| task | " + " | ".join(ARMS) + " |", "|---|" + "---|" * len(ARMS)]
    for task in TASKS:
        cells = [row["seconds"] for arm in ARMS for row in rows if (row["task"], row["arm"]) == (task, arm)]
        lines.append(
            f"| {task} | " + " | ".join(f"{c['median']:.2f} ({c['low']:.2f} to {c['high']:.2f})" for c in cells) + " |"
        )
    return "\n".join(lines)
