"""A tiny start model, tokenised rows and a stage context: what the tests of training share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from alignment.config.execution import Checkpoint, Engine
from alignment.config.launchers import LocalLauncher
from alignment.config.rewards import Reward
from alignment.config.schema import Experiment, Node, Pipeline
from alignment.config.stages.preference import Dpo, Kto
from alignment.config.stages.reward_model import RewardModel
from alignment.config.stages.training import Lora, Reference, Sft
from alignment.stages.context import StageContext
from tests.conftest import write_tiny_model

EOS, VOCABULARY = 1, 260


def lora(**changes: Any) -> Lora:
    plain = {"rank": 4, "alpha": 8.0, "dropout": 0.0, "target_modules": "all-linear"}
    variant = {"rslora": False, "dora": False, "init": "kaiming", "modules_to_save": [], "quantize": None}
    return Lora(**{**plain, **variant, **changes})


LORA = lora()


def adapters(told: bool | dict[str, Any]) -> Lora | None:
    """None, LORA, or LORA with these changes."""
    return lora(**told) if isinstance(told, dict) else LORA if told else None


COMMON: dict[str, Any] = {
    "global_batch_size": 6, "epochs": 1.0, "max_steps": 10, "learning_rate": 1e-3, "schedule": "cosine",
    "warmup_ratio": 0.1, "weight_decay": 0.01, "adam_beta1": 0.9, "adam_beta2": 0.999, "adam_epsilon": 1e-8,
    "max_grad_norm": 1.0, "precision": "fp32", "lora": None, "nonfinite": "halt", "max_nonfinite": 3,
    "seed": 3, "log_every": 1, "spike_alarm": None,
}  # fmt: skip


def sft(**changes: Any) -> Sft:
    return Sft(**{**COMMON, "kind": "sft", **changes})


LOSS: dict[str, Any] = {
    "loss": "sigmoid", "beta": 0.1, "label_smoothing": 0.0, "divergence": "reverse_kl", "divergence_alpha": 0.5,
    "weighting": "none", "ld_alpha": None, "reference_update": None, "discopop_tau": 0.05, "dpop_lambda": 50.0,
    "length_penalty": 0.01, "simpo_gamma": 1.0, "cpo_alpha": 1.0, "beta_dpo_alpha": 0.6, "beta_dpo_keep": 0.8,
    "beta_dpo_momentum": 0.9,
}  # fmt: skip


def dpo(**changes: Any) -> Dpo:
    return Dpo(**{**COMMON, "kind": "dpo", **LOSS, **changes})


def kto(**changes: Any) -> Kto:
    own = {"loss": "kto", "beta": 0.1, "desirable_weight": 1.0, "undesirable_weight": 1.0}
    return Kto(**{**COMMON, "kind": "kto", **own, **changes})


def reward_model(**changes: Any) -> RewardModel:
    own = {"kind": "reward_model", "loss": "bradley_terry", "margin": 0.0, "centring": 0.0, "label_smoothing": 0.0}
    return RewardModel(**{**COMMON, **own, **changes})


def reference(**changes: Any) -> Reference:
    """For the settings of dpo()."""
    common = {name: COMMON[name] for name in ("precision", "global_batch_size", "epochs", "max_steps", "seed")}
    return Reference(**{**common, "kind": "reference", **changes})


def engine(strategy: str = "single", **changes: Any) -> Engine:
    return Engine(
        **{
            "strategy": strategy, "tokens_per_micro_batch": 120, "gradient_checkpointing": False, "compile": False,
            "offload": "none", "nvme_path": None, "param_persistence_threshold": 0, "hpz": 1,
            "quantized_weights": False, "quantized_gradients": False, "sequence_parallel": 1, "threads": 1,
            "adapt": False, "watchdog_s": 600.0, **changes,
        }
    )  # fmt: skip


def checkpoint(**changes: Any) -> Checkpoint:
    """No checkpoints, unless the changes say when."""
    return Checkpoint(
        **{
            "every_minutes": None, "every_steps": None, "asynchronous": True, "keep_last": 2, "keep_best": 0,
            "best_by": "loss", "best_is": "lowest", "max_failures": 3, **changes,
        }
    )  # fmt: skip


def tokens(random: np.random.Generator, low: int, high: int) -> list[int]:
    return random.integers(5, VOCABULARY, random.integers(low, high)).tolist()


def sft_rows(count: int = 40) -> list[dict[str, list[int]]]:
    """Prompts of 3-20 tokens, answers of 2-25 tokens and the end-of-turn token."""
    random, rows = np.random.default_rng(1), []
    for _ in range(count):
        prompt, answer = tokens(random, 3, 20), [*tokens(random, 2, 25), EOS]
        rows.append({"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer})
    return rows


def pair_rows(count: int = 40) -> list[dict[str, list[int]]]:
    random = np.random.default_rng(2)
    return [
        {
            "prompt_ids": tokens(random, 3, 20),
            "chosen_ids": [*tokens(random, 2, 25), EOS],
            "rejected_ids": [*tokens(random, 2, 25), EOS],
        }
        for _ in range(count)
    ]


def unpaired_rows(count: int = 40) -> list[dict[str, Any]]:
    """Every third answer is not wanted; the mismatched one is that of the next row."""
    rows = pair_rows(count)
    return [
        {
            "prompt_ids": row["prompt_ids"], "completion_ids": row["chosen_ids"], "label": number % 3 != 0,
            "mismatched_ids": rows[(number + 1) % count]["chosen_ids"],
        }
        for number, row in enumerate(rows)
    ]  # fmt: skip


def scored_rows(count: int = 40) -> list[dict[str, Any]]:
    """Pairs beside an answer with a score: whatever a reward model may be trained on."""
    random = np.random.default_rng(4)
    scored = [{"completion_ids": [*tokens(random, 2, 25), EOS], "score": float(random.uniform())} for _ in range(count)]
    return [{**pair, **answer} for pair, answer in zip(pair_rows(count), scored, strict=True)]


def write_inputs(folder: Path, kind: str, count: int = 40) -> dict[str, Path]:
    """The results of the two parents of a stage that trains."""
    from datasets import Dataset

    if not (folder / "start" / "model").exists():
        write_tiny_model(folder / "start" / "model")
    rows = {"sft": sft_rows, "kto": unpaired_rows, "reward_model": scored_rows}.get(kind, pair_rows)(count)
    if (folder / kind / "train").exists():
        return {"model": folder / "start", "data": folder / kind}
    Dataset.from_list(rows).save_to_disk(folder / kind / "train")
    return {"model": folder / "start", "data": folder / kind}


def context(
    folder: Path,
    inputs: dict[str, Path],
    settings: Any,
    setup: Engine,
    rank: int = 0,
    world_size: int = 1,
    saving: Checkpoint | None = None,
    reward: Reward | None = None,
) -> StageContext:
    if rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
    return StageContext(
        name=settings.kind, run="test", key="0" * 64, folder=folder, settings=settings,
        experiment=Experiment.model_construct(
            engine=setup, checkpoint=saving or checkpoint(), reward=reward,
            pipeline=Pipeline(nodes={settings.kind: Node(stage=settings.kind, inputs={})}, final=settings.kind),
            launcher=LocalLauncher(kind="local", time_limit=None),
        ),
        inputs=inputs, rank=rank, world_size=world_size,
    )  # fmt: skip
