"""KTO and its like: the parent's model, which is also the reference, on single answers that are wanted or not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import trl

from alignment.config.stages.preference import Kto
from alignment.stages.context import StageContext
from alignment.stages.reference import references_of
from alignment.stages.train import tokenised, train
from alignment.training.model import load, lora_config
from alignment.training.rows import pair_sizes
from alignment.training.unpaired import KTO


def run(context: StageContext) -> dict[str, Any]:
    return train(context, pair_sizes, make_trainer, rows_of=_rows)


def _rows(context: StageContext, tokenizer: Any) -> Any:
    """Without the answers to other prompts where the loss does not look at them."""
    rows, column = tokenised(context, tokenizer), "rejected_ids"
    _say_if_one_sided(context, rows)
    if context.settings.has_reference_point:
        return rows
    kind = rows.features[column]
    return rows.remove_columns(column).add_column(column, [[]] * len(rows), feature=kind)


def _say_if_one_sided(context: StageContext, rows: Any) -> None:
    """Outside of what the paper advises (eq. 9): weight times number, wanted to unwanted, from 1:1 to 3:2."""
    wanted, settings = sum(rows["label"]), context.settings
    unwanted = len(rows) - wanted
    others = settings.undesirable_weight * unwanted
    ratio = settings.desirable_weight * wanted / others if others else 0.0
    if context.is_main and ratio and not 1 <= round(ratio, 2) <= 1.5:
        what = f"{wanted} rows are wanted and {unwanted} are not: with their weights {ratio:.3g} to 1"
        even = f"stage.kto.desirable_weight={settings.desirable_weight / ratio:.3g} would make it even"
        context.warn(f"{what}, where KTO's paper advises 1 to 1.5; {even}")


def make_trainer(context: StageContext, start: Path, arguments: dict[str, Any], **common: Any) -> KTO:
    """TRL's DPOTrainer is the base: what it does with pairs, KTO does with an answer and a mismatched one."""
    settings: Kto = context.settings
    args = trl.DPOConfig(**arguments, disable_dropout=True, precompute_ref_log_probs=True, router_aux_loss_coef=0.0)
    model = load(start, settings.lora, settings.precision)
    return KTO(
        model=model,
        args=args,
        peft_config=lora_config(settings.lora, model),
        settings=settings,
        references=references_of(context, start),
        **common,
    )
