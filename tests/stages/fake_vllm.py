"""A stub of vLLM's offline interface, which takes the place of the package: of what `sample` uses of it, with names,
defaults and meaning as vLLM's source has them from 0.11 to 0.15 (entrypoints/llm.py, sampling_params.py, outputs.py,
v1/engine/parallel_sampling.py). What it does not know it refuses. It computes an answer alone and without a cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from alignment import generation

MADE: list[LLM] = []  # engines, in their order


@dataclass(frozen=True)
class SamplingParams:
    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None
    stop_token_ids: list[int] | None = None
    max_tokens: int | None = 16
    logprobs: int | None = None


@dataclass(frozen=True)
class CompletionOutput:
    """token_ids: with the stop token, if one came. cumulative_logprob: of these, where log-probs were asked for."""

    index: int
    text: str
    token_ids: Sequence[int]
    cumulative_logprob: float | None
    finish_reason: str | None


@dataclass(frozen=True)
class RequestOutput:
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]


class LLM:
    def __init__(self, model: str, *, dtype: str, seed: int, max_num_seqs: int):
        self.options = {"model": model, "dtype": dtype, "seed": seed, "max_num_seqs": max_num_seqs}
        self.asked: list[tuple[list[int], SamplingParams]] = []
        self._model: Any = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype))
        MADE.append(self)

    def generate(
        self, prompts: list[dict[str, list[int]]], sampling_params: list[SamplingParams], *, use_tqdm: bool = True
    ) -> list[RequestOutput]:
        """In the order of the prompts, whichever ends first."""
        outputs = []
        for prompt, how in zip(prompts, sampling_params, strict=True):
            ((name, ids),) = prompt.items()
            assert name == "prompt_token_ids"
            self.asked.append((ids, how))
            outputs.append(RequestOutput(ids, [self._answer(ids, how, index) for index in range(how.n)]))
        return outputs

    @torch.inference_mode()
    def _answer(self, prompt: list[int], how: SamplingParams, index: int) -> CompletionOutput:
        """An answer's seed is that of the request and its number in it."""
        assert how.seed is not None and how.max_tokens is not None and how.stop_token_ids
        chance, ids, total = torch.Generator().manual_seed(how.seed + index), list(prompt), 0.0
        while len(ids) - len(prompt) < how.max_tokens and (ids == prompt or ids[-1] not in how.stop_token_ids):
            logits = self._model(torch.tensor([ids])).logits[:, -1].float()
            noise = torch.rand(1, generator=chance)
            token = int(generation.choose(logits, noise, temperature=how.temperature, top_p=how.top_p))
            ids.append(token)
            total += float(logits[0].log_softmax(-1)[token])
        answer = tuple(ids[len(prompt) :])
        reason = "stop" if answer[-1] in how.stop_token_ids else "length"
        return CompletionOutput(index, "", answer, None if how.logprobs is None else total, reason)
