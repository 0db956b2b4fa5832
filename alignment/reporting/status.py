"""What the runs of a store are doing now: run.json, corrected by what the folders and the locks say."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from alignment import life
from alignment.errors import BY_CODE, InputError
from alignment.files import listed
from alignment.pipeline import attempts
from alignment.pipeline.store import Store
from alignment.pipeline.sweeps import FILE
from alignment.reporting import words
from alignment.reporting.gather import Row, is_run, read, tail
from alignment.reporting.settings import called, short_names
from alignment.reporting.sweep_files import is_name, read_sweep
from alignment.reporting.targets import unreadable
from alignment.reporting.words import DONE, error_text, finite

# Seconds without a beat that are worth a word. Of a file that another machine holds open and writes, NFS may show what
# is 95 s old though all is well: it is written back up to 35 s late, and what was seen of it here is believed for 60 s.
SILENT = 150.0
FRESH = 15.0  # seconds after its last line in which a run between two stages counts as running
UNKNOWN = ("unreadable", "missing")  # states of a run of which nothing else is known
LINES = 4  # of a failed stage's log
NOISE = re.compile(r"(srun|slurmstepd\S*): |_step_signal: ")  # how SLURM ends what is left: no reason
TAIL = 65_536  # bytes in which they are looked for

Known = dict[str, tuple[tuple[int, ...], Row]]  # name -> the file as it was (inode, time, size), and what it said


def read_runs(
    store: Path,
    is_held: Callable[[str], bool],
    folders: Sequence[Path] | None = None,
    jobs_of: Callable[[list[str]], dict[str, Row]] = lambda keys: {},
    results: Results | None = None,
    sweeps: Sequence[str] = (),
) -> list[Row]:
    """Every run of the store, the newest first; or those in these folders, in their order.

    is_held(key) says whether a living process works on a key. jobs_of(keys): key -> what `jobs.read` says of the job of
    a cluster that makes it. A run is run.json's content with, corrected, "state": done | gone | running | waiting |
    queued | failed | cancelled | preempted | interrupted | pruned | unreadable | missing, "driven": whether a living
    process brings its stages into the store here, "seconds": of its own work, "folder", "own": in what it differs from
    the others of its sweep, in words, else empty, and nodes whose "state" is reused or one of these; working ones have
    "progress", those that this run has tried "attempts" (a count) and "causes" (why each that ended without a result
    did), those that are jobs of a cluster "job" and, where it waits, "why", where it runs, "on" (its nodes); failed
    ones "log" (the last lines of what the stage, or else its job, has written), and those of a cluster that have said
    why their "code" (of errors.BY_CODE, or 1).
    gone: it was done, but the store no longer has the result, or not whole ("error" says what is wrong with it); the
    same command makes it again.
    preempted: stopped in order. pruned: stopped as a hopeless trial of a sweep. interrupted: killed, or ended at once.
    unreadable, missing (a point of a sweep that has no folder yet): the run's "error" says what is wrong with its
    run.json; nothing else is known of it. sweeps: names of those that were asked for, of which "own" is.
    """
    files = sorted(store.glob("runs/*/run.json")) if folders is None else [folder / "run.json" for folder in folders]
    results = results or Results(store)
    jobs = jobs_of_runs(files, results, jobs_of)
    runs = [read_run(file, results, is_held, jobs) for file in files]
    theirs = [run["sweep"] for run in runs if is_name(run.get("sweep"))]
    known = {sweep: results.sweep(sweep) for sweep in dict.fromkeys([*sweeps, *theirs])}
    runs = [_placed(run, known, sweeps) for run in runs]
    if folders is not None:
        return runs
    return sorted(runs, key=lambda run: finite(run.get("created")) or 0.0, reverse=True)


class Results:
    """What a store has, as it says itself: all files with their sizes. Of a result that was whole these are not looked
    at again while its record is the same: who looks at hundreds of stages every few seconds would ask for thousands.
    And which runs have a driver: who holds a run's lock."""

    def __init__(self, root: Path):
        self.root = root
        self._store = Store(root)
        self._known: Known = {}  # records, by key
        self._sweeps: Known = {}

    def is_driven(self, run: str) -> bool:
        return self._store.run_lock(run).is_held()

    def damage(self, key: str) -> str | None:
        return self._store.damage(key)

    def record(self, key: str) -> Row | None:
        """{"seconds", "attempts"} of a committed result, else None."""
        return _once(self._known, key, self._store.result(key) / "record.json", lambda: self._record(key))

    def _record(self, key: str) -> Row | None:
        record = self._store.record(key)
        return None if record is None else {name: record.get(name) for name in ("seconds", "attempts")}

    def sweep(self, name: str) -> Row:
        """{"launcher": of a sweep, "own": run -> in what the point differs from the others, in words}."""
        folder = self.root / "sweeps" / name
        found = _once(self._sweeps, name, folder / FILE, lambda: _own_of(folder))
        return found or {"launcher": None, "own": {}}


