"""Direct preference optimisation of the parent's model, which is also the reference."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import trl

from alignment.config.schema import Dpo
from alignment.stages.context import StageContext
from alignment.stages.train import train
from alignment.training import engine
from alignment.training.model import load, lora_config
from alignment.training.reference import ReferenceStore, weights_digest
from alignment.training.reference_pass import References
from alignment.training.rows import pair_sizes
from alignment.training.trainers import DPO


def run(context: StageContext) -> dict[str, Any]:
    return train(context, pair_sizes, make_trainer)


def make_trainer(context: StageContext, start: Path, arguments: dict[str, Any], **common: Any) -> DPO:
    """The reference is the policy before its first update, so one model is loaded."""
    settings: Dpo = context.settings
    args = trl.DPOConfig(
        **arguments,
        loss_type=[settings.loss],
        beta=settings.beta,
        disable_dropout=True,
        precompute_ref_log_probs=True,
        router_aux_loss_coef=0.0,
    )
    model = load(start)
    return DPO(
        model=model,
        args=args,
        peft_config=lora_config(settings.lora, model),
        references=References(_store(context, start), context.progress, context.warn),
        **common,
    )


def _store(context: StageContext, start: Path) -> ReferenceStore | None:
    """Where runs that start from these weights in this precision keep the log-probs of their reference."""
    if context.shared is None:
        return None
    return ReferenceStore(
        context.shared / "reference",
        weights=weights_digest(start),
        adapter=None,  # the reference is the start model itself: adapters are off
        dtype=_dtype(context),
    )


def _dtype(context: StageContext) -> str:
    if context.settings.precision == "fp32":
        return "fp32"
    return "bf16-weights" if context.experiment.engine.strategy in engine.ZERO_STAGE else "bf16-autocast"
