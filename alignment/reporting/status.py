"""What the runs of a store are doing now: run.json, corrected by what the folders and the locks say."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from alignment.reporting.gather import Row, read
from alignment.reporting.words import DONE, error_text, finite

FRESH = 15.0  # seconds after its last line in which a run between two stages counts as running


def read_runs(store: Path, is_held: Callable[[str], bool]) -> list[Row]:
    """Every run of the store, the newest first.

    is_held(key) says whether a living process works on a key. A run is run.json's content with, corrected,
    "state": done | gone | running | waiting | failed | preempted | interrupted | unreadable, "seconds": of its own
    work, "folder", and nodes whose "state" is reused or one of these; working ones have "progress", those that this run
    has tried "attempts" (a count) and "causes" (why each that ended without a result did).
    gone: it was done, but the store no longer has the result; the same command makes it again.
    preempted: stopped in order. interrupted: killed, or ended at once.
    """
    runs = [read_run(file, store, is_held) for file in store.glob("runs/*/run.json")]
    return sorted(runs, key=lambda run: finite(run.get("created")) or 0.0, reverse=True)


def read_run(file: Path, store: Path, is_held: Callable[[str], bool]) -> Row:
    """One run by its run.json, as in `read_runs`."""
    run = read(file)
    if not isinstance(run, dict) or not all(
        isinstance(node, dict) and "name" in node for node in run.get("nodes") or []
    ):
        return {
            "run": file.parent.name,
            "state": "unreadable",
            "folder": str(file.parent),
            "seconds": None,
            "nodes": [],
        }
    nodes = [_node(node, store, is_held) for node in run.get("nodes") or []]
    spent = sum(finite(node.get("seconds")) or 0.0 for node in nodes if node["state"] != "reused")
    state = _state(nodes, finite(run.get("updated")) or 0.0)
    return {
        **run,
        "run": run.get("run") or file.parent.name,
        "nodes": nodes,
        "state": state,
        "seconds": spent,
        "folder": str(file.parent),
    }


def _node(node: Row, store: Path, is_held: Callable[[str], bool]) -> Row:
    """A node with its true state: run.json of a killed run still says running."""
    key, state = node.get("key") or "", node.get("state") or "waiting"
    work = store / "work" / key[:16]
    told: Row = {**node, "state": state, "error": error_text(node.get("error"))}
    if not key:
        return told
    committed = (store / "store" / key[:16] / "record.json").is_file()
    if state in DONE:
        return told if committed else {**told, "state": "gone"}
    held = is_held(key)
    if state == "running" and not held:
        if committed:
            return {**told, "state": "done"}
        failure, left = read(work / "error.json"), read(work / "outcome.json")
        told["state"] = "failed" if failure else "preempted" if left else "interrupted"
        told["error"] = error_text(failure)
    elif held:
        told["held"] = True
    if held or told["state"] in ("preempted", "interrupted"):
        told["progress"] = read(work / "progress.json")
        told["seconds"] = finite((told["progress"] or {}).get("elapsed_s"))
    return told


def _state(nodes: list[Row], updated: float) -> str:
    states = [node["state"] for node in nodes]
    if nodes and all(state in DONE for state in states):
        return "done"
    for state in ("failed", "interrupted", "preempted", "running"):
        if state in states:
            return state
    if nodes and all(state in (*DONE, "gone") for state in states):
        return "gone"
    if any(node.get("held") for node in nodes):
        return "waiting"
    return "running" if time.time() - updated < FRESH else "interrupted"


def facts_text(progress: Any) -> str:
    """step 12/40 of progress.json, or its note."""
    if not isinstance(progress, dict):
        return ""
    step, total = finite(progress.get("step")), finite(progress.get("total"))
    return f"{step:.0f}/{total:.0f}" if step is not None and total else str(progress.get("note") or "")
