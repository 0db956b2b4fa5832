"""What answers are measured by, and the reward that judges them."""

from __future__ import annotations

from collections.abc import Mapping

from alignment.config.reward_terms import AnyTerm, Comparison
from alignment.config.settings import Settings, execution, identity

# What is measured of every answer -> whether more of it is better; None: neither, it is there to be watched.
HIGHER_IS_BETTER: dict[str, bool | None] = {
    "reward": True,
    "stop_rate": True,  # share of answers that ended by themselves
    "tokens": None,  # length of an answer, end-of-turn token included
    "repetition": False,
    "kl": None,  # nats an answer away from the reference model
    "heldout_nll": False,  # nats per token of the reference answer
}
# What else stands in the summary of an evaluation, of answers or of reward models: no metrics of the model.
COUNTS = ("prompts", "heldout_nll_missing", "reward_failed", "kl_bound", "pairs", "rows", "members")
# Names that no term of a reward can have (config/checks.py): terms stand beside all these, beside `step` and `time` in
# rows of metrics.jsonl, and their means beside that of a judge's margins.
RESERVED = frozenset({*HIGHER_IS_BETTER, *COUNTS, "step", "time", "margin"})
LARGEST = 1e15  # in size, of rewards and scores: sums of squares of larger ones soon leave float32, in which is trained


def better_of_terms(weights: Mapping[str, float]) -> dict[str, bool | None]:
    """Term -> whether more of it is better, by the sign of its weight; None: it weighs nothing, and is watched."""
    return {name: weight > 0 if weight else None for name, weight in weights.items()}


class Reward(Settings):
    """A reward is the weighted sum of its terms. comparison: who says which of two answers is better, where stages ask.

    max_failed_share: of the answers of a stage those that a term has no value for are dropped and counted; if they are
    more than this share, the stage is an error. It changes no result: it refuses some.
    """

    terms: dict[str, AnyTerm] = identity(min_length=1)
    max_failed_share: float = execution(default=0.05, ge=0, le=1)
    comparison: Comparison | None = identity(default=None)

    def idle(self) -> frozenset[str]:
        return frozenset({"comparison"} if self.comparison is None else ())

    @property
    def better(self) -> dict[str, bool | None]:
        """Of its terms, as `better_of_terms`, and of all else that is measured of an answer."""
        return {**better_of_terms({name: term.weight for name, term in self.terms.items()}), **HIGHER_IS_BETTER}

    def read(self, compares: bool) -> Reward:
        """What of it a stage asks: one that compares answers the comparison, where there is one; else the terms."""
        if compares and self.comparison is not None:
            return self.model_copy(update={"terms": {}})
        return self.model_copy(update={"comparison": None})
