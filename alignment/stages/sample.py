"""Several answers of a model to each prompt -> samples.jsonl. A new attempt goes on after those that are kept."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

from alignment.config.stages.answering import Sample
from alignment.errors import InputError, PreemptedError
from alignment.evaluation.signals import repetition
from alignment.files import append, digest, write_jsonl
from alignment.pipeline.store import SAMPLED
from alignment.stages.backends import BACKENDS, Answer
from alignment.stages.context import StageContext
from alignment.stages.parts import Parts, rows_of

Row = dict[str, Any]


def run(context: StageContext) -> dict[str, Any]:
    settings: Sample = context.settings
    prompts = asked(rows_of(context.inputs["data"], "prompts.jsonl"), settings)
    kept, parts = Kept(context), Parts(context, {"loading": 5, "sampling": 95})
    parts("loading")
    with context.stop.deferred():
        progress = _until_asked(context, kept, len(prompts), parts("sampling"))
        model, texts = context.inputs["model"] / "model", [row["prompt"] for row in prompts]
        for rows, answers in BACKENDS[settings.backend](model, texts, settings, kept.answers.keys(), progress):
            kept.add(rows, answers)
    samples = [{**row, "completions": kept.answers[number]} for number, row in enumerate(prompts)]
    write_jsonl(context.folder / "samples.jsonl", samples)
    metrics = _metrics(samples, kept.seconds)
    context.log(int(metrics["completions"]), metrics)
    return metrics


def asked(rows: list[Row], settings: Sample) -> list[Row]:
    """The prompts from `first_prompt` on, `prompts` of them. Raises InputError if there are fewer."""
    first, count = settings.first_prompt, settings.prompts
    found = rows[first:] if count is None else rows[first : first + count]
    if not found or (count is not None and len(found) < count):
        what = f"prompts.jsonl has {len(rows)} rows, and {count or 1} are asked for from row {first + 1} on"
        raise InputError(what, fix="give the split `prompts` more rows in the prepare stage")
    return found


class Kept:
    """Answers by their prompts' rows, in a file of the work folder that outlives the attempt: a line a batch, written
    durably, with its digest. A line that is cut or damaged is told of, and its prompts are sampled again."""

    def __init__(self, context: StageContext):
        self.context, self.path = context, context.folder / SAMPLED
        self.answers: dict[int, list[Answer]] = {}
        self.seconds = 0.0  # of sampling, over all attempts
        self.added = 0  # prompts, in this attempt
        lines = self.path.read_text(encoding="utf-8", errors="replace").splitlines() if self.path.is_file() else []
        wrong = sum(not self._take(line) for line in lines)
        if wrong:
            context.warn(f"{wrong} batches of answers in {SAMPLED} are damaged: they are sampled again")
        self._since = time.monotonic()

    def _take(self, line: str) -> bool:
        try:
            batch = json.loads(line)
            if batch.pop("sha256") != digest(batch):
                return False
            self.answers |= zip(batch["rows"], batch["answers"], strict=True)
            self.seconds += batch["seconds"]
        except (ValueError, KeyError, TypeError, AttributeError):
            return False
        return True

    def add(self, rows: list[int], answers: list[list[Answer]]) -> None:
        now = time.monotonic()
        seconds, self._since = now - self._since, now
        batch = {"rows": rows, "answers": answers, "seconds": seconds}
        append(self.path, json.dumps({**batch, "sha256": digest(batch)}) + "\n")
        self.answers |= zip(rows, answers, strict=True)
        self.seconds += seconds
        self.added += len(rows)
        self.context.tell_next(sampled=len(self.answers))  # so that a failure after it counts as the first


def _until_asked(context: StageContext, kept: Kept, prompts: int, progress: Callable[..., None]) -> Callable[..., None]:
    """The progress, which stops the sampling in order where that is asked for."""

    def tell(step: int, total: int, **facts: Any) -> None:
        progress(step, total, **facts)
        if context.stop.asked:
            left = f"the answers to {len(kept.answers)} of {prompts} prompts are kept"
            error = PreemptedError(f"{context.stop.asked}: {left}")
            error.kept = kept.added > 0
            raise error

    return tell


def _metrics(samples: list[Row], seconds: float) -> dict[str, float]:
    """seconds: of sampling, loading included."""
    every = [answer for row in samples for answer in row["completions"]]
    tokens = sum(answer["tokens"] for answer in every)
    return {
        "prompts": float(len(samples)),
        "completions": float(len(every)),
        "stop_rate": sum(answer["finished"] for answer in every) / len(every),
        "tokens": tokens / len(every),
        "repetition": sum(repetition(answer["text"]) for answer in every) / len(every),
        "seconds": seconds,
        "tokens_per_s": tokens / max(seconds, 1e-9),
    }
