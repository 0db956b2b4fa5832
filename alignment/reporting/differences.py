"""In which settings experiments differ, as a person would say it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from alignment.config.schema import STAGES, Experiment
from alignment.config.shape import side
from alignment.files import digest
from alignment.reporting.gather import TRAINING
from alignment.reporting.settings import mapping_at

Row = dict[str, Any]
ONLY_BEFORE = {stage.optional_inputs[role] for stage in STAGES.values() for role in stage.ordering}
BEFOREHAND = tuple(kind for kind, stage in STAGES.items() if stage.makes in ONLY_BEFORE)  # stages that change no other
SAYS_NOTHING = tuple(n for n, f in Experiment.model_fields.items() if side(f) == "execution" and n != "pipeline")
TRAINS_OR_ASKS = (*TRAINING, "sample", "judge", "merge")
MISSING = object()


def differences(configs: Sequence[Row]) -> list[Row]:
    """Of each config the settings in which they differ, by dotted key, without what cannot change a result.

    What some lack as a whole, as a term of the reward, is one setting. So is a pipeline of other nodes; that another
    lacks one of its stages says no more, and is left out.

    configs: as records have them, of whatever release: what is odd in them is taken for nothing.
    """
    found: list[Row] = [{} for _ in configs]
    other = len({tuple(sorted(mapping_at(config, "pipeline", "nodes"))) for config in configs}) > 1
    if other:
        for one, name in zip(found, _pipelines(configs), strict=True):
            one["pipeline"] = name
    for group in dict.fromkeys(group for config in configs for group in config):
        if group == "stage":
            _add_stages(found, [mapping_at(config, group) for config in configs], other)
        elif group not in SAYS_NOTHING and not (other and group == "pipeline"):
            _add(found, group, [config.get(group, MISSING) for config in configs])
    return found


def _add_stages(found: list[Row], stages: list[Row], other: bool) -> None:
    """other: their pipelines are, and what one lacks comes from that."""
    for name, values in _each_name(stages):
        theirs = [i for i, stage in enumerate(values) if not other or stage is not MISSING]
        if not {str(mapping_at(stage).get("kind")) for stage in values} & set(BEFOREHAND):
            _add([found[i] for i in theirs], f"stage.{name}", [values[i] for i in theirs])


def _pipelines(configs: Sequence[Row]) -> list[str]:
    """Each pipeline in a word: its stages that make models, answers or pairs; a digest where that is not enough."""
    digests, shapes = [], []
    for config in configs:
        nodes = mapping_at(config, "pipeline", "nodes")
        names = [str(mapping_at(nodes, name).get("stage")) for name in nodes]
        working = [name for name in names if mapping_at(config, "stage", name).get("kind") in TRAINS_OR_ASKS]
        shapes.append(" ".join(working) or "no training")
        digests.append(digest(nodes))
    names_of = {shape: {d for s, d in zip(shapes, digests, strict=True) if s == shape} for shape in shapes}
    return [
        f"{shape} #{mine[:6]}" if len(names_of[shape]) > 1 else shape
        for shape, mine in zip(shapes, digests, strict=True)
    ]


def _add(found: list[Row], key: str, values: list[Any]) -> None:
    """In each of `found` its value of what differs at or below the key; what some lack, or is of two kinds, differs as
    a whole, and below the key among those that have it alike."""
    if not values or all(value == values[0] for value in values):
        return
    kinds: dict[Any, list[int]] = {}
    for i, value in enumerate(values):
        if isinstance(value, dict):
            kinds.setdefault(str(value.get("kind")), []).append(i)
    if [*kinds.values()] != [[*range(len(values))]]:
        for one, value in zip(found, values, strict=True):
            if value is not MISSING:
                one[key] = value
    for alike in kinds.values():
        for name, few in _each_name([values[i] for i in alike]):
            _add([found[i] for i in alike], f"{key}.{name}", few)


def _each_name(values: list[Row]) -> list[tuple[str, list[Any]]]:
    names = dict.fromkeys(name for value in values for name in value)
    return [(name, [value.get(name, MISSING) for value in values]) for name in names]
