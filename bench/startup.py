"""From the launch of a process to the end of its first optimiser step: imports, model, trainer, reference pass, step.

The model is the tiny one, so that what is measured is what every run pays, whatever its size.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.group import order
from bench.pool import Pool, WorkerError
from bench.summary import spread
from bench.workloads import Workload

ARMS = ("trl_default", "trl_tuned", "ours")
TASKS = ("sft", "dpo")
REPEATS = 3  # at most
LAUNCH_SECONDS = 8.0  # of one process on two cores, for the estimate only
OPTIONS = {task: {"micro_batch": 4, "padding_free": False} for task in TASKS}


def reserved(repeats: int) -> float:
    """Seconds that `measure` will take, roughly."""
    return (min(repeats, REPEATS) + 1) * len(TASKS) * len(ARMS) * LAUNCH_SECONDS


def measure(logs: Path, repeats: int, precision: str, say: Callable[[str], None]) -> list[dict[str, Any]]:
    """Rows {task, arm, seconds: {median, low, high}, imports: the same of their part}: a new process each time, arms in
    turn, one untimed round.

    An arm that fails has `failed`, the reason, in place of seconds.
    """
    rows = []
    for task in TASKS:
        taken: dict[str, list[tuple[float, float]]] = {arm: [] for arm in ARMS}
        failed: dict[str, str] = {}
        for repeat in range(min(repeats, REPEATS) + 1):
            for arm in [arm for arm in ARMS if arm not in failed]:
                try:
                    one = launch(logs, arm, task, precision)
                except (RuntimeError, WorkerError) as error:
                    failed[arm] = f"failed: {error}"
                    continue
                if repeat:  # the first round fills the file cache
                    taken[arm].append(one)
        for arm in ARMS:
            names = ("imports", "seconds")
            spreads = {
                name: spread(list(part)) for name, part in zip(names, zip(*taken[arm], strict=True), strict=False)
            }
            rows.append({"task": task, "arm": arm, **({"failed": failed[arm]} if arm in failed else spreads)})
            say(f"  launch to first step, {task}, {arm}: {cell(rows[-1])} s")
    return rows


def launch(logs: Path, arm: str, task: str, precision: str) -> tuple[float, float]:
    """Seconds from starting a process to the end of its imports (PyTorch, transformers, TRL), and to that of its only
    step."""
    workload = Workload(task=task, lengths="hh", size="tiny", rows=4, steps=1)
    began = time.monotonic()
    with Pool(logs) as pool:
        pool.ask(arm, {"kind": "hello"})
        imported = time.monotonic() - began
        answer = pool.ask(arm, order(workload, OPTIONS, precision))
        ended = time.monotonic() - began
    if "seconds" not in answer:
        raise RuntimeError(str(answer.get("error") or answer.get("unavailable")))
    return imported, ended


def cell(row: dict[str, Any]) -> str:
    if "failed" in row:
        return str(row["failed"])
    imports = row["imports"]["median"]
    return "{median:.2f} ({low:.2f} to {high:.2f}), {0:.2f} of it imports".format(imports, **row["seconds"])


def table(rows: list[dict[str, Any]]) -> str:
    lines = ["| task | " + " | ".join(ARMS) + " |", "|---|" + "---|" * len(ARMS)]
    for task in TASKS:
        cells = [cell(row) for arm in ARMS for row in rows if (row["task"], row["arm"]) == (task, arm)]
        lines.append(f"| {task} | " + " | ".join(cells) + " |")
    return "\n".join(lines)
