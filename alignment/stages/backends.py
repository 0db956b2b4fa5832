"""What samples: our own loop, transformers' continuous batching, or vLLM. Each draws other answers from one seed.

A backend yields (rows of prompts, their answers), some prompts at a time, in an order and in parts that depend on
prompts and settings alone; a part whose rows are all in `skip` is left out, and changes nothing of the others. So
sampling goes on where it was stopped.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from alignment import generation
from alignment.config.stages.answering import Sample
from alignment.errors import MachineError
from alignment.files import digest

Answer = dict[str, Any]  # {"text", "tokens", "finished"}
Prompts = Sequence[Sequence[generation.Message]]
Progress = Callable[..., None]
Part = tuple[list[int], list[list[Answer]]]
Backend = Callable[[Path, Prompts, Sample, Collection[int], Progress], Iterator[Part]]

PART = 8  # batches of answers that a backend which makes its own batches gets at once: then they are kept
PAGE = 256  # tokens of a page of continuous batching's cache: its default
PREFILL = 2048  # tokens that continuous batching computes at once, beside one for each answer in work


def loop(folder: Path, prompts: Prompts, settings: Sample, skip: Collection[int], progress: Progress) -> Iterator[Part]:
    """Bit for bit the same answers from one seed, whatever was skipped."""
    model, tokenizer = generation.load(folder, settings.precision)
    found = generation.batches(
        model,
        tokenizer,
        prompts,
        max_new_tokens=settings.max_new_tokens,
        temperature=settings.temperature,
        top_p=settings.top_p,
        batch_size=settings.batch_size,
        seed=settings.seed,
        completions=settings.completions_per_prompt,
        skip=skip,
        progress=progress,
    )
    for rows, answers in found:
        yield rows, [[_answer(completion) for completion in few] for few in answers]


def continuous(
    folder: Path, prompts: Prompts, settings: Sample, skip: Collection[int], progress: Progress
) -> Iterator[Part]:
    """transformers' continuous batching: an answer that ends makes room for the next at once. All requests of a part
    are there before its first step, and each part has its own seed, so that a part is drawn alike each time. Raises
    InputError for log-probs that are not finite, as the loop."""
    model, tokenizer = generation.load(folder, settings.precision)
    finite = _watch(model)
    stop, ids = generation.stop_tokens(model, tokenizer), _ids(model, tokenizer, prompts, settings)
    meter = _meter(ids, settings, progress)
    for rows in _parts(ids, settings):
        if all(row in skip for row in rows):
            meter.add(0, ended=_most(rows, settings))
            continue
        given, seed = [ids[row] for row in rows], _seed(settings, rows[0])
        drawn = _continuous_part(model, given, seed, stop, settings, meter, finite)
        yield rows, [[_answer(generation.completion(tokenizer, one, (), stop)) for one in few] for few in drawn]


def _watch(model: Any) -> Tensor:
    """A number that is finite as long as all positions from which continuous batching draws have log-probs that are.

    Where they are not it draws from zeros instead: else the draw itself would fail, on the CPU in words that name
    neither model nor fix, on CUDA with all that the process has there. On the model's device: no step waits for it."""
    seen = torch.zeros((), device=model.device)

    def look(_: Any, __: Any, given: dict[str, Any], output: Any) -> None:
        sums = output.logits.float().logsumexp(-1, keepdim=True)  # [1, positions, 1]
        drawn = sums if "logits_to_keep" in given else sums[:, given["logits_indices"]]
        seen.add_((drawn * 0).sum())  # NaN from then on
        output.logits = output.logits.where(sums.isfinite(), 0)

    model.register_forward_hook(look, with_kwargs=True)
    return seen


