"""Files chosen as a list for one group: Hydra merges them, and of a key that two of them set keeps the last value."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig

from alignment.config import shape
from alignment.config.paths import GROUPS
from alignment.config.provenance import Origin
from alignment.config.stages.preference import weighted
from alignment.errors import ConfigError

File = tuple[Path, str]  # and the package that its keys go to


def refuse_overlaps(config: DictConfig) -> None:
    """Raises ConfigError if two files that were chosen as a list give a key different values, and the command line none
    of its own."""
    choices = config.hydra.runtime.choices  # where Hydra notes no group whose choice is a list
    for group in (group for group in GROUPS if group not in choices and group != "stage"):
        origin = Origin.of(config.hydra, as_typed=True)
        files = list(origin.listed(group))
        typed = [override.partition("=")[0].lstrip("+") for override in origin.overrides]
        if found := overlap(files, typed):
            first, second, key = found
            what = f"`{group}` lists {first} and {second}, which set `{key}` to different values: only the last counts"
            fix = instead(group, [file.stem for file, _ in files], key)
            raise ConfigError(what, where=origin.chosen(group, second), fix=fix)


def overlap(files: Sequence[File], decided: Sequence[str] = ()) -> tuple[str, str, str] | None:
    """(name, name, key) of the first two that give a key different values, or of which one has keys below it. decided:
    keys that have a value whatever files say."""
    for one, other in combinations(files, 2):
        for key, value in _values(one):
            for its, theirs in _values(other):
                within = key.startswith(f"{its}.") or its.startswith(f"{key}.")
                if within or (key == its and value != theirs and key not in decided):
                    return one[0].stem, other[0].stem, min(key, its, key=len)
    return None


def instead(group: str, names: Sequence[str], key: str) -> str:
    """The fix for files of the group that cannot be listed, as they differ in the key."""
    if group == "loss" and key.split(".")[-1] == "loss":
        return f"several losses have weights: {weighted('stage.dpo.loss', names)}"
    return f"choose one of them, and set `{key}` itself where it should be another"


def _values(file: File) -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of every leaf that the file itself sets."""
    path, package = file
    settings = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    for name, value in settings.items():
        if name != "defaults":
            yield from shape.leaves(value, f"{package}.{name}".lstrip("."))
