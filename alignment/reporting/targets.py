"""What a person means by the name of a run or the path of a model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from alignment.errors import ConfigError, InputError
from alignment.files import listed, read_json
from alignment.pipeline.store import Store
from alignment.pipeline.sweeps import FILE
from alignment.reporting import words
from alignment.reporting.gather import MAKES_MODEL, MAKES_REWARD_MODEL, read, read_run

MORE = 5  # names in one line
VISIBLE = "[!.]*"  # what begins with a dot is nobody's run: .DS_Store, .nfs0001


def run_folder(name: str, store: Path, say: Callable[[str], None]) -> Path:
    """A run folder by path, by its full name, or by the beginning of its name (the newest that fits). say: told which
    others would."""
    newest, *others = _fitting(name, store)
    if others:
        more = words.listed([folder.name for folder in others], MORE)
        say(f"{newest.name}: of {len(others) + 1} runs that begin so, the newest; others: {more}")
    return newest


def only_run_folder(name: str, store: Path) -> Path:
    """As `run_folder`. Raises ConfigError if several begin so."""
    found = _fitting(name, store)
    if len(found) > 1:
        what = f"{name!r} is how {len(found)} runs begin: {words.listed([folder.name for folder in found], MORE)}"
        raise ConfigError(what, where=str(store / "runs"), fix="the whole name of one")
    return found[0]


def _fitting(name: str, store: Path) -> list[Path]:
    """Run folders that a name means, the newest first; at least one."""
    refuse_no_name(name)
    if (Path(name) / "run.json").is_file():
        return [Path(name).resolve()]
    files = sorted(store.resolve().glob("runs/*/run.json"), key=lambda file: file.stat().st_mtime, reverse=True)
    runs = [file.parent for file in files]
    for fits in (name.__eq__, lambda one: one.startswith(name)):
        if found := [folder for folder in runs if fits(folder.name)]:
            return found
    known = words.listed([folder.name for folder in runs], MORE)
    fix = f"known: {known}" if known else "run one first"
    raise ConfigError(f"no run is called {name!r}", where=str(store / "runs"), fix=fix)


def run_or_sweep(name: str, store: Path, say: Callable[[str], None]) -> list[Path]:
    """Folder of a run, as `run_folder`; or those of the runs of the sweep of exactly this name."""
    refuse_no_name(name)
    sweep = store / "sweeps" / name / FILE
    return _points(sweep, store) if sweep.is_file() else [run_folder(name, store, say)]


def meant(names: Sequence[str], store: Path) -> tuple[list[Path] | None, list[str]]:
    """Folders of all runs that these names, or beginnings of names, of runs and sweeps mean, and the sweeps among them.
    No names: None, for all.

    Raises ConfigError for a name that means nothing, InputError for one that means what cannot be read.
    """
    if not names:
        return None, []
    found: list[Path] = []
    asked: list[str] = []
    for name in names:
        runs, sweeps = named(name, store)
        # A sweep is named as its runs are: who gives no more than that means them too.
        mine = [folder for folders in sweeps.values() for folder in folders] + runs
        found += whole(name, runs, sweeps) or mine
        asked += sweeps
    return list(dict.fromkeys(found)), asked


def refuse_no_name(name: str) -> None:
    """An empty name is the beginning of every other; a store is said in another way. Raises ConfigError."""
    if not name.strip():
        what = "a name is empty: a variable of the shell that is not set?"
        raise ConfigError(what, where="command line", fix="alignment status lists the runs")
    if name.startswith("store="):
        store = name.removeprefix("store=") or "FOLDER"
        what, fix = f"`{name}` is a setting of runs, and no name of one", f"--store {store}, or ALIGNMENT_STORE={store}"
        raise ConfigError(what, where="command line", fix=fix)


def named(name: str, store: Path) -> tuple[list[Path], dict[str, list[Path]]]:
    """Runs whose names begin so: their folders; and sweeps: name -> folders of its runs. Only the run or the sweep of
    exactly this name, if there is one. Raises ConfigError if there is neither.

    Runs whose run.json was removed are among them, for they may have jobs. Raises InputError if there are no others,
    and for a sweep whose sweep.json was removed or cannot be read.
    """
    refuse_no_name(name)
    runs = [folder for folder in folders_of_runs(store) if folder.name.startswith(name)]
    sweeps = [path for path in listed(store, f"sweeps/{VISIBLE}") if path.is_dir() and path.name.startswith(name)]
    if exact := [folder for folder in runs if folder.name == name]:
        runs, sweeps = exact, []
    elif exact := [folder for folder in sweeps if folder.name == name]:
        runs, sweeps = [], exact
    if not runs and not sweeps:
        raise ConfigError(f"no run is called {name!r}", where=str(store / "runs"), fix="alignment status lists them")
    if not sweeps and not any((folder / "run.json").exists() for folder in runs):
        raise unreadable(runs[0] / "run.json")
    return runs, {folder.name: _points(folder / FILE, store) for folder in sweeps}


def folders_of_runs(store: Path) -> list[Path]:
    """Also of those whose run.json was removed."""
    return [path for path in listed(store, f"runs/{VISIBLE}") if path.is_dir()]


def unreadable(file: Path, more: str = "") -> InputError:
    """Of a run.json or sweep.json that was removed or damaged: what it names may have jobs."""
    what = f"is no {file.name} that can be read" if file.exists() else "is gone"
    fix = "its command writes it again; squeue and scancel know its jobs"
    return InputError(what + more, where=str(file), fix=fix)


def _points(sweep: Path, store: Path) -> list[Path]:
    """Folders of a sweep's runs. Raises InputError if its sweep.json cannot be read."""
    told = read(sweep)
    points = told.get("points") if isinstance(told, dict) else None
    if not isinstance(points, list):
        raise unreadable(sweep)
    return [store / "runs" / str(point["run"]) for point in points if isinstance(point, dict) and point.get("run")]


