"""Which of two answers a chat model prefers, shown side by side.

Judges prefer a place, too: whoever asks asks in both orders (Zheng et al. 2023, arXiv:2306.05685, section 3.4).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path

from alignment.config.reward_terms import Comparison
from alignment.rewards.asking import Asker, filled
from alignment.rewards.patterns import last
from alignment.rewards.term import Failed, Row

Verdict = int | Failed  # 1: the first is better; -1: the second; 0: neither


class Comparer:
    """Raises MachineError as an endpoint does."""

    def __init__(self, settings: Comparison, alive: Callable[[], None], shared: Path | None):
        self.settings = settings
        self.asker = Asker(settings, "reward.comparison", alive, shared)
        self.pattern = re.compile(settings.pattern, re.S)

    def __call__(self, rows: Sequence[Row], first: Sequence[str], second: Sequence[str]) -> list[Verdict]:
        """Of first[i] with second[i], both answers to rows[i]. Nobody is asked where an answer is white space alone,
        which loses, or where both are the same."""
        worded = [bool(a.strip()) - bool(b.strip()) for a, b in zip(first, second, strict=True)]
        verdicts: list[Verdict] = [*worded]
        both = enumerate(zip(first, second, strict=True))
        asked = [i for i, (a, b) in both if a.strip() and b.strip() and a != b]
        prompt = self.settings.prompt
        texts = [filled(prompt, rows[i], {"first": first[i], "second": second[i]}) for i in asked]
        for i, verdict in zip(asked, self.asker(texts, self._verdict), strict=True):
            verdicts[i] = verdict
        return verdicts

    def _verdict(self, reply: str) -> int:
        """By the group of the pattern's last match. Raises Failed."""
        if (found := last(self.pattern, reply)) is None:
            raise Failed("the judge's reply has no verdict")
        return (found[1] == self.settings.first) - (found[1] == self.settings.second)
