"""Who waits for which jobs: one that several runs or sweeps wait for is cancelled with the last of them.

jobs/claims/<run or sweep>.json   of what was submitted under that name: run -> jobs that it waits for
jobs/ended/<sweep>                when it was cancelled last: a command that works on it begins nothing more
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from alignment.files import listed, read_json, write_json, write_text
from alignment.pipeline.store import Store

FOLDER = "jobs/claims"
ENDED = "jobs/ended"
Claims = dict[str, dict[str, list[str]]]  # claimant -> run -> jobs


def read(store: Store) -> Claims:
    """Of all that was ever submitted; most of those jobs have ended."""
    return {path.stem: _of(path) for path in listed(store.root, f"{FOLDER}/*.json")}


def _of(path: Path) -> dict[str, list[str]]:
    try:
        told: Any = read_json(path)
    except (OSError, ValueError):
        return {}
    found = told.items() if isinstance(told, dict) else ()
    return {run: [str(job) for job in jobs] for run, jobs in found if isinstance(jobs, list)}


def add(store: Store, claimant: str, jobs: Mapping[str, Sequence[str]]) -> None:
    """jobs: run -> jobs that it waits for from now on. The caller holds the lock of submissions. Raises OSError."""
    path = store.root / FOLDER / f"{claimant}.json"
    known = _of(path)
    more = {run: list(dict.fromkeys([*known.get(run, []), *of])) for run, of in jobs.items()}
    write_json(path, {**known, **more}, durable=False)


def drop(store: Store, gone: Callable[[str, str], bool]) -> None:
    """Those of a claimant's runs of which gone(claimant, run). The caller holds the lock of submissions."""
    for claimant, of_runs in read(store).items():
        left = {run: jobs for run, jobs in of_runs.items() if not gone(claimant, run)}
        if len(left) < len(of_runs):
            write_json(store.root / FOLDER / f"{claimant}.json", left, durable=False)


def end(store: Store, sweep: str) -> None:
    write_text(store.root / ENDED / sweep, f"{time.time_ns()}\n", durable=False)


def ended(store: Store, sweep: str) -> str | None:
    """A mark, another one each time that the sweep is cancelled; None if it never was."""
    try:
        return (store.root / ENDED / sweep).read_text(encoding="utf-8")
    except OSError:
        return None


def by_job(claims: Claims) -> dict[str, list[tuple[str, str]]]:
    """Job -> (claimant, run) of all that wait for it."""
    found: dict[str, list[tuple[str, str]]] = {}
    for claimant, of_runs in claims.items():
        for run, jobs in of_runs.items():
            for job in jobs:
                found.setdefault(job, []).append((claimant, run))
    return found
