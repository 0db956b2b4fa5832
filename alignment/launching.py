"""Before a launch: what `alignment check` looks at, unless the same was looked at before.

What is remembered stands in the user's cache, a note for each look, named by the digest of all that it depends on: the
start model and the rows, the settings of what is trained but for its numbers (a sweep of learning rates is looked at
once), the reward, how and where it is trained, this machine, and the code. After an hour memory and disk are looked at
again.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from alignment import checking
from alignment.config.settings import Settings
from alignment.errors import AlignmentError, Finding
from alignment.files import cache_home, digest, read_json, write_json
from alignment.pipeline.graph import Node
from alignment.pipeline.identity import code_digest
from alignment.pipeline.runner import Run

NUMBERS = ("seed",)  # settings that change no look, beside all that are no whole numbers
REMEMBERED = 3600.0  # seconds
LOOKED_AT_WHOLE = ("import_model", "prepare")


def look(run: Run, force: bool, refused: dict[str, AlignmentError], say: Callable[[str], None]) -> None:
    """Say what of the run is odd, and raise the first failure as the error that the run would have ended with. What the
    store has is looked at no more. force: a failure is said, and stops nothing. refused: by earlier looks of the same
    command; is added to."""
    fresh = [node.name for node in run.nodes if not run.store.record(node.key)]
    if not run.experiment.check or os.environ.get("ALIGNMENT_CHECK") == "false" or not fresh:
        return
    name = _look_of(run)
    note = cache_home() / "checks" / f"{name}.json"
    if _is_recent(note, fresh):
        return
    if name in refused:
        raise refused[name]
    say("looking at settings, data, model and memory before anything starts (check=false leaves it out)")
    failed: list[Finding] = []
    for finding in checking.findings(run, only=fresh):
        if finding["state"] in ("failed", "warning"):
            checking.say(finding, say)
        failed += [finding] if finding["state"] == "failed" else []
    if failed and not force:
        refused[name] = _refused(failed)
        raise refused[name]
    if not failed:
        _remember(note, fresh)


def _refused(failed: list[Finding]) -> AlignmentError:
    error = checking.error_of(failed)
    fix = f"{error.fix}; " if error.fix else ""
    return type(error)(error.what, where=error.where, fix=f"{fix}--force starts it all the same")


def _is_recent(note: Path, fresh: list[str]) -> bool:
    """Memory and disk that were free then may be taken now. fresh: nodes to be made, as those were that were looked at:
    where one point of a sweep has made its rows, those after it make fewer."""
    try:
        return time.time() - note.stat().st_mtime < REMEMBERED and set(fresh) <= set(read_json(note)["nodes"])
    except (OSError, ValueError, KeyError, TypeError):  # none, or one that a full disk has cut
        return False


def _remember(note: Path, fresh: list[str]) -> None:
    try:
        write_json(note, {"nodes": fresh}, durable=False)
    except OSError:
        pass  # an unwritable cache costs time, not the run


def _look_of(run: Run) -> str:
    """By what two looks are the same one."""
    experiment = run.experiment
    # Without their parents: rows that are made for a trained model have its learning rate in their key.
    sources = [{**node.identity, "parents": None} for node in run.nodes if _reads(node)]
    others = [_steady([node.settings.model_dump(), node.identity["groups"]]) for node in run.nodes if not _reads(node)]
    others += [experiment.pipeline.model_dump(), experiment.tracking.model_dump(), experiment.min_free_gb]
    where: list[Settings] = [experiment.engine, experiment.launcher, experiment.checkpoint, experiment.hardware]
    settings = [one.model_dump() for one in where]
    return digest([sources, others, settings, str(run.store.root), socket.gethostname(), code_digest()])


def _reads(node: Node) -> bool:
    """Whether it brings in the start model or rows, each number of whose settings may change what is looked at."""
    return node.kind in LOOKED_AT_WHOLE


def _steady(value: Any) -> Any:
    """Settings without the values of those that are fractions, which say how much and not what."""
    if isinstance(value, float):
        return "a fraction"
    if isinstance(value, dict):
        return {name: _steady(inner) for name, inner in value.items() if name not in NUMBERS}
    return [_steady(inner) for inner in value] if isinstance(value, list | tuple) else value
