"""Rows that a run makes itself: pairs that a judge makes of samples, of which prompts and longest answers are known."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

from alignment.config.schema import Experiment
from alignment.config.stages.answering import Judge, Sample
from alignment.config.stages.preparing import Prepare
from alignment.config.stages.training import Reference, Train
from alignment.estimating.seen import Lengths


def stages_on(experiment: Experiment, prepared: str) -> list[str]:
    """Nodes that train on what this node prepares."""
    nodes, stage = experiment.pipeline.nodes, experiment.stage
    return [
        name
        for name, node in nodes.items()
        if isinstance(stage[node.stage], Train | Reference) and node.inputs.get("data") == prepared
    ]


def generated(experiment: Experiment, prepared: str) -> Iterator[tuple[str, Sample, Judge]]:
    """Nodes that prepare pairs which a judge makes of samples of these prompts."""
    nodes, stage = experiment.pipeline.nodes, experiment.stage
    for name, node in nodes.items():
        settings = stage[node.stage]
        if not isinstance(settings, Prepare) or settings.datasets or settings.task != "preference":
            continue
        judged = nodes[node.inputs["data"]]
        judge, sampled = stage[judged.stage], nodes.get(judged.inputs.get("data", ""))
        if not isinstance(judge, Judge) or sampled is None or sampled.inputs.get("data") != prepared:
            continue
        sampling = stage[sampled.stage]
        if isinstance(sampling, Sample):
            yield name, sampling, judge


def longest_pairs(experiment: Experiment, name: str, seen: Mapping[str, Lengths]) -> Lengths | None:
    """Of the pairs that the node `name` prepares: to prompts that were looked at, both answers as long as they may
    become. None: they are of no such prompts."""
    for prepared, rows in seen.items():
        for pairs, sampling, _ in generated(experiment, prepared):
            if pairs == name and len(rows.prompt):
                answers = np.full_like(rows.prompt, sampling.max_new_tokens)
                return Lengths("preference", rows.prompt, rows.prompt + answers, 2 * answers)
    return None
