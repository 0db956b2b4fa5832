"""A reward of a user's own, for online training in tests."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any


def letters(prompts: Sequence[Any], answers: Sequence[str], rows: Sequence[dict[str, Any]]) -> list[float]:
    """The share of a's to m's among the characters of each answer."""
    return [sum("a" <= letter <= "m" for letter in answer) / max(len(answer), 1) for answer in answers]


def moody(prompts: Sequence[Any], answers: Sequence[str], rows: Sequence[dict[str, Any]]) -> list[float]:
    """No number for answers of an odd length."""
    return [math.nan if len(answer) % 2 else 1.0 for answer in answers]


def all_alike(prompts: list, answers: list, rows: list) -> list[float]:
    return [1.0] * len(answers)
