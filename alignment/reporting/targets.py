"""What a person means by the name of a run or the path of a model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from alignment.errors import ConfigError, InputError
from alignment.files import read_json
from alignment.pipeline.store import Store
from alignment.pipeline.sweeps import FILE
from alignment.reporting.gather import MAKES_MODEL


def run_folder(name: str, store: Path) -> Path:
    """A run folder by path, by its full name, or by the beginning of its name (the newest that fits)."""
    if (Path(name) / "run.json").is_file():
        return Path(name).resolve()
    runs = sorted(store.resolve().glob("runs/*/run.json"), key=lambda file: file.stat().st_mtime, reverse=True)
    for file in runs:
        if file.parent.name.startswith(name):
            return file.parent
    known = ", ".join(file.parent.name for file in runs[:5])
    raise ConfigError(
        f"no run is called {name!r}", where=str(store / "runs"), fix=f"known: {known}" if known else "run one first"
    )


def run_folders(names: Sequence[str], store: Path) -> list[Path] | None:
    """Folders of all runs that these names, or beginnings of names, of runs and sweeps mean. No names: None, for all.

    Raises ConfigError for a name that means nothing.
    """
    if not names:
        return None
    found: list[Path] = []
    for name in names:
        sweeps = [file for file in sorted(store.glob(f"sweeps/*/{FILE}")) if file.parent.name.startswith(name)]
        of_sweeps = [store / "runs" / str(point["run"]) for file in sweeps for point in read_json(file)["points"]]
        # A sweep is named as its runs are: who gives no more than that means them too.
        of_runs = [file.parent for file in sorted(store.glob("runs/*/run.json")) if file.parent.name.startswith(name)]
        exact = [folder for folder in of_runs if folder.name == name]
        whole = [file for file in sweeps if file.parent.name == name]
        mine = exact or (of_sweeps if whole else [*of_sweeps, *of_runs])
        if not mine:
            raise ConfigError(f"no run is called {name}", where=str(store / "runs"), fix="alignment status lists them")
        found += mine
    return list(dict.fromkeys(found))


def models(target: str, store: Path, compare: bool) -> dict[str, Path]:
    """name -> model folder: the final model of a run, all its models with `compare`, or the folder given."""
    if compare and not (Path(target) / "run.json").is_file() and Path(target).is_dir():
        raise ConfigError("--compare needs a run: a model folder is one model", where=target, fix="leave out --compare")
    if (Path(target) / "config.json").is_file():
        return {Path(target).resolve().name: Path(target).resolve()}
    if (Path(target) / "model" / "config.json").is_file():
        return {Path(target).resolve().name: Path(target).resolve() / "model"}
    if Path(target).is_dir() and not (Path(target) / "run.json").is_file():
        raise InputError("is neither a run nor a model folder (no config.json)", where=target)
    folder = run_folder(target, store)
    state = read_json(folder / "run.json")
    found = model_folders(state, Store(folder.parent.parent))
    wanted = found if compare else {name: path for name, path in found.items() if name == state["final"]}
    if not wanted:
        raise InputError(f"the run {state['run']} has no finished model yet", where=str(folder), fix="alignment status")
    return wanted


def model_folders(state: dict[str, Any], store: Store) -> dict[str, Path]:
    """node name -> model folder, for every committed node of a run that makes a model."""
    nodes = [node for node in state["nodes"] if node["kind"] in MAKES_MODEL and store.record(node["key"])]
    return {node["name"]: store.result(node["key"]) / "model" for node in nodes}
