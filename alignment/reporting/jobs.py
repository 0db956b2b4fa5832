"""What SLURM says of the jobs that make stages, and what they have said themselves."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from alignment.errors import MachineError
from alignment.launchers import slurm
from alignment.pipeline.ledger import job_of
from alignment.pipeline.store import Store
from alignment.reporting.gather import tail

# Seconds between two questions to SLURM: when something has just happened, and twice as long after each; while things
# happen; while nothing does. CALM: after so long what happens is worth the first pace again.
SOON, OFTEN, SELDOM, CALM = 2.0, 15.0, 30.0, 60.0
# Files of a work folder that change where an attempt begins or ends, and not while it is at work.
TELLING = ("stage.json", "attempts.jsonl", "outcome.json")
SOON_AGAIN = 300.0  # seconds after which SLURM starts a job that was queued again, at most
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


class Jobs:
    """What SLURM and the jobs themselves say, to one who looks at the store every few seconds, for days perhaps.

    The controller serves a whole cluster, so it is asked every half a minute if nothing happens, every quarter if
    something does, and soon after a file has said that something has: in a moment its job may end, or others begin.
    """

    def __init__(self, store: Store, clock: Callable[[], float] = time.monotonic):
        self._store, self._clock = store, clock
        self._known: dict[str, slurm.JobState] = {}
        self._accounted: dict[str, slurm.JobState] = {}
        self._final: dict[str, slurm.JobState] = {}  # of jobs that the controller has forgotten: nothing changes them
        self._completed: dict[str, float] = {}  # when such a job was first seen, by the clock on the wall
        self._refused: str | None = None  # why SLURM did not answer
        self._asked: set[str] = set()  # the jobs that it was asked for
        self._at = self._hurried = float("-inf")
        self._every = SOON
        self._files: dict[str, list[int]] = {}

    def read(self, keys: Sequence[str]) -> dict[str, dict[str, Any]]:
        """Key -> {"job", "out": file of what it printed, "submitted", "alive", "waits", "runs": its processes may be
        expected to show life, "started", "nodes", "why": it waits, or has ended, "ended": failed | cancelled | gone,
        "code": of errors.BY_CODE, or 1, where it has failed and has said so}.
        Keys that no job was submitted for are left out.

        Where SLURM does not answer, its word is missing: whose end is not known counts as queued, with that as its why,
        and is "unknown" if it never was known to be alive.
        """
        notes = {key: note for key in keys if (note := job_of(self._store, key))}
        jobs, now = {str(note["job"]) for note in notes.values()}, self._clock()
        if self._has_changed(keys):
            if now - self._hurried >= CALM:
                self._every, self._hurried = SOON, now
            self._every = min(self._every, OFTEN)
        if jobs - self._asked or now - self._at >= self._every:
            self._ask(jobs)
        if self._refused:
            lost = {"alive": True, "unknown": True, "waits": True, "why": f"unknown: {self._refused}"}
            return {key: {**note, **self._last_told(note, lost)} for key, note in notes.items()}
        return {key: {**note, **self._told(note)} for key, note in notes.items()}

    def _has_changed(self, keys: Sequence[str]) -> bool:
        """Whether a stage was made, began another attempt or ended one since the last look."""
        before = self._files
        self._files = {key: [_mtime(self._store.work(key) / name) for name in TELLING] for key in keys}
        return bool(before) and self._files != before

    def _ask(self, jobs: set[str]) -> None:
        before = self._known, self._accounted
        open_ = jobs - set(self._final)
        try:
            self._known = slurm.states(open_) if open_ else {}
            self._accounted = slurm.accounted(open_ - set(self._known))
            self._refused = None
        except MachineError as error:
            self._refused = error.what
        self._final |= {job: state for job, state in self._accounted.items() if not state.lives}
        self._asked, self._at = jobs, self._clock()
        moves = (self._known, self._accounted) != before
        self._every = min(2 * self._every, OFTEN if moves else SELDOM)

    def _last_told(self, note: dict[str, Any], lost: dict[str, Any]) -> dict[str, Any]:
        """What SLURM said before it went away; else what is said of a job that nothing is known of."""
        if not any(note["job"] in states for states in (self._final, self._known, self._accounted)):
            return lost
        told = self._told(note)
        return {**told, "why": lost["why"]} if told["alive"] else told

    def _told(self, note: dict[str, Any]) -> dict[str, Any]:
        """The controller knows every job that lives. Of one that it does not know the accounting may say RUNNING for
        ever, where the controller was restarted at the wrong moment."""
        job = str(note["job"])
        known = self._known.get(job)
        if known is not None and known.lives:
            why = REASONS.get(known.reason, known.reason) if known.waits else None
            if known.waits and known.reason == "BeginTime" and known.start and known.start - time.time() > SOON_AGAIN:
                why = f"not before {time.strftime('%Y-%m-%d %H:%M', time.localtime(known.start))}"
            runs = known.state == "RUNNING"  # not one that is suspended, or whose nodes are being made ready
            told = {"alive": True, "waits": known.waits, "runs": runs, "started": known.start}
            return {**told, "why": why, "nodes": known.nodes}
        state = self._final.get(job) or known or self._accounted.get(job)
        if note.get("cancelled") and (state is None or state.state != "COMPLETED"):
            return {"alive": False, "ended": "cancelled", "why": "by alignment cancel"}
        if state is not None and state.state == "COMPLETED":  # by its code its result is stored
            if time.time() - (state.end or self._completed.setdefault(job, time.time())) < LAG:
                return {"alive": True, "waits": False, "why": "has ended; its result is not to be seen from here yet"}
            return {
                "alive": False,
                "ended": "gone",
                "why": f"job {job} has made it; its result is not in the store any more",
            }
        if state is None and not Path(str(note.get("out"))).exists():
            # Of an element of an array that was cancelled while it waited SLURM says nothing, while others wait still.
            why = f"job {job} has never begun: it was cancelled, or its node could not write into {note.get('out')}"
            return {"alive": False, "ended": "cancelled", "why": why}
        said, code = last_error(Path(str(note.get("out"))))
        if state is not None and state.state == "CANCELLED":
            why = said or "cancelled, or a stage before it has failed"
            return {"alive": False, "ended": "cancelled", "why": why}
        lost = f"job {job} has ended without a result" if state is None or state.lives else _ended(state)
        return {"alive": False, "ended": "failed", "why": said or lost, **({} if code is None else {"code": code})}


def _ended(state: slurm.JobState) -> str:
    word = state.state.lower().replace("_", " ")
    return f"{word} without a word: its driver was killed, or could not start" if state.state == "FAILED" else word


def _mtime(file: Path) -> int:
    try:
        return file.stat().st_mtime_ns
    except OSError:
        return 0


def last_error(out: Path) -> tuple[str | None, int | None]:
    """What a job has said it failed of, and the code of that (errors.word_of_a_job)."""
    found = re.findall(r"^alignment: error: (.*?)(?: \[code (\d+)\])?$", tail(out, TAIL), re.M)
    if not found:
        return None, None
    said, code = found[-1]
    return said, int(code) if code else None
