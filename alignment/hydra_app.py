"""`alignment run` as a Hydra application: --help, --cfg, --info, -m and hydra.sweeper are Hydra's own."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from alignment.config import compose
from alignment.config.paths import CONF
from alignment.config.schema import Experiment
from alignment.errors import ConfigError

Execute = Callable[[Experiment, list[str]], float | None]


def main(arguments: list[str], execute: Execute) -> int:
    """Let Hydra read the arguments; run the experiment they mean, or each job of a multirun in turn."""
    if any(argument.startswith("--experimental-rerun") for argument in arguments):
        raise ConfigError("--experimental-rerun is refused: it loads a pickle", fix="give the settings instead")
    dirs = _config_dirs(arguments)
    single: list[tuple[Experiment, list[str]]] = []
    begun: list[list[str]] = []  # jobs that Hydra has handed over

    def task(config: DictConfig) -> Any:
        app = HydraConfig.get()
        choices = OmegaConf.to_container(app.runtime.choices)
        assert isinstance(choices, dict)
        overrides = list(app.overrides.task)
        begun.append(overrides)
        experiment = compose.validate(config, choices, overrides, dirs)
        if app.mode == RunMode.MULTIRUN:
            return execute(experiment, overrides)
        single.append((experiment, overrides))  # run after Hydra is done, so that errors reach us unwrapped
        return None

    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then raises instead of printing; main() prints
    before = sys.argv
    sys.argv = ["alignment run", *arguments]
    try:
        hydra.main(config_path=str(CONF), config_name="config", version_base="1.3")(task)()
    except (HydraException, OmegaConfBaseException) as error:
        given = [argument for argument in arguments if "=" in argument and not argument.startswith("-")]
        raise compose.explain(error, given, dirs) from error
    except ValueError as error:
        if begun:  # a job's own, not a refusal of the arguments
            raise
        raise ConfigError(str(error), where="command line", fix="see alignment run --help") from error
    finally:
        sys.argv = before
    for experiment, overrides in single:
        execute(experiment, overrides)
    return 0


def _config_dirs(arguments: list[str]) -> tuple[Path, ...]:
    for index, argument in enumerate(arguments):
        if argument.startswith("--config-dir="):
            return (Path(argument.split("=", 1)[1]).resolve(),)
        if argument in ("--config-dir", "-cd") and index + 1 < len(arguments):
            return (Path(arguments[index + 1]).resolve(),)
    return ()
