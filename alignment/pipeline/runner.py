"""The driver: walks the graph, reuses what the store has, has a launcher run the rest, one stage at a time."""

from __future__ import annotations

import math
import time
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

from alignment.config.schema import Experiment
from alignment.errors import AlignmentError, LostError, PreemptedError
from alignment.files import append, read_json, write_json
from alignment.launchers import Job, launcher_for
from alignment.pipeline import attempts, graph
from alignment.pipeline.graph import Node
from alignment.pipeline.leading import gather
from alignment.pipeline.store import Lock, Store
from alignment.pipeline.supervisor import Patience, Supervisor
from alignment.signals import TIME_LIMIT, Asked, Listener, Stopped


class Observer(Protocol):
    """Who is told what happens; the terminal is one."""

    def started(self, name: str, kind: str) -> None: ...
    def progress(self, name: str, facts: dict[str, Any]) -> None: ...
    def waiting(self, name: str, holder: dict[str, Any]) -> None: ...
    def done(self, name: str, state: str, seconds: float, facts: dict[str, Any]) -> None: ...
    def warning(self, name: str, text: str) -> None: ...


@dataclass
class Run:
    """One experiment on its way through the store; `state` is what run.json holds.

    writes: whether this process is the one that writes it. (The jobs of a cluster are not: what becomes of their stages
    lies in the store and in the work folders.)
    """

    experiment: Experiment
    command: str
    writes: bool = True
    sweep: str | None = None  # that it belongs to
    own: str = ""  # in what it differs from others of its sweep, in words
    nodes: list[Node] = field(init=False)
    store: Store = field(init=False)
    state: dict[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        self.nodes = graph.build(self.experiment)
        self.store = Store(Path(self.experiment.store))
        self.id = graph.run_id(self.experiment, self.nodes)
        self.folder = self.store.run_folder(self.id)
        self.state = {
            "run": self.id,
            "name": self.experiment.name,
            "created": time.time(),
            "updated": time.time(),
            "command": self.command,
            "sweep": self.sweep,
            "config": self.experiment.model_dump(),
            "final": self.experiment.pipeline.final,
            "nodes": [
                {
                    "name": node.name, "kind": node.kind, "stage": node.stage, "key": node.key,
                    "inputs": {role: parent.name for role, parent in node.parents.items()},
                    "state": "waiting", "seconds": None, "error": None,
                }
                for node in self.nodes
            ],
        }  # fmt: skip

    @property
    def place(self) -> tuple[Path, str]:
        """Runs of one place are one: what their settings differ in changes no result."""
        return self.store.root, self.id

    def belongs_to(self, sweep: str) -> None:
        self.sweep = self.state["sweep"] = sweep

    def node(self, name: str) -> Node:
        return next(node for node in self.nodes if node.name == name)

    def submitted(self, missing: Collection[str]) -> None:
        """Its stages are jobs of a cluster from now on. missing: keys that the store lacks. Raises OSError."""
        for line in self.state["nodes"]:
            record = None if line["key"] in missing else self.store.record(line["key"])
            line.update(state="reused" if record else "queued", seconds=record["seconds"] if record else None)
        write_json(self.folder / "run.json", self.state, durable=False)

    def finished(self) -> bool:
        """If all its stages are in the store: say so in run.json, whoever has made them. When its command was given,
        and that it was pruned, stays as it is there: the last of its jobs knows neither. Raises OSError."""
        records = {node.name: self.store.record(node.key) for node in self.nodes}
        if not all(records.values()):
            return False
        for line in self.state["nodes"]:
            record = records[line["name"]] or {}
            mine = record.get("run") == self.id
            line.update(state="done" if mine else "reused", seconds=record["seconds"], error=None)
            line.update(attempts.summary(record.get("attempts") or []) if mine else {})
        self.state |= self._of_its_command()
        self.state["updated"] = time.time()
        write_json(self.folder / "run.json", self.state, durable=False)
        return True

    def _of_its_command(self) -> dict[str, Any]:
        """What run.json says and no job knows; nothing if it is gone or damaged."""
        try:
            told = read_json(self.folder / "run.json")
        except (OSError, ValueError):
            return {}
        kinds = {"created": int | float, "pruned": str}
        known = told if isinstance(told, dict) else {}
        return {name: known[name] for name, kind in kinds.items() if isinstance(known.get(name), kind)}

    def note(self, name: str, **facts: Any) -> None:
        """Change a node's line in run.json, unless the disk is full: that must not hide what became of the stage."""
        if not self.writes:
            return
        next(node for node in self.state["nodes"] if node["name"] == name).update(facts)
        self._write()

    def note_pruned(self, why: str) -> None:
        """It was a trial of a sweep, and is stopped as hopeless. Begun anew it is none any more."""
        self.state["pruned"] = why
        self._write()

    def _write(self) -> None:
        self.state["updated"] = time.time()
        with suppress(OSError):
            write_json(self.folder / "run.json", self.state, durable=False)


def plan(run: Run, queued: Mapping[str, str] = MappingProxyType({})) -> list[dict[str, Any]]:
    """What would happen to each node: reuse (the store has it), wait (another process works on it, or a job of a
    cluster will), or run, and why. queued: key -> number of the job that waits or runs for it."""
    rows, fresh = [], set()
    for node in run.nodes:
        stale = list(dict.fromkeys(parent.name for parent in node.parents.values() if parent.name in fresh))
        if run.store.record(node.key):
            action, why = "reuse", "the store has it"
        else:
            fresh.add(node.name)
            held, reached = run.store.is_held(node.key), attempts.checkpoint(run.store.work(node.key))
            action = "wait" if held or node.key in queued else "run"
            if node.key in queued:
                why = f"job {queued[node.key]} makes it"
            elif held:
                why = "another run works on it"
            elif damage := run.store.damage(node.key):
                why = damage
            elif reached >= 0:
                why = f"goes on from step {reached}"
            else:
                why = f"{', '.join(stale)} will be new" if stale else "not in the store"
        rows.append({"name": node.name, "kind": node.kind, "key": node.key, "action": action, "why": why})
    return rows


def execute(
    run: Run, observer: Observer, stop: Asked | None = None, failed: dict[str, AlignmentError] | None = None
) -> None:
    """Bring every node of the run into the store. Raises the error of the first stage that fails for good.

    failed: key -> why, of stages that are not tried again; those of this run are added.

    stop: what hears the signals of this process. The first one has the stage at work save and end (PreemptedError);
    between two stages it is raised as Stopped. A KeyboardInterrupt ends the stage at work at once.
    The same command given twice at once: the second waits for the first, and then reuses.
    """
    mine = run.store.run_lock(run.id)
    mine.wait(run.id, partial(observer.waiting, run.nodes[0].name))
    try:
        _walk(run, observer, stop or Listener(), {} if failed is None else failed)
    finally:
        mine.release()


def _walk(run: Run, observer: Observer, stop: Asked, failed: dict[str, AlignmentError]) -> None:
    for node in run.nodes:
        if node.key in failed:
            run.note(node.name, state="failed", error=str(failed[node.key]))
            raise failed[node.key]
        try:
            bring(run, node, observer, stop)
        except PreemptedError:
            raise
        except AlignmentError as error:
            failed[node.key] = error
            raise


def bring(run: Run, node: Node, observer: Observer, stop: Asked) -> None:
    """Bring one node into the store, whose parents are there. Raises as `execute`."""
    record = run.store.record(node.key)
    if record is not None:
        run.store.tidy(node.key, record)
        run.note(node.name, state="reused", seconds=record["seconds"])
        observer.done(node.name, "reused", record["seconds"], record["metrics"])
        return
    lock = run.store.lock(node.key)

    def waiting(holder: dict[str, Any]) -> None:
        if stop.asked:  # deferred by whoever called
            raise Stopped(stop.asked)
        observer.waiting(node.name, holder)

    try:
        if stop.asked:  # while the stage before was at work, which has ended well
            raise Stopped(stop.asked)
        lock.wait(f"{run.id}/{node.name}", waiting)
        with stop.deferred():
            _bring(run, node, lock, observer, stop)
    except Stopped:
        run.note(node.name, state="preempted")
        raise
    finally:
        lock.release()


def _bring(run: Run, node: Node, lock: Lock, observer: Observer, stop: Asked) -> None:
    """With the key locked: look again (another run may have just made it, or been killed as it was done), else run the
    stage."""
    record = run.store.record(node.key) or run.store.sealed(node.key)
    state = "reused" if record else "done"
    if record is None:
        run.note(node.name, state="running")
        observer.started(node.name, node.kind)
        if damage := run.store.damage(node.key):
            kept = f"{run.store.result(node.key).name}.damaged-*"
            observer.warning(node.name, f"its result is {damage}; it is made again, and what is there stays as {kept}")
        started = time.monotonic()
        try:
            record = _persist(run, node, lock, observer, stop)
        except (Exception, KeyboardInterrupt) as error:
            outcome = attempts.outcome_of(error)
            state = outcome if outcome in ("preempted", "interrupted") else "failed"
            told = str(error) if state == "failed" else None
            run.note(node.name, state=state, seconds=time.monotonic() - started, error=told)
            observer.done(node.name, state, time.monotonic() - started, {})
            raise
        _note_attempts(run, node, record.get("attempts") or [])
    run.note(node.name, state=state, seconds=record["seconds"])
    observer.done(node.name, state, record["seconds"], record["metrics"])


def _persist(run: Run, node: Node, lock: Lock, observer: Observer, stop: Asked) -> dict[str, Any]:
    """The stage's record, after as many attempts as it takes and `retries` allows."""
    folder = run.store.work(node.key)
    run.store.remove_odd(node.key, partial(observer.warning, node.name))
    retries = attempts.Retries(folder, run.experiment.retries, run.experiment.retry_wait_s)
    if start := retries.start():
        observer.warning(node.name, f"goes on {start}, which an earlier attempt has left")
    limit, began = run.experiment.launcher.time_to_work(node.stage, node.name), time.monotonic()

    def left() -> float | None:
        return None if limit is None else limit - (time.monotonic() - began)

    def asked() -> str | None:
        return stop.asked or (TIME_LIMIT if (seconds := left()) is not None and seconds <= 0 else None)

    while True:
        gather(run, layout(run, node)[0], asked, partial(observer.warning, node.name))
        if not lock.holds():  # it was pausing, or waited for others, cut off
            raise taken_over(node)
        order = _begin(run, node, left(), observer)
        _note_attempts(run, node, [*attempts.read(folder), order])
        try:
            return _attempt(run, node, order, lock, observer, stop)
        except (Exception, KeyboardInterrupt) as error:
            if not lock.holds():
                raise taken_over(node) from error
            row = attempts.row(folder, order, attempts.outcome_of(error), attempts.cause_of(error))
            rows = [*attempts.read(folder), row]
            attempts.note(folder, row)
            _note_attempts(run, node, rows)
            if vain := attempts.in_vain(node.name, rows):
                raise vain from error
            if not isinstance(error, AlignmentError) or (wait := retries.next(error)) is None:
                raise
            observer.warning(node.name, retries.says(error, order["attempt"], wait))
            try:
                attempts.pause(wait, asked)
            except PreemptedError as stopped:
                if stop.asked or retries.gained:
                    raise
                raise error from stopped  # there is no time for another one, and none has brought anything


def taken_over(node: Node) -> LostError:
    """Of a process that SLURM could not reach, and has replaced: nothing of the stage is its own any more."""
    return LostError(f"{node.name} goes on in a later start of this job: this one ends, and leaves all to it")


def layout(run: Run, node: Node) -> tuple[int, int]:
    """Nodes of its stage, and processes on each."""
    return run.experiment.launcher.layout(node.stage, node.name, distributed=node.settings.distributed)


def _note_attempts(run: Run, node: Node, rows: list[dict[str, Any]]) -> None:
    run.note(node.name, **attempts.summary(rows))


def _begin(run: Run, node: Node, left: float | None, observer: Observer) -> dict[str, Any]:
    """A work folder with its stage.json, which is returned: all that a worker needs to know of this attempt.

    left: seconds that it may take; None: any.
    """
    run.store.require_space(run.experiment.min_free_gb)
    attempts.note_unnoted(run.store.work(node.key))
    folder = run.store.begin(node.key, partial(observer.warning, node.name))
    number = max((row.get("attempt", 0) for row in attempts.read(folder)), default=0) + 1
    order = {
        "key": node.key,
        "name": node.name,
        "kind": node.kind,
        "stage": node.stage,
        "run": run.id,
        "sweep": run.sweep,
        "store": str(run.store.root),
        "identity": node.identity,
        "parents": {role: {"name": parent.name, "key": parent.key} for role, parent in node.parents.items()},
        "experiment": run.experiment.model_dump(),
        "distributed": node.settings.distributed,
        "world_size": math.prod(layout(run, node)),
        "attempt": number,
        "time_left": left,
        **attempts.here(),
    }
    write_json(folder / "stage.json", order)
    append(folder / "log.txt", f"{attempts.BEGINS}{number}, {time.strftime('%Y-%m-%d %H:%M:%S %z')}\n")
    return order


def _attempt(
    run: Run, node: Node, order: dict[str, Any], lock: Lock, observer: Observer, stop: Asked
) -> dict[str, Any]:
    """One attempt at a stage: its record. Raises the error that it ended with."""
    folder, experiment = run.store.work(node.key), run.experiment
    job = Job(node.name, folder, *layout(run, node), order["attempt"], experiment.engine.threads, lock.fileno)
    handle = launcher_for(experiment.launcher).submit(job)
    patience = Patience(experiment.engine.watchdog_s, order["time_left"])
    watched = Supervisor(
        handle, folder, patience, stop, partial(observer.progress, node.name), partial(observer.warning, node.name)
    )
    try:
        code = watched.watch()
    except BaseException:
        watched.end()
        raise
    record = run.store.record(node.key)
    watched.tell_warnings(folder if record is None else run.store.result(node.key))
    if record is None:
        raise attempts.cause(node.name, folder, code, watched)
    return record
