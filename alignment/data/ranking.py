"""Several answers to one prompt, each with a score -> which of them make pairs."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any, Literal

Rule = Literal["best_worst", "best_random", "all_margin"]
Answer = dict[str, Any]


@dataclass(frozen=True)
class Candidate:
    """Two answers of a prompt. margin: of their scores, not negative."""

    better: Answer
    worse: Answer
    margin: float


def candidates(answers: Sequence[Answer], scores: Sequence[float]) -> list[Candidate]:
    """Every two answers, the largest margin first; of equal margins those whose answers come first."""
    found = []
    for a, b in combinations(range(len(answers)), 2):
        better, worse = (a, b) if scores[a] >= scores[b] else (b, a)
        found.append((-(scores[better] - scores[worse]), better, worse))
    return [Candidate(answers[better], answers[worse], -margin) for margin, better, worse in sorted(found)]


def choose(ordered: list[Candidate], rule: Rule, seed: int, name: str) -> list[Candidate]:
    """Those that the rule asks for, in the order in which they are taken. ordered: by `candidates`; name: the prompt's.

    best_worst: the best answer against the worst, the best of the others against theirs, and so on, each answer once.
    best_random: the best against the others in random order (Zephyr, Tunstall et al. 2023, arXiv:2310.16944, takes the
    first of these). all_margin: every two, the largest margin first.
    """
    if not ordered or rule == "all_margin":
        return ordered
    if rule == "best_random":  # seeded by the prompt too: what other prompts there are changes nothing
        best = ordered[0].better
        against = [candidate for candidate in ordered if candidate.better is best]
        random.Random(f"{seed}/{name}").shuffle(against)
        return against
    taken: list[Candidate] = []
    used: set[int] = set()
    for candidate in ordered:
        both = {id(candidate.better), id(candidate.worse)}
        if not both & used:
            taken.append(candidate)
            used |= both
    return taken
