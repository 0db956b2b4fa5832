"""Prompts that are too long, cut from the left: the oldest turns first, then the beginning of the last question."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TypeVar

from alignment.data.turns import Message

T = TypeVar("T")


def shortened(prompt: list[Message], again: Callable[[list[Message]], T | None]) -> T | None:
    """What `again` makes of the longest shorter prompt that fits; None if none does. The system turn stays, and so do
    the tools. again: None for one that is still too long."""
    head = prompt[:1] if prompt[0]["role"] == "system" else []
    rest = prompt[len(head) :]
    questions = [number for number, turn in enumerate(rest) if turn["role"] == "user"]
    for start in questions[1:]:
        if (found := again(_headed(prompt, head, rest[start:]))) is not None:
            return found
    return _cut_question(prompt, head, rest[questions[-1] :], again) if questions else None


def _headed(prompt: list[Message], head: list[Message], rest: list[Message]) -> list[Message]:
    """The system turn, or else the first one that is left, says what tools there are."""
    if head or "tools" not in prompt[0]:
        return [*head, *rest]
    return [{**rest[0], "tools": prompt[0]["tools"]}, *rest[1:]]


def _cut_question(
    prompt: list[Message], head: list[Message], rest: list[Message], again: Callable[[list[Message]], T | None]
) -> T | None:
    """By words, where it has several; by halving, as more words are never fewer tokens (or hardly ever)."""
    question = rest[0]["content"]
    starts = [found.start() for found in re.finditer(r"\S+", question)]
    starts = starts if len(starts) > 1 else list(range(len(question)))
    best, low, high = None, 1, len(starts) - 1
    while low <= high:
        middle = (low + high) // 2
        first = {**rest[0], "content": question[starts[middle] :]}
        found = again(_headed(prompt, head, [first, *rest[1:]]))
        if found is None:
            low = middle + 1
        else:
            best, high = found, middle - 1
    return best
