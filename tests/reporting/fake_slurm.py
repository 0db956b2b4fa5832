"""SLURM's commands that answer what a test says, and runs whose stages are jobs. tests/slurm has a real SLURM."""

from __future__ import annotations

import hashlib
import json
import time
from pathlib import Path
from typing import Any

from alignment.pipeline import claims
from alignment.pipeline.store import Store

CREATED = 1_795_395_600.0


class FakeSlurm:
    """In a folder that is in front of PATH. Each command notes how it was called."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.queue()
        self.accounts()
        self.script("scancel", "true")

    def queue(self, *jobs: tuple[str, ...]) -> None:
        """What squeue knows. Each: job, state, and then reason, nodes, end and start, as far as they matter."""
        lines = ["|".join([*job, *("None", "n1", "N/A", "N/A")[len(job) - 2 :]]) for job in jobs]
        self._prints("squeue", lines)

    def accounts(self, *jobs: tuple[str, str, str]) -> None:
        """What sacct knows. Each: job, state, end."""
        self._prints("sacct", ["|".join([job, state, "n1", end]) for job, state, end in jobs])

    def calls(self, command: str) -> list[str]:
        """The arguments of each call."""
        file = self.folder / f"{command}.calls"
        return file.read_text().splitlines() if file.exists() else []

    def script(self, command: str, text: str) -> None:
        """text: of the shell."""
        path = self.folder / command
        path.write_text(f"#!/bin/sh\necho \"$@\" >> '{path}.calls'\n{text}\n")
        path.chmod(0o755)

    def _prints(self, command: str, lines: list[str]) -> None:
        self.script(command, "\n".join(["cat <<'EOF'", *lines, "EOF"]))


def key_of(run: str, node: str) -> str:
    return hashlib.sha256(f"{run}/{node}".encode()).hexdigest()


def write(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def write_run(store: Path, run: str, states: dict[str, str], jobs: dict[str, str] | None = None) -> Path:
    """states: node -> as in run.json. jobs: node -> job that was submitted for it. Returns the run's folder."""
    nodes = [
        {"name": node, "kind": node, "key": key_of(run, node), "state": state, "seconds": None, "error": None}
        for node, state in states.items()
    ]
    told = {"run": run, "name": run, "created": CREATED, "updated": CREATED, "command": "", "final": "sft"}
    write(store / "runs" / run / "run.json", {**told, "nodes": nodes})
    for node, job in (jobs or {}).items():
        note(store, run, node, job)
    if jobs:
        claims.add(Store(store), run, {run: list(jobs.values())})
    return store / "runs" / run


def note(store: Path, run: str, node: str, job: str, ago: float = 60.0) -> Path:
    """A job that was submitted some seconds ago. Returns the file into which it prints."""
    out = store / "jobs" / "once" / f"{node}-{job}.out"
    told = {"job": job, "submitted": time.time() - ago, "run": run, "node": node, "out": str(out)}
    write(store / "jobs" / "keys" / f"{key_of(run, node)[:16]}.json", told)
    out.parent.mkdir(parents=True, exist_ok=True)
    return out


def commit(store: Path, run: str, node: str) -> Path:
    folder = store / "store" / key_of(run, node)[:16]
    write(folder / "record.json", {"key": key_of(run, node), "seconds": 1.0, "metrics": {}, "files": {}})
    return folder


def write_sweep(store: Path, name: str, runs: list[str]) -> None:
    """Of these runs, which wait for their jobs as its points from now on."""
    waiting = claims.read(Store(store))
    claims.add(Store(store), name, {run: waiting[run][run] for run in runs if run in waiting.get(run, {})})
    claims.drop(Store(store), lambda claimant, run: claimant == run and run in runs)
    write(store / "sweeps" / name / "sweep.json", {"sweep": name, "points": [{"run": run} for run in runs]})
