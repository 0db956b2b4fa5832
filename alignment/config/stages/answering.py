"""Stages that have a model answer, judge its answers and compare models by them."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from alignment.config.settings import Settings, identity
from alignment.config.stages.base import Reads, Stage

# Why a prompt gives no pair: what left none, in this order. A judge counts its prompts as `dropped_<reason>`.
NO_PAIR = FEW, LOW, UNLIKE, LOST, CLOSE = (
    "fewer_than_two_usable_answers",
    "chosen_below_min_reward",
    "lengths_too_unlike",
    "comparison_lost_or_failed",
    "rewards_too_close",
)


def as_ever(settings: Settings, **values: Any) -> frozenset[str]:
    """Those of the settings that have these values, which mean what was done before there were such settings: left out
    of the key, so that results from then count."""
    return frozenset(name for name, value in values.items() if getattr(settings, name) == value)


class Sample(Stage):
    """Several answers of a model to each prompt."""

    makes = "samples"
    inputs: ClassVar[dict[str, str]] = {"model": "a model", "data": "rows"}
    reads: ClassVar[Reads] = {"data": "prompts"}
    packages = ("torch", "transformers", "tokenizers", "vllm")
    kind: Literal["sample"] = identity()
    backend: Literal["loop", "continuous", "vllm"] = identity()
    first_prompt: int = identity(ge=0)
    prompts: int | None = identity(ge=1)
    completions_per_prompt: int = identity(ge=1)
    max_new_tokens: int = identity(gt=0)
    temperature: float = identity(gt=0)
    top_p: float = identity(gt=0, le=1)
    batch_size: int = identity(gt=0)
    precision: Literal["fp32", "bf16"] = identity()
    seed: int = identity(ge=0)

    def idle(self) -> frozenset[str]:
        return as_ever(self, backend="loop", first_prompt=0, prompts=None)


class Judge(Stage):
    """Samples -> pairs of a better and a worse answer, the best answers, labelled answers: by the reward."""

    makes = "pairs"
    inputs: ClassVar[dict[str, str]] = {"data": "samples"}
    groups = ("reward",)
    packages = ("torch", "transformers", "tokenizers", "vaderSentiment")
    kind: Literal["judge"] = identity()
    judging: Literal["pointwise", "pairwise"] = identity()
    finished_only: bool = identity()
    length: Literal["none", "match", "penalty"] = identity()
    length_ratio: float = identity(ge=1)
    length_penalty: float = identity(gt=0)
    min_reward: float | None = identity()
    pairs: Literal["none", "best_worst", "best_random", "all_margin"] = identity()
    min_margin: float = identity(ge=0)
    max_pairs_per_prompt: int = identity(ge=1)
    ties: Literal["drop", "keep"] = identity()
    best: bool = identity()
    label_threshold: float | None = identity()
    seed: int = identity(ge=0)

    @property
    def compares(self) -> bool:
        return self.judging == "pairwise"

    def idle(self) -> frozenset[str]:
        idle = {
            *as_ever(self, judging="pointwise", length="none", min_reward=None, pairs="best_worst"),
            *as_ever(self, max_pairs_per_prompt=1, ties="drop", best=False, label_threshold=None),
            *(() if self.length == "match" else ("length_ratio",)),
            *(() if self.length == "penalty" else ("length_penalty",)),
            *(() if self.pairs == "best_random" else ("seed",)),
            *(("min_margin", "max_pairs_per_prompt", "ties") if self.pairs == "none" else ()),
        }
        return frozenset(idle)


class Evaluate(Stage):
    """One model on the held-out prompts: answers, reward, stopping, length, KL to the start model, held-out loss."""

    makes = "answers"
    inputs: ClassVar[dict[str, str]] = {"model": "a model", "data": "rows", "reference": "a model"}
    reads: ClassVar[Reads] = {"data": "heldout"}
    groups = ("reward",)
    packages = ("torch", "transformers", "tokenizers", "vaderSentiment")
    kind: Literal["evaluate"] = identity()
    best_of: int = identity(ge=1)
    max_new_tokens: int = identity(gt=0)
    temperature: float = identity(ge=0)
    batch_size: int = identity(gt=0)
    precision: Literal["fp32", "bf16"] = identity()
    seed: int = identity(ge=0)

    def idle(self) -> frozenset[str]:
        return as_ever(self, best_of=1)


class Compare(Stage):
    """Evaluations side by side, first the baseline -> the table with confidence intervals and the verdict."""

    makes = "a verdict"
    open_inputs = "answers"
    packages = ("numpy",)
    kind: Literal["compare"] = identity()
    baseline: str = identity()
    candidate: str = identity()
    confidence: float = identity(gt=0.5, lt=1)
    resamples: int = identity(ge=100)
    max_relevance_drop: float = identity(ge=0)
    min_stop_rate: float = identity(ge=0, le=1)
    seed: int = identity(ge=0)