def _continuous_part(
    model: Any,
    prompts: list[list[int]],
    seed: int,
    stop: list[int],
    settings: Sample,
    meter: generation.Meter,
    finite: Tensor,
) -> list[list[list[int]]]:
    """Token ids of the answers to each prompt. finite: see _watch."""
    from transformers import ContinuousBatchingConfig, GenerationConfig

    copies, most = settings.completions_per_prompt, settings.max_new_tokens
    sampled = GenerationConfig(
        do_sample=True,
        temperature=settings.temperature,
        top_p=settings.top_p,
        top_k=0,
        max_new_tokens=most,
        num_return_sequences=copies,
        eos_token_id=stop,
        pad_token_id=0,
    )
    # By the settings, not by the memory that is free: the parts of a step decide which random numbers an answer gets.
    pages = -(-(max(map(len, prompts)) + most) // PAGE) + 1
    sizes: dict[str, Any] = {
        "num_blocks": settings.batch_size * pages,
        "max_batch_tokens": PREFILL,
    }  # not by free memory
    how = ContinuousBatchingConfig(page_size=PAGE, max_requests_per_batch=settings.batch_size, seed=seed, **sizes)
    manager = model.init_continuous_batching(generation_config=sampled, continuous_batching_config=how)
    names = manager.add_requests(inputs=prompts, max_new_tokens=most)
    found: dict[str, list[int]] = {}
    manager.start()
    try:
        while len(found) < len(prompts) * copies:
            result = manager.get_result(timeout=1)
            generation.check_finite(finite)
            if result is None and not manager.is_running():
                raise MachineError("continuous batching has ended before its answers", fix="stage.sample.backend=loop")
            if result is not None and result.error is not None:
                raise MachineError(f"continuous batching: {result.error}", fix="stage.sample.backend=loop")
            tokens = 0
            if result is not None and result.is_finished():
                found[result.request_id] = list(result.generated_tokens)
                tokens = len(result.generated_tokens)
            meter.add(tokens, ended=most - tokens if tokens else 0)
    finally:
        manager.stop(hard_stop=len(found) < len(prompts) * copies)
        manager.destroy()
    return [[found[f"{name}__child#{i}"] for i in range(copies - 1)] + [found[name]] for name in names]


def vllm(folder: Path, prompts: Prompts, settings: Sample, skip: Collection[int], progress: Progress) -> Iterator[Part]:
    """vLLM's offline engine, where it is installed. Each prompt has its own seed, and vLLM gives its answers that seed
    and those after it: what is computed beside them changes them by rounding only. Raises InputError for log-probs that
    are not finite, as the loop. Written against vLLM 0.11 and later; tests run it with a stub of that interface."""
    try:
        from vllm import LLM, SamplingParams
    except ImportError:
        fix = "pip install vllm, or stage.sample.backend=loop"
        raise MachineError("the package vllm is missing", where="stage.sample.backend", fix=fix) from None
    from transformers import AutoConfig, AutoTokenizer, GenerationConfig

    ends = GenerationConfig.from_pretrained(folder) if (folder / "generation_config.json").is_file() else None
    model = SimpleNamespace(config=AutoConfig.from_pretrained(folder), generation_config=ends)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    stop, ids = generation.stop_tokens(model, tokenizer), _ids(model, tokenizer, prompts, settings)
    dtype = {"fp32": "float32", "bf16": "bfloat16"}[settings.precision]
    engine = LLM(model=str(folder), dtype=dtype, seed=settings.seed, max_num_seqs=settings.batch_size)
    meter = _meter(ids, settings, progress)
    for rows in _parts(ids, settings):
        if all(row in skip for row in rows):
            meter.add(0, ended=_most(rows, settings))
            continue
        how = [
            SamplingParams(
                n=settings.completions_per_prompt,
                temperature=settings.temperature,
                top_p=settings.top_p,
                max_tokens=settings.max_new_tokens,
                stop_token_ids=stop,
                seed=_seed(settings, row),
                logprobs=0,  # of the chosen tokens alone
            )
            for row in rows
        ]
        outputs = engine.generate([{"prompt_token_ids": ids[row]} for row in rows], how, use_tqdm=False)
        generation.check_finite(torch.tensor([one.cumulative_logprob for output in outputs for one in output.outputs]))
        drawn = [[list(one.token_ids) for one in output.outputs] for output in outputs]
        made = sum(len(one) for few in drawn for one in few)
        meter.add(made, ended=_most(rows, settings) - made)
        yield rows, [[_answer(generation.completion(tokenizer, one, (), stop)) for one in few] for few in drawn]


BACKENDS: dict[str, Backend] = {"loop": loop, "continuous": continuous, "vllm": vllm}


# --- parts ------------------------------------------------------------------------------------------------------------


def _answer(completion: generation.Completion) -> Answer:
    return {"text": completion.text, "tokens": completion.tokens, "finished": completion.finished}


def _ids(model: Any, tokenizer: Any, prompts: Prompts, settings: Sample) -> list[list[int]]:
    ids = [generation.encode_prompt(tokenizer, prompt) for prompt in prompts]
    generation.check_window(ids, settings.max_new_tokens, generation.window(model))
    return ids


def _parts(ids: Sequence[Sequence[int]], settings: Sample) -> Iterator[list[int]]:
    """Rows of like length, the longest first."""
    order = sorted(range(len(ids)), key=lambda row: (-len(ids[row]), row))
    size = max(1, PART * settings.batch_size // settings.completions_per_prompt)
    return (order[start : start + size] for start in range(0, len(order), size))


def _seed(settings: Sample, row: int) -> int:
    return int(digest([settings.seed, row])[:8], 16)


def _most(rows: Sequence[int], settings: Sample) -> int:
    """Tokens of the answers to so many prompts, at most."""
    return len(rows) * settings.completions_per_prompt * settings.max_new_tokens


def _meter(ids: Sequence[Any], settings: Sample, progress: Progress) -> generation.Meter:
    return generation.Meter(_most(range(len(ids)), settings), progress)
