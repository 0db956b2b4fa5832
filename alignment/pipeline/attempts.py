"""Attempts at a stage, a line of attempts.jsonl each: what it came to, why, and whether another one is worth it."""

from __future__ import annotations

import json
import shutil
import signal
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alignment import life
from alignment.allocation import allocation
from alignment.errors import BY_CODE, AlignmentError, ConfigError, LostError, MachineError, PreemptedError, StageFailed
from alignment.files import append, listed, read_json
from alignment.launchers import srun
from alignment.pipeline.store import CHECKPOINTS, NEXT, OUTCOME
from alignment.signals import TIME_LIMIT

if TYPE_CHECKING:
    from alignment.pipeline.supervisor import Supervisor

ATTEMPTS = "attempts.jsonl"
BEGINS = "--- attempt "  # the line of log.txt before what an attempt says
FULL = 1 << 20  # bytes: with so few free, a process that has left no word had no room for one
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
        if isinstance(row, dict) and isinstance(row.get("attempt"), int):
            rows.append(row)
    return rows


def begun(folder: Path) -> list[Row]:
    """As `read`, and after them what stage.json says of the attempt that is at work, or ended without being noted."""
    rows, order = read(folder), _read(folder / "stage.json") or {}
    is_new = isinstance(order.get("attempt"), int) and all(row["attempt"] != order["attempt"] for row in rows)
    return [*rows, order] if is_new else rows


def summary(rows: list[Row]) -> Row:
    """Of the attempts at a stage: {"attempts": how many, "causes": why each that failed did so, "restarts": times that
    its job was queued again}."""
    restarts = [int((row.get("job") or {}).get("restarts") or 0) for row in rows]
    causes = [row["cause"] for row in rows if row.get("cause")]
    return {"attempts": len(rows), "causes": causes, "restarts": max(restarts, default=0)}


def row(folder: Path, order: Row, outcome: str, cause: str | None, ended: float | None = None) -> Row:
    """One line. order: stage.json. outcome: done | preempted | lost | failed | interrupted. Times: unix seconds."""
    return {
        "attempt": order["attempt"],
        "started": order["started"],
        "ended": time.time() if ended is None else ended,
        "outcome": outcome,
        "cause": cause,
        "step": (_read(folder / "progress.json") or {}).get("step"),
        "checkpoint": checkpoint(folder),
        "kept": (_read(folder / OUTCOME) or {}).get("kept"),
        "time_left": order.get("time_left"),
        "host": order["host"],
        "job": order.get("job"),
        "processes": order.get("world_size", 1),
        "strategy": order["experiment"]["engine"]["strategy"] if order["distributed"] else None,
    }


def note(folder: Path, line: Row) -> None:
    """Append it, unless the disk is full: that must not hide what the attempt came to."""
    with suppress(OSError):
        append(folder / ATTEMPTS, json.dumps(line) + "\n")


def note_unnoted(folder: Path) -> None:
    """Before another attempt: note the one whose driver was killed before it could, or found the disk full."""
    order = _read(folder / "stage.json")
    if not order or not {"attempt", "started", "host", "distributed", "experiment"} <= set(order):
        return
    if any(line.get("attempt") == order["attempt"] for line in read(folder)):
        return
    ended = (_read(folder / "progress.json") or {}).get("at", order["started"])
    note(folder, row(folder, order, *_left(folder, order), ended))


def _left(folder: Path, order: Row) -> tuple[str, str]:
    """Outcome and cause of an attempt, as far as its processes have said: their words have their disk reserved."""
    if error := _told(folder, "error.json") or _told(folder, "lost.json"):
        return outcome_of(error), str(error)
    if outcome := _read(folder / OUTCOME):
        return "preempted", str(outcome.get("why"))
    before, mine = order.get("job") or {}, allocation()
    # SLURM ends the whole job, with the driver on a living node, where another node fails; and then starts it again.
    if mine and before.get("id") == mine.job and before.get("restarts", mine.restarts) < mine.restarts:
        since = f"job {mine.job}, restart {mine.restarts}"
        return "interrupted", f"its job was ended by SLURM without a word: a node has failed, most likely ({since})"
    return "interrupted", "its driver was killed, or the disk too full to say why"


