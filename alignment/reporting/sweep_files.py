"""Which sweeps a store has, and what their sweep.json says."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeGuard

from alignment.errors import ConfigError, InputError
from alignment.pipeline.sweeps import FILE
from alignment.reporting.gather import read
from alignment.reporting.targets import refuse_no_name
from alignment.reporting.words import finite, listed

Row = dict[str, Any]
LONGEST = 200  # bytes of a name; those of its files are a little longer, and may have 255
OBJECTIVE = {"metric": "reward", "direction": "maximize"}


def list_sweeps(store: Path) -> list[Row]:
    """The store's sweeps, the newest first: {"sweep", "name", "created", "points": how many, "command", "launcher",
    "folder", "problem": why it cannot be read, or None}."""
    found = []
    for file in store.resolve().glob("sweeps/*/sweep.json"):
        try:
            sweep, problem = read_sweep(file.parent), None
        except InputError as error:
            sweep, problem = {"points": []}, error.what
        told = {name: sweep.get(name) for name in ("name", "created", "command", "launcher")}
        points = len(sweep["points"])
        found.append(
            {"sweep": file.parent.name, **told, "points": points, "folder": str(file.parent), "problem": problem}
        )
    return sorted(found, key=lambda sweep: (-(finite(sweep["created"]) or 0.0), sweep["sweep"]))


def sweep_folder(name: str, store: Path, say: Callable[[str], None] = lambda text: None) -> Path:
    """A sweep's folder by path, by its full name, or by the beginning of its name (the newest that fits). say: told
    which others would."""
    refuse_no_name(name)
    if (Path(name) / FILE).is_file():
        return Path(name).resolve()
    known = list_sweeps(store)
    names = [sweep["sweep"] for sweep in known]
    for fits in (name.__eq__, lambda one: one.startswith(name)):
        if found := [sweep for sweep in known if fits(sweep["sweep"])]:
            newest, *others = found
            if others:
                more = listed([one["sweep"] for one in others], 5)
                say(f"{newest['sweep']}: of {len(found)} sweeps that begin so, the newest; others: {more}")
            return Path(newest["folder"])
    fix = f"known: {', '.join(names[:5])}" if names else "alignment run -m key=value1,value2 makes one"
    fix += "; runs are compared by naming two or more"
    raise ConfigError(f"no sweep is called {name!r}", where=str(store / "sweeps"), fix=fix)


def read_sweep(folder: Path) -> Row:
    """sweep.json with every part of it in its place, {"sweep", "name", "created", "command", "launcher", "objective",
    "points": [{"run" or None, "settings", "pruned"}]}. What of a point cannot be read is left empty, the point stays.

    Raises InputError without a file that can be read.
    """
    told, where = read(folder / FILE), str(folder / FILE)
    if not isinstance(told, dict) or not isinstance(told.get("points"), list):
        raise InputError(
            "is no sweep.json that can be read", where=where, fix="the command of the sweep writes it anew"
        )
    named = _listed(told.get("objective"))
    objective = [one for one in named if isinstance(one, dict) and isinstance(one.get("metric"), str)]
    kept = {name: told.get(name) for name in ("created", "command", "launcher", "wandb_group")}
    return {
        "sweep": folder.name,
        "name": str(told.get("name") or folder.name),
        **kept,
        "objective": objective or [OBJECTIVE],
        "points": [point_of(point if isinstance(point, dict) else {}) for point in told["points"]],
    }


def point_of(point: Row) -> Row:
    """A point of sweep.json, with every part of it in its place."""
    run, settings = point.get("run"), point.get("settings")
    if not isinstance(settings, dict):
        texts = [text for text in _listed(point.get("overrides")) if isinstance(text, str)]
        pairs = [text.split("=", 1) for text in texts if "=" in text]
        settings = {key.lstrip("+"): value for key, value in pairs}
    return {"run": run if is_name(run) else None, "settings": _plain(settings), "pruned": point.get("pruned") is True}


def is_name(value: Any) -> TypeGuard[str]:
    """Whether it can be that of a run or a sweep, and of its folder."""
    if not isinstance(value, str) or value in ("", ".", "..") or {"/", "\0"} & set(value):
        return False
    return len(value.encode(errors="replace")) <= LONGEST and value.isprintable()


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _plain(settings: Row) -> Row:
    """Numbers that JSON does not know become texts."""
    odd = {key: str(v) for key, v in settings.items() if isinstance(v, float) and not math.isfinite(v)}
    return {**settings, **odd}
