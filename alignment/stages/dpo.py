"""Direct preference optimisation, and its family, of the parent's model, which is also the reference."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import trl

from alignment.config.stages.preference import Dpo
from alignment.errors import InputError
from alignment.stages.context import StageContext
from alignment.stages.reference import references_of
from alignment.stages.train import train
from alignment.training.model import load, lora_config
from alignment.training.objective import Objective
from alignment.training.preference import DPO
from alignment.training.rows import pair_sizes


def run(context: StageContext) -> dict[str, Any]:
    return train(context, pair_sizes, make_trainer)


def make_trainer(context: StageContext, start: Path, arguments: dict[str, Any], **common: Any) -> DPO:
    """The reference is the policy before its first update, so one model is loaded. Its log-probs are those that the
    stage before has kept; what is missing of them is computed here. The loss is ours (training/objective.py)."""
    settings: Dpo = context.settings
    _require_update(settings, common["batches"].steps)
    args = trl.DPOConfig(
        **arguments,
        disable_dropout=True,
        precompute_ref_log_probs=True,
        use_weighting=settings.weighting == "wpo",  # padded rows are scored by TRL's head
        router_aux_loss_coef=0.0,
    )
    model = load(start, settings.lora, settings.precision)
    return DPO(
        model=model,
        args=args,
        peft_config=lora_config(settings.lora, model),
        objective=Objective(settings),
        references=references_of(context, start) if settings.refers else None,
        **common,
    )


def _require_update(settings: Dpo, steps: int) -> None:
    """Raises InputError if the reference would never move; where the config knows the steps, it has refused that."""
    if settings.reference_update and steps <= settings.reference_update.every_steps:
        what = f"the reference moves every {settings.reference_update.every_steps} steps, and these rows are {steps}"
        fix = f"a smaller reference_update.every_steps, such as {max(steps // 4, 1)}, or more epochs"
        raise InputError(what, where="stage.dpo.reference_update", fix=fix)
