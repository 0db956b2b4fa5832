"""What answers are measured by, and the reward that judges them."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from alignment.config.settings import Settings, execution, identity
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


class Clip(Settings):
    """Values below `low` or above `high` are these."""

    kind: Literal["clip"] = identity()
    low: float = identity()
    high: float = identity()


class Sigmoid(Settings):
    """x -> 1 / (1 + e^-x), in (0, 1)."""

    kind: Literal["sigmoid"] = identity()


class ZScore(Settings):
    """x -> (x - mean) / std, of a mean and a standard deviation that were measured before."""

    kind: Literal["zscore"] = identity()
    mean: float = identity()
    std: float = identity(gt=0)


Normalise = Annotated[Clip | Sigmoid | ZScore, Field(discriminator="kind")]


class Term(Settings):
    """What is common to all kinds. normalise: a fixed transform of its value; null: none."""

    weight: float = identity()
    normalise: Normalise | None = identity(default=None)

    def sources(self) -> list[Source]:
        """Where its models come from, in a fixed order."""
        return []

    def idle(self) -> frozenset[str]:
        return frozenset({"normalise"} if self.normalise is None else ())


class Sentiment(Term):
    """The lexicon comes with its package, so there is no source."""

    kind: Literal["sentiment"] = identity()
    source: None = identity(default=None)


class Relevance(Term):
    kind: Literal["relevance"] = identity()
    source: Source | None = identity()

    def sources(self) -> list[Source]:
        return [] if self.source is None else [self.source]


AnyTerm = Annotated[Sentiment | Relevance, Field(discriminator="kind")]


class Reward(Settings):
    """A reward is the weighted sum of its terms.

    max_failed_share: of the answers of a stage those that a term has no value for are dropped and counted; if they are
    more than this share, the stage is an error. It changes no result: it refuses some.
    """

    terms: dict[str, AnyTerm] = identity(min_length=1)
    max_failed_share: float = execution(default=0.05, ge=0, le=1)
