"""What answers are measured by, and the reward that judges them."""

from __future__ import annotations

from typing import Literal

from alignment.config.settings import Settings, identity
from alignment.config.sources import Source

# What is measured of every answer -> whether more of it is better; None: neither, it is there to be watched.
# A reward's terms stand beside these in every table, so they bear other names (config/checks.py).
HIGHER_IS_BETTER: dict[str, bool | None] = {
    "reward": True,
    "stop_rate": True,  # share of answers that ended by themselves
    "tokens": None,  # length of an answer, end-of-turn token included
    "repetition": False,
    "kl": None,  # nats an answer away from the reference model
    "heldout_nll": False,  # nats per token of the reference answer
}


class RewardTerm(Settings):
    kind: Literal["sentiment", "relevance"] = identity()
    weight: float = identity()
    source: Source | None = identity()


class Reward(Settings):
    """A reward is the weighted sum of its terms; each term is a number in [-1, 1]."""

    terms: dict[str, RewardTerm] = identity(min_length=1)
