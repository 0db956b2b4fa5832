"""A reward model from the parent's model: on pairs, or on answers with a score."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import trl

from alignment.config.stages.reward_model import RewardModel
from alignment.data.numbers import check_margins, check_scores
from alignment.files import write_json
from alignment.stages.context import StageContext
from alignment.stages.train import train
from alignment.training.classifier import adapters, load_classifier
from alignment.training.reward_model import Regression, Reward
from alignment.training.rows import Sizes, pair_sizes, scored_sizes

TOLD = "reward_model.json"
CHANCES = (0.0, 1.0)  # what bce learns


def run(context: StageContext) -> dict[str, Any]:
    settings: RewardModel = context.settings
    _check_numbers(context, settings)
    metrics = train(context, partial(sizes, settings), make_trainer, partial(load_classifier, seed=settings.seed))
    if context.is_main:  # what a number of this model means
        margin = settings.margin if settings.loss == "bradley_terry" else 0.0
        write_json(context.folder / TOLD, {"loss": settings.loss, "margin": margin})
    return metrics


def _check_numbers(context: StageContext, settings: RewardModel) -> None:
    """Raises InputError for rows that lack a number which the loss needs, or have one that it cannot take."""
    data = context.inputs["data"]
    if settings.loss != "bradley_terry":
        for split in ("train", "heldout"):  # the latter is what it will be measured by
            if split == "train" or (data / split).is_dir():
                check_scores(data, split, CHANCES if settings.loss == "bce" else None)
    elif settings.margin and (below := check_margins(data)) and context.is_main:
        context.warn(f"{below} pairs have a margin below 0: they may be ranked the other way round")


def sizes(settings: RewardModel, rows: Any) -> Sizes:
    return pair_sizes(rows) if settings.loss == "bradley_terry" else scored_sizes(rows)


def make_trainer(context: StageContext, start: Path, arguments: dict[str, Any], **common: Any) -> Reward | Regression:
    settings: RewardModel = context.settings
    args = trl.RewardConfig(**arguments)  # before the model: under ZeRO-3 it is sharded while it is read
    model = load_classifier(start, settings.seed)
    common |= {"model": model, "args": args, "peft_config": adapters(settings.lora, model)}
    if settings.loss != "bradley_terry":
        return Regression(loss=settings.loss, **common)
    return Reward(
        margin=settings.margin, centring=settings.centring, label_smoothing=settings.label_smoothing, **common
    )
