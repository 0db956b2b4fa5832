"""Patterns that people give, kept from running for ever.

There are patterns, such as (a+)+b, that a text of thirty letters keeps busy for hours. So each search has a limit in
seconds of this process's own work, which the matching engine heeds, as it looks for signals. Signals come to the main
thread alone: elsewhere there is no limit.
"""

from __future__ import annotations

import re
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from alignment.rewards.term import Failed

LIMIT = 1.0  # seconds


def find(pattern: re.Pattern[str], text: str, *, whole: bool = False) -> re.Match[str] | None:
    """The first match, or, whole, that of the whole text. Raises Failed if it takes longer than the limit."""
    with _limited(pattern):
        return pattern.fullmatch(text) if whole else pattern.search(text)


def last(pattern: re.Pattern[str], text: str) -> re.Match[str] | None:
    """The last match. Raises Failed as above."""
    found = None
    with _limited(pattern):
        for match in pattern.finditer(text):
            found = match
    return found


@contextmanager
def _limited(pattern: re.Pattern[str]) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def too_slow(number: int, frame: FrameType | None) -> None:
        raise Failed(f"the pattern {pattern.pattern!r} took longer than {LIMIT:g} s")

    before = signal.signal(signal.SIGVTALRM, too_slow)
    signal.setitimer(signal.ITIMER_VIRTUAL, LIMIT)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)
