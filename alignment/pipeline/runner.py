"""The driver: walks the graph, reuses what the store has, has a launcher run the rest, one stage at a time."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from alignment.config.schema import Experiment
from alignment.errors import BY_CODE, AlignmentError, StageFailed
from alignment.files import read_json, write_json
from alignment.launchers import Handle, Job, launcher_for
from alignment.pipeline import graph
from alignment.pipeline.graph import Node
from alignment.pipeline.store import WARNINGS, Lock, Store

POLL = 0.1  # seconds between two looks at a running stage


class Observer(Protocol):
    """Who is told what happens; the terminal is one."""

    def started(self, name: str, kind: str) -> None: ...
    def progress(self, name: str, facts: dict[str, Any]) -> None: ...
    def waiting(self, name: str, holder: dict[str, Any]) -> None: ...
    def done(self, name: str, state: str, seconds: float, facts: dict[str, Any]) -> None: ...
    def warning(self, name: str, text: str) -> None: ...


@dataclass
class Run:
    """One experiment on its way through the store; `state` is what run.json holds."""

    experiment: Experiment
    command: str
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

    def note(self, name: str, **facts: Any) -> None:
        """Change a node's line in run.json."""
        next(node for node in self.state["nodes"] if node["name"] == name).update(facts)
        self.state["updated"] = time.time()
        write_json(self.folder / "run.json", self.state, durable=False)


def plan(run: Run) -> list[dict[str, Any]]:
    """What would happen to each node: reuse (the store has it), wait (another process works on it), or run, and why."""
    rows, fresh = [], set()
    for node in run.nodes:
        stale = list(dict.fromkeys(parent.name for parent in node.parents.values() if parent.name in fresh))
        if run.store.record(node.key):
            action, why = "reuse", "the store has it"
        else:
            fresh.add(node.name)
            held = run.store.is_held(node.key)
            action = "wait" if held else "run"
            why = (
                "another run works on it"
                if held
                else f"{', '.join(stale)} will be new"
                if stale
                else "not in the store"
            )
        rows.append({"name": node.name, "kind": node.kind, "key": node.key, "action": action, "why": why})
    return rows


def execute(run: Run, observer: Observer) -> None:
    """Bring every node of the run into the store. Raises the error of the first stage that fails.

    The same command given twice at once: the second waits for the first, and then reuses.
    """
    mine = run.store.run_lock(run.id)
    mine.wait(run.id, partial(observer.waiting, run.nodes[0].name))
    try:
        _walk(run, observer)
    finally:
        mine.release()


def _walk(run: Run, observer: Observer) -> None:
    for node in run.nodes:
        record = run.store.record(node.key)
        if record is not None:
            run.note(node.name, state="reused", seconds=record["seconds"])
            observer.done(node.name, "reused", record["seconds"], record["metrics"])
            continue
        lock = run.store.lock(node.key)
        lock.wait(f"{run.id}/{node.name}", partial(observer.waiting, node.name))
        try:
            _bring(run, node, lock, observer)
        finally:
            lock.release()


def _bring(run: Run, node: Node, lock: Lock, observer: Observer) -> None:
    """With the key locked: look again (another run may have just made it), else run the stage."""
    record = run.store.record(node.key)
    state = "reused" if record else "done"
    if record is None:
        run.note(node.name, state="running")
        observer.started(node.name, node.kind)
        started = time.monotonic()
        try:
            record = _work(run, node, lock, observer)
            _pass_on_warnings(run.store.result(node.key), node.name, observer)
        except KeyboardInterrupt:
            run.note(node.name, state="interrupted", seconds=time.monotonic() - started)
            raise
        except AlignmentError as error:
            _pass_on_warnings(run.store.work(node.key), node.name, observer)
            run.note(node.name, state="failed", seconds=time.monotonic() - started, error=str(error))
            observer.done(node.name, "failed", time.monotonic() - started, {})
            raise
    run.note(node.name, state=state, seconds=record["seconds"])
    observer.done(node.name, state, record["seconds"], record["metrics"])


def _pass_on_warnings(folder: Path, name: str, observer: Observer) -> None:
    """What the worker warned of goes to its log and, so that people see it, through here."""
    if (folder / WARNINGS).is_file():
        for line in (folder / WARNINGS).read_text(encoding="utf-8").splitlines():
            observer.warning(name, line)


def _work(run: Run, node: Node, lock: Lock, observer: Observer) -> dict[str, Any]:
    run.store.require_space(run.experiment.min_free_gb)
    folder = run.store.begin(node.key)
    write_json(folder / "stage.json", _order(run, node))
    job = Job(node.name, folder, node.settings.distributed, run.experiment.engine.threads, lock.fileno)
    handle = launcher_for(run.experiment.launcher).submit(job)
    try:
        code = _watch(handle, folder, node.name, observer)
    except BaseException:
        handle.stop(grace=10.0)
        raise
    record = run.store.record(node.key)
    if record is None:
        raise _cause(node, folder, code)
    return record


def _order(run: Run, node: Node) -> dict[str, Any]:
    """What a worker needs to know, as a value: it reads nothing else of the experiment."""
    return {
        "key": node.key,
        "name": node.name,
        "kind": node.kind,
        "stage": node.stage,
        "run": run.id,
        "store": str(run.store.root),
        "identity": node.identity,
        "parents": {role: {"name": parent.name, "key": parent.key} for role, parent in node.parents.items()},
        "experiment": run.experiment.model_dump(),
    }


def _watch(handle: Handle, folder: Path, name: str, observer: Observer) -> int:
    seen = None
    while (code := handle.status()) is None:
        try:
            facts = read_json(folder / "progress.json")
        except (OSError, ValueError):
            facts = None
        if facts and facts != seen:
            observer.progress(name, facts)
            seen = facts
        time.sleep(POLL)
    return code


def _cause(node: Node, folder: Path, code: int) -> AlignmentError:
    """Why a stage ended without a result: its own words, else what its exit code and log say."""
    try:
        told = read_json(folder / "error.json")
    except (OSError, ValueError):
        told = None
    if told:
        error = BY_CODE.get(told["code"], StageFailed)(told["what"], where=told["where"], fix=told["fix"])
        error.add_note(told["traceback"])
        return error
    how = f"was ended by signal {-code}" if code < 0 else f"ended with exit code {code}"
    hint = "out of memory is the usual cause of signal 9; " if code in (-9, 137) else ""
    error = StageFailed(f"the stage {node.name} {how} and left no result", fix=f"{hint}see {folder / 'log.txt'}")
    try:
        error.add_note("".join((folder / "log.txt").read_text(errors="replace").splitlines(keepends=True)[-30:]))
    except OSError:
        pass
    return error
