"""Reads what a run left behind into plain values for the report. Draws nothing, and a missing part is None or empty."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from alignment.config.schema import STAGES
from alignment.config.stages.training import Train
from alignment.errors import InputError
from alignment.pipeline.store import METRICS
from alignment.reporting.words import DONE, error_text, finite, label

Row = dict[str, Any]
TRAINING = tuple(kind for kind, stage in STAGES.items() if issubclass(stage, Train))
MAKES_MODEL = tuple(kind for kind, stage in STAGES.items() if stage.makes == "a model")
MAKES_REWARD_MODEL = tuple(kind for kind, stage in STAGES.items() if stage.makes == "a reward model")
SAMPLES = 10
LOSSES = 3


@dataclass(frozen=True)
class Stage:
    """A node of the run with what its folder says. folder: committed, else the work in progress, else None."""

    name: str
    kind: str
    key: str
    state: str
    seconds: float | None
    error: str | None
    inputs: dict[str, str]
    folder: Path | None
    record: Row
    settings: Row

    @property
    def metrics(self) -> Row:
        return self.record.get("metrics") or {}

    @property
    def bytes(self) -> float:
        return sum(finite(file.get("bytes")) or 0.0 for file in (self.record.get("files") or {}).values())


@dataclass(frozen=True)
class Model:
    """A model that was evaluated. name: its role in the comparison. node: the stage that made it. colour: its index.
    prompts: metric -> over how many of the prompts its mean is, where it is known."""

    name: str
    label: str
    node: str
    colour: int
    answers: list[Row]
    metrics: Row
    prompts: Row = field(default_factory=dict)


@dataclass(frozen=True)
class Report:
    run: Row
    stages: list[Stage]
    verdict: Row | None
    models: list[Model]
    baseline: Model | None
    candidate: Model | None
    colours: dict[str, int] = field(default_factory=dict)

    def stage(self, name: str) -> Stage | None:
        return next((stage for stage in self.stages if stage.name == name), None)

    def of(self, *kinds: str) -> list[Stage]:
        return [stage for stage in self.stages if stage.kind in kinds]


def read(path: Path | None) -> Any:
    """JSON of a file; None if the file is missing or cannot be read."""
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path else None
    except (OSError, ValueError):
        return None


def tail(path: Path, size: int) -> str:
    """The last bytes of a file as text, without a first line that is cut, unless it is the only one; empty if there is
    no file."""
    try:
        with open(path, "rb") as stream:
            cut = b""
            if (start := path.stat().st_size - size) > 0:
                stream.seek(start - 1)
                cut = stream.readline()[1:]
            return (stream.read() or cut).decode(errors="replace")
    except OSError:
        return ""


def read_rows(path: Path | None) -> list[Row]:
    """Rows of a .jsonl; a last line that is still being written is left out."""
    rows: list[Row] = []
    if path is None or not path.is_file():
        return rows
    with open(path, encoding="utf-8", errors="replace") as stream:
        for line in stream:
            try:
                row = json.loads(line)
            except ValueError:
                continue
            if isinstance(row, dict):
                rows.append(row)
    return rows


def folder_of(store: Path, key: str | None) -> Path | None:
    """The committed folder of a key, else its folder of work in progress."""
    for place in ("store", "work"):
        if key and (folder := store / place / key[:16]).is_dir():
            return folder
    return None


def read_stage(node: Row, store: Path, config: Row) -> Stage:
    key = node.get("key") or ""
    folder = folder_of(store, key)
    record = (read(folder / "record.json") if folder else None) or {}
    configured = (config.get("stage") or {}).get(node.get("stage") or node["name"]) or {}
    return Stage(
        name=node["name"],
        kind=node.get("kind") or record.get("kind") or "",
        key=key,
        state=node.get("state") or "waiting",
        seconds=finite(node.get("seconds")) if node.get("state") not in DONE else _seconds(node, record),
        error=error_text(node.get("error")),
        inputs=dict(node.get("inputs") or {}),
        folder=folder,
        record=record,
        settings=record.get("settings") or configured,
    )


def _seconds(node: Row, record: Row) -> float | None:
    """What the work took when it was done; for a reused stage the run itself spent nothing, so the record knows."""
    return finite(record.get("seconds")) or finite(node.get("seconds"))


def gather(run_folder: Path, store: Path) -> Report:
    """Everything the report shows of one run.

    run_folder holds run.json; store is the folder with store/, work/ and runs/. Raises InputError without a run.json.
    """
    return collect(read_run(run_folder), store)


def read_run(run_folder: Path) -> Row:
    """The content of its run.json. Raises InputError if there is none, or one that lacks what `is_run` asks for."""
    run = read(run_folder / "run.json")
    if not is_run(run):
        fix = "name a folder under <store>/runs; the run's command writes it again"
        raise InputError("no run.json that can be read", where=str(run_folder), fix=fix)
    return dict(run)


def is_run(run: Any) -> bool:
    """Whether it has what all that shows runs relies on: one that lacks it must not end a look at all the others."""
    nodes = (run.get("nodes") or []) if isinstance(run, dict) else None
    return isinstance(nodes, list) and isinstance(run.get("run") or "", str) and all(map(_is_node, nodes))


def _is_node(node: Any) -> bool:
    if not isinstance(node, dict) or not isinstance(node.get("inputs") or {}, dict):
        return False
    return all(isinstance(node.get(name), str) for name in ("name", "kind", "key", "state"))


def collect(run: Row, store: Path) -> Report:
    """As gather, with the content of run.json given."""
    config = run.get("config") or {}
    stages = [read_stage(node, store, config) for node in run.get("nodes") or []]
    compare = next((stage for stage in reversed(stages) if stage.kind == "compare"), None)
    found = read(compare.folder / "verdict.json") if compare and compare.folder else None
    verdict = found if isinstance(found, dict) else None
    roles = _roles(stages, compare)
    colours = _colours(stages, roles)
    order = (verdict or {}).get("models") or list(roles)
    models = [_model(role, stage, colours[_drawn_as(role, roles)]) for role, stage in roles.items()]
    models.sort(key=lambda model: order.index(model.name) if model.name in order else len(order))
    asked = compare.settings if compare else {}
    by_name = {model.name: model for model in models}
    first, last = (models[0], models[-1]) if models else (None, None)
    return Report(
        run=run,
        stages=stages,
        verdict=verdict,
        models=models,
        baseline=by_name.get(asked.get("baseline", ""), first),
        candidate=by_name.get(asked.get("candidate", ""), last),
        colours=colours,
    )


def _roles(stages: list[Stage], compare: Stage | None) -> dict[str, Stage]:
    """Role in the comparison -> its evaluate stage; without a comparison each evaluated model under its own name, one
    that is evaluated in several ways under those of its evaluate stages."""
    by_name = {stage.name: stage for stage in stages}
    if compare:
        return {role: by_name[node] for role, node in compare.inputs.items() if node in by_name}
    evaluated = [stage for stage in stages if stage.kind == "evaluate"]
    models = [stage.inputs.get("model", stage.name) for stage in evaluated]
    named = zip(models, evaluated, strict=True)
    return {model if models.count(model) == 1 else stage.name: stage for model, stage in named}


def _colours(stages: list[Stage], roles: dict[str, Stage]) -> dict[str, int]:
    """Node that made a model -> index of its colour: the evaluated models first, in order, then the others. A model
    that is evaluated in several ways, as best-of-n too, has a colour for each: the further ones by their roles."""
    makers = [_drawn_as(role, roles) for role in roles]
    makers += [stage.name for stage in stages if stage.kind in MAKES_MODEL]
    return {name: index for index, name in enumerate(dict.fromkeys(makers))}


def _drawn_as(role: str, roles: dict[str, Stage]) -> str:
    """The node that made a role's model; the role itself, where one before it has this node."""
    nodes = {name: stage.inputs.get("model", name) for name, stage in roles.items()}
    return nodes[role] if list(nodes.values()).index(nodes[role]) == list(nodes).index(role) else role


