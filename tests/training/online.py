"""Online stages on a tiny model: their settings, prompts, a judge that counts letters, and answers that are given."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl.trainer.base_config import _BaseConfig

from alignment.config.reward_terms import Python
from alignment.config.rewards import Reward
from alignment.config.sources import PathSource
from alignment.config.stages.online import Grpo, Kl, OnlineDpo, Ppo, Rloo
from alignment.rewards import Judge
from alignment.training import engine
from alignment.training.batching import GlobalBatches
from alignment.training.model import lora_config
from alignment.training.policy_gradient import PolicyGradientTrainer
from alignment.training.rollouts import Answer
from alignment.training.trainers import Packing
from tests.conftest import write_tiny_model
from tests.training import tiny

KINDS = ("rloo", "grpo", "online_dpo", "ppo")
# The reward of a stage whose judge is the parent in the role reward_model.
BY_MODEL = Reward.model_validate(
    {
        "terms": {
            "model": {
                "kind": "model", "weight": 1.0, "members": {}, "roles": "reward_model", "combine": "mean",
                "uncertainty": 0.0, "end": "end_of_turn",
            }
        }
    }
)  # fmt: skip
NO_KL = Kl(coefficient=0.0, estimator="k3", place="loss", target=None, gain=0.1, corrected=True)
COMMON: dict[str, Any] = {
    **tiny.COMMON, "schedule": "constant", "warmup_ratio": 0.0, "weight_decay": 0.0, "global_batch_size": 4,
    "completions_per_prompt": 4, "max_new_tokens": 8, "sampling_batch_size": 16, "batches_per_rollout": 1,
    "epochs_per_rollout": 1, "truncated": "keep", "truncation_penalty": 1.0,
}  # fmt: skip
GRADIENT: dict[str, Any] = {"epsilon_low": 0.2, "epsilon_high": 0.2, "whiten": False, "resamples": 0}


def kl(**changes: Any) -> Kl:
    return NO_KL.model_copy(update={"coefficient": 0.05, **changes})


def rloo(**changes: Any) -> Rloo:
    own = {"kind": "rloo", "ratio": "sequence", "aggregate": "sequence", "kl": kl(estimator="k1", place="reward")}
    return Rloo(**{**COMMON, **GRADIENT, **own, **changes})


def grpo(**changes: Any) -> Grpo:
    own = {"kind": "grpo", "ratio": "token", "aggregate": "sequence", "kl": kl(), "scale_by_std": True}
    return Grpo(**{**COMMON, **GRADIENT, **own, **changes})


def online_dpo(**changes: Any) -> OnlineDpo:
    return OnlineDpo(**{**COMMON, "kind": "online_dpo", "beta": 0.1, "min_margin": 0.0, **changes})


def ppo(**changes: Any) -> Ppo:
    """Two updates a rollout."""
    gradient = {name: value for name, value in GRADIENT.items() if name != "resamples"}
    own = {"kind": "ppo", "ratio": "token", "aggregate": "token", "kl": kl(estimator="k1", place="reward")}
    values = {"gamma": 1.0, "lam": 0.95, "value_coefficient": 0.1, "value_clip": 0.2, "epochs_per_rollout": 2}
    return Ppo(**{**COMMON, **gradient, **own, **values, **changes})


def write_inputs(folder: Path, count: int = 12) -> dict[str, Path]:
    """A start model, and prompts of unlike length."""
    if not (folder / "start" / "model").exists():
        write_tiny_model(folder / "start" / "model")
    (folder / "prompts").mkdir(exist_ok=True)
    rows = [{"id": i, "prompt": [{"role": "user", "content": "wxyz"[: i % 4 + 1] * (i % 5 + 1)}]} for i in range(count)]
    (folder / "prompts" / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"model": folder / "start", "data": folder / "prompts"}


def letters(function: str = "letters", watched: str | None = None) -> Judge:
    """The share of a's to m's among the characters of an answer, or another function of that file; and one more of
    weight 0."""
    source = PathSource(kind="path", path=str(Path(__file__).with_name("letters.py")))
    terms = {"letters": Python(kind="python", source=source, function=function, weight=1.0)}
    if watched is not None:
        terms[watched] = Python(kind="python", source=source, function=watched, weight=0.0)
    return Judge(Reward(terms=terms), {name: [Path(source.path)] for name in terms})


def given(number: int, branch: int) -> tuple[list[int], float]:
    """The answer to a prompt, and its reward."""
    random = np.random.default_rng([number, branch])
    return [*random.integers(5, tiny.VOCABULARY, random.integers(2, 7)).tolist(), tiny.EOS], float(random.normal())


def trainer(
    folder: Path,
    settings: Any,
    steps: int,
    budget: int = 120,
    kind: Any = PolicyGradientTrainer,
    finished: bool | None = None,
    **more: Any,
):  # type: ignore[no-untyped-def]
    """One of ours on answers that are `given`, prompts of random tokens. finished: of all answers; None: where answers
    are masked, of all but the prompts' first."""
    random = np.random.default_rng(5)
    rows = [{"prompt_ids": random.integers(5, tiny.VOCABULARY, 3 + 2 * i % 11).tolist()} for i in range(9)]
    number_of = {tuple(row["prompt_ids"]): number for number, row in enumerate(rows)}
    start = write_inputs(folder)["model"] / "model"

    def sample(model: Any, prompts: Any, noise: Any, alive: Any) -> list[list[Answer]]:
        every = range(settings.completions_per_prompt)
        answers = [[given(number_of[tuple(prompt)], branch)[0] for branch in every] for prompt in prompts]
        ended = [(finished is None and (branch or settings.truncated != "mask")) or bool(finished) for branch in every]
        return [
            [Answer(ids, [0.0] * len(ids), bool(end)) for ids, end in zip(few, ended, strict=True)] for few in answers
        ]

    def judge(numbers: Any, answers: Any, alive: Any) -> None:
        for at, (number, answer) in enumerate(zip(numbers, answers, strict=True)):
            answer.reward = given(number, at % settings.completions_per_prompt)[1]

    arguments = engine.training_arguments(settings, tiny.engine(), steps, folder)
    arguments.pop("max_length")
    model, count = AutoModelForCausalLM.from_pretrained(start), settings.answers_trained_on()
    lengths = [len(row["prompt_ids"]) + count * settings.max_new_tokens for row in rows]
    batches = GlobalBatches(
        lengths, [1] * len(rows), settings.global_batch_size, steps, settings.seed, tokens_per_micro_batch=budget
    )
    refers = settings.lora is None and getattr(settings, "kl", kl()).coefficient > 0
    common = {
        "reference": AutoModelForCausalLM.from_pretrained(start) if refers else None, "judge": judge, "sample": sample,
        "peft_config": lora_config(settings.lora, model), "args": _BaseConfig(**arguments), "batches": batches,
        "widths": [count * length for length in lengths], "processing_class": AutoTokenizer.from_pretrained(start),
        "on_step": lambda *given: None, "packing": Packing(), "train_dataset": rows, **more,
    }  # fmt: skip
    return kind(settings=settings, model=model, **common)
