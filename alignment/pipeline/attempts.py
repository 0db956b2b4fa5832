"""Attempts at a stage, a line of attempts.jsonl each: what it came to, why, and whether another one is worth it."""

from __future__ import annotations

import json
import os
import re
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alignment.errors import BY_CODE, AlignmentError, LostError, PreemptedError, StageFailed
from alignment.files import read_json

if TYPE_CHECKING:
    from alignment.pipeline.supervisor import Supervisor

ATTEMPTS = "attempts.jsonl"
LONGEST_WAIT = 300.0  # seconds before a retry
OUT_OF_MEMORY = "out of memory is the usual cause of signal 9"
GOES_ON = "the same command goes on from there"
Row = dict[str, Any]


def read(folder: Path) -> list[Row]:
    """The attempts at the stage of a work folder so far; a line that was cut is left out."""
    rows = []
    try:
        lines = (folder / ATTEMPTS).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows


def row(folder: Path, order: Row, outcome: str, cause: str | None, ended: float | None = None) -> Row:
    """One line. order: stage.json. outcome: done | preempted | lost | failed | interrupted. Times: unix seconds."""
    experiment = order["experiment"]
    processes = experiment["launcher"].get("processes", 1) if order["distributed"] else 1
    return {
        "attempt": order["attempt"],
        "started": order["started"],
        "ended": time.time() if ended is None else ended,
        "outcome": outcome,
        "cause": cause,
        "step": (_read(folder / "progress.json") or {}).get("step"),
        "host": order["host"],
        "processes": processes,
        "strategy": experiment["engine"]["strategy"] if order["distributed"] else None,
    }


def note(folder: Path, line: Row) -> None:
    """Append it, unless the disk is full: that must not hide what the attempt came to."""
    try:
        with open(folder / ATTEMPTS, "ab", buffering=0) as stream:
            stream.write((json.dumps(line) + "\n").encode())
            os.fsync(stream.fileno())
    except OSError:
        return


def settle(folder: Path) -> None:
    """Before another attempt: note the one whose driver was killed before it could."""
    order = _read(folder / "stage.json")
    if not order or not {"attempt", "started", "host", "distributed", "experiment"} <= set(order):
        return
    if any(line.get("attempt") == order["attempt"] for line in read(folder)):
        return
    told = _read(folder / "progress.json") or {}
    note(folder, row(folder, order, "interrupted", "its driver was killed", told.get("at", order["started"])))


def here() -> Row:
    """What stage.json says of the attempt itself."""
    return {"started": time.time(), "host": socket.gethostname()}


def checkpoint(folder: Path) -> int:
    """The step of the newest whole checkpoint; -1 without one."""
    found = (re.fullmatch(r"step-(\d+)", path.parent.name) for path in folder.glob("checkpoints/step-*/manifest.json"))
    return max((int(name[1]) for name in found if name), default=-1)


def cause(name: str, folder: Path, code: int, watched: Supervisor) -> AlignmentError:
    """Why an attempt ended without a result. Who was asked to stop was preempted, unless it failed by itself."""
    error = _told(folder, "error.json") or watched.fault or _told(folder, "lost.json")
    outcome, why = _read(folder / "outcome.json"), watched.asked
    # Ranks that were asked one by one end with 0 or 75. After a failure torchrun asks those that are left: no such end.
    if error is None and outcome and (why or code in (0, PreemptedError.exit_code)):
        # The driver sends SIGTERM whatever it was asked by; words of the stage's own say more.
        why = why if why and outcome["why"] == "SIGTERM" else str(outcome["why"])
    elif error is None:
        error = _by_code(name, folder, code)
        error.retry = error.retry or bool(why)  # it had no time to say so
    if error is None or (why and error.retry):
        return PreemptedError(f"{name} has stopped ({why})", fix=GOES_ON)
    return error


def outcome_of(error: BaseException) -> str:
    if isinstance(error, PreemptedError):
        return "preempted"
    if not isinstance(error, AlignmentError):
        return "interrupted"
    return "lost" if error.retry else "failed"


class Retries:
    """Counts failures in a row without progress, which is a newer whole checkpoint."""

    def __init__(self, folder: Path, most: int, wait_s: float):
        self._folder, self._most, self._wait_s = folder, most, wait_s
        self._failures, self._reached = 0, checkpoint(folder)

    def next(self, error: AlignmentError) -> float | None:
        """Seconds to wait before the next attempt; None if there must be none."""
        if not error.retry:
            return None
        reached = checkpoint(self._folder)
        self._failures = 1 if reached > self._reached else self._failures + 1
        self._reached = reached
        if self._failures > self._most:
            return None
        return min(LONGEST_WAIT, self._wait_s * 2.0 ** (self._failures - 1))

    def says(self, error: AlignmentError, attempt: int, wait: float) -> str:
        """attempt: number of the one that has failed."""
        start = f"from step {self._reached}" if self._reached >= 0 else "from its beginning"
        last = attempt + self._most - self._failures + 1
        return f"{error.what}; attempt {attempt + 1} of up to {last} in {wait:g} s, {start}"


def pause(seconds: float, asked: Callable[[], str | None], every: float = 0.1) -> None:
    """Wait for the next attempt. Raises PreemptedError if asked to stop meanwhile."""
    until = time.monotonic() + seconds
    while True:
        if why := asked():
            raise PreemptedError(f"stopped ({why}) between two attempts", fix=GOES_ON)
        if (left := until - time.monotonic()) <= 0:
            return
        time.sleep(min(every, left))


def _told(folder: Path, name: str) -> AlignmentError | None:
    """The error that a process left in its own words."""
    told = _read(folder / name)
    if not told:
        return None
    error = BY_CODE.get(told["code"], StageFailed)(told["what"], where=told["where"], fix=told["fix"])
    error.retry = bool(told.get("retry", error.retry))
    error.add_note(told["traceback"])
    return error


def _by_code(name: str, folder: Path, code: int) -> AlignmentError:
    """What the exit code and the log of a job say that left no word."""
    log = folder / "log.txt"
    number = -code if code < 0 else code - 128 if code > 128 else 0
    hint = f"{OUT_OF_MEMORY}; " if number == 9 else ""
    if number:
        error: AlignmentError = LostError(f"{name} was killed by signal {number}", fix=f"{hint}see {log}")
    elif code == StageFailed.exit_code:  # torchrun's, of a rank that died before it could show life or leave a word
        error = LostError(f"{name} ended without a word", fix=f"{OUT_OF_MEMORY}; see {log}")
    else:
        kind = BY_CODE.get(code, StageFailed)  # a full disk may have kept its words
        error = kind(f"the stage {name} ended with exit code {code} and left no result", fix=f"see {log}")
    try:
        error.add_note("".join(log.read_text(errors="replace").splitlines(keepends=True)[-30:]))
    except OSError:
        pass
    return error


def _read(path: Path) -> Row | None:
    try:
        value = read_json(path)
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None
