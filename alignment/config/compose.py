"""Hydra composes, the schema validates: overrides in, a typed Experiment out, or one line with key, file and fix."""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import Any

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import ValidationError

from alignment.config import provenance, shape
from alignment.config.paths import CONF
from alignment.config.schema import Experiment
from alignment.errors import ConfigError

MISSING = "???"


def compose(overrides: list[str], config_dirs: tuple[Path, ...] = ()) -> Experiment:
    """Compose conf/ with the overrides and validate the result.

    config_dirs: further folders searched for groups, before conf/. Raises ConfigError.
    """
    config_dirs = tuple(folder.resolve() for folder in config_dirs)
    for folder in config_dirs:
        if not folder.is_dir():
            raise ConfigError("no such folder", where=f"--config-dir {folder}")
    try:
        with initialize_config_dir(str(CONF), version_base="1.3"):
            config = hydra_compose(
                "config", [*provenance.search_path(config_dirs), *overrides], return_hydra_config=True
            )
            choices = OmegaConf.to_container(config.hydra.runtime.choices)
    except (HydraException, OmegaConfBaseException) as error:
        raise explain(error, overrides, config_dirs) from error
    finally:
        GlobalHydra.instance().clear()
    assert isinstance(choices, dict)
    return validate(config, choices, overrides, config_dirs)


def validate(
    config: DictConfig, choices: dict[Any, Any], overrides: list[str], config_dirs: tuple[Path, ...] = ()
) -> Experiment:
    """The typed experiment of a composed config; the first wrong key as a ConfigError."""
    try:
        raw = OmegaConf.to_container(config, resolve=True, throw_on_missing=False)
    except OmegaConfBaseException as error:
        raise explain(error, overrides, config_dirs) from error
    assert isinstance(raw, dict)
    raw.pop("hydra", None)
    if raw.get("name") is None:
        raw["name"] = str(choices.get("experiment") or choices.get("pipeline") or "run").replace("/", "-")
    try:
        return Experiment.model_validate(raw)
    except ValidationError as error:
        raise _first_fault(error, overrides, config_dirs) from error


def require(experiment: Experiment, key: str) -> None:
    """Refuse a key that is still `???`, with every key below it; called for the parts a pipeline really uses."""
    value: Any = experiment
    for part in key.split("."):
        value = value[part] if isinstance(value, dict) else getattr(value, part)
    for below, leaf in shape.leaves(value, key):
        if leaf == MISSING:
            raise ConfigError(f"`{below}` has no value", fix=f"add {below}=... to the command")


def _first_fault(error: ValidationError, overrides: list[str], config_dirs: tuple[Path, ...]) -> ConfigError:
    faults = sorted(error.errors(), key=lambda fault: fault["type"] != "extra_forbidden")
    fault = faults[0]
    key, owner = shape.locate(Experiment, fault["loc"])
    where = provenance.source_of(key, overrides, CONF, config_dirs)
    more = f"; {len(faults) - 1} more after this one" if len(faults) > 1 else ""
    if fault["type"] == "extra_forbidden":
        known = shape.keys(owner)
        return ConfigError(f"unknown key `{key}`{more}", where=where, fix=_nearest(key, known))
    if fault["type"] == "missing":
        return ConfigError(f"`{key}` is missing{more}", where=where, fix="every key of conf/ must be present")
    if fault.get("input") == MISSING:
        return ConfigError(f"`{key}` has no value{more}", fix=f"add {key}=... to the command")
    if fault["type"] == "union_tag_invalid":
        kinds, kind = fault["ctx"]["expected_tags"], fault["ctx"]["tag"]
        where = provenance.source_of(f"{key}.kind", overrides, CONF, config_dirs)
        return ConfigError(
            f"`{key}.kind` should be one of {kinds}, got {kind!r}{more}", where=where, fix=_allowed(fault)
        )
    message = re.sub(r"^(Input|Value) ", "", str(fault["msg"]))
    given = "" if isinstance(fault.get("input"), dict | list) else f", got {fault.get('input')!r}"
    return ConfigError(f"`{key}` {message[0].lower()}{message[1:]}{given}{more}", where=where, fix=_allowed(fault))


def _allowed(fault: Any) -> str | None:
    expected = str(fault.get("ctx", {}).get("expected") or fault.get("ctx", {}).get("expected_tags") or "")
    given = fault.get("ctx", {}).get("tag", fault.get("input"))
    near = difflib.get_close_matches(str(given), re.findall(r"'([^']+)'", expected), 1, 0.5)
    return f"did you mean {near[0]!r}?" if near else None


def _nearest(key: str, known: list[str]) -> str:
    prefix, _, last = key.rpartition(".")
    near = difflib.get_close_matches(last, known, 1, 0.5)
    if near:
        return f"did you mean `{prefix + '.' if prefix else ''}{near[0]}`?"
    return "known keys here: " + ", ".join(known)


def explain(error: Exception, overrides: list[str], config_dirs: tuple[Path, ...] = ()) -> ConfigError:
    """Hydra's own refusal as one line with the nearest right key."""
    text = str(error.__cause__ or error) if "Error merging override" in str(error) else str(error)
    text = re.sub(r"\s+full_key:.*", "", text, flags=re.S).strip()
    if found := re.search(r"Could not override '([^']+)'\.?\s*No match in the defaults list", text):
        return ConfigError(f"unknown group `{found[1]}`", where="command line", fix=_nearest(found[1], _groups()))
    if found := re.search(r"Could not override '([^']+)'", str(error)) or re.search(r"Key '([^']+)' is not in", text):
        key = next((o.split("=")[0].lstrip("+~") for o in overrides if o.split("=")[0].endswith(found[1])), found[1])
        return ConfigError(
            f"unknown key `{key}`", where="command line", fix=_nearest(*shape.known_near(Experiment, key))
        )
    if found := re.search(
        r"Could not find '([^']+)'.*?Available options in '[^']+':\s*(.*?)(?:Config search path|$)", text, re.S
    ):
        group, _, choice = found[1].rpartition("/")
        options = found[2].split()
        near = difflib.get_close_matches(choice, options, 1, 0.5)
        fix = f"did you mean {group}={near[0]}?" if near else f"choose one of: {', '.join(options)}"
        return ConfigError(f"no {group} is called {choice!r}", where="command line", fix=fix)
    first = " ".join(line.strip() for line in text.splitlines()[:2])
    return ConfigError(first, fix="alignment run --help shows how settings are given")


def _groups() -> list[str]:
    return sorted(folder.name for folder in CONF.iterdir() if folder.is_dir() and folder.name != "chat_template")