def here() -> Row:
    """What stage.json says of the attempt itself."""
    mine = allocation()
    return {
        "started": time.time(),
        "host": socket.gethostname(),
        "job": mine and {"id": mine.job, "restarts": mine.restarts, "nodes": mine.nodes},
    }


def checkpoint(folder: Path) -> int:
    """The step of the newest checkpoint whose files are all there with their sizes; -1 without one."""
    manifests = reversed(listed(folder, f"{CHECKPOINTS}/step-*/manifest.json"))
    return next((step for path in manifests if (step := _step(path)) is not None), -1)


def _step(manifest: Path) -> int | None:
    """Of the checkpoint that it is in, or None: a look at sizes, the next attempt will look at the bytes."""
    told = _read(manifest) or {}
    try:
        whole = all((manifest.parent / name).stat().st_size == file["bytes"] for name, file in told["files"].items())
        return int(told["step"]) if whole else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def cause(name: str, folder: Path, code: int, watched: Supervisor) -> AlignmentError:
    """Why an attempt ended without a result. Who was asked to stop was preempted, unless it failed by itself."""
    error, why = _told(folder, "error.json"), watched.asked
    if error is None or (error.exit_code == StageFailed.exit_code and watched.fault):  # may be what came of the fault
        error = watched.fault or error or _told(folder, "lost.json")
    if error is not None and error is not watched.fault:  # torchrun asks those whom the dead one has left
        why = why or (_read(folder / "error.json") or {}).get("asked")
    outcome = _read(folder / OUTCOME)
    # Ranks that were asked one by one end with 0 or 75, or by a second signal once they had said so. After a failure
    # torchrun asks those that are left, and ends with 1.
    if error is None and outcome and (why or code < 0 or code in (0, PreemptedError.exit_code)):
        # The driver passes on whatever it was asked by; what became of it only the stage knows.
        told, _, became = str(outcome["why"]).partition(": ")
        why = ": ".join(filter(None, (why or told, became)))
    elif error is None:
        error = _by_code(name, folder, code)
        error.retry = error.retry or bool(why)  # it had no time to say so
    if error is None or (why and error.retry):
        return PreemptedError(f"{name} has stopped ({why})", fix=GOES_ON)
    return error


def outcome_of(error: BaseException) -> str:
    if isinstance(error, PreemptedError):
        return "preempted"
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    return "lost" if isinstance(error, AlignmentError) and error.retry else "failed"


def cause_of(error: BaseException) -> str:
    """In one line, for the list of attempts; of a stop without its advice, which is for the moment."""
    if isinstance(error, KeyboardInterrupt):
        return "ended at once, by a second signal"
    return error.what if isinstance(error, PreemptedError) else str(error)


def in_vain(name: str, rows: list[Row]) -> AlignmentError | None:
    """What the last one of all attempts comes to if its time limit has ended it and it has left nothing new to go on
    from. Once more with no more time is an error: who starts the command again on code 75 would do so for ever."""
    late: list[float] = []  # seconds that those have had, since anything was left
    reached = -1
    for row in rows:
        if row.get("kept") or row.get("checkpoint", -1) > reached:
            late.clear()
        reached = row.get("checkpoint", -1)
        if _late(row):
            late.append(row["time_left"])
    if not late or not _late(rows[-1]):
        return None
    *before, seconds = late
    if before and max(before) + 1 >= seconds:
        what = f"{name} has come to its time limit {len(late)} times, and has left nothing new to go on from"
        return ConfigError(what, where=TIME_LIMIT, fix=f"{seconds:.0f} s are too few: raise it")
    what = f"{name} has stopped ({TIME_LIMIT}: in {seconds:.0f} s it has left nothing new to go on from)"
    return PreemptedError(what, fix=f"raise {TIME_LIMIT}, or the next attempt gets no further")


def _late(row: Row) -> bool:
    at_limit = row.get("outcome") == "preempted" and TIME_LIMIT in str(row.get("cause"))
    return at_limit and row.get("kept") is False and isinstance(row.get("time_left"), float)


