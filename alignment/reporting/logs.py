"""`alignment logs`: what a stage has written, wherever it is now."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from alignment.errors import ConfigError, InputError
from alignment.pipeline.ledger import job_of
from alignment.pipeline.store import Store
from alignment.reporting import queue, targets, watching
from alignment.reporting.gather import folder_of
from alignment.reporting.words import label

EVERY = 0.5  # seconds between two looks at a file that grows
FIRST = ("running", "failed", "cancelled", "interrupted", "preempted", "queued", "done", "reused")


def show(
    run: str,
    stage: str | None,
    root: Path,
    lines: int,
    follow: bool,
    sleep: Callable[[float], None] = time.sleep,
    clock: Callable[[], float] = time.monotonic,
) -> int:
    """lines: so many of the last ones; 0: all. Raises ConfigError or InputError."""
    store = Store(root)
    folders, look = targets.run_or_sweep(run, store.root, queue.note), watching.Look(store, clock)
    folder, node = _meant(look(folders), stage)
    shown = 0
    for title, path in _files(store, node):
        if path.is_file() and not follow:
            print(f"==> {node['name']}: {title}, {path} <==")
            text = path.read_text(errors="replace").splitlines()
            print("\n".join(text[-lines:] if lines else text))
            shown += 1
    if follow:
        return _follow(store, node, lines, lambda: _node(look([folder])[0], node["name"])["state"], sleep, clock)
    if not shown:
        raise InputError(f"{node['name']} has written nothing yet", where=str(folder), fix="alignment status says why")
    return 0


def _meant(runs: list[dict[str, Any]], stage: str | None) -> tuple[Path, dict[str, Any]]:
    """Folder of a run, and its stage: of several runs one at work or that failed, as of the stages of one."""
    found = [(Path(run["folder"]), _node(run, stage)) for run in runs if run["nodes"]]
    if not found:
        where = runs[0]["folder"] if runs else "runs"
        raise InputError("is no run.json that can be read", where=str(where), fix="the run's command writes it again")
    return min(found, key=lambda one: _rank(one[1]))


def _rank(node: dict[str, Any]) -> int:
    return FIRST.index(node["state"]) if node["state"] in FIRST else len(FIRST)


def _node(run: dict[str, Any], stage: str | None) -> dict[str, Any]:
    nodes = run["nodes"]
    if stage is None:
        return min((dict(node) for node in reversed(nodes)), key=_rank)
    for node in nodes:
        if stage in (node["name"], label(node["name"])):  # as it is in the store, or as people are told
            return dict(node)
    known = ", ".join(node["name"] for node in nodes)
    raise ConfigError(f"the run {run['run']} has no stage {stage!r}", where="command line", fix=f"one of: {known}")


def _files(store: Store, node: dict[str, Any]) -> list[tuple[str, Path]]:
    """What its job printed, if it is one, and what the stage itself did."""
    found = []
    if note := job_of(store, node["key"]):
        found.append((f"job {note['job']}", Path(str(note["out"]))))
    folder = folder_of(store.root, node["key"])
    return [*found, ("log.txt", folder / "log.txt")] if folder else found


def _follow(
    store: Store,
    node: dict[str, Any],
    lines: int,
    state_of: Callable[[], str],
    sleep: Callable[[float], None],
    clock: Callable[[], float],
) -> int:
    """The files as they grow, until the stage has ended. Its state, for which all of the run is read, is looked at more
    seldom than they are."""
    read: dict[str, int] = {}
    state, at = node["state"], clock()
    while True:
        for title, path in _files(store, node):
            _print_new(title, path, read, lines)
        if state not in ("running", "queued", "waiting"):
            return 0
        sleep(EVERY)
        if clock() - at >= watching.EVERY:
            state, at = state_of(), clock()


def _print_new(title: str, path: Path, read: dict[str, int], lines: int) -> None:
    """What a file has more than was read. A result's log is its work folder's, which has moved."""
    try:
        with open(path, "rb") as stream:
            if title not in read:
                text = stream.read()
                last = text.splitlines(keepends=True)[-lines:] if lines else [text]
                fresh, read[title] = b"".join(last), len(text)
            else:
                stream.seek(read[title])
                fresh = stream.read()
                read[title] += len(fresh)
    except OSError:
        return
    sys.stdout.write(fresh.decode(errors="replace"))
    sys.stdout.flush()
