"""The verdict on a candidate model: is it better than the baseline, and did it break on the way?

Two gates can break a candidate, however high its reward, because both are how a reward is hacked:
- stop_rate: the share of its answers that end by themselves is below the limit. The share itself is held to the limit,
  without an interval: it is what people who use the model on such prompts see.
- relevance: its best estimate lies further below the baseline's than allowed.
Then reward decides, by the interval of its paired difference. *better*: the interval lies above 0 against the
baseline, it does not lie below 0 against any other model (the SFT model it came from), and relevance is *shown* to have
been kept: even the lower bound of its difference is within what is allowed. To say "better" is a claim, so the burden
of proof is with the candidate: where relevance may have fallen too far, more prompts are needed, and the verdict is
*no measurable difference*. *worse*: the interval lies below 0 against the baseline or any other model. Best-of-n of a
model is shown beside them and does not decide: it costs n answers where the candidate gives one.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from alignment.evaluation.statistics import Comparison, Interval


@dataclass(frozen=True)
class Limits:
    max_relevance_drop: float
    min_stop_rate: float


@dataclass(frozen=True)
class Gate:
    """passed: the candidate meets it. detail: with what numbers, a clause that can end a sentence."""

    gate: str
    passed: bool
    detail: str


def verdict(
    comparison: Comparison,
    *,
    candidate: str,
    baseline: str,
    limits: Limits,
    relevance: Sequence[str],
    prompts: int,
    shown: Collection[str] = (),
) -> dict[str, Any]:
    """{"verdict", "sentence", "reasons"} as in verdict.json. relevance: the metrics that the relevance gate watches.
    prompts: how many the reward is compared on. shown: models that are there to be seen, and do not
    decide."""
    broken = [_stop_rate(comparison, candidate, limits, prompts)]
    broken += [_relevance(comparison, name, candidate, baseline, limits) for name in relevance]
    lowest = {name: comparison.difference(name, candidate, baseline).low for name in relevance}
    unshown = [name for name, low in lowest.items() if low < -limits.max_relevance_drop]
    reward = comparison.difference("reward", candidate, baseline)
    gain = Gate(
        "reward",
        reward.low > 0,
        f"its reward differs by {_show(reward, comparison)} from {baseline}'s (all above 0 asked)",
    )
    others = [model for model in comparison.values if model not in (candidate, baseline, *shown)]
    versus = {model: comparison.difference("reward", candidate, model) for model in others}
    kept = [
        Gate(
            f"reward_against_{model}",
            d.high >= 0,
            f"its reward differs by {_show(d, comparison)} from {model}'s (not all below 0 asked)",
        )
        for model, d in versus.items()
    ]
    if not all(gate.passed for gate in broken):
        word = "broken"
    elif reward.high < 0 or not all(gate.passed for gate in kept):
        word = "worse"
    elif gain.passed and not unshown:
        word = "better"
    else:
        word = "no measurable difference"
    because = _because(word, broken, gain, kept, unshown, limits)
    also = [model for model, d in versus.items() if d.low > 0] if word == "better" else []
    claim, many = _claim(word, candidate, [baseline, *also]), "" if prompts == 1 else "s"
    sentence = f"{claim} on {prompts} held-out prompt{many}: {because}."
    return {"verdict": word, "sentence": sentence, "reasons": [asdict(gate) for gate in (*broken, gain, *kept)]}


def _claim(word: str, candidate: str, beaten: Sequence[str]) -> str:
    return {
        "better": f"{candidate} is better than {' and '.join(beaten)}",
        "worse": f"{candidate} is worse",
        "broken": f"{candidate} is broken",
        "no measurable difference": f"{candidate} is not shown to be better than {beaten[0]}",
    }[word]


def _because(
    word: str, broken: list[Gate], gain: Gate, kept: list[Gate], unshown: Sequence[str], limits: Limits
) -> str:
    """The gates that decided, in words."""
    if word == "broken":
        return " and ".join(gate.detail for gate in broken if not gate.passed)
    if word == "worse":
        return " and ".join(gate.detail for gate in (gain, *kept) if gate is gain or not gate.passed)
    if gain.passed and unshown:
        names, limit = " and ".join(unshown), limits.max_relevance_drop
        return f"{gain.detail}, but these prompts cannot rule out that {names} fell by more than {limit:.2f}"
    return ", ".join(gate.detail for gate in (gain, *kept, *broken))


def _stop_rate(comparison: Comparison, candidate: str, limits: Limits, prompts: int) -> Gate:
    """prompts: how many the sentence says."""
    rate, own = comparison.mean("stop_rate", candidate).mean, comparison.prompts("stop_rate")
    which = "its answers" if own == prompts else f"its answers to {own}"
    detail = f"{rate:.0%} of {which} end by themselves (at least {limits.min_stop_rate:.0%} asked)"
    return Gate("stop_rate", rate >= limits.min_stop_rate, detail)


def _relevance(comparison: Comparison, name: str, candidate: str, baseline: str, limits: Limits) -> Gate:
    change = comparison.difference(name, candidate, baseline)
    limit = limits.max_relevance_drop
    detail = f"its {name} differs by {_show(change, comparison)} (at most {limit:.2f} lower allowed)"
    return Gate(name, change.mean >= -limit, detail)


def _show(value: Interval, comparison: Comparison) -> str:
    if value.low == -math.inf:
        return f"{value.mean:+.2f} (on one prompt, which has no interval)"
    return f"{value.mean:+.2f} ({comparison.confidence:.0%} interval {value.low:+.2f} to {value.high:+.2f})"
