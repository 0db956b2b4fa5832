"""A config may not name code. Ours never do; but in Hydra's own part of a config some keys do, and Hydra runs it.

Folders of configs are shared, so that part is looked at before Hydra acts on it. What an installed package registers
with Hydra (a sweeper, a launcher) may be named: whoever installed it has trusted it.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from hydra import conf as hydra_conf
from hydra.core.config_store import ConfigNode, ConfigStore
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from alignment.config import shape
from alignment.config.provenance import Origin
from alignment.errors import ConfigError

Leaf = tuple[str, Any]


def refuse_code(config: DictConfig) -> None:
    """Raises ConfigError if the `hydra` part of a composed config names code, or changes what our processes load."""
    for key, what, fix in _doors(config.hydra):
        raise ConfigError(f"`{key}` {what}", where=Origin.of(config.hydra).where(key), fix=fix)


def _doors(hydra: DictConfig) -> Iterator[tuple[str, str, str]]:
    """(key, what is wrong with it, fix) of each setting that could run code; the first is the one to tell."""
    plain: Any = OmegaConf.to_container(hydra, resolve=False)
    for key, _ in _leaves(plain["callbacks"], "hydra.callbacks"):
        yield key, "names code for Hydra to run", "leave hydra.callbacks empty"
    for key, _ in _leaves(plain["job"]["env_set"], "hydra.job.env_set"):  # think of PYTHONPATH
        yield key, "would change the environment of the stages", "set variables in the shell"
    for name in ("hydra_logging", "job_logging"):  # handlers, formatters and filters are called by their names
        key, settings = f"hydra.{name}", plain[name]
        if settings is not None and settings not in _shipped(name):
            known = _leaves(_shipped(name)[0], key)
            odd = next((leaf for leaf, value in _leaves(settings, key) if (leaf, value) not in known), key)
            yield odd, "may name code for Hydra to run", f"choose one of Hydra's own: hydra/{name}=default"
    if (plain["sweeper"] or {}).get("custom_search_space") is not None:  # Optuna's sweeper calls what this names
        what = "names code for the sweeper to run"
        yield "hydra.sweeper.custom_search_space", what, "hydra.sweeper.params says what is varied"
    for name in ("sweeper", "launcher"):
        try:
            named = _targets(hydra[name], f"hydra.{name}", resolve=True)
        except OmegaConfBaseException as error:
            yield f"hydra.{name}", f"cannot be read: {error}", f"choose one of Hydra's own: hydra/{name}=basic"
            return
        for key, target in named:
            if target not in _registered(name):
                what = f"names {target}, which is no {name} that an installed package brings"
                yield key, what, f"choose one of those: hydra/{name}=basic"


def _leaves(value: Any, key: str) -> list[Leaf]:
    return [leaf for leaf in shape.leaves(value, key) if leaf[1] is not None]


def _targets(settings: Any, key: str, *, resolve: bool) -> list[Leaf]:
    """(key, value) of every `_target_`, at any depth. resolve: follow interpolations, as Hydra does."""
    if OmegaConf.is_config(settings):
        settings = OmegaConf.to_container(settings, resolve=resolve)
    return [leaf for leaf in _all_leaves(settings, key) if leaf[0].endswith("._target_")]


def _all_leaves(value: Any, key: str) -> Iterator[Leaf]:
    """As shape.leaves, and into lists too."""
    for below, leaf in shape.leaves(value, key):
        if isinstance(leaf, list):
            for item in leaf:
                yield from _all_leaves(item, below)
        else:
            yield below, leaf


@cache
def _shipped(name: str) -> list[Any]:
    """The logging configs that come with Hydra, first `none`, which conf/config.yaml chooses."""
    files = sorted((Path(hydra_conf.__file__).parent / "hydra" / name).glob("*.yaml"), key=lambda f: f.stem != "none")
    return [yaml.safe_load(file.read_text(encoding="utf-8")) for file in files]


def _registered(name: str) -> set[Any]:
    """Every `_target_` that installed packages have registered for the group, nested ones (samplers, ...) included."""

    def nodes(place: Any) -> Iterator[Any]:
        if isinstance(place, ConfigNode):
            yield place.node
        else:
            for below in place.values():
                yield from nodes(below)

    brought = nodes(ConfigStore.instance().repo["hydra"][name])
    return {target for node in brought for _, target in _targets(node, "", resolve=False)}