def _model(role: str, stage: Stage, colour: int) -> Model:
    folder = stage.folder
    evaluation = read(folder / "evaluation.json") if folder else None
    return Model(
        name=role,
        label=label(role),
        node=stage.inputs.get("model", role),
        colour=colour,
        answers=read_rows(folder / "answers.jsonl") if folder else [],
        metrics=(evaluation or {}).get("metrics") or stage.metrics,
        prompts=(evaluation or {}).get("prompts") or {},
    )


def summarise(run: Row, store: Path) -> Row:
    """What the terminal says at the end of a run.

    {"run", "states": {state: count}, "spent_s": seconds of work of this run, "verdict": verdict.json or None,
    "candidate": name or None, "final", "model": folder of the final model or None, "talks": whether it answers}
    """
    report = collect(run, store)
    states = [stage.state for stage in report.stages]
    final = report.stage(run.get("final", ""))
    model = final.folder / "model" if final and final.folder and final.state in DONE else None
    return {
        "run": run.get("run"),
        "states": {state: states.count(state) for state in dict.fromkeys(states)},
        "spent_s": sum(stage.seconds or 0.0 for stage in report.stages if stage.state != "reused"),
        "verdict": report.verdict,
        "candidate": report.candidate.name if report.candidate else None,
        "final": run.get("final"),
        "model": model if model and model.is_dir() else None,
        "talks": final is not None and final.kind in MAKES_MODEL,
    }


def curve_rows(stage: Stage) -> list[Row]:
    """Rows of metrics.jsonl by step. A step written twice (before and after a restart) counts as it was last."""
    rows = read_rows(stage.folder / METRICS) if stage.folder else []
    by_step = {row["step"]: row for row in rows if finite(row.get("step")) is not None}
    return [by_step[step] for step in sorted(by_step)]


def changes(report: Report) -> dict[str, float]:
    """Prompt id -> reward of the candidate's answer minus reward of the baseline's."""
    if not report.baseline or not report.candidate:
        return {}
    before = {row.get("id"): finite(row.get("reward")) for row in report.baseline.answers}
    found = {}
    for row in report.candidate.answers:
        old, new = before.get(row.get("id")), finite(row.get("reward"))
        if old is not None and new is not None:
            found[str(row["id"])] = new - old
    return found


def choose(change: dict[str, float], count: int = SAMPLES, losses: int = LOSSES) -> list[str]:
    """Ids by rule: the `losses` biggest losses, then evenly spaced ranks up to the biggest gain; from loss to gain.

    Depends on the numbers and ids alone, so nobody picks the nice ones.
    """
    ranked = sorted(change, key=lambda name: (change[name], name))
    return [ranked[i] for i in spread(len(ranked), count, losses)]


def spread(length: int, count: int, first: int) -> Sequence[int]:
    """The `first` lowest positions, then evenly spaced ones up to the last: `count` of `length` in all."""
    if length <= count:
        return range(length)
    gap = (length - first - 1) / (count - first - 1)
    return [*range(first), *(first + round(i * gap) for i in range(count - first))]