def _own_of(folder: Path) -> Row | None:
    try:
        told = read_sweep(folder)
    except InputError:
        return None
    points = {point["run"]: point["settings"] for point in told["points"] if point["run"]}
    names = short_names(list({key: None for settings in points.values() for key in settings}))
    own = {run: called(few, {key: names[key] for key in few}) for run, few in points.items()}
    return {"launcher": told["launcher"], "own": own}


def _once(known: Known, name: str, file: Path, look: Callable[[], Row | None]) -> Row | None:
    """What a look at a file has found, which is not repeated while the file is the same."""
    try:
        now = os.stat(file)
    except OSError:
        return None
    mark = (now.st_ino, now.st_mtime_ns, now.st_size)
    before, told = known.get(name, (None, None))
    if before == mark:
        return told
    if (told := look()) is not None:
        known[name] = mark, told
    return told


def jobs_of_runs(
    files: Sequence[Path], results: Results, jobs_of: Callable[[list[str]], dict[str, Row]]
) -> dict[str, Row]:
    """What is said of the jobs of all stages of these runs that are not made: asked once."""
    runs = [run for file in files if is_run(run := read(file))]
    keys = {node.get("key"): None for run in runs for node in run.get("nodes") or []}
    missing = [key for key in keys if isinstance(key, str) and not results.record(key)]
    return jobs_of(missing) if missing else {}


def _placed(run: Row, known: Mapping[str, Row], asked: Sequence[str]) -> Row:
    """With what its sweep says of it: one that was asked for, else its own; of a run without a word of its own, any."""
    own = [run["sweep"]] if is_name(run.get("sweep")) else []
    few = [known[sweep] for sweep in [*(own if {*own} & {*asked} else []), *asked, *(own or known)]]
    found = next((sweep for sweep in few if run["run"] in sweep["own"]), None)
    told = {**run, "own": found["own"][run["run"]] if found else ""}
    if found and found["launcher"] != "slurm" and run["state"] == "unreadable" and not Path(run["folder"]).exists():
        told.update(state="missing", error="not begun yet, or deleted")  # nor has it jobs that nobody knows of
    return told


def read_run(file: Path, results: Results, is_held: Callable[[str], bool], jobs: dict[str, Row]) -> Row:
    """One run by its run.json, as in `read_runs`. jobs: of `jobs_of_runs`."""
    run = read(file)
    if not is_run(run):
        told: Row = {"run": file.parent.name, "state": "unreadable", "error": str(unreadable(file))}
        return {**told, "folder": str(file.parent), "seconds": None, "nodes": []}
    nodes = [_node(node, results, is_held, jobs) for node in run.get("nodes") or []]
    for node in nodes:
        if node["state"] == "failed":
            node["log"] = _last_lines(results.root, node, jobs.get(node.get("key") or "", {}))
    spent = sum(finite(node.get("seconds")) or 0.0 for node in nodes if node["state"] != "reused")
    driven = any(node["state"] not in DONE for node in nodes) and results.is_driven(file.parent.name)
    state = _state(nodes, driven or time.time() - (finite(run.get("updated")) or 0.0) < FRESH)
    if run.get("pruned") and state not in ("done", "running", "queued"):
        state = "pruned"
    return {
        **run,
        "run": run.get("run") or file.parent.name,
        "nodes": nodes,
        "state": state,
        "driven": driven,
        "seconds": spent,
        "folder": str(file.parent),
    }


def _node(node: Row, results: Results, is_held: Callable[[str], bool], jobs: dict[str, Row]) -> Row:
    """A node with its true state: run.json of a killed run still says running."""
    key, state = node.get("key") or "", node.get("state") or "waiting"
    work = results.root / "work" / key[:16]
    told: Row = {**node, "state": state, "error": error_text(node.get("error"))}
    if not key:
        return told
    record = results.record(key)
    if state in DONE:
        return told if record else {**told, "state": "gone", "error": results.damage(key)}
    job, held = jobs.get(key, {}), state != "queued" and is_held(key)
    # The same settings may have been given to another launcher since they were queued: then run.json does not say so.
    alive = job.get("alive") and not job.get("unknown")
    if state == "queued" or (alive and not (held and job.get("waits"))):
        return _of_a_job(told, work, record, job, results)
    if state == "running" and not held:
        if record:
            return {**told, "state": "done"}
        failure, left = read(work / "error.json"), read(work / "outcome.json")
        told["state"] = "failed" if failure else "preempted" if left else "interrupted"
        told["error"] = error_text(failure)
    elif held:
        told |= {"held": True, "job": job["job"] if alive else None}
    if held or told["state"] in ("preempted", "interrupted"):
        told["progress"] = read(work / "progress.json")
        told["seconds"] = finite((told["progress"] or {}).get("elapsed_s"))
    return told


