"""Impossible combinations of the stages that answer and judge."""

from __future__ import annotations

from collections.abc import Iterator

from alignment.config.schema import Experiment
from alignment.config.stages.answering import Evaluate, Judge, Sample
from alignment.config.stages.preparing import Prepare

Told = tuple[str, tuple[str, ...], str]  # what is wrong; the keys, first the one to look at; the fix


def faults(experiment: Experiment, name: str) -> Iterator[Told]:
    """Of one node, all of whose roles are filled by nodes that make what they take."""
    node = experiment.pipeline.nodes[name]
    settings, key = experiment.stage[node.stage], f"stage.{node.stage}"
    parents = {role: experiment.pipeline.nodes[parent].stage for role, parent in node.inputs.items()}
    if isinstance(settings, Judge):
        yield from _judge(experiment, settings, key, parents["data"])
    if isinstance(settings, Evaluate) and settings.best_of > 1 and settings.temperature != 1:
        keys = (f"{key}.temperature", f"{key}.best_of")
        what = f"`{keys[1]}` is {settings.best_of}, and `{keys[0]}` {settings.temperature:g}"
        yield f"{what}: the bound of its KL is that of answers as the model draws them", keys, f"{keys[0]}=1.0"
    if isinstance(settings, Prepare) and settings.dataset is None and "data" in parents:
        yield from _judged_rows(experiment, settings, key, parents["data"])


def _judge(experiment: Experiment, settings: Judge, key: str, parent: str) -> Iterator[Told]:
    if settings.pairs == "none" and not settings.best and settings.label_threshold is None:
        keys = tuple(f"{key}.{name}" for name in ("pairs", "best", "label_threshold"))
        yield f"`{keys[0]}` is none, and nothing else is asked of it", keys, f"{keys[1]}=true, or a {keys[2]}"
    samples = experiment.stage[parent]
    few = isinstance(samples, Sample) and samples.completions_per_prompt < 2
    if few and settings.pairs != "none":
        keys = (f"stage.{parent}.completions_per_prompt", f"{key}.pairs")
        yield f"`{keys[0]}` is 1, and a pair needs two answers", keys, f"raise it, or {keys[1]}=none"


def _judged_rows(experiment: Experiment, settings: Prepare, key: str, parent: str) -> Iterator[Told]:
    """The judge makes rows for the task."""
    judge = experiment.stage[parent]
    if not isinstance(judge, Judge):
        return
    wanted = {"preference": ("pairs", judge.pairs != "none"), "sft": ("best", judge.best)}
    name, made = wanted.get(settings.task, ("", True))
    if not made:
        keys = (f"stage.{parent}.{name}", f"{key}.task")
        fix = f"{keys[0]}={'true' if name == 'best' else 'best_worst'}, or another task"
        yield f"`{keys[1]}` is {settings.task}, and `stage.{parent}` makes no such rows", keys, fix
