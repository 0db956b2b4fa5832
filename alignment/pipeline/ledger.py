"""Which job makes which key: what is queued already is not submitted again, but waited for.

jobs/keys/<key16>.json     the job that was last submitted for a key
jobs/<submission>/begun    a submission that has not come to its end: of its jobs some may have no note
"""

from __future__ import annotations

import re
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from alignment.files import LATE, listed, read_json, remove, write_json
from alignment.launchers import slurm
from alignment.launchers.slurm import JobState
from alignment.pipeline import claims
from alignment.pipeline.runner import Run
from alignment.pipeline.store import Store
from alignment.signals import Asked, Stopped

JOBS = "jobs"
KEYS = f"{JOBS}/keys"
BEGUN = "begun"
SUBMIT = "submit"  # name of the lock of submissions
DEPENDENT = "Dependency"  # SLURM's reason for a job that waits for another
NEVER = "DependencyNeverSatisfied"  # SLURM's reason; it takes such a job from the queue, but not at once
ENDING = 90.0  # seconds to wait for a job that is ending: SLURM's KillWait, 30 s by default, and what sites do after it


def job_of(store: Store, key: str) -> dict[str, Any] | None:
    """{"job", "submitted", "run", "node", "out"} of the job that was last submitted for a key; and "cancelled", when,
    if `alignment cancel` has cancelled it."""
    return _read(_place(store, key))


def unmade(store: Store) -> list[dict[str, Any]]:
    """As `job_of`, of every key that a job was ever submitted for and that has no result."""
    notes = [(path.stem, _read(path)) for path in listed(store.root, f"{KEYS}/*.json")]
    return [told for key, told in notes if told and not (store.result(key) / "record.json").exists()]


def _read(path: Path) -> dict[str, Any] | None:
    try:
        told = read_json(path)
    except (OSError, ValueError):
        return None
    whole = isinstance(told, dict) and all(isinstance(told.get(name), str) for name in ("job", "run", "node", "out"))
    return told if whole else None


def _place(store: Store, key: str) -> Path:
    return store.root / KEYS / f"{key[:16]}.json"


def note(
    store: Store, script: Path, number: str, orders: Mapping[str, Mapping[str, Any]], array: bool
) -> dict[str, str]:
    """Remember the jobs of one script, which is `number` for SLURM. script: without its ending; jobs print beside it.
    orders: index -> {"run", "node", "key"}. Returns key -> job."""
    jobs = {}
    submitted = script.with_suffix(".json").stat().st_mtime  # by the clock that what jobs write is dated with
    for index, order in orders.items():
        job = f"{number}_{index}" if array else number
        told = {"job": job, "submitted": submitted, "run": order["run"], "node": order["node"]}
        told["out"] = str(script.with_name(f"{script.name}-{job}.out"))
        write_json(_place(store, order["key"]), told, durable=False)
        jobs[order["key"]] = job
    return jobs


def note_cancelled(store: Store, jobs: Mapping[str, str]) -> None:
    """Remember that these were cancelled by us: SLURM forgets within minutes. jobs: number -> key of what it makes."""
    for job, key in jobs.items():
        if (told := job_of(store, key)) and told["job"] == job:
            write_json(_place(store, key), {**told, "cancelled": time.time()}, durable=False)


def queued(
    runs: Sequence[Run], say: Callable[[str], None] = lambda text: None, patience: float = ENDING
) -> dict[str, str]:
    """Key -> job, of what SLURM will make or makes already. A job that is ending is waited for, `patience` seconds,
    till it is known how: cancelled, queued again, or well, though its result is not to be seen yet. What SLURM will
    never start does not count."""
    store = runs[0].store
    keys = dict.fromkeys(node.key for run in runs for node in run.nodes)
    known = {key: told["job"] for key in keys if (told := job_of(store, key))}
    until, said = time.monotonic() + patience, False
    while True:
        states = slurm.states(known.values()) if known else {}
        ending = [
            job for key, job in known.items() if job in states and _is_ending(states[job]) and store.record(key) is None
        ]
        if not ending or time.monotonic() > until:
            live = {key: job for key, job in known.items() if job in states and _will_make(states[job])}
            return _without_orphans(runs, live, states)
        if not said:
            say(f"waits for what is ending: job {', '.join(dict.fromkeys(ending))}")
            said = True
        time.sleep(1.0)
        store.look_anew()


