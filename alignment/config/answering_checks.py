"""Impossible combinations of the stages that answer and judge."""

from __future__ import annotations

from collections.abc import Iterator

from alignment.config.faults import Fault, Use
from alignment.config.stages.answering import Evaluate, Judge, Sample
from alignment.config.stages.preparing import Prepare


def faults(use: Use) -> Iterator[Fault]:
    """Of a node all of whose roles are filled by nodes that make what they take."""
    settings, key = use.settings, use.key
    parents = {role: Use(use.experiment, parent) for role, parent in use.inputs.items()}
    if isinstance(settings, Sample):
        yield from _prompts(settings, key, parents["data"])
    if isinstance(settings, Judge):
        yield from _judge(settings, key, parents["data"])
    if isinstance(settings, Evaluate) and settings.best_of > 1 and settings.temperature != 1:
        keys = (f"{key}.temperature", f"{key}.best_of")
        what = f"`{keys[1]}` is {settings.best_of}, and `{keys[0]}` {settings.temperature:g}"
        yield Fault(f"{what}: the bound of its KL is that of answers as the model draws them", keys, f"{keys[0]}=1.0")
    if isinstance(settings, Prepare) and "data" in parents:
        if settings.dataset is None:
            yield from _judged_rows(settings, key, parents["data"])
        else:
            both = (f"{key}.dataset", use.role("data"))
            what = f"`{both[0]}` is {settings.dataset}, and `{both[1]}` names `{use.inputs['data']}`"
            yield Fault(f"{what}: rows have one source", both, f"{both[0]}=null, or ~{both[1]}")


def _prompts(settings: Sample, key: str, rows: Use) -> Iterator[Fault]:
    """There are as many as are asked for; found before what stands before it has trained for hours."""
    if not isinstance(rows.settings, Prepare):
        return
    there, asked = rows.settings.splits.prompts, settings.first_prompt + (settings.prompts or 1)
    if there < asked:
        split, name = f"{rows.key}.splits.prompts", "prompts" if settings.prompts else "first_prompt"
        given = f"`{key}.{name}` is {getattr(settings, name)}"
        after = f" after the first {settings.first_prompt}" if settings.prompts and settings.first_prompt else ""
        yield Fault(
            f"{given}{after}, and `{split}` {there}", (f"{key}.{name}", split), f"{split}={asked}, or fewer here"
        )


def _judge(settings: Judge, key: str, samples: Use) -> Iterator[Fault]:
    if settings.pairs == "none" and not settings.best and settings.label_threshold is None:
        keys = tuple(f"{key}.{name}" for name in ("pairs", "best", "label_threshold"))
        yield Fault(f"`{keys[0]}` is none, and nothing else is asked of it", keys, f"{keys[1]}=true, or a {keys[2]}")
    few = isinstance(samples.settings, Sample) and samples.settings.completions_per_prompt < 2
    if few and settings.pairs != "none":
        both = (f"{samples.key}.completions_per_prompt", f"{key}.pairs")
        yield Fault(f"`{both[0]}` is 1, and a pair needs two answers", both, f"raise it, or {both[1]}=none")


def _judged_rows(settings: Prepare, key: str, judge: Use) -> Iterator[Fault]:
    """The judge makes rows for the task."""
    if not isinstance(judge.settings, Judge):
        return
    has_pairs, has_labels = judge.settings.pairs != "none", judge.settings.label_threshold is not None
    made = {
        "preference": ("pairs=best_worst", has_pairs),
        "unpaired": ("label_threshold=0.0", has_labels or has_pairs),
        "sft": ("best=true", judge.settings.best),
        "scored": ("", False),
    }
    setting, is_made = made[settings.task]
    if not is_made:
        keys = (f"{judge.key}.{setting.partition('=')[0]}" if setting else judge.key, f"{key}.task")
        fix = f"{judge.key}.{setting}, or another task" if setting else f"name a data set: {key}.dataset"
        yield Fault(f"`{keys[1]}` is {settings.task}, and `{judge.key}` makes no such rows", keys, fix)
