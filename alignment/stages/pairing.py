"""Judged answers of one prompt -> pairs, the best answer, labelled answers. A row is a line of judged.jsonl.

A pair is a chosen and a rejected answer; its *margin* is the difference of their scores. An answer's score is its
reward, or what length control makes of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from alignment.config.stages.answering import CLOSE, FEW, LOST, LOW, UNLIKE, Judge
from alignment.data.ranking import Answer, Candidate, candidates, choose

Row = dict[str, Any]


@dataclass
class Found:
    """What one prompt gives. ties: two answers of which neither is shown to be better. reason: why no pair, of NO_PAIR.
    beyond: pairs left out by max_pairs_per_prompt."""

    pairs: list[Row] = field(default_factory=list)
    ties: list[Row] = field(default_factory=list)
    reason: str | None = None
    beyond: int = 0


def usable(row: Row, settings: Judge) -> list[Answer]:
    """Answers of which anything is made: not empty, with a reward, and ended by themselves if that is asked."""
    known = [c for c in row["completions"] if c["reward"] is not None and c["text"].strip()]
    return [c for c in known if c["finished"] or not settings.finished_only]


def scores(answers: Sequence[Answer], settings: Judge) -> list[float]:
    """Rewards; with length=penalty each less length_penalty x (its tokens / mean tokens of the answers - 1).

    So an answer that is longer than the prompt's others must earn it: the length regularisation of R-DPO (Park et al.
    2024, arXiv:2403.19159), which acts on the loss there, acts on the choice of pairs.
    """
    rewards = [float(answer["reward"]) for answer in answers]
    if settings.length != "penalty" or not answers:
        return rewards
    mean = sum(answer["tokens"] for answer in answers) / len(answers)
    return [r - settings.length_penalty * (a["tokens"] / mean - 1) for r, a in zip(rewards, answers, strict=True)]


def pairs_of(row: Row, settings: Judge) -> Found:
    """The pairs of one prompt, those of the largest margin first. Of equal scores the answer sampled first counts."""
    answers = usable(row, settings)
    if len(answers) < 2:
        return Found(reason=FEW)
    left = candidates(answers, scores(answers, settings))
    for reason, keeps in _limits(settings, row):
        if not (left := [candidate for candidate in left if keeps(candidate)]):
            return Found(reason=reason)
    apart = [candidate for candidate in left if _is_apart(candidate, settings.min_margin)]
    found = Found(reason=None if apart else CLOSE)
    close = [candidate for candidate in left if not _is_apart(candidate, settings.min_margin)]
    found.ties = [_tie(row, candidate) for candidate in close if _differ(candidate)]
    assert settings.pairs != "none"  # then nobody asks
    chosen = choose(apart, settings.pairs, settings.seed, str(row["id"]))
    found.pairs = [_pair(row, candidate) for candidate in chosen[: settings.max_pairs_per_prompt]]
    found.beyond = max(0, len(chosen) - settings.max_pairs_per_prompt)
    return found


def best_of(row: Row, settings: Judge) -> Row | None:
    """The answer of the highest score as a row for SFT (rejection sampling; RAFT, Dong et al. 2023, arXiv:2304.06767).

    None without a usable answer, or where its reward is below min_reward.
    """
    answers = usable(row, settings)
    values = scores(answers, settings)
    number = max(range(len(answers)), key=values.__getitem__, default=None)
    if number is None or not _is_good(answers[number], settings):
        return None
    best = answers[number]
    return {**_whose(row), "prompt": row["prompt"], "completion": _said(best), "reward": best["reward"]}


def labelled(row: Row, settings: Judge) -> list[Row]:
    """Every usable answer with whether its score is at least label_threshold, for losses of unpaired answers (KTO)."""
    answers, threshold = usable(row, settings), settings.label_threshold
    assert threshold is not None
    return [
        {
            **_source(row),
            "prompt": row["prompt"],
            "completion": _said(a),
            "label": value >= threshold,
            "reward": a["reward"],
        }
        for a, value in zip(answers, scores(answers, settings), strict=True)
    ]


# --- parts -----------------------------------------------------------------------------------------------------------


def _limits(settings: Judge, row: Row) -> list[tuple[str, Callable[[Candidate], bool]]]:
    """(why a candidate is no pair, whether it may be one)."""
    limits: list[tuple[str, Callable[[Candidate], bool]]] = [(LOW, lambda c: _is_good(c.better, settings))]
    if settings.length == "match":
        limits.append((UNLIKE, lambda c: _ratio(c) <= settings.length_ratio))
    if "beats" in row["completions"][0]:  # they were compared
        failed = [set(one["answers"]) for one in row.get("failed_comparisons", ())]
        limits.append((LOST, lambda c: not _has_lost(c) and {c.better["number"], c.worse["number"]} not in failed))
    return limits


def _is_good(answer: Answer, settings: Judge) -> bool:
    return settings.min_reward is None or bool(answer["reward"] >= settings.min_reward)


def _ratio(candidate: Candidate) -> float:
    """Of the tokens of the longer answer to those of the shorter."""
    lengths = candidate.better["tokens"], candidate.worse["tokens"]
    return max(lengths) / min(lengths)


def _has_lost(candidate: Candidate) -> bool:
    """Whether the better answer has lost against the other one itself. Of equal scores neither is the better one."""
    return candidate.margin > 0 and candidate.better["number"] in candidate.worse["beats"]


def _is_apart(candidate: Candidate, min_margin: float) -> bool:
    """No tie. Where answers were compared with each other, the better one must also have won this comparison."""
    won = candidate.worse["number"] in candidate.better["beats"] if "beats" in candidate.better else True
    return won and candidate.margin > 0 and candidate.margin >= min_margin and _differ(candidate)


def _differ(candidate: Candidate) -> bool:
    return bool(candidate.better["text"] != candidate.worse["text"])


def _source(row: Row) -> Row:
    """The name of the data set that the prompt is of, where there are several."""
    return {"source": row["source"]} if "source" in row else {}


def _whose(row: Row) -> Row:
    return {"id": row["id"], **_source(row)}


def _said(answer: Answer) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": answer["text"]}]


def _pair(row: Row, candidate: Candidate) -> Row:
    return {
        **_whose(row),
        "prompt": row["prompt"],
        "chosen": _said(candidate.better),
        "rejected": _said(candidate.worse),
        "chosen_reward": candidate.better["reward"],
        "rejected_reward": candidate.worse["reward"],
        "margin": candidate.margin,
    }


def _tie(row: Row, candidate: Candidate) -> Row:
    both = (candidate.better, candidate.worse)
    answers = [{"text": answer["text"], "reward": answer["reward"]} for answer in both]
    return {**_whose(row), "prompt": row["prompt"], "answers": answers}
