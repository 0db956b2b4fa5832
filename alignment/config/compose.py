"""Hydra composes, the schema validates: overrides in, a typed Experiment out, or one line with key, file and fix."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import ValidationError

from alignment.config import explain
from alignment.config.checks import check
from alignment.config.given import refuse_twice
from alignment.config.guard import refuse_code
from alignment.config.listed import refuse_overlaps
from alignment.config.paths import CONF
from alignment.config.preference_checks import refuse_replaced_names
from alignment.config.provenance import Origin
from alignment.config.rounds import expand
from alignment.config.schema import Experiment
from alignment.errors import ConfigError


def compose(overrides: list[str], config_dirs: tuple[Path, ...] = ()) -> Experiment:
    """Compose conf/ with the overrides and validate the result.

    config_dirs: further folders searched for groups, after conf/. Raises ConfigError.
    """
    refuse_twice(overrides)
    origin = Origin(tuple(overrides), tuple(folder.resolve() for folder in config_dirs))
    for folder in origin.folders:
        if not folder.is_dir():
            raise ConfigError("no such folder", where=f"--config-dir {folder}")
    try:
        with initialize_config_dir(str(CONF), version_base="1.3"):
            config = hydra_compose("config", [*origin.search_path(), *overrides], return_hydra_config=True)
    except explain.REFUSALS as error:
        raise explain.refusal(error, origin) from error
    except (TypeError, ValueError) as error:
        raise explain.no_choice(overrides, origin) or error from error
    finally:
        GlobalHydra.instance().clear()
    refuse_code(config)
    refuse_overlaps(config)
    return validate(config, config.hydra)


def validate(config: DictConfig, hydra: Any) -> Experiment:
    """The typed experiment of a composed config and Hydra's part of it; what is wrong first as a ConfigError."""
    origin = Origin.of(hydra)
    try:
        ours = OmegaConf.masked_copy(config, [str(key) for key in config if key != "hydra"])
        raw: Any = OmegaConf.to_container(ours, resolve=True, throw_on_missing=False)
    except OmegaConfBaseException as error:
        raise explain.refusal(error, origin) from error
    try:
        experiment = typed(raw, default_name(hydra))
    except ValidationError as error:
        raise explain.first_fault(error, origin) from error
    refuse_replaced_names(experiment, origin.overrides)
    check(experiment, origin)
    return experiment


def typed(raw: dict[str, Any], name: str) -> Experiment:
    """The experiment of a resolved config, called so if it has no name of its own, its rounds made out. Raises
    ValidationError."""
    return expand(Experiment.model_validate({**raw, "name": name} if raw.get("name") is None else raw))


def default_name(hydra: Any) -> str:
    choices = hydra.runtime.choices
    return str(choices.get("experiment") or choices.get("pipeline") or "run").replace("/", "-")
