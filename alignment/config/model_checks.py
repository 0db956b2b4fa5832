"""Settings of reward models and of merging that are right one by one and impossible together."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations
from typing import Any

from alignment.config.faults import Fault
from alignment.config.stages.merging import Merge
from alignment.config.stages.preparing import Prepare
from alignment.config.stages.reward_model import MEMBERS, POINTWISE, EvaluateReward, RewardModel

OF_PAIRS = ("margin", "centring", "label_smoothing")


def faults(use: Any, of: Any) -> Iterator[Fault]:
    """use: the node that is looked at; of: node -> its Use."""
    if isinstance(use.settings, RewardModel):
        yield from _loss(use)
    if isinstance(use.settings, EvaluateReward):
        yield from _members(use, of)
        yield from _rows(use, of)
    if isinstance(use.settings, Merge) and use.inputs["model"] == use.inputs["other"]:
        what = f"`{use.role('other')}` names `{use.inputs['other']}`, as `{use.role('model')}` does"
        yield Fault(what, (use.role("other"), use.role("model")), "a model merged with itself is itself")


def _loss(use: Any) -> Iterator[Fault]:
    settings = use.settings
    for name in OF_PAIRS:
        if settings.loss in POINTWISE and getattr(settings, name):
            key = f"{use.key}.{name}"
            what = f"`{key}` is {getattr(settings, name)}, which is of pairs, and `{use.key}.loss` {settings.loss}"
            yield Fault(what, (key, f"{use.key}.loss"), f"{key}=0.0, or {use.key}.loss=bradley_terry")
    if settings.lora is not None and settings.lora.quantize is not None:
        key = f"{use.key}.lora.quantize"
        what = f"`{key}` is {settings.lora.quantize}, which was not tried with a new head: `{use.node}` needs all bits"
        yield Fault(what, (key,), f"{key}=null")


def _members(use: Any, of: Any) -> Iterator[Fault]:
    """Equal members would be sure of everything; members that learned other things have nothing in common to be."""
    members = {role: of(use.inputs[role]) for role in MEMBERS if role in use.inputs}
    for (one, first), (other, second) in combinations(members.items(), 2):
        keys = use.role(other), use.role(one)
        if first.node == second.node or (first.settings == second.settings and first.inputs == second.inputs):
            what = f"`{use.role(other)}` names `{second.node}`, the same model as `{use.role(one)}`, `{first.node}`"
            yield Fault(what, keys, "members differ by their seed, at least")
        elif first.settings.loss != second.settings.loss:
            what = (
                f"`{first.node}` and `{second.node}` are trained with different losses, and `{use.node}` averages them"
            )
            yield Fault(what, (f"{second.key}.loss", f"{first.key}.loss"), "use one loss")


def _rows(use: Any, of: Any) -> Iterator[Fault]:
    rows = of(use.inputs["data"])
    if isinstance(rows.settings, Prepare) and rows.settings.task in ("sft", "unpaired"):
        what = f"`{rows.key}.task` is {rows.settings.task}, and `{use.node}` needs pairs or answers with a score"
        yield Fault(
            what, (f"{rows.key}.task", use.role("data")), f"{rows.key}.task=preference or scored, or other rows"
        )
