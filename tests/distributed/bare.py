"""Trainings that no stage does, run as one: rows without labels, which stages refuse."""

from __future__ import annotations

from typing import Any

from datasets import Dataset

from alignment.stages.context import StageContext
from alignment.training import engine
from alignment.training.model import load
from tests.training import tiny, trainers

KINDS = ("unlabelled",)
STEPS = 6  # of 6 of 40 rows: no row is seen twice


def run(kind: str, context: StageContext) -> dict[str, Any]:
    """Writes metrics.jsonl, model and start/model into the context's folder."""
    setup, start = context.experiment.engine, context.inputs["model"] / "model"
    engine.start(setup, context.world_size)
    trainer = trainers.ours(
        "sft", load(start), context.folder, start, STEPS, setup.tokens_per_micro_batch, world_size=context.world_size,
        rows=unlabelled_rows(),
    )  # fmt: skip
    if context.is_main:
        trainer.model.save_pretrained(context.folder / "start" / "model")
    trainer.train()
    for row in trainer.state.log_history:
        if "loss" in row:
            context.log(row.pop("step"), row)
    if context.is_main:
        trainer.model.save_pretrained(context.folder / "model")
    return {}


def unlabelled_rows() -> list[dict[str, list[int]]]:
    """Of each step, the rows of one of two processes have no label, in turns."""
    rows = tiny.sft_rows()
    batches = trainers.batches_of("sft", Dataset.from_list(rows), STEPS, budget=1, world_size=2)
    for step in range(STEPS):
        for micro_batch in batches.micro_batches(step)[step % 2]:
            for row in micro_batch:
                rows[row]["labels"] = [-100] * len(rows[row]["labels"])
    return rows


def labels_by_process(step: int) -> list[int]:
    """Trained tokens of each of two processes."""
    rows = Dataset.from_list(unlabelled_rows())
    batches = trainers.batches_of("sft", rows, STEPS, budget=1, world_size=2)
    return [sum(batches.weights[row] for cut in share for row in cut) for share in batches.micro_batches(step)]
