"""Log-probs of DPO's reference before any DPO starts: the runs of a sweep find them, and none waits for another.

The result is a note of what was done: the log-probs lie in the folder that the runs of a store share, and a DPO whose
log-probs are not there (it was cleared, or another engine has another dtype) computes them itself.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import trl
from transformers import AutoTokenizer

from alignment.config.stages.training import Reference, Train
from alignment.files import digest, write_json
from alignment.pipeline.identity import version
from alignment.stages.context import StageContext
from alignment.stages.train import Plan, keeper_of, plan_of, train_rows
from alignment.training import engine
from alignment.training.activations import arithmetic
from alignment.training.keeper import Keeper
from alignment.training.model import load
from alignment.training.out_of_memory import adapted, advising
from alignment.training.reference import ReferenceStore, weights_digest
from alignment.training.reference_pass import References
from alignment.training.rows import pair_sizes
from alignment.training.scoring import Scorer
from alignment.training.trainers import Packing

REFERENCE = "reference"  # folder of what runs share


def run(context: StageContext) -> dict[str, Any]:
    """A request to stop is heeded where all processes can: raises PreemptedError then."""
    setup = adapted(context.experiment.engine, context.told())
    start = context.inputs["model"] / "model"
    context.progress(0, 0, note="looking for what is there", force=True)
    engine.start(setup, context.world_size)
    keeper = keeper_of(context, setup)
    keeper.safe_point()  # engines take long to start

    rows = train_rows(context.inputs["data"])
    plan = plan_of(context, setup, start, pair_sizes(rows))
    references = references_of(context, start)
    if len(references.missing(rows, plan.batches)):
        _compute(context, start, rows, plan, references, keeper)
    else:  # no model need be loaded
        keeper.say(references.says(computed=0))
    told = {
        "rows": references.needed,
        "found": references.needed - references.computed,
        "computed": references.computed,
        "tokens": references.tokens,
        "pass_seconds": references.seconds,
        "reference": references.digest,
        "dtype": dtype_of(context),
        "folder": references.store and f"{REFERENCE}/{references.store.folder.name}",
    }
    if context.is_main:
        write_json(context.folder / "reference.json", told)
    return told


def _compute(context: StageContext, start: Path, rows: Any, plan: Plan, references: References, keeper: Keeper) -> None:
    settings: Reference = context.settings
    setup, choice = adapted(context.experiment.engine, context.told()), plan.choice
    keeper.say(choice.why)
    context.progress(0, 0, note="loading the model", force=True)
    arguments = engine.forward_arguments(settings, setup, plan.batches.steps, context.folder, choice.checkpointing)
    # Before the model: under ZeRO-3 it is sharded while it is read.
    args = trl.DPOConfig(**arguments, disable_dropout=True, precompute_ref_log_probs=True, router_aux_loss_coef=0.0)
    scorer = Scorer(
        model=load(start),
        args=args,
        references=references,
        train_dataset=rows,
        processing_class=AutoTokenizer.from_pretrained(start, local_files_only=True),
        batches=plan.batches,
        widths=plan.widths,
        on_step=lambda *told: None,
        say=keeper.say,
        warn=context.warn,
        keeper=keeper,
        packing=Packing(compile=setup.compile),
    )
    with advising(setup, choice.load, choice.checkpointing, plan.config, plan.longest, context.tell_next):
        scorer.score_all()


def references_of(context: StageContext, start: Path) -> References:
    """Of a stage that has the reference as its start model: what runs from these weights in this dtype have kept."""
    store = None
    if context.shared is not None:
        store = ReferenceStore(
            context.shared / REFERENCE,
            weights=digest_of(context.settings, start),
            adapter=None,  # the reference is the start model itself: adapters are off
            dtype=dtype_of(context),
        )
    return References(store, context.progress, context.warn)


def digest_of(settings: Reference | Train, start: Path) -> str:
    """Of the weights that answer: a start model in 4 bits is another reference."""
    weights, lora = weights_digest(start), getattr(settings, "lora", None)
    if lora is None or lora.quantize is None:
        return weights
    return digest([weights, lora.quantize, version("bitsandbytes")])


def dtype_of(context: StageContext) -> str:
    return arithmetic(context.settings.precision, context.experiment.engine.strategy)
