"""A finished model out of the store: a plain folder, or the adapter that made it, copied whole or not at all."""

from __future__ import annotations

import hashlib
import os
from contextlib import suppress
from pathlib import Path

from alignment.errors import ConfigError, InputError
from alignment.files import CHUNK, fsync, remove, require_room
from alignment.pipeline.store import Store
from alignment.reporting.gather import MAKES_MODEL, MAKES_REWARD_MODEL, Row, read_run
from alignment.reporting.targets import only_run_folder


def export(run: str, target: Path, store: Path, stage: str | None = None, adapter: bool = False) -> Path:
    """Copy the model of a run's stage (none named: of its final one), or with `adapter` the adapter beside it, to the
    folder `target`, which must not be there, or be empty. Each file is checked against its SHA-256 in the record.

    Returns the folder of the model that was copied, or that the adapter goes on. Raises ConfigError (no such run, or
    several that begin so, no such stage or adapter, the target is taken), InputError (not finished, damaged),
    MachineError (no room).
    """
    folder = only_run_folder(run, store)
    state, within = read_run(folder), Store(folder.parent.parent)
    node = _node(state, stage)
    if (record := within.record(node["key"])) is None:
        what = within.damage(node["key"]) or f"`{node['name']}` of {folder.name} has no finished model yet"
        raise InputError(what, where=str(folder), fix="the run's command makes it")
    part = "adapter" if adapter else "model"
    files = {name: file for name, file in record["files"].items() if name.startswith(f"{part}/")}
    if not files:
        made = [one["name"] for one in _makers(state) if (within.result(one["key"]) / "adapter").is_dir()]
        what = f"`{node['name']}` has no adapter: all of its weights were trained, or none"
        raise ConfigError(what, where="--adapter", fix=f"leave it out; stages with one: {', '.join(made) or 'none'}")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ConfigError("is there already, and not empty", where=str(target), fix="name a new folder")
    _copy(within.result(node["key"]), part, files, target)
    return _start(state, node, within) if adapter else within.result(node["key"]) / part


def _makers(state: Row) -> list[Row]:
    return [node for node in state.get("nodes") or [] if node["kind"] in (*MAKES_MODEL, *MAKES_REWARD_MODEL)]


def _node(state: Row, stage: str | None) -> Row:
    wanted = stage or state.get("final")
    found: Row | None = next((node for node in _makers(state) if node["name"] == wanted), None)
    if found is None:
        known = ", ".join(node["name"] for node in _makers(state)) or "none"
        raise ConfigError(f"the run has no stage {wanted!r} that makes a model", where="--stage", fix=f"known: {known}")
    return found


def _start(state: Row, node: Row, store: Store) -> Path:
    """Folder of the model that the stage began with."""
    parent = next(one for one in state["nodes"] if one["name"] == node["inputs"]["model"])
    return store.result(parent["key"]) / "model"


def _copy(result: Path, part: str, files: dict[str, Row], target: Path) -> None:
    """Aside, durably, then one rename."""
    target.parent.mkdir(parents=True, exist_ok=True)
    require_room(target.parent, sum(file["bytes"] for file in files.values()))
    aside = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        for name, file in files.items():
            place = aside / Path(name).relative_to(part)
            place.parent.mkdir(parents=True, exist_ok=True)
            if _copied(result / name, place) != file["sha256"]:
                what = "is not the file that was made: its SHA-256 differs from the record's"
                raise InputError(what, where=str(result / name), fix="delete that result; its run makes it again")
        fsync(aside)
        with suppress(FileNotFoundError):
            target.rmdir()
        aside.rename(target)
    finally:
        remove(aside)


def _copied(source: Path, place: Path) -> str:
    """SHA-256 of what was copied."""
    digest = hashlib.sha256()
    with open(source, "rb") as old, open(place, "xb") as new:
        while block := old.read(CHUNK):
            digest.update(block)
            new.write(block)
        new.flush()
        os.fsync(new.fileno())
    return digest.hexdigest()
