"""What judged the answers of a point: rewards of two judges have two scales, and do not say which point is better.

A sweep over a weight of the reward, runs with two reward files, or with two reward models: each point's `reward` is
high by its own judge. What is measured without one (kl, stop_rate, ...) can always be compared.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any

from alignment.files import digest

Row = dict[str, Any]


def judges(record: Row) -> Row:
    """The reward and its terms -> {"settings", "models"}: digests of what an evaluation's answers were judged by.

    record: of the evaluation. A term's own weight does not change what it says, and one that weighs nothing not the
    reward. Empty where the record does not tell.
    """
    identity = record.get("identity") or {}
    terms = ((identity.get("groups") or {}).get("reward") or {}).get("terms") or {}
    parents = identity.get("parents") or {}
    models = {
        name: {role: key for role, key in parents.items() if (begin := term.get("roles")) and role.startswith(begin)}
        for name, term in terms.items()
    }
    weighing = {name: term for name, term in terms.items() if term.get("weight")}
    found = {name: _digests({**term, "weight": None}, models[name]) for name, term in terms.items()}
    if weighing:
        found["reward"] = _digests(weighing, {name: models[name] for name in weighing})
    return found


def _digests(settings: Row, models: Row) -> Row:
    return {"settings": digest(settings), "models": digest(models)}


def judged_apart(points: Sequence[Row], metrics: Sequence[str], seed_of: Callable[[Row], Hashable]) -> list[str]:
    """Of the metrics those that not one judge measured. points: with "metrics" and "judges".

    A reward model that each seed trained anew is one judge: within a seed all points are measured by the same.
    """
    return [name for name in metrics if _apart([point for point in points if name in point["metrics"]], name, seed_of)]


def _apart(points: Sequence[Row], metric: str, seed_of: Callable[[Row], Hashable]) -> bool:
    known = [(seed_of(point), one) for point in points if (one := point["judges"].get(metric))]
    models: dict[Hashable, set[str]] = {}
    for seed, one in known:
        models.setdefault(seed, set()).add(one["models"])
    return len({one["settings"] for _, one in known}) > 1 or any(len(few) > 1 for few in models.values())
