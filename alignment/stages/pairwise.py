"""Judging by comparison: every two answers of a prompt are put side by side, in both orders."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import combinations
from typing import Any

from alignment.rewards.comparison import Verdict
from alignment.rewards.term import Failed

Row = dict[str, Any]
Answer = dict[str, Any]  # as `sample` has it: {"text", "tokens", ...}
Why = Mapping[str, str]  # a comparison has failed: what of the reward has, and why
Outcome = int | Why  # 1: the first answer is better; -1: the second; 0: neither
# compare(rows, a, b): of a[i] with b[i], both answers to rows[i], for each i
Comparator = Callable[[Sequence[Row], Sequence[Answer], Sequence[Answer]], Sequence[Outcome]]
# As of a judge: {"reward": float | None}, with "failed" where it is None, for each text, given its tokens
Score = Callable[[Sequence[Row], Sequence[str], Sequence[int]], list[Row]]


def by_verdict(ask: Callable[[Sequence[Row], Sequence[str], Sequence[str]], Sequence[Verdict]]) -> Comparator:
    """By who is shown both side by side."""

    def compare(rows: Sequence[Row], a: Sequence[Answer], b: Sequence[Answer]) -> list[Outcome]:
        verdicts = ask(rows, [answer["text"] for answer in a], [answer["text"] for answer in b])
        return [{"comparison": str(one)} if isinstance(one, Failed) else one for one in verdicts]

    return compare


def by_reward(score: Score) -> Comparator:
    """Who has the higher reward is better; each answer is scored once a call."""

    def compare(rows: Sequence[Row], a: Sequence[Answer], b: Sequence[Answer]) -> list[Outcome]:
        asked = {id(one): (row, one) for row, *both in zip(rows, a, b, strict=True) for one in both}
        given = [row for row, _ in asked.values()], [one for _, one in asked.values()]
        scored = score(given[0], [one["text"] for one in given[1]], [one["tokens"] for one in given[1]])
        scores = dict(zip(asked, scored, strict=True))
        return [_higher(scores[id(one)], scores[id(other)]) for one, other in zip(a, b, strict=True)]

    return compare


def _higher(one: Row, other: Row) -> Outcome:
    for score in (one, other):
        if score["reward"] is None:
            return dict(score["failed"])
    return int(one["reward"] > other["reward"]) - int(one["reward"] < other["reward"])


def in_both_orders(compare: Comparator, rows: Sequence[Row], a: Sequence[Answer], b: Sequence[Answer]) -> list[Outcome]:
    """Outcomes that do not depend on which answer is shown first: where the two orders disagree it is a tie (Zheng et
    al. 2023, arXiv:2306.05685, section 3.4)."""
    both = compare([*rows, *rows], [*a, *b], [*b, *a])
    return [_agreed(one, turned) for one, turned in zip(both[: len(a)], both[len(a) :], strict=True)]


def _agreed(one: Outcome, turned: Outcome) -> Outcome:
    if not isinstance(one, int):
        return one
    if not isinstance(turned, int):
        return turned
    return one if one == -turned else 0


def judged(compare: Comparator, samples: Sequence[Row]) -> list[Row]:
    """The samples, each answer with its number, `beats` (numbers of those that it won against) and its reward: the mean
    outcome against the prompt's other answers, in [-1, 1], 0 if there are none; None, and why its first one `failed`,
    where no comparison of it succeeded. A row with comparisons that failed has them as `failed_comparisons`: the
    numbers of both answers, and why."""
    bare = [{name: value for name, value in row.items() if name != "completions"} for row in samples]
    games = [(i, a, b) for i, row in enumerate(samples) for a, b in combinations(row["completions"], 2)]
    sides = [[both[side] for _, *both in games] for side in (0, 1)]
    outcomes = iter(in_both_orders(compare, [bare[i] for i, _, _ in games], *sides))
    return [_ranked(row, outcomes) for row in samples]


def _ranked(row: Row, outcomes: Iterator[Outcome]) -> Row:
    """outcomes: goes on with those of its answers."""
    answers = row["completions"]
    results: list[list[int]] = [[] for _ in answers]
    beats: list[list[int]] = [[] for _ in answers]
    failed: list[Row] = []
    for a, b in combinations(range(len(answers)), 2):
        outcome = next(outcomes)
        if not isinstance(outcome, int):
            failed.append({"answers": [a, b], "failed": dict(outcome)})
            continue
        results[a].append(outcome)
        results[b].append(-outcome)
        if outcome:
            winner, loser = (a, b) if outcome > 0 else (b, a)
            beats[winner].append(loser)
    ranked = []
    for number, (answer, own) in enumerate(zip(answers, results, strict=True)):
        why = [] if own else [one["failed"] for one in failed if number in one["answers"]]
        told = {"reward": None, "failed": why[0]} if why else {"reward": sum(own) / max(len(own), 1)}
        ranked.append({**answer, **told, "terms": {}, "number": number, "beats": beats[number]})
    return {**row, "completions": ranked, **({"failed_comparisons": failed} if failed else {})}


def comparisons(row: Row) -> int:
    """How many there were of a judged row's answers."""
    return len(row["completions"]) * (len(row["completions"]) - 1) // 2
