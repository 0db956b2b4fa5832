"""`alignment run` as a Hydra application: --help, --cfg, --info, -m and hydra.sweeper are Hydra's own."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import hydra
from hydra._internal.utils import get_args
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from alignment.config import compose, explain
from alignment.config.paths import CONF
from alignment.config.provenance import Origin
from alignment.config.schema import Experiment
from alignment.errors import ConfigError

Execute = Callable[[Experiment, list[str]], float | None]


class Aside(BaseException):
    """Carries an error past Hydra, which catches every Exception of a job, prints a line of its own and raises it."""

    def __init__(self, error: Exception):
        super().__init__(error)
        self.error = error


@contextmanager
def aside() -> Iterator[None]:
    try:
        yield
    except Exception as error:
        raise Aside(error) from error


def main(arguments: list[str], execute: Execute) -> int:
    """Let Hydra read the arguments; run the experiment they mean, or each job of a multirun in turn."""
    if any(argument.startswith("--experimental-rerun") for argument in arguments):
        raise ConfigError("--experimental-rerun is refused: it loads a pickle", fix="give the settings instead")
    given = get_args(arguments)
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then raises instead of printing; main() prints
    before, sys.argv = sys.argv, ["alignment run", *arguments]
    single: list[tuple[Experiment, list[str]]] = []

    def task(config: DictConfig) -> Any:
        app = HydraConfig.get()
        with aside():
            experiment, overrides = compose.validate(config, app), list(app.overrides.task)
            if app.mode == RunMode.MULTIRUN:
                return execute(experiment, overrides)
        single.append((experiment, overrides))  # runs when Hydra is done
        return None

    try:
        hydra.main(config_path=str(CONF), config_name="config", version_base="1.3")(task)()
    except Aside as passed:
        raise passed.error from passed.error.__cause__
    except explain.REFUSALS as error:
        folders = (Path(given.config_dir).resolve(),) if given.config_dir else ()
        raise explain.refusal(error, Origin(tuple(given.overrides), folders)) from error
    except ValueError as error:  # a refusal of the arguments
        raise ConfigError(str(error), where="command line", fix="see alignment run --help") from error
    finally:
        sys.argv = before
    for experiment, overrides in single:
        execute(experiment, overrides)
    return 0
