"""What an estimate is made from: the model's tensors, and how long rows are. No weights are read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from alignment.config.schema import Experiment
from alignment.config.stages.base import Stage
from alignment.config.stages.online import Online
from alignment.config.stages.preference import Kto
from alignment.config.stages.preparing import Prepare
from alignment.config.stages.reward_model import RewardModel
from alignment.errors import InputError
from alignment.estimating.generated import longest_pairs
from alignment.estimating.seen import Lengths
from alignment.training.shape import shape_of


@dataclass(frozen=True)
class Footprints:
    """[rows] each: tokens to compute when packed, when padded beside rows no longer; and of those that autograd keeps
    something of, how many there are, and how many the head scores.

    known: False where nobody has the rows yet, and these are as long as they may become.
    """

    lengths: np.ndarray
    widths: np.ndarray
    trained: np.ndarray
    scored: np.ndarray
    known: bool


ONE = np.ones(1, np.int64)
ONE_TOKEN = Footprints(ONE, ONE, ONE, ONE, known=False)


def is_estimated(config: Any) -> bool:
    """Whether it is a decoder with attention, by whose numbers memory is counted."""
    try:
        shape_of(config)
    except AttributeError:
        return False
    return True


def tensors_of(config: Any, settings: Stage) -> dict[str, int]:
    """Numbers in each weight of the model that this stage trains or makes, by name; tied ones once. Raises InputError
    if transformers itself has no such architecture."""
    model = without_storage(config, isinstance(settings, RewardModel))
    return {name: weight.numel() for name, weight in model.named_parameters()}


def without_storage(config: Any, classifies: bool = False) -> Any:
    """A model of this transformers configuration whose weights have shapes alone, not to be changed; classifies: with
    one output, as a reward model. Raises InputError if transformers itself has no such architecture."""
    return _made(str(config.to_json_string()), classifies)


@lru_cache(maxsize=8)
def _made(text: str, classifies: bool) -> Any:
    config = AutoConfig.for_model(**{**json.loads(text), **({"num_labels": 1} if classifies else {})})
    auto: Any = AutoModelForSequenceClassification if classifies else AutoModelForCausalLM
    try:
        with torch.device("meta"):
            return auto.from_config(config, trust_remote_code=False)
    except Exception as error:  # whatever an architecture asks of its configuration
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(f"transformers cannot make this model: {first}", where="model.source") from error


def footprints_of(experiment: Experiment, name: str, seen: Mapping[str, Lengths]) -> Footprints:
    """Rows of a node that trains, from what its parent's rows were found to be. seen: prepare node -> lengths."""
    node = experiment.pipeline.nodes[name]
    settings, data = experiment.stage[node.stage], node.inputs["data"]
    if (found := seen.get(data)) is not None and len(found.tokens):
        return _rows(settings, found, known=True)
    if (found := longest_pairs(experiment, data, seen)) is not None:
        return _rows(settings, found, known=False)
    parent = experiment.stage[experiment.pipeline.nodes[data].stage]
    assert isinstance(parent, Prepare)
    prompt = min(parent.max_prompt_length, parent.max_length - 1)
    answers = (parent.max_length - prompt) * (2 if parent.task == "preference" else 1)
    longest = Lengths(parent.task, np.array([prompt]), np.array([parent.max_length]), np.array([answers]))
    return _rows(settings, longest, known=False)


def _rows(settings: Any, found: Lengths, known: bool) -> Footprints:
    if isinstance(settings, Online):
        count = settings.answers_trained_on()
        answers = np.full_like(found.prompt, count * settings.max_new_tokens)
        packed = found.prompt + answers
        return Footprints(packed, count * found.prompt + answers, packed, answers, known)
    if found.task == "preference":
        packed, widths = found.prompt + found.trained, 2 * found.tokens
    elif (
        isinstance(settings, Kto) and settings.has_reference_point
    ):  # beside each answer that of another prompt, without a gradient
        other = np.roll(found.trained, 1)
        packed, widths = found.tokens + other, 2 * (found.prompt + np.maximum(found.trained, other))
        return Footprints(packed, widths, found.tokens, found.trained, known)
    else:
        packed = widths = found.tokens
    scored = np.zeros_like(found.trained) if isinstance(settings, RewardModel) else found.trained
    return Footprints(packed, widths, packed, scored, known)
