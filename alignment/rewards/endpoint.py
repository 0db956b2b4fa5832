"""endpoint: a model behind an OpenAI-compatible chat endpoint as judge. Its score as a number in [0, 1].

An answer without a word is worth 0, and nobody is asked.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path

from alignment.config.reward_terms import Endpoint
from alignment.rewards.asking import Asker, filled
from alignment.rewards.patterns import last
from alignment.rewards.term import Answer, Failed, Term, Value, worded


def endpoint(settings: Endpoint, name: str, alive: Callable[[], None], shared: Path | None) -> Term:
    """name: of the term. alive is called after each reply. shared: where replies are kept, in a folder of their own.

    Raises MachineError if the key is not there; a call does if nothing is to be had from the endpoint at all.
    """
    asker = Asker(settings, f"reward.terms.{name}", alive, shared)
    pattern = re.compile(settings.pattern, re.S)

    def values(answers: Sequence[Answer]) -> list[Value]:
        texts = [filled(settings.prompt, answer.row, {"answer": answer.text}) for answer in answers]
        return asker(texts, lambda reply: score(reply, pattern, settings))

    return worded(values)


def score(reply: str, pattern: re.Pattern[str], settings: Endpoint) -> float:
    """The number in the last match of the pattern, from low to high as one from 0 to 1. Raises Failed."""
    found = last(pattern, reply)
    try:
        value = float(found[1]) if found else None
    except (TypeError, ValueError):
        value = None
    if value is None:
        raise Failed("the judge's reply has no score")
    if not settings.low <= value <= settings.high:
        raise Failed(f"the judge's score is not from {settings.low:g} to {settings.high:g}")
    return (value - settings.low) / (settings.high - settings.low)
