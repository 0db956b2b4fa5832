"""Looks at runs again and again: those whose stages are jobs of a cluster go on without anybody here."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live

from alignment.errors import MachineError
from alignment.pipeline import ledger
from alignment.pipeline.store import Store
from alignment.reporting import jobs, queue, status
from alignment.reporting.sweep_files import is_name
from alignment.signals import Listener, Stopped

EVERY = 2.0  # seconds between two looks at the store; SLURM is asked more seldom (jobs.py)


class Look:
    """At the runs of a store, as they are now; each call is another one, and knows what the calls before have found."""

    def __init__(self, store: Store, clock: Callable[[], float] = time.monotonic):
        self._store, self._results, self._jobs = store, status.Results(store.root), jobs.Jobs(store, clock)
        with suppress(MachineError, OSError):  # what SLURM does not say is told of each job
            ledger.recall(store)

    def __call__(self, folders: Sequence[Path] | None, sweeps: Sequence[str] = ()) -> list[dict[str, Any]]:
        """Of all runs, or those in these folders. sweeps: those that were asked for."""
        known = self._jobs.read, self._results, sweeps
        return status.read_runs(self._store.root, self._store.is_held, folders, *known)


def look(store: Store, folders: Sequence[Path] | None, sweeps: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Once."""
    return Look(store)(folders, sweeps)


def watch(
    store: Store,
    meant: Callable[[], tuple[Sequence[Path] | None, Sequence[str]]],
    sleep: Callable[[float], None] = time.sleep,
    clock: Callable[[], float] = time.monotonic,
) -> int:
    """Until all have ended: in a terminal the table, which changes; elsewhere a line for each stage that does. Returns
    the exit code: 0 if all are done or pruned, else 1. meant: folders of the runs, as many as there are by
    now, and sweeps: a search makes more of them."""
    console, said, look = Console(highlight=False), dict[str, str](), Look(store, clock)
    moving = console.is_terminal and not console.is_dumb_terminal
    with Live(console=console, auto_refresh=False) as live:
        while True:
            folders, sweeps = meant()
            runs = look(folders, sweeps)
            if moving:
                live.update(queue.table(runs), refresh=True)
            else:
                for line in queue.changes(runs, said):
                    queue.say(line)
            if all(status.is_over(run) for run in runs) and not _has_command(store, runs, sweeps):
                return int(any(run["state"] not in ("done", "pruned") for run in runs))
            sleep(EVERY)


def _has_command(store: Store, runs: Sequence[dict[str, Any]], sweeps: Sequence[str]) -> bool:
    """Whether a command works on a sweep of theirs still, which may come to its next points in a moment."""
    theirs = {sweep for run in runs if is_name(sweep := run.get("sweep"))}
    return any(store.driver_lock(sweep).is_held() for sweep in sorted({*theirs, *sweeps}))


def until_done(
    folders: Sequence[Path],
    store: Store,
    stop: Listener,
    each: Callable[[list[dict[str, Any]]], None] = lambda runs: None,
    sleep: Callable[[float], None] = time.sleep,
) -> list[dict[str, Any]]:
    """The state of each run, as status.read_runs tells it, once nothing of it waits or works any more.

    each: told the states at every look, before anybody waits for the next one.
    Raises Stopped if this process is asked to: the jobs go on.
    """
    said, look = dict[str, str](), Look(store)
    with stop.deferred():
        while True:
            runs = look(folders)
            for line in queue.changes(runs, said):
                queue.say(line)
            if all(status.is_over(run) for run in runs):
                return runs
            each(runs)
            if stop.asked:
                raise jobs_go_on(stop.asked)
            sleep(EVERY)


def jobs_go_on(asked: str) -> Stopped:
    """What is said by a command that is asked to stop, and why, when all its jobs are queued."""
    return Stopped(f"{asked}: the jobs go on, alignment cancel ends them")
