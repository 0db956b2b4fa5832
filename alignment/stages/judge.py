"""Samples -> judged.jsonl (every answer with its reward), pairs.jsonl (the best against the worst of each prompt)."""

from __future__ import annotations

from collections import Counter
from typing import Any

from alignment.config.stages.answering import Judge
from alignment.errors import InputError
from alignment.files import write_jsonl
from alignment.stages.context import StageContext
from alignment.stages.parts import Parts, judge_of, rows_of

REASONS = ("fewer_than_two_usable_answers", "rewards_too_close")  # why a prompt gives no pair
BATCH = 64  # prompts judged between two words of progress
Row = dict[str, Any]


def run(context: StageContext) -> dict[str, Any]:
    settings: Judge = context.settings
    samples = rows_of(context.inputs["data"], "samples.jsonl")
    parts = Parts(context, {"loading": 30, "judging": 70})
    parts("loading")
    judge, progress = judge_of(context), parts("judging")
    judged: list[Row] = []
    for start in range(0, len(samples), BATCH):
        judged += _judge(judge, samples[start : start + BATCH])
        context.log(len(judged), {"reward_mean": _reward_mean(judged)})
        progress(len(judged), len(samples))
    failed = judge.failures([completion for row in judged for completion in row["completions"]])
    reasons: Counter[str] = Counter()
    pairs = [p for row in judged if (p := pair(row, settings.min_margin, settings.finished_only, reasons)) is not None]
    metrics = {**_metrics(judged, pairs, reasons), "reward_failed": float(failed)}
    context.log(len(judged), metrics)
    if not pairs:
        counts = ", ".join(f"{count} {reason.replace('_', ' ')}" for reason, count in sorted(reasons.items()))
        fix = "lower judge.min_margin, set judge.finished_only=false, or sample more and longer answers"
        raise InputError(f"none of {len(judged)} prompts gives a pair: {counts}", where=context.name, fix=fix)
    write_jsonl(context.folder / "judged.jsonl", judged)
    write_jsonl(context.folder / "pairs.jsonl", pairs)
    return metrics


def _judge(judge: Any, samples: list[Row]) -> list[Row]:
    answers = [c for row in samples for c in row["completions"]]
    asked = [row for row in samples for _ in row["completions"]]
    scores = iter(judge.score(asked, [c["text"] for c in answers], [c["tokens"] for c in answers]))
    return [{**row, "completions": [{**c, **next(scores)} for c in row["completions"]]} for row in samples]


def pair(row: Row, min_margin: float, finished_only: bool, reasons: Counter[str]) -> Row | None:
    """The best against the worst answer of one prompt; None if there is no pair, its reason counted.

    Empty answers, and those that have no reward because it failed, are never paired. Of answers with one reward the
    first sampled counts.
    """
    known = [c for c in row["completions"] if c["reward"] is not None]
    usable = [c for c in known if c["text"].strip() and (c["finished"] or not finished_only)]
    if len(usable) < 2:
        reasons[REASONS[0]] += 1
        return None
    best = max(usable, key=lambda c: c["reward"])
    worst = min(usable, key=lambda c: c["reward"])
    margin = best["reward"] - worst["reward"]
    if margin <= 0 or margin < min_margin:
        reasons[REASONS[1]] += 1
        return None
    return {
        "id": row["id"],
        "prompt": row["prompt"],
        "chosen": [{"role": "assistant", "content": best["text"]}],
        "rejected": [{"role": "assistant", "content": worst["text"]}],
        "chosen_reward": best["reward"],
        "rejected_reward": worst["reward"],
    }


def _reward_mean(judged: list[Row]) -> float:
    return _mean([c["reward"] for row in judged for c in row["completions"]])


def _mean(values: list[float | None]) -> float:
    """Of those that did not fail."""
    known = [value for value in values if value is not None]
    return sum(known) / max(len(known), 1)


def _metrics(judged: list[Row], pairs: list[Row], reasons: Counter[str]) -> dict[str, float]:
    answers = [c for row in judged for c in row["completions"]]
    terms = {f"{name}_mean": _mean([c["terms"][name] for c in answers]) for name in answers[0]["terms"]}
    margins = [pair["chosen_reward"] - pair["rejected_reward"] for pair in pairs]
    return {
        "reward_mean": _reward_mean(judged),
        **terms,
        "prompts": float(len(judged)),
        "pairs": float(len(pairs)),
        "margin_mean": sum(margins) / len(margins) if margins else 0.0,
        "answers": float(len(answers)),
        "answers_unfinished": float(sum(not c["finished"] for c in answers)),
        "answers_empty": float(sum(not c["text"].strip() for c in answers)),
        **{f"dropped_{reason}": float(reasons[reason]) for reason in REASONS},
    }