def _is_ending(state: JobState) -> bool:
    return state.state == "COMPLETING" or _has_just_made(state)


def _has_just_made(state: JobState) -> bool:
    """By its word, while a file system may hide what another machine has just committed."""
    return state.state == "COMPLETED" and state.end is not None and time.time() - state.end < LATE


def _will_make(state: JobState) -> bool:
    if _has_just_made(state):
        return True
    return state.lives and state.state != "COMPLETING" and not (state.waits and state.reason == NEVER)


def _without_orphans(runs: Sequence[Run], jobs: Mapping[str, str], states: Mapping[str, JobState]) -> dict[str, str]:
    """Key -> job, but for those that wait for a job that is gone and has left no result: SLURM will take them from the
    queue, but only when it comes to look, and till then they wait like any other."""
    kept: dict[str, str] = {}
    for run in runs:
        for node in run.nodes:  # parents before children
            job = jobs.get(node.key)
            if job is None or node.key in kept:
                continue
            parents = (parent.key for parent in node.parents.values() if parent.key not in kept)
            dependent = states[job].waits and states[job].reason == DEPENDENT
            if not (dependent and any(run.store.record(key) is None for key in parents)):
                kept[node.key] = job
    return kept


@contextmanager
def alone(store: Store, who: str, say: Callable[[str], None], stop: Asked | None = None) -> Iterator[None]:
    """While nobody else submits or cancels. who: a word for those who wait. Raises Stopped if this process is asked to
    stop while it waits; stop: hears that where signals are deferred."""

    def waiting(holder: object) -> None:
        if stop is not None and stop.asked:
            raise Stopped(stop.asked)

    lock = store.run_lock(SUBMIT)
    if not lock.acquire(who):
        say(f"waits for another submission: {lock.holder().get('who')}")
        lock.wait(who, waiting)
    try:
        yield
    finally:
        lock.release()


def recall(store: Store) -> None:
    """`remember`, by who submits nothing: not while another command submits. Raises MachineError if SLURM refuses."""
    if not _left(store):
        return
    lock = store.run_lock(SUBMIT)
    if lock.acquire("what a submission has left"):
        try:
            remember(store)
        finally:
            lock.release()


def remember(store: Store) -> None:
    """Note the jobs of submissions that did not come to their end: their command was killed, or SLURM took too long to
    answer it; and of all, if the notes were removed. The caller holds the lock of submissions: none is at it now."""
    folders = _left(store)
    printed = slurm.outputs().items() if folders else ()
    # By number: of two jobs for one key the later stays.
    for asked, number in sorted(printed, key=lambda found: (len(found[1]), found[1])):
        path = Path(asked.replace("%%", "%"))
        found = re.fullmatch(r"(.+)-(%A_%a|%j|\d+_\d+|\d+)\.out", path.name)
        if found and path.parent in folders and (script := path.with_name(found[1])).with_suffix(".json").exists():
            orders = read_json(script.with_suffix(".json"))
            jobs = note(store, script, number, orders, array="_" in found[2])
            if (path.parent / BEGUN).exists():
                owners: dict[str, list[str]] = defaultdict(list)
                for order in orders.values():
                    owners[order["run"]].append(jobs[order["key"]])
                claims.add(store, (path.parent / BEGUN).read_text(), owners)
    for folder in folders:
        remove(folder / BEGUN)
    if folders:
        (store.root / KEYS).mkdir(exist_ok=True)


def _left(store: Store) -> set[Path]:
    """Folders of submissions whose jobs may have no note."""
    if not (store.root / KEYS).exists():
        return {path.parent for path in listed(store.root, f"{JOBS}/*/*.sbatch")}
    return {path.parent for path in listed(store.root, f"{JOBS}/*/{BEGUN}")}
