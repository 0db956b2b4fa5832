"""What the command line gives and would be lost without a word: a key twice in one mapping, a setting that nobody
reads, or only a sweep, a choice that a later one replaces."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import yaml

from alignment.config.paths import GROUPS
from alignment.config.provenance import COMMAND_LINE
from alignment.config.redact import setting_without_secrets as shown
from alignment.config.schema import Experiment
from alignment.config.settings import Settings
from alignment.errors import ConfigError

SEARCH = ("hydra/sweeper", "hydra.sweeper.")  # how settings of a sweeper begin


def refuse_twice(overrides: Iterable[str]) -> None:
    """Raises ConfigError for {sigmoid: 1.0, sigmoid: 2.0}: Hydra takes the last, as if the first were not there."""
    for override in overrides:
        key, _, value = override.partition("=")
        if twice := next(_twice(value), None):
            what = f"`{key.lstrip('+')}` has `{twice}` twice"
            raise ConfigError(what, where=COMMAND_LINE, fix="give it once: of two the first would be lost")


def lost(overrides: Sequence[str], alone: bool) -> list[str]:
    """What of these settings counts for nothing, a line each: a choice that another one of its group replaces, as two
    are not taken together. (Of a value that is given again the last counts, as scripts rely on.) alone: for one run, no
    multirun."""
    found, sweeps = [], "hydra.mode=MULTIRUN" in [one.lstrip("+") for one in overrides]  # as -m
    for place, override in enumerate(overrides):
        key = override.partition("=")[0].lstrip("+")
        later = [one for one in overrides[place + 1 :] if one.partition("=")[0].lstrip("+") == key]
        if key.partition("@")[0] in GROUPS and later and later[-1] != override:
            found.append(f"`{shown(override)}` counts for nothing: `{shown(later[-1])}` comes after it")
        elif alone and not sweeps and (key == "sweep" or key.startswith(SEARCH)):
            found.append(f"`{shown(override)}` is for a sweep, and without -m this is one run")
    return found


def _twice(value: str) -> Iterator[str]:
    """Keys that stand twice in one mapping of a value, or of several that are swept over; of what is no YAML none,
    which Hydra reads or refuses."""
    if "{" not in value:
        return
    inside = re.sub(r"^\s*\w+\((.*)\)\s*$", r"\1", value, flags=re.S)  # choice(...)
    try:
        nodes: list[Any] = [yaml.compose(re.sub(r":(?=\S)", ": ", f"[{inside}]"))]  # Hydra needs no blank there
    except yaml.YAMLError:
        return
    while nodes:
        node = nodes.pop()
        if isinstance(node, yaml.SequenceNode):
            nodes += node.value
        elif isinstance(node, yaml.MappingNode):
            names = [name.value for name, _ in node.value]
            yield from (str(name) for i, name in enumerate(names) if name in names[:i])
            nodes += [item for _, item in node.value]


def unread(experiment: Experiment, overrides: Iterable[str]) -> list[str]:
    """Keys that were given a value and that nothing reads, whatever that is, as the others stand: simpo_gamma, where
    SimPO is none of the losses. Not those that are off by their own value."""
    keys = [override.partition("=")[0].lstrip("+") for override in overrides if "=" in override]
    return [key for key in dict.fromkeys(keys) if _is_unread(experiment, key)]


def _is_unread(experiment: Experiment, key: str) -> bool:
    place: Any = experiment
    for part in key.split("."):
        if isinstance(place, Settings):
            if part in place.idle() and part in _idle_with(place, part):
                return True
            place = getattr(place, part, None)
        else:
            place = place.get(part) if isinstance(place, dict) else None
    return False


def _idle_with(settings: Settings, name: str) -> frozenset[str]:
    """What would be idle with another value of this one: with one that is no value at all."""
    try:
        return settings.model_copy(update={name: object()}).idle()
    except (TypeError, AttributeError):  # it was asked for, so it is read
        return frozenset()
