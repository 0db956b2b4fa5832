"""Losses and gradients that are no numbers, or far from what they were, and answers that become unlikely: what is done,
on all processes alike."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from alignment.errors import TrainingError

ROLLED_BACK = "rolled_back"  # what an attempt tells the next one: steps from which training has gone back
FIX = "lower learning_rate, or look at the data"
SHOWN = 12  # rows named in an error


@dataclass
class NonFinite:
    """policy: halt | skip | rollback (stage.*.nonfinite). most: steps that may be skipped in a run.

    skipped: steps whose update was left out. rolled_back: steps at which an earlier attempt has gone back.
    """

    policy: Literal["halt", "skip", "rollback"] = "halt"
    most: int = 1
    skipped: list[int] = field(default_factory=list)
    rolled_back: list[int] = field(default_factory=list)

    def meet(self, step: int, what: str, rows: Sequence[int]) -> None:
        """Returns if the update of this step is to be left out. Raises TrainingError to halt, or to be tried again.

        step: from 1. what: a clause. rows: of the training split, those whose loss it is, or the whole batch.
        """
        where = f"step {step}, {_named(rows)}"
        if self.policy == "halt":
            raise TrainingError(what, where=where, fix=f"{FIX}; or set nonfinite=skip or rollback")
        if self.policy == "rollback" and step not in self.rolled_back:
            self.rolled_back.append(step)
            error = TrainingError(f"{what}: back to the last checkpoint", where=where, fix=FIX)
            error.retry = True
            raise error
        if len(self.skipped) >= self.most:
            raise TrainingError(f"{what}, after {self.most} skipped steps", where=where, fix=f"{FIX}; or max_nonfinite")
        self.skipped.append(step)


def _named(rows: Sequence[int]) -> str:
    shown = ", ".join(map(str, rows[:SHOWN]))
    more = f" and {len(rows) - SHOWN} more" if len(rows) > SHOWN else ""
    return f"row{'s' if len(rows) > 1 else ''} {shown}{more} of the training split, from 0"


@dataclass
class SpikeAlarm:
    """Whether a loss lies more than `factor` standard deviations above its recent mean, and by a tenth of it.

    Mean and variance are exponentially weighted with a memory of about SPAN steps (West 1979); nothing is said in the
    first WARM_UP steps, nor again within so many.
    """

    factor: float | None
    mean: float = 0.0
    variance: float = 0.0
    seen: int = 0
    quiet_until: int = 0

    SPAN = 50
    WARM_UP = 20

    def hear(self, loss: float) -> str | None:
        """A clause to warn with, or None."""
        if self.factor is None:
            return None
        deviation = math.sqrt(self.variance)
        above = loss - self.mean
        told = None
        if self.seen >= max(self.WARM_UP, self.quiet_until) and above > max(self.factor * deviation, 0.1 * self.mean):
            told = f"the loss is {loss:.4g}, its recent mean is {self.mean:.4g} with a deviation of {deviation:.2g}"
            self.quiet_until = self.seen + self.WARM_UP
        weight = max(1 / (self.seen + 1), 1 / self.SPAN)
        self.mean += weight * above
        self.variance = (1 - weight) * (self.variance + weight * above * above)
        self.seen += 1
        return told

    def state_dict(self) -> list[float]:
        return [self.mean, self.variance, self.seen, self.quiet_until]

    def load_state_dict(self, state: Sequence[Any]) -> None:
        self.mean, self.variance, self.seen, self.quiet_until = state


@dataclass
class DisplacementAlarm:
    """Whether chosen answers become unlikely while their margin grows: likelihood displacement, Razin et al. 2024
    (arXiv:2410.08847). The loss of pairs falls all the same, as it sees the margin alone.

    Means over about SPAN rows of metrics, exponentially weighted: chosen and margin as log-ratios, reference the
    log-prob of a chosen answer under the reference, in nats an answer. Said once, from a fall of SHARE on.
    """

    chosen: float = 0.0
    margin: float = 0.0
    reference: float = 0.0
    seen: int = 0
    said: bool = False

    SPAN = 5
    SHARE = 0.1

    def hear(self, row: Mapping[str, float], scale: float) -> str | None:
        """A clause to warn with, or None. row: of metrics; scale: of its rewards, per nat."""
        chosen, margin = row["rewards/chosen"] / scale, row["rewards/margins"] / scale
        self.seen += 1
        weight = max(1 / self.seen, 1 / self.SPAN)
        self.chosen += weight * (chosen - self.chosen)
        self.margin += weight * (margin - self.margin)
        self.reference += weight * (row["logps/chosen"] - chosen - self.reference)
        falls = -self.chosen > self.SHARE * -self.reference and self.margin > 0
        if self.said or self.seen < self.SPAN or not falls:
            return None
        self.said = True
        return (
            f"chosen answers become unlikely while their margin grows ({self.margin:.3g} nats): their log-prob is "
            f"{self.reference + self.chosen:.4g} nats in the recent mean, {self.reference:.4g} under the reference "
            "(loss=rpo or loss=dpop holds it up)"
        )

    def state_dict(self) -> dict[str, Any]:
        return asdict(self)
