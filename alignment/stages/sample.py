"""Several answers of a model to each prompt -> samples.jsonl."""

from __future__ import annotations

from typing import Any

from alignment import generation
from alignment.config.stages.answering import Sample
from alignment.evaluation.signals import repetition
from alignment.files import write_jsonl
from alignment.stages.context import StageContext
from alignment.stages.parts import Parts, rows_of


def run(context: StageContext) -> dict[str, Any]:
    settings: Sample = context.settings
    prompts = rows_of(context.inputs["data"], "prompts.jsonl")
    parts = Parts(context, {"loading": 5, "sampling": 95})
    parts("loading")
    model, tokenizer = generation.load(context.inputs["model"] / "model", settings.precision)
    answers = generation.generate(
        model,
        tokenizer,
        [row["prompt"] for row in prompts],
        max_new_tokens=settings.max_new_tokens,
        temperature=settings.temperature,
        top_p=settings.top_p,
        batch_size=settings.batch_size,
        seed=settings.seed,
        completions=settings.completions_per_prompt,
        progress=parts("sampling"),
    )
    write_jsonl(context.folder / "samples.jsonl", map(_row, prompts, answers))
    every = [completion for few in answers for completion in few]
    metrics = {
        "prompts": float(len(prompts)),
        "completions": float(len(every)),
        "stop_rate": sum(c.finished for c in every) / len(every),
        "tokens": sum(c.tokens for c in every) / len(every),
        "repetition": sum(repetition(c.text) for c in every) / len(every),
    }
    context.log(len(every), metrics)
    return metrics


def _row(prompt: dict[str, Any], completions: list[generation.Completion]) -> dict[str, Any]:
    answers = [{"text": c.text, "tokens": c.tokens, "finished": c.finished} for c in completions]
    return {**prompt, "completions": answers}