def _of_a_job(told: Row, work: Path, record: Row | None, job: Row, results: Results) -> Row:
    """A node that is a job's to make: what became of it the store, the work folder and SLURM say, not run.json."""
    if record:
        tried = attempts.summary(record["attempts"] or [])
        return {**told, "state": "done", "seconds": finite(record["seconds"]), **tried}
    told |= {"job": job.get("job"), **attempts.summary(attempts.begun(work))}
    if job.get("alive"):
        told |= {
            "state": "queued" if job.get("waits") else "running",
            "why": job.get("why"),
            "on": job.get("nodes"),
        }
        told["progress"] = read(work / "progress.json")
        told["seconds"] = finite((told["progress"] or {}).get("elapsed_s"))
        told["silent"] = _silence(work, finite(job.get("started")) or 0.0) if job.get("runs") else None
        return told
    told["state"] = job.get("ended") or "waiting"
    error = read(work / "error.json") if _is_of(job, work / "error.json") else None
    damage = results.damage(told["key"]) if told["state"] == "gone" else None
    told["error"] = error_text(error) or damage or job.get("why")
    code = error.get("code") if isinstance(error, dict) else job.get("code")  # of whose words these are
    if isinstance(code, int):
        told["code"] = code
    return told


def _silence(work: Path, started: float) -> float | None:
    """Seconds since the newest sign of life of any rank, if they are many: SLURM takes minutes to find a node gone.

    None before the first sign since the job started, perhaps not for the first time, and between two attempts.
    """
    files = listed(work, f"{life.BEATS}/rank-*.json")
    silent = time.time() - max((stat.st_mtime for path in files if (stat := _stat(path))), default=time.time())
    if silent <= SILENT or time.time() - silent < started:
        return None
    order = read(work / "stage.json")
    attempt = order.get("attempt") if isinstance(order, dict) else None
    # Who left in order has said so. Who was killed after another had failed has not: then the attempt is noted as over.
    paused = attempt is not None and any(row["attempt"] == attempt for row in attempts.read(work))
    left = [beat.ended for beat in life.beats(work).values()]
    return None if paused or (left and all(left)) else silent


def _stat(path: Path) -> os.stat_result | None:
    try:
        return path.stat()
    except OSError:
        return None


def _is_of(job: Row, file: Path) -> bool:
    """Whether the file was written since the job was submitted, and not by one before that tried the same stage."""
    try:
        return file.stat().st_mtime >= (finite(job.get("submitted")) or 0.0)
    except OSError:
        return False


def _last_lines(store: Path, node: Row, job: Row) -> list[str]:
    """What the stage has written last, else what its job has; that of an earlier job would explain another failure.
    Of an error with a known cause, which is said already, no traceback."""
    work = store / "work" / str(node.get("key"))[:16]
    for path in (work / "log.txt" if _is_of(job, work / "log.txt") else None, job.get("out")):
        lines = [line for line in words.plain_lines(tail(Path(path), TAIL)) if not NOISE.match(line)] if path else []
        if lines := [line for line in lines if not line.startswith(attempts.BEGINS)]:
            error = read(work / "error.json") if _is_of(job, work / "error.json") else None
            if isinstance(error, dict) and error.get("code") in BY_CODE:
                lines = words.without_tracebacks(lines, str(error.get("traceback") or ""))
            return lines[-LINES:]
    return []


def works(run: Row) -> bool:
    """Whether a stage of it is at work, or waits in the queue."""
    return any(node["state"] in ("queued", "running") for node in run["nodes"])


def is_over(run: Row) -> bool:
    """Whether nothing of it waits or works any more. Between two stages, and while it waits for what another process
    makes, none of its own is at work, but its driver lives."""
    return not (works(run) or run.get("driven") or run["state"] == "waiting")


def _state(nodes: list[Row], lives: bool) -> str:
    """lives: whether it goes on, as far as is known, where no node says so."""
    states = [node["state"] for node in nodes]
    if nodes and all(state in DONE for state in states):
        return "done"
    for state in ("failed", "interrupted", "cancelled", "preempted", "running", "queued"):
        if state in states:
            return state
    if nodes and all(state in (*DONE, "gone") for state in states):
        return "gone"
    if any(node.get("held") for node in nodes):
        return "waiting"
    return "running" if lives else "interrupted"


def facts_text(progress: Any) -> str:
    """12/40 of progress.json, 33 % where it counts no steps but shares of the whole, or its note."""
    if not isinstance(progress, dict):
        return ""
    step, total = finite(progress.get("step")), finite(progress.get("total"))
    if step is None or not total:
        return str(progress.get("note") or "")
    return f"{100 * step / total:.0f} %" if progress.get("share") else f"{step:.0f}/{total:.0f}"
