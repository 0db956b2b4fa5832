"""What judged the answers of a point: rewards of two judges have two scales, and do not say which point is better.

A sweep over a weight of the reward, runs with two reward files, or with two reward models: each point's `reward` is
high by its own judge. What is measured without one (kl, stop_rate, ...) can always be compared.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Iterator, Sequence
from typing import Any

from alignment.config.reward_terms import Endpoint
from alignment.config.schema import STAGES
from alignment.config.shape import of_side
from alignment.config.stages.answering import Evaluate
from alignment.files import digest
from alignment.reporting.settings import is_seed, mapping_at

Row = dict[str, Any]
PATIENCE = set(of_side("execution", Endpoint))  # in no key

# --- what has judged --------------------------------------------------------------------------------------------------


def judges(record: Row) -> Row:
    """The reward and its terms -> {"settings", "models"}: digests of what an evaluation's answers were judged by.

    record: of the evaluation. A term's own weight does not change what it says, and one that weighs nothing not the
    reward. Empty where the record does not tell.
    """
    identity = mapping_at(record, "identity")
    terms = {name: mapping_at(term) for name, term in mapping_at(identity, "groups", "reward", "terms").items()}
    parents = mapping_at(identity, "parents")
    begins = {name: str(term.get("roles") or "") for name, term in terms.items()}
    models = {
        name: {role: key for role, key in parents.items() if begin and role.startswith(begin)}
        for name, begin in begins.items()
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


# --- what would judge -------------------------------------------------------------------------------------------------


def deciding(keys: Sequence[str], metric: str, config: Row) -> str | None:
    """The first of the keys with whose values the judge of a metric changes: of the reward's terms, or of what a reward
    model that judges is made of. Seeds do not count, as in `judged_apart`.

    config: composed, and not yet validated: what is odd in it is for others to tell.
    """
    terms = {name: term for name, term in mapping_at(config, "reward", "terms").items() if isinstance(term, dict)}
    if metric != "reward" and metric not in terms:
        return None
    places = {key: key.rpartition("@")[2] for key in keys}  # data@data.rows: what is chosen stands there
    weighed = {name for name, term in terms.items() if term.get("weight") or f"reward.terms.{name}.weight" in keys}
    idle = set(terms) - weighed if metric == "reward" else set(terms) - {metric}
    trainers = set(_trainers(config, [term for name, term in terms.items() if name not in idle]))
    for key, place in places.items():
        *above, last = place.split(".")
        if above[:1] == ["reward"] and above != ["reward", "terms"] and last in PATIENCE:  # else it is a term's name
            continue
        trains = any(_within(place, one) or _within(one, place) for one in trainers)
        if (trains or _says(place, metric, idle)) and not is_seed(place):
            return key
    return None


def _says(place: str, metric: str, idle: Collection[str]) -> bool:
    """Whether a setting decides what the terms say that a metric is made of. idle: those that it is not made of."""
    if place in ("reward", "reward.terms"):
        return True
    group, *path = place.split(".")
    if group != "reward" or path[0] != "terms":  # how pairs are compared, which no evaluation does
        return False
    _, name, *setting = path
    weight_of_its_own = metric != "reward" and setting == ["weight"]
    return name not in idle and metric in ("reward", name) and not weight_of_its_own


def _within(place: str, whole: str) -> bool:
    return f"{place}.".startswith(f"{whole}.")


def _trainers(config: Row, terms: Sequence[Row]) -> Iterator[str]:
    """Where what the terms' reward models come from stands: who judges, the stages that train them, and all that these
    are made of."""
    nodes, stages = mapping_at(config, "pipeline", "nodes"), mapping_at(config, "stage")
    begins = tuple(str(term.get("roles")) for term in terms if term.get("kind") == "model" and not term.get("members"))

    def stage_of(name: str) -> str:
        return str(mapping_at(nodes, name).get("stage"))

    def kind_of(name: str) -> Any:
        return STAGES.get(str(mapping_at(stages, stage_of(name)).get("kind")))

    open_, seen = list[str](), set[str]()
    for name in (name for name in nodes if kind_of(name) is Evaluate):
        for role, parent in mapping_at(nodes, name, "inputs").items():
            if str(role).startswith(begins):
                yield f"pipeline.nodes.{name}.inputs.{role}"
                open_.append(str(parent))
    while open_:
        name = open_.pop()
        kind = kind_of(name)
        if name in seen or kind is None:
            continue
        seen.add(name)
        inputs = mapping_at(nodes, name, "inputs")
        open_ += [str(parent) for role, parent in inputs.items() if role not in kind.ordering]
        yield f"pipeline.nodes.{name}"
        yield from (f"stage.{stage_of(name)}.{field}" for field in of_side("identity", kind))
        settings = mapping_at(stages, stage_of(name))
        compares = settings.get("judging") == "pairwise" and mapping_at(config, "reward", "comparison")
        reward = "reward.comparison" if compares else "reward.terms"
        data = f"data.{settings['dataset']}" if settings.get("dataset") else None
        yield from filter(None, ({"reward": reward, "data": data}.get(group, group) for group in kind.groups))