def whole(name: str, runs: Sequence[Path], sweeps: Mapping[str, list[Path]]) -> list[Path]:
    """Folders of the run or the sweep of exactly this name, among what `named` has found; none if there is none."""
    return [folder for folder in runs if folder.name == name] or sweeps.get(name, [])


def models(target: str, store: Path, compare: bool, say: Callable[[str], None]) -> dict[str, Path]:
    """name -> model folder: the final model of a run, all its models with `compare`, or the folder given. say: as of
    `run_folder`."""
    refuse_no_name(target)
    if compare and not (Path(target) / "run.json").is_file() and Path(target).is_dir():
        raise ConfigError("--compare needs a run: a model folder is one model", where=target, fix="leave out --compare")
    for folder in (Path(target), Path(target) / "model"):
        if (folder / "config.json").is_file():
            _refuse_classifier(folder)
            return {Path(target).resolve().name: folder.resolve()}
    if Path(target).is_dir() and not (Path(target) / "run.json").is_file():
        raise InputError("is neither a run nor a model folder (no config.json)", where=target)
    folder = run_folder(target, store, say)
    state = read_run(folder)
    found = model_folders(state, Store(folder.parent.parent))
    final = state.get("final")
    wanted = found if compare else {name: path for name, path in found.items() if name == final}
    if not wanted and any(node["name"] == final and node["kind"] in MAKES_REWARD_MODEL for node in state["nodes"]):
        what = f"`{final}` of {folder.name} is a reward model, which judges and does not talk"
        raise ConfigError(what, where=target, fix="--compare, for the models of the run that do")
    if not wanted:
        raise InputError(f"the run {folder.name} has no finished model yet", where=str(folder), fix="alignment status")
    return wanted


def _refuse_classifier(folder: Path) -> None:
    with suppress(OSError, ValueError, AttributeError, TypeError):  # whoever loads it says what is wrong with it
        made_for = [str(name) for name in read_json(folder / "config.json").get("architectures") or []]
        if any(name.endswith("ForSequenceClassification") for name in made_for):
            what = f"is a {made_for[0]}, which judges and does not talk"
            raise ConfigError(what, where=str(folder), fix="give a model that generates")


def model_folders(state: dict[str, Any], store: Store) -> dict[str, Path]:
    """node name -> model folder, for every committed node of a run that makes a model."""
    nodes = [node for node in state.get("nodes") or [] if node["kind"] in MAKES_MODEL and store.record(node["key"])]
    return {node["name"]: store.result(node["key"]) / "model" for node in nodes}
