"""Whether the prompts that a model will be asked leave room for its answers in its window."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from alignment.config.schema import Experiment
from alignment.config.stages.answering import Evaluate, Sample
from alignment.config.stages.online import Online
from alignment.config.stages.preparing import Prepare
from alignment.errors import Finding, InputError

Asks = Sample | Evaluate | Online


@dataclass(frozen=True)
class Prompts:
    """Of rows that were looked at. tokens: [rows], of the prompt of each. fit: those that may be used. splits: split ->
    its rows, in order; None where not all rows are known, and any may be in any split. place: where a row stands."""

    tokens: np.ndarray
    fit: np.ndarray
    splits: Mapping[str, np.ndarray] | None
    place: Callable[[int], str]


def asking(experiment: Experiment) -> dict[str, Asks]:
    """Nodes in which a model answers prompts, with their settings."""
    found = {name: experiment.stage[node.stage] for name, node in experiment.pipeline.nodes.items()}
    return {name: settings for name, settings in found.items() if isinstance(settings, Asks)}


def finding(experiment: Experiment, name: str, window: int, prompts: Prompts | None) -> Finding:
    """Of the node `name`, in which a model with a window of so many tokens answers. prompts: of the node that prepares
    its rows; None where nobody has these yet."""
    node = experiment.pipeline.nodes[name]
    settings = asking(experiment)[name]
    new, told = settings.max_new_tokens, {"check": f"window {name}"}
    rows = np.zeros(0, np.int64) if prompts is None else _asked(settings, prompts)
    if prompts is not None and len(rows):
        longest = int(rows[prompts.tokens[rows].argmax()])
        tokens = int(prompts.tokens[longest])
        if tokens + new > window:
            fix = _fix(experiment, name, tokens, window)
            what = f"a prompt of {tokens} tokens leaves no room for {new} more in a window of {window}"
            odd: Finding = {**told, "what": what, "where": prompts.place(longest), "fix": fix}
            if prompts.splits is None:  # it may be in another split
                return {**odd, "state": "warning", "what": f"where it is asked, {what}"}
            return {**odd, "state": "failed", "code": InputError.exit_code}
        if prompts.splits is not None:
            what = f"prompts of {tokens} tokens at most and answers of {new}, of {window} tokens"
            return {**told, "state": "ok", "what": what}
    most = _most(experiment, name)
    if most + new > window:
        what = f"prompts may have {most} tokens, which leave no room for {new} more in a window of {window}"
        fix = _fix(experiment, name, most, window)
        return {**told, "state": "warning", "what": what, "where": f"stage.{node.stage}", "fix": fix}
    return {**told, "state": "ok", "what": f"prompts of {most} tokens at most and answers of {new}, of {window} tokens"}


def _asked(settings: Asks, prompts: Prompts) -> np.ndarray:
    """Rows that are asked, or may be."""
    if prompts.splits is None:
        return prompts.fit
    rows = prompts.splits[settings.reads["data"]]
    if isinstance(settings, Sample):
        rows = rows[settings.first_prompt :][: settings.prompts]
    return rows


def _preparing(experiment: Experiment, name: str) -> tuple[str, Prepare]:
    """The stage that prepares the prompts, and its settings."""
    nodes = experiment.pipeline.nodes
    stage = nodes[nodes[name].inputs["data"]].stage
    settings = experiment.stage[stage]
    assert isinstance(settings, Prepare)  # it alone makes rows
    return stage, settings


def _most(experiment: Experiment, name: str) -> int:
    """Tokens of the longest prompt that settings allow, with an answer."""
    settings = _preparing(experiment, name)[1]
    return min(settings.max_prompt_length, settings.max_length - 1)


def _fix(experiment: Experiment, name: str, tokens: int, window: int) -> str:
    stage = experiment.pipeline.nodes[name].stage
    new, (prepare, _) = asking(experiment)[name].max_new_tokens, _preparing(experiment, name)
    fixes = {f"stage.{stage}.max_new_tokens": window - tokens, f"stage.{prepare}.max_prompt_length": window - new}
    return " or ".join(f"{key}={value}" for key, value in fixes.items() if value > 0) or "a model with a larger window"
