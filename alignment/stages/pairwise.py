"""Judging by comparison: every two answers of a prompt are put side by side, in both orders."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import combinations
from typing import Any

Row = dict[str, Any]
# compare(rows, a, b) -> one of 1 (a[i] answers rows[i] better), -1 (b[i] does), 0 (neither) for each i
Comparator = Callable[[Sequence[Row], Sequence[str], Sequence[str]], list[int]]
Score = Callable[[Sequence[Row], Sequence[str]], list[Row]]  # one {"reward": ...} an answer


def by_reward(score: Score) -> Comparator:
    """Who has the higher reward is better; each answer is scored once a call."""

    def compare(rows: Sequence[Row], a: Sequence[str], b: Sequence[str]) -> list[int]:
        asked = {(id(row), text): row for row, *texts in zip(rows, a, b, strict=True) for text in texts}
        scored = score(list(asked.values()), [text for _, text in asked])
        rewards = dict(zip(asked, (one["reward"] for one in scored), strict=True))
        sides = ((rewards[id(row), one], rewards[id(row), other]) for row, one, other in zip(rows, a, b, strict=True))
        return [(one > other) - (one < other) for one, other in sides]

    return compare


def in_both_orders(compare: Comparator, rows: Sequence[Row], a: Sequence[str], b: Sequence[str]) -> list[int]:
    """Outcomes that do not depend on which answer is shown first: where the two orders disagree it is a tie (Zheng et
    al. 2023, arXiv:2306.05685, section 3.4)."""
    both = compare([*rows, *rows], [*a, *b], [*b, *a])
    return [one if one == -turned else 0 for one, turned in zip(both[: len(a)], both[len(a) :], strict=True)]


def judged(compare: Comparator, samples: Sequence[Row]) -> list[Row]:
    """The samples, each answer with its number, `beats` (numbers of those that it won against) and its reward: the mean
    outcome against the prompt's other answers, in [-1, 1]; 0 without others."""
    rows, games = [], []
    for row in samples:
        texts = [completion["text"] for completion in row["completions"]]
        for a, b in combinations(range(len(texts)), 2):
            rows.append(row)
            games.append((a, b, texts[a], texts[b]))
    outcomes = iter(in_both_orders(compare, rows, [game[2] for game in games], [game[3] for game in games]))
    found = []
    for row in samples:
        count = len(row["completions"])
        points, beats = [0] * count, [[] for _ in range(count)]  # type: tuple[list[int], list[list[int]]]
        for a, b in combinations(range(count), 2):
            outcome = next(outcomes)
            points[a], points[b] = points[a] + outcome, points[b] - outcome
            if outcome:
                winner, loser = (a, b) if outcome > 0 else (b, a)
                beats[winner].append(loser)
        means = [point / max(count - 1, 1) for point in points]
        completions = [
            {**c, "reward": means[i], "terms": {}, "number": i, "beats": beats[i]}
            for i, c in enumerate(row["completions"])
        ]
        found.append({**row, "completions": completions})
    return found
