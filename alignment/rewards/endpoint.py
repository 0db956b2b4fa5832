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

SHOWN = 200  # characters of a reply that has no score


def endpoint(settings: Endpoint, name: str, alive: Callable[[], None], shared: Path | None) -> Term:
    """name: of the term. alive is called after each reply. shared: where replies are kept, in a folder of their own.

    Raises MachineError if the key is not there; a call does if nothing is to be had from the endpoint at all.
    """
    asker = Asker(settings, f"reward.terms.{name}", alive, shared)
    pattern, shown = re.compile(settings.pattern, re.S), False

    def read(reply: str) -> float:
        nonlocal shown
        try:
            return score(reply, pattern, settings)
        except Failed as failed:
            if not shown:  # the first, so that one sees whether the judge or the pattern is wrong
                print(f"reward.terms.{name}: {failed}: {reply[:SHOWN]!r}", flush=True)
            shown = True
            raise

    def values(answers: Sequence[Answer]) -> list[Value]:
        texts = [filled(settings.prompt, answer.row, {"answer": answer.text}) for answer in answers]
        return asker(texts, read)

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
