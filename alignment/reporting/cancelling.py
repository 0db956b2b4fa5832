"""`alignment cancel`: ends the jobs of runs, but for those that other runs wait for."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from alignment.launchers import slurm
from alignment.pipeline.store import Store
from alignment.reporting import queue, targets, watching
from alignment.reporting.gather import Row
from alignment.reporting.status import is_over


def cancel(names: Sequence[str], root: Path) -> int:
    """Raises ConfigError for a name that means nothing, MachineError if SLURM refuses."""
    store = Store(root)
    jobs, needed = jobs_of(store, targets.run_folders(names, store.root) or [])
    for node, run in needed:
        queue.say(f"{node['name']} (job {node['job']}) stays: {run} waits for it")
    slurm.cancel(jobs)
    for job, node in jobs.items():
        queue.say(f"cancelled {node['name']} (job {job})")
    if not jobs:
        queue.say("nothing to cancel: no job of theirs waits or runs")
    return 0


def jobs_of(store: Store, folders: Sequence[Path]) -> tuple[dict[str, Row], list[tuple[Row, str]]]:
    """Of the runs in these folders: job -> its node, of what waits or works for them alone; and nodes that another run
    waits for too, with its name."""
    runs = watching.look(store, None)
    mine = [run for run in runs if Path(run["folder"]) in folders]
    others = {node["key"]: run["run"] for run in runs if run not in mine and not is_over(run) for node in run["nodes"]}
    jobs: dict[str, Row] = {}
    needed: list[tuple[Row, str]] = []
    for run in mine:
        for node in run["nodes"]:
            if node["state"] not in ("queued", "running") or not node.get("job"):
                continue
            if node["key"] in others:
                needed.append((node, others[node["key"]]))
            else:
                jobs[node["job"]] = node
    return jobs, needed
