"""What judged the answers of a point: rewards of two judges have two scales, and do not say which point is better.

A sweep over a weight of the reward, runs with two reward files, or with two reward models: each point's `reward` is
high by its own judge. What is measured without one (kl, stop_rate, ...) can always be compared.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Iterator, Sequence
from typing import Any

from alignment.config.reward_terms import Endpoint
from alignment.config.shape import side
from alignment.files import digest
from alignment.reporting.settings import is_seed, mapping_at

Row = dict[str, Any]
PATIENCE = {name for name, field in Endpoint.model_fields.items() if side(field) == "execution"}  # in no key

# --- what has judged --------------------------------------------------------------------------------------------------


def judges(record: Row) -> Row:
    """The reward and its terms -> {"settings", "models"}: digests of what an evaluation's answers were judged by.

    record: of the evaluation. A term's own weight does not change what it says, and one that weighs nothing not the
    reward. Empty where the record does not tell.
    """
    identity = mapping_at(record, "identity")
    terms, parents = mapping_at(identity, "groups", "reward", "terms"), mapping_at(identity, "parents")
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
        trains = any(_within(place, one) or _within(one, place) for one in trainers)
        if (trains or _says(place, metric, idle)) and not is_seed(place):
            return key
    return None


def _says(place: str, metric: str, idle: Collection[str]) -> bool:
    """Whether a setting decides what the terms say that a metric is made of. idle: those that it is not made of."""
    group, *path = place.split(".")
    if group != "reward" or len(path) < 2:  # all of it, or all of its terms
        return place in ("reward", "reward.terms")
    _, name, *setting = path
    weight_of_its_own = metric != "reward" and setting == ["weight"]
    return name not in idle and (metric in ("reward", name)) and not weight_of_its_own and not PATIENCE & set(setting)


def _within(place: str, whole: str) -> bool:
    return f"{place}.".startswith(f"{whole}.")


def _trainers(config: Row, terms: Sequence[Row]) -> Iterator[str]:
    """Where the settings are of the stages that the terms' reward models come from, these themselves, and all that
    they are made of."""
    nodes, stages = mapping_at(config, "pipeline", "nodes"), mapping_at(config, "stage")
    begins = tuple(str(term.get("roles")) for term in terms if term.get("kind") == "model" and not term.get("members"))

    def parents(name: str, roles: Callable[[str], bool] = lambda role: True) -> list[str]:
        return [str(parent) for role, parent in mapping_at(nodes, name, "inputs").items() if roles(role)]

    def stage_of(name: str) -> str:
        return str(mapping_at(nodes, name).get("stage"))

    asked = [name for name in nodes if mapping_at(stages, stage_of(name)).get("kind") == "evaluate"]
    open_, seen = [one for name in asked for one in parents(name, lambda role: role.startswith(begins))], set[str]()
    while open_:
        if (name := open_.pop()) in seen or name not in nodes:
            continue
        seen.add(name)
        open_ += parents(name)
        settings = mapping_at(stages, stage_of(name))
        yield f"stage.{stage_of(name)}"
        if settings.get("kind") == "import_model":
            yield "model"
        if settings.get("dataset"):
            yield f"data.{settings['dataset']}"
