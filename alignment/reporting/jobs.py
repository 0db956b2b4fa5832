"""What SLURM says of the jobs that make stages, and what they have said themselves."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Any

from alignment.errors import MachineError
from alignment.launchers import slurm
from alignment.pipeline.store import Store
from alignment.pipeline.submission import job_of
from alignment.reporting.gather import tail

LAG = 180.0  # seconds after a job's end in which its result may be hidden by a file system that caches
TAIL = 65_536  # bytes of a job's output that are looked through
# Reasons for which a job waits, in other words than SLURM's where these say little.
REASONS = {
    "Priority": "others have a higher priority",
    "Resources": "no nodes are free",
    "Dependency": "a stage before it",
    "DependencyNeverSatisfied": "a stage before it has failed",
    "BeginTime": "SLURM starts it again in a moment",
    "JobArrayTaskLimit": "launcher.max_parallel",
    "None": "SLURM has not looked at it yet",
}


def read(store: Store, keys: list[str]) -> dict[str, dict[str, Any]]:
    """Key -> {"job", "out": file of what it printed, "submitted", "alive", "waits", "nodes", "why": it waits, or has
    ended, "ended": failed | cancelled | gone}. Keys that no job was submitted for are left out.

    Where SLURM does not answer, its word is missing: who is not known to live counts as queued, with that as its why.
    """
    notes = {key: note for key in keys if (note := job_of(store, key))}
    try:
        known = slurm.states(note["job"] for note in notes.values())
        accounted = slurm.accounted(note["job"] for note in notes.values() if note["job"] not in known)
    except MachineError as error:
        lost = {"alive": True, "waits": True, "why": f"unknown: {error.what}"}
        return {key: {**note, **lost} for key, note in notes.items()}
    return {
        key: {**note, **_told(note, known.get(note["job"]), accounted.get(note["job"]))} for key, note in notes.items()
    }


def _told(note: dict[str, Any], known: slurm.JobState | None, accounted: slurm.JobState | None) -> dict[str, Any]:
    """known: by the controller, which knows every job that lives. accounted: of one that it does not know, the
    accounting's word, which may say RUNNING for ever where the controller was restarted at the wrong moment."""
    if known is not None and known.lives:
        why = REASONS.get(known.reason, known.reason) if known.waits else None
        return {"alive": True, "waits": known.waits, "why": why, "nodes": known.nodes}
    state, job = known or accounted, note["job"]
    if state is not None and state.state == "COMPLETED":  # by its code its result is stored
        if state.end is None or time.time() - state.end < LAG:
            return {"alive": True, "waits": False, "why": "has ended; its result is not to be seen from here yet"}
        return {
            "alive": False,
            "ended": "gone",
            "why": f"job {job} has made it; its result is not in the store any more",
        }
    said = last_error(Path(str(note.get("out"))))
    if state is None or state.lives:
        return {"alive": False, "ended": "failed", "why": said or f"job {job} has ended without a result"}
    cancelled = state.state == "CANCELLED"
    because = "cancelled, or a stage before it has failed" if cancelled else f"job {job}: {state.state}"
    return {"alive": False, "ended": "cancelled" if cancelled else "failed", "why": said or because}


def last_error(out: Path) -> str | None:
    """What a job has said it failed of."""
    found = re.findall(r"^alignment: error: (.*)$", tail(out, TAIL), re.M)
    return found[-1] if found else None
