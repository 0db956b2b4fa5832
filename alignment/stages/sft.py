"""Supervised fine-tuning of the parent's model on the assistant's tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import trl

from alignment.config.stages.training import Sft
from alignment.stages.context import StageContext
from alignment.stages.train import train
from alignment.training.model import load, lora_config
from alignment.training.rows import sft_sizes
from alignment.training.trainers import SFT


def run(context: StageContext) -> dict[str, Any]:
    return train(context, sft_sizes, make_trainer)


def make_trainer(context: StageContext, start: Path, arguments: dict[str, Any], **common: Any) -> SFT:
    settings: Sft = context.settings
    # Before the model: under ZeRO-3 it is sharded while it is read.
    args = trl.SFTConfig(**arguments, router_aux_loss_coef=0.0)
    model = load(start, settings.lora, settings.precision)
    return SFT(model=model, args=args, peft_config=lora_config(settings.lora, model), **common)
