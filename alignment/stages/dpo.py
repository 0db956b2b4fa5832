"""Direct preference optimisation of the parent's model, which is also the reference."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import trl

from alignment.config.schema import Dpo
from alignment.stages.context import StageContext
from alignment.stages.train import train
from alignment.training.model import load, lora_config
from alignment.training.rows import pair_sizes
from alignment.training.trainers import DPO


def run(context: StageContext) -> dict[str, Any]:
    return train(context, pair_sizes, make_trainer)


def make_trainer(settings: Dpo, start: Path, arguments: dict[str, Any], **common: Any) -> DPO:
    """The reference is the policy with its adapter off, or without LoRA a second copy of the start model."""
    args = trl.DPOConfig(**arguments, loss_type=[settings.loss], beta=settings.beta, disable_dropout=True)
    model = load(start)
    reference = None if settings.lora else load(start)
    return DPO(model=model, ref_model=reference, args=args, peft_config=lora_config(settings.lora, model), **common)
