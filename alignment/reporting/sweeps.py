"""Reads what a sweep, or a few runs taken together, left behind: every point, its true state and what it measured."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from alignment.config.rewards import COUNTS
from alignment.errors import ConfigError
from alignment.files import digest
from alignment.reporting.differences import differences
from alignment.reporting.gather import TRAINING, Stage, read, read_stage
from alignment.reporting.judges import judges
from alignment.reporting.settings import mapping_at
from alignment.reporting.status import Results, facts_text, jobs_of_runs, read_run
from alignment.reporting.sweep_files import OBJECTIVE, point_of
from alignment.reporting.targets import only_run_folder
from alignment.reporting.words import DONE, finite, label

Row = dict[str, Any]


NOTHING_KNOWN: Row = {
    "state": "unreadable", "note": None, "measured": False, "metrics": {}, "verdict": None, "evaluation": None,
    "training": None, "report": False, "weights": {}, "judges": {},
}  # fmt: skip
EVALUATES = ("evaluate", "evaluate_reward")

# --- which sweep -----------------------------------------------------------------------------------------------------


def sweep_of_runs(names: list[str], store: Path) -> tuple[Row, Path]:
    """Runs taken together as a sweep of their own, and the folder for its page. Settings: those in which their configs
    differ. Raises ConfigError, InputError."""
    folders = list(dict.fromkeys(only_run_folder(name, store) for name in names))
    if len(folders) < 2:
        raise ConfigError(f"{' and '.join(names)} are one run", where=str(folders[0]), fix="name two different runs")
    roots = list(dict.fromkeys(folder.parent.parent for folder in folders))
    if len(roots) > 1:
        raise ConfigError(
            "the runs lie in different stores", where=", ".join(map(str, roots)), fix="compare within one"
        )
    runs = [read(folder / "run.json") for folder in folders]
    configs = [run.get("config") if isinstance(run, dict) else None for run in runs]
    settings = differences([config for config in configs if isinstance(config, dict)])
    told = iter(settings)
    points = [
        {"run": folder.name, "settings": next(told) if isinstance(config, dict) else {}}
        for folder, config in zip(folders, configs, strict=True)
    ]
    name = f"runs-{digest(sorted(folder.name for folder in folders))[:8]}"
    created = max((finite(run.get("created")) or 0.0 for run in runs if isinstance(run, dict)), default=0.0)
    command = f"alignment compare {' '.join(folder.name for folder in folders)}"
    sweep = {"sweep": name, "name": f"{len(folders)} runs", "created": created, "command": command, "launcher": None}
    return {**sweep, "objective": [OBJECTIVE], "points": [point_of(point) for point in points]}, roots[
        0
    ] / "sweeps" / name


# --- its points ------------------------------------------------------------------------------------------------------


def read_points(
    sweep: Row,
    store: Path,
    is_held: Callable[[str], bool],
    jobs_of: Callable[[list[str]], dict[str, Row]] = lambda keys: {},
) -> list[Row]:
    """Every point of the sweep, in its order: {"number", "run", "settings", "state", "note", "measured", "metrics",
    "verdict", "evaluation", "training", "report", "weights": of the reward's terms, "judges": as `judges` tells}.

    state: of its run as `status.read_runs` knows it, or pruned, missing (no run.json), unreadable.
    measured: the evaluation of its final model is in the store, and it was not pruned. Then metrics holds each metric
    of that model, {"mean", "low", "high", "confidence"}, the interval over prompts by the verdict where there is one.
    evaluation: the key of that evaluation; equal keys are one measurement. training: {"stage", "folder", "done"}.
    """
    found = []
    files = [store / "runs" / str(point["run"]) / "run.json" for point in sweep["points"]]
    results = Results(store)
    jobs = jobs_of_runs(files, results, jobs_of)
    for number, point in enumerate(sweep["points"], start=1):
        told: Row = {"number": number, **NOTHING_KNOWN, "run": point["run"], "settings": point["settings"]}
        try:
            told.update(_read_point(point, results, is_held, jobs))
        except (AttributeError, KeyError, TypeError, ValueError):  # JSON, but not of ours: it must not hide the others
            told.update(NOTHING_KNOWN, note="what its run left cannot be read")
        found.append(told)
    return found


def _read_point(point: Row, results: Results, is_held: Callable[[str], bool], jobs: dict[str, Row]) -> Row:
    if point["run"] is None:
        return {"note": "the sweep does not say which run it is"}
    file = results.root / "runs" / point["run"] / "run.json"
    if not file.is_file():
        why = "pruned before it began" if point["pruned"] else "no run.json: not begun yet, or deleted"
        return {"state": "pruned" if point["pruned"] else "missing", "note": why}
    run = read_run(file, results, is_held, jobs)
    if run["state"] == "unreadable":
        return {"note": "its run.json cannot be read"}
    told: Row = {"state": run["state"], "note": _note(run), "report": (file.parent / "report.html").is_file()}
    stages = [read_stage(node, results.root, mapping_at(run, "config")) for node in run["nodes"]]
    told["weights"] = _weights(mapping_at(run, "config"))
    told["training"] = _training(stages, str(run.get("final") or ""))
    if point["pruned"]:
        return {**told, "state": "pruned", "note": run.get("pruned")}
    told.update(measured(stages, str(run.get("final") or "")))
    if not told.get("measured") and run["state"] == "done":
        evaluated = any(stage.kind in (*EVALUATES, "compare") for stage in stages)
        unread = "its evaluation cannot be read, or is of another model"
        told["note"] = unread if evaluated else "its pipeline evaluates no model"
    return told


def _weights(config: Row) -> dict[str, float]:
    """Of the terms of its reward."""
    terms = mapping_at(config, "reward", "terms")
    known = {name: finite(mapping_at(terms, name).get("weight")) for name in terms}
    return {name: weight for name, weight in known.items() if weight is not None}


def _note(run: Row) -> str | None:
    """What there is to say of a run that is not done: which stage, how far, why."""
    for node in run["nodes"]:
        if node["state"] == run["state"] and node["state"] not in DONE:
            far = node.get("error") or facts_text(node.get("progress"))
            return f"{label(str(node['name']))}{f': {far}' if far else ''}"
    return None


def _training(stages: list[Stage], final: str) -> Row | None:
    """The stage that trained the final model, else the last that trains: {"stage", "folder", "done"}."""
    training = [stage for stage in stages if stage.kind in TRAINING]
    found = next((stage for stage in training if stage.name == final), training[-1] if training else None)
    if found is None or found.folder is None:
        return None
    return {"stage": found.name, "kind": found.kind, "folder": str(found.folder), "done": found.state in DONE}


def objective(run: Row, store: Path, metrics: Sequence[str]) -> float | tuple[float, ...] | None:
    """What a sweeper learns of a run by its run.json: the one metric's value, or a value for each of several.

    None if any of them is not known.
    """
    stages = [read_stage(node, store, mapping_at(run, "config")) for node in run.get("nodes") or []]
    known = measured(stages, str(run.get("final") or "")).get("metrics") or {}
    values = [known[name]["mean"] for name in metrics if name in known]
    if len(values) < len(metrics):
        return None
    return tuple(values) if len(values) > 1 else float(values[0])


def measured(stages: list[Stage], final: str) -> Row:
    """What is known of the final model; of the comparison's candidate where the final model was not evaluated."""
    done = [stage for stage in stages if stage.state in DONE]
    compare = next((stage for stage in reversed(stages) if stage.kind == "compare"), None)
    by_name = {stage.name: stage for stage in stages}
    roles = {role: by_name[node] for role, node in (compare.inputs if compare else {}).items() if node in by_name}
    ways = [(role, stage) for role, stage in roles.items() if stage.inputs.get("model") == final]
    ways += [("", stage) for stage in stages if stage.kind in EVALUATES and stage.inputs.get("model") == final]
    candidate = compare.settings.get("candidate", "") if compare else ""
    ways += [(candidate, roles[candidate])] if candidate in roles else []
    role, evaluation = next(((role, stage) for role, stage in ways if stage in done), ("", None))
    if evaluation is None:
        return {}
    found = read(evaluation.folder / "evaluation.json") if evaluation.folder else None
    means = (found.get("metrics") if isinstance(found, dict) else None) or evaluation.metrics
    known = [name for name, value in means.items() if finite(value) is not None and name not in COUNTS]
    metrics = {name: _only_mean(means[name]) for name in known}
    verdict = _verdict(compare) if compare in done else {}
    for row in verdict.get("table") or []:
        value = (row.get("values") or {}).get(role) or {}
        if finite(value.get("mean")) is not None:
            bounds = {name: finite(value.get(name)) for name in ("mean", "low", "high")}
            metrics[row.get("metric")] = {**bounds, "confidence": finite(verdict.get("confidence"))}
    told = {"verdict": verdict.get("verdict"), "evaluation": evaluation.key, "judges": judges(evaluation.record)}
    return {"measured": bool(metrics), "metrics": metrics, **told}


def _only_mean(value: Any) -> Row:
    return {"mean": finite(value), "low": None, "high": None, "confidence": None}


def _verdict(compare: Stage | None) -> Row:
    found = read(compare.folder / "verdict.json") if compare and compare.folder else None
    return found if isinstance(found, dict) else {}
