"""Stages that have a model answer, judge its answers and compare models by them."""

from __future__ import annotations

from typing import ClassVar, Literal

from alignment.config.settings import identity
from alignment.config.stages.base import Reads, Stage


class Sample(Stage):
    """Several answers of a model to each prompt."""

    makes = "samples"
    inputs: ClassVar[dict[str, str]] = {"model": "a model", "data": "rows"}
    reads: ClassVar[Reads] = {"data": "prompts"}
    packages = ("torch", "transformers", "tokenizers")
    kind: Literal["sample"] = identity()
    completions_per_prompt: int = identity(ge=2)
    max_new_tokens: int = identity(gt=0)
    temperature: float = identity(gt=0)
    top_p: float = identity(gt=0, le=1)
    batch_size: int = identity(gt=0)
    precision: Literal["fp32", "bf16"] = identity()
    seed: int = identity(ge=0)


class Judge(Stage):
    """Samples -> pairs: the best against the worst answer of each prompt by the reward."""

    makes = "pairs"
    inputs: ClassVar[dict[str, str]] = {"data": "samples"}
    groups = ("reward",)
    packages = ("torch", "transformers", "tokenizers", "vaderSentiment")
    kind: Literal["judge"] = identity()
    min_margin: float = identity(ge=0)
    finished_only: bool = identity()


class Evaluate(Stage):
    """One model on the held-out prompts: answers, reward, stopping, length, KL to the start model, held-out loss."""

    makes = "answers"
    inputs: ClassVar[dict[str, str]] = {"model": "a model", "data": "rows", "reference": "a model"}
    reads: ClassVar[Reads] = {"data": "heldout"}
    groups = ("reward",)
    packages = ("torch", "transformers", "tokenizers", "vaderSentiment")
    kind: Literal["evaluate"] = identity()
    max_new_tokens: int = identity(gt=0)
    temperature: float = identity(ge=0)
    batch_size: int = identity(gt=0)
    precision: Literal["fp32", "bf16"] = identity()
    seed: int = identity(ge=0)


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
