"""Trainers, ours and TRL's own, on a model in memory: for tests that look at what a training loop does."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import trl
from datasets import Dataset
from transformers import AutoTokenizer

from alignment.training import engine
from alignment.training.batching import GlobalBatches
from alignment.training.objective import Objective
from alignment.training.preference import DPO
from alignment.training.reference_pass import References
from alignment.training.reward_model import Reward
from alignment.training.rows import pair_sizes, sft_sizes
from alignment.training.trainers import SFT, Packing
from tests.training import tiny
from tests.training.test_stages import Sequential, StockDPO, StockSFT


class StockReward(Sequential, trl.RewardTrainer):
    def _prepare_dataset(self, dataset: Any, *arguments: Any) -> Any:
        return dataset


ROWS = {
    "sft": lambda: tiny.sft_rows(),
    "dpo": lambda: tiny.pair_rows(),
    "reward": lambda: tiny.pair_rows(),
}
PACKED = Packing()
SIZES = {"sft": sft_sizes, "dpo": pair_sizes, "reward": pair_sizes}


def configuration(kind: str, steps: int, folder: Path, **changes: Any) -> Any:
    arguments = {**engine.training_arguments(settings(kind), tiny.engine(), steps, folder), **changes}
    if kind == "sft":
        return trl.SFTConfig(**arguments, router_aux_loss_coef=0.0)
    if kind == "dpo":
        return trl.DPOConfig(**arguments, loss_type=["sigmoid"], beta=0.1, router_aux_loss_coef=0.0)
    return trl.RewardConfig(**arguments)


def settings(kind: str) -> Any:
    return tiny.sft() if kind == "sft" else tiny.dpo()


def batches_of(kind: str, rows: Dataset, steps: int, budget: int, world_size: int = 1) -> GlobalBatches:
    sizes = SIZES[kind](rows)
    return GlobalBatches(
        sizes.lengths.tolist(), sizes.weights.tolist(), settings(kind).global_batch_size, steps, seed=3,
        world_size=world_size, tokens_per_micro_batch=budget,
    )  # fmt: skip


def ours(
    kind: str, model: Any, folder: Path, tokenizer: Path, steps: int = 20, budget: int = 120,
    packing: Packing = PACKED, say: Callable[[str], None] = print, world_size: int = 1, rows: Any = None,
) -> Any:  # fmt: skip
    rows = Dataset.from_list(rows or ROWS[kind]())
    batches = batches_of(kind, rows, steps, budget, world_size)
    common = {
        "model": copy.deepcopy(model), "train_dataset": rows, "batches": batches,
        "widths": SIZES[kind](rows).widths.tolist(), "processing_class": AutoTokenizer.from_pretrained(tokenizer),
        "on_step": lambda *given: None, "packing": packing, "say": say,
    }  # fmt: skip
    if kind == "dpo":
        args = configuration(kind, steps, folder, disable_dropout=True, precompute_ref_log_probs=True)
        return DPO(args=args, objective=Objective(settings(kind)), references=References(None), **common)
    return {"sft": SFT, "reward": Reward}[kind](args=configuration(kind, steps, folder), **common)


def stock(kind: str, model: Any, folder: Path, tokenizer: Path, steps: int = 20) -> Any:
    """TRL's trainer on the same rows in the same order, a global batch padded at once, its reference a second model."""
    rows = Dataset.from_list(ROWS[kind]())
    batches = batches_of(kind, rows, steps, budget=120)
    rows = rows.select([row for step in range(steps) for row in batches.rows(step)])
    if kind == "reward":
        rows = Dataset.from_list([with_prompts(row) for row in rows])
    args = configuration(kind, steps, folder, per_device_train_batch_size=batches.global_batch_size)
    common = {
        "model": copy.deepcopy(model), "train_dataset": rows, "args": args,
        "processing_class": AutoTokenizer.from_pretrained(tokenizer),
    }  # fmt: skip
    if kind != "dpo":
        return {"sft": StockSFT, "reward": StockReward}[kind](**common)
    return StockDPO(ref_model=copy.deepcopy(model), **common)


def with_prompts(row: dict[str, Any]) -> dict[str, Any]:
    """As TRL's reward trainer wants pairs: each answer with its prompt before it."""
    sides = ("chosen_ids", "rejected_ids")
    rest = {name: value for name, value in row.items() if name not in ("prompt_ids", *sides)}
    return {**rest, **{side: row["prompt_ids"] + row[side] for side in sides}}


def losses(trainer: Any) -> list[float]:
    trainer.train()
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]
