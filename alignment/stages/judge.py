"""Samples -> judged.jsonl (every answer with its reward), and of these what is asked for: pairs.jsonl (a better and a
worse answer), ties.jsonl, best.jsonl (rows for SFT), unpaired.jsonl (answers with a label)."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from alignment.config.stages.answering import NO_PAIR, Judge
from alignment.errors import InputError
from alignment.files import write_jsonl
from alignment.rewards import Judge as Rewards
from alignment.stages import pairing, pairwise
from alignment.stages.context import StageContext
from alignment.stages.parts import Parts, judge_of, rows_of

ROUNDING = 1e-12  # of a sum, as a share of the sizes of what is added
BATCH = 64  # prompts judged between two words of progress
Row = dict[str, Any]


def run(context: StageContext) -> dict[str, Any]:
    settings: Judge = context.settings
    samples = rows_of(context.inputs["data"], "samples.jsonl")
    parts = Parts(context, {"loading": 30, "judging": 70})
    parts("loading")
    judge, progress = judge_of(context), parts("judging")
    look = _compared if settings.judging == "pairwise" else _scored
    judged: list[Row] = []
    for start in range(0, len(samples), BATCH):
        judged += look(judge, samples[start : start + BATCH])
        context.log(len(judged), _reward_mean(judged, settings))
        progress(len(judged), len(samples))
    counts = _failures(judge, judged, settings)
    made = [make(judged, settings) for make in (_pairs, _best, _labelled)]
    metrics = {**_answers(judged, settings), **counts}
    metrics |= {name: count for one in made for name, count in one.counts.items()}
    context.log(len(judged), metrics)
    for one in made:
        one.require(context.name)
    write_jsonl(context.folder / "judged.jsonl", judged)
    for name, rows in ((name, rows) for one in made for name, rows in one.files.items()):
        write_jsonl(context.folder / name, rows)
    return metrics


def _scored(judge: Rewards, samples: list[Row]) -> list[Row]:
    """The same, with a reward on each answer."""
    answers = [c for row in samples for c in row["completions"]]
    rows = [{name: value for name, value in row.items() if name != "completions"} for row in samples]
    asked = [bare for bare, row in zip(rows, samples, strict=True) for _ in row["completions"]]
    scores = iter(judge.score(asked, [c["text"] for c in answers], [c["tokens"] for c in answers]))
    return [{**row, "completions": [{**c, **next(scores)} for c in row["completions"]]} for row in samples]


def _compared(judge: Rewards, samples: list[Row]) -> list[Row]:
    """The same, with the mean outcome of its comparisons as each answer's reward. Who has no judge of pairs compares by
    the reward."""
    by = pairwise.by_reward(judge.score) if judge.compare is None else pairwise.by_verdict(judge.compare)
    return pairwise.judged(by, samples)


def _failures(judge: Rewards, judged: list[Row], settings: Judge) -> dict[str, float]:
    """Counts. Raises InputError if too many comparisons failed, or answers have no reward."""
    counts = {}
    if settings.judging == "pairwise":
        compared = sum(map(pairwise.comparisons, judged))
        failed = [one["failed"] for row in judged for one in row.get("failed_comparisons", ())]
        counts = {"comparisons": float(compared)}
        counts |= {"comparisons_failed": float(judge.failed_comparisons(failed, compared))}
    every = [completion for row in judged for completion in row["completions"]]
    return {**counts, "reward_failed": float(judge.failures(every))}


# --- what is made of the judged answers -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Made:
    """files: name -> rows. nothing: what to say if the first of them is empty, and fix: what to do then."""

    files: dict[str, list[Row]] = field(default_factory=dict)
    counts: dict[str, float] = field(default_factory=dict)
    nothing: str = ""
    fix: str = ""

    def require(self, name: str) -> None:
        if self.files and not next(iter(self.files.values())):
            raise InputError(self.nothing, where=name, fix=self.fix)


def _fix(settings: Judge, bound: str) -> str:
    """What of these settings could let more through. bound: the key of one that answers have to reach."""
    ways = [f"lower stage.judge.{bound}"] if getattr(settings, bound) else []
    ways += ["set stage.judge.finished_only=false"] if settings.finished_only else []
    return ", or ".join([*ways, "sample more and longer answers, or mend the reward"])


def _pairs(judged: list[Row], settings: Judge) -> Made:
    if settings.pairs == "none":
        return Made()
    found = [pairing.pairs_of(row, settings) for row in judged]
    pairs = [pair for one in found for pair in one.pairs]
    reasons = Counter(one.reason for one in found if one.reason is not None)
    margins = [pair["margin"] for pair in pairs]
    counts = {
        "pairs": float(len(pairs)),
        "margin_mean": sum(margins) / len(margins) if margins else 0.0,
        **{f"dropped_{reason}": float(reasons[reason]) for reason in NO_PAIR},
        "left_out_pairs": float(sum(one.beyond for one in found)),
        "ties": float(sum(len(one.ties) for one in found)),
    }
    told = ", ".join(f"{count} {reason.replace('_', ' ')}" for reason, count in sorted(reasons.items()))
    files = {"pairs.jsonl": pairs}
    if settings.ties == "keep":
        files["ties.jsonl"] = [tie for one in found for tie in one.ties]
    fix = _fix(settings, "min_margin")
    return Made(files, counts, f"none of {len(judged)} prompts gives a pair: {told}", fix)


def _best(judged: list[Row], settings: Judge) -> Made:
    if not settings.best:
        return Made()
    rows = [best for row in judged if (best := pairing.best_of(row, settings)) is not None]
    counts = {"best": float(len(rows)), "dropped_prompts_without_best": float(len(judged) - len(rows))}
    fix = _fix(settings, "min_reward")
    return Made({"best.jsonl": rows}, counts, f"none of {len(judged)} prompts has a usable answer that is good", fix)


def _labelled(judged: list[Row], settings: Judge) -> Made:
    if settings.label_threshold is None:
        return Made()
    rows = [one for row in judged for one in pairing.labelled(row, settings)]
    good = sum(row["label"] for row in rows)
    counts = {"labelled_good": float(good), "labelled_bad": float(len(rows) - good)}
    fix = "set judge.finished_only=false, or sample longer answers"
    return Made({"unpaired.jsonl": rows}, counts, f"none of {len(judged)} prompts has a usable answer", fix)


def _reward_mean(judged: list[Row], settings: Judge) -> dict[str, float]:
    """None of comparisons, in which one's gain is the other's loss: it is 0."""
    if settings.judging == "pairwise":
        return {}
    return {"reward_mean": _mean([c["reward"] for row in judged for c in row["completions"]])}


def _mean(values: list[float | None]) -> float:
    """Of those that did not fail. Where they cancel out, as in comparisons, no rounding is left of them."""
    known = [value for value in values if value is not None]
    total = math.fsum(known)
    cancelled = abs(total) <= ROUNDING * math.fsum(map(abs, known))
    return 0.0 if cancelled else total / len(known)


def _answers(judged: list[Row], settings: Judge) -> dict[str, float]:
    answers = [c for row in judged for c in row["completions"]]
    terms = {f"{name}_mean": _mean([c["terms"][name] for c in answers]) for name in answers[0]["terms"]}
    return {
        **_reward_mean(judged, settings),
        **terms,
        "prompts": float(len(judged)),
        "answers": float(len(answers)),
        "answers_unfinished": float(sum(not c["finished"] for c in answers)),
        "answers_empty": float(sum(not c["text"].strip() for c in answers)),
    }