class Retries:
    """Counts failures in a row that brought nothing: no newer whole checkpoint, and nothing learned (NEXT) by which the
    next attempt would do otherwise."""

    def __init__(self, folder: Path, most: int, wait_s: float):
        self._folder, self._most, self._wait_s = folder, most, wait_s
        self._failures, self._reached, self._learned = 0, checkpoint(folder), _read(folder / NEXT)
        self.gained = False  # whether any attempt has brought something

    def next(self, error: AlignmentError) -> float | None:
        """Seconds to wait before the next attempt; None if there must be none."""
        if not error.retry:
            return None
        reached, learned = checkpoint(self._folder), _read(self._folder / NEXT)
        gained = reached > self._reached or learned != self._learned
        self._failures, self.gained = 1 if gained else self._failures + 1, self.gained or gained
        self._reached, self._learned = reached, learned
        if self._failures > self._most:
            return None
        return min(LONGEST_WAIT, self._wait_s * 2.0 ** (self._failures - 1))

    def start(self) -> str | None:
        """Where the next attempt goes on; None: from the stage's beginning."""
        sampled = (self._learned or {}).get("sampled")
        start = f"after the answers to {sampled} prompts" if sampled else None
        return f"from step {self._reached}" if self._reached >= 0 else start

    def says(self, error: AlignmentError, attempt: int, wait: float) -> str:
        """attempt: number of the one that has failed."""
        start = self.start() or "from its beginning"
        last = attempt + self._most - self._failures + 1
        where = f"{error.where}: " if error.where else ""
        return f"{where}{error.what}; attempt {attempt + 1} of up to {last} in {wait:g} s, {start}"


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


def word_of(folder: Path, rank: int) -> AlignmentError | None:
    """What the process of this rank has said of its loss, if it was the first to say so."""
    said = _read(folder / "lost.json") or {}
    return _told(folder, "lost.json") if said.get("rank") == rank else None


def silent(who: str, number: int, log: Path, rank: int | None = None) -> AlignmentError:
    """Why a process, or one of all, has ended that left no word. number: of the signal that ended it; 0: it is not
    known of any."""
    if number <= 0 and (full := _full_disk(log.parent, rank)):
        return full
    how = f"was killed by signal {number}" if number > 0 else "ended without a word"
    hint = {0: "; out of memory is a usual cause", signal.SIGKILL: f"; {OUT_OF_MEMORY}"}.get(number, "")
    return LostError(f"{who} {how}", fix=f"see {log}{hint}")


def _full_disk(folder: Path, rank: int | None) -> MachineError | None:
    """If it was too full to reserve the word of this process, or of any."""
    order = _read(folder / "stage.json") or {}
    ranks = range(order.get("world_size", 1)) if rank is None else [rank]
    try:
        free = shutil.disk_usage(folder).free
    except OSError:  # the folder has moved on, or was removed
        return None
    if free >= FULL or all(_size(life.word(folder, one)) == life.WORD for one in ranks):
        return None
    return MachineError("no space left on the disk", where=str(folder), fix="free some space, or set store=...")


def _by_code(name: str, folder: Path, code: int) -> AlignmentError:
    """What the exit code and the log of a job say that left no word."""
    log = folder / "log.txt"
    number = -code if code < 0 else code - 128 if code > 128 else 0
    try:
        said = log.read_text(encoding="utf-8", errors="replace").rpartition(BEGINS)[2]  # this attempt
    except OSError:
        said = ""
    if refused := srun.refused(said):
        error: AlignmentError = refused
    elif number or code == StageFailed.exit_code:  # torchrun's, of a rank that left no word
        error = silent(name, number, log)
    elif full := _full_disk(folder, None):
        error = full
    else:
        kind = BY_CODE.get(code, StageFailed)  # a full disk may have kept its words
        error = kind(f"the stage {name} ended with exit code {code} and left no result", fix=f"see {log}")
    error.add_note("".join(said.splitlines(keepends=True)[-30:]))
    return error


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _read(path: Path) -> Row | None:
    try:
        value = read_json(path)
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None
