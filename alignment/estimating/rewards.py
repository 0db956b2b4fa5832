"""Reward models that the processes of a stage hold beside what they train."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from alignment.config.schema import Experiment
from alignment.config.sources import PathSource, Source
from alignment.config.stages.online import Online
from alignment.estimating.sizes import tensors_of
from alignment.training.activations import FP32


def held_bytes(experiment: Experiment, name: str, config: Any) -> int:
    """Bytes of their weights, which each process of the node has in fp32: those of local folders, and of parents, made
    of the start model. config: its configuration. Models that are fetched from elsewhere are not counted."""
    node = experiment.pipeline.nodes[name]
    settings = experiment.stage[node.stage]
    if not isinstance(settings, Online):
        return 0
    numbers = 0
    for term in experiment.reward.read(settings.compares).terms.values():
        numbers += sum(map(_numbers, term.sources()))
        for role in term.reads(node.inputs):
            trains = experiment.stage[experiment.pipeline.nodes[node.inputs[role]].stage]
            numbers += sum(tensors_of(config, trains).values())
    return FP32 * numbers


def _numbers(source: Source) -> int:
    """Numbers of the weights of a local folder; 0 where they cannot be read, which is said elsewhere."""
    if not isinstance(source, PathSource):
        return 0
    total = 0
    for file in Path(source.path).glob("*.safetensors"):
        try:
            with safe_open(file, "pt") as opened:  # reads the header alone
                total += sum(math.prod(opened.get_slice(key).get_shape()) for key in opened.keys())  # noqa: SIM118
        except (OSError, SafetensorError):
            return 0
    return total
