"""Judging by comparison: every two answers of a prompt are put side by side, in both orders."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import combinations
from typing import Any

Row = dict[str, Any]
Outcome = int | None  # 1: the first answer is better; -1: the second; 0: neither; None: the comparison has failed
# compare(rows, a, b): of a[i] with b[i], both answers to rows[i], for each i
Comparator = Callable[[Sequence[Row], Sequence[str], Sequence[str]], Sequence[Outcome]]
Score = Callable[[Sequence[Row], Sequence[str]], list[Row]]  # {"reward": float | None} for each answer


def by_reward(score: Score) -> Comparator:
    """Who has the higher reward is better; each answer is scored once a call."""

    def compare(rows: Sequence[Row], a: Sequence[str], b: Sequence[str]) -> list[Outcome]:
        asked = {(id(row), text): row for row, *texts in zip(rows, a, b, strict=True) for text in texts}
        scored = score(list(asked.values()), [text for _, text in asked])
        rewards = {key: one["reward"] for key, one in zip(asked, scored, strict=True)}
        return [
            _higher(rewards[id(row), one], rewards[id(row), other]) for row, one, other in zip(rows, a, b, strict=True)
        ]

    return compare


def _higher(one: float | None, other: float | None) -> Outcome:
    return None if one is None or other is None else (one > other) - (one < other)


def in_both_orders(compare: Comparator, rows: Sequence[Row], a: Sequence[str], b: Sequence[str]) -> list[Outcome]:
    """Outcomes that do not depend on which answer is shown first: where the two orders disagree it is a tie (Zheng et
    al. 2023, arXiv:2306.05685, section 3.4)."""
    both = compare([*rows, *rows], [*a, *b], [*b, *a])
    return [_agreed(one, turned) for one, turned in zip(both[: len(a)], both[len(a) :], strict=True)]


def _agreed(one: Outcome, turned: Outcome) -> Outcome:
    if one is None or turned is None:
        return None
    return one if one == -turned else 0


def judged(compare: Comparator, samples: Sequence[Row]) -> list[Row]:
    """The samples, each answer with its number, `beats` (numbers of those that it won against) and its reward: the mean
    outcome against the prompt's other answers, in [-1, 1], 0 if there are none; None, and why it `failed`, where no
    comparison of it succeeded."""
    games = [(row, a, b) for row in samples for a, b in combinations(range(len(row["completions"])), 2)]
    sides = [[row["completions"][both[side]]["text"] for row, *both in games] for side in (0, 1)]
    outcomes = iter(in_both_orders(compare, [row for row, _, _ in games], *sides))
    return [{**row, "completions": _ranked(row["completions"], outcomes)} for row in samples]


def _ranked(answers: Sequence[Row], outcomes: Any) -> list[Row]:
    """outcomes: an iterator that goes on with those of these answers."""
    results: list[list[int]] = [[] for _ in answers]
    beats: list[list[int]] = [[] for _ in answers]
    for a, b in combinations(range(len(answers)), 2):
        outcome = next(outcomes)
        if outcome is None:
            continue
        results[a].append(outcome)
        results[b].append(-outcome)
        if outcome:
            winner, loser = (a, b) if outcome > 0 else (b, a)
            beats[winner].append(loser)
    ranked = []
    for number, (answer, own) in enumerate(zip(answers, results, strict=True)):
        failed = not own and len(answers) > 1
        told = {"failed": {"comparison": "none of its comparisons succeeded"}} if failed else {}
        reward = None if failed else sum(own) / max(len(own), 1)
        ranked.append({**answer, "reward": reward, "terms": {}, **told, "number": number, "beats": beats[number]})
    return ranked
