"""`alignment run` as a Hydra application: --help, --cfg, --info, -m and hydra.sweeper are Hydra's own."""

from __future__ import annotations

import gc
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NoReturn

import hydra
from hydra._internal import hydra as internals
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.core_plugins.basic_launcher import BasicLauncher
from hydra._internal.utils import get_args_parser
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from hydra.plugins.plugin import Plugin
from hydra.types import HydraContext, RunMode, TaskFunction
from omegaconf import DictConfig, open_dict
from omegaconf.errors import OmegaConfBaseException

from alignment.config import compose, explain
from alignment.config.given import lost, refuse_twice
from alignment.config.guard import refuse_code
from alignment.config.listed import refuse_overlaps
from alignment.config.paths import CONF
from alignment.config.points import Points, as_given
from alignment.config.provenance import Origin
from alignment.config.redact import run_command
from alignment.config.schema import Experiment
from alignment.errors import AlignmentError, ConfigError
from alignment.reporting import queue
from alignment.reporting.settings import own_settings
from alignment.search import OPTUNA, Search, learns


@dataclass(frozen=True)
class Point:
    """One job of Hydra's: its validated experiment, and the settings that made it. arguments: of the command that makes
    it alone, where these are not all."""

    experiment: Experiment
    overrides: list[str]
    arguments: tuple[str, ...] = ()

    @property
    def command(self) -> str:
        return run_command(self.arguments or self.overrides)


@dataclass(frozen=True)
class Refused:
    """A job that a search has asked for, whose settings cannot be."""

    error: AlignmentError
    overrides: list[str]


# The second: the config of a multirun.
Execute = Callable[[Sequence[Point | Refused], DictConfig | None], Sequence[Any]]


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


class Loader(ConfigLoaderImpl):
    """Hydra's loader. All that Hydra acts on is loaded here: callbacks, log handlers, sweepers, each job of a sweep."""

    def __init__(self, config_search_path: ConfigSearchPath) -> None:
        super().__init__(config_search_path)
        self.points = Points()

    def load_configuration(self, *arguments: Any, **options: Any) -> DictConfig:
        config = super().load_configuration(*arguments, **options)
        with aside():
            refuse_code(config)
            refuse_overlaps(config)
        return config

    def load_sweep_config(self, master_config: DictConfig, sweep_overrides: list[str]) -> DictConfig:
        """Called for all jobs before the first one starts: a wrong setting of the last is not found hours later.

        Sweeper and launcher both call it, for hundreds of jobs: see config/points.py.
        """
        point = self.points.compose(self, master_config, sweep_overrides)
        config = point.config if point else super().load_sweep_config(master_config, sweep_overrides)
        if point is None or point.experiment is None:
            try:
                compose.validate(config, config.hydra)
            except ConfigError as error:
                if not isinstance(error.__cause__, OmegaConfBaseException):  # such as ${hydra:job.num}: a job knows it
                    raise Aside(_of_point(error, sweep_overrides, master_config)) from error
        return config

    def experiment(self, master_config: DictConfig, sweep_overrides: list[str], number: int) -> Experiment:
        """What the job of this number will run: known from load_sweep_config, or composed and validated as a job is."""
        with aside():
            if known := self.points.known(master_config.hydra, sweep_overrides):
                return known
            try:
                config = self.load_sweep_config(master_config, sweep_overrides)
            except explain.REFUSALS as error:  # here and not in `main`: of a search it is one trial's
                theirs = master_config.hydra
                origin = Origin((*as_given(theirs.overrides.hydra), *sweep_overrides), Origin.of(theirs).folders)
                raise explain.refusal(error, origin) from error
            if known := self.points.known(master_config.hydra, sweep_overrides):
                return known
            with open_dict(config):
                config.hydra.job.id, config.hydra.job.num = str(number), number
            before = HydraConfig.instance().cfg
            try:
                HydraConfig.instance().set_config(config)
                return compose.validate(config, HydraConfig.get())
            finally:
                HydraConfig.instance().cfg = before


def _of_point(error: ConfigError, overrides: list[str], master: DictConfig) -> ConfigError:
    """Which of a sweep's points it is that cannot be. Of a search this is said beside it."""
    given = as_given(master.hydra.overrides.task)
    if learns(master) or not (own := own_settings(overrides, given)):
        return error
    told = ConfigError(f"the point {own}: {error.what}", where=error.where, fix=error.fix)
    told.__cause__ = error.__cause__
    return told


def main(arguments: list[str], execute: Execute, warn: bool = True) -> int:
    """Let Hydra read the arguments, and have the experiments that they mean executed: one, or the jobs of a multirun as
    its sweeper asks for them."""
    given = _read(arguments)
    refuse_twice(given.overrides)
    if warn:
        queue.note_lost(lost(given.overrides, alone=not given.multirun))
    places, single = _places(given), list[Point]()
    origin = Origin(tuple(given.overrides), (Path(given.config_dir).resolve(),) if given.config_dir else ())

    def task(config: DictConfig) -> Any:
        app = HydraConfig.get()
        with aside():
            experiment, overrides = _planned(app) or compose.validate(config, app), list(app.overrides.task)
            if app.mode == RunMode.MULTIRUN:  # by another launcher than ours
                return _value(execute([Point(experiment, overrides, (*places, *overrides))], None)[0])
        single.append(Point(experiment, overrides, tuple(arguments)))  # runs when Hydra is done
        return None

    try:
        with _hydra_as_ours(arguments, execute, places), many_objects():
            hydra.main(config_path=str(CONF), config_name="config", version_base="1.3")(task)()
    except Aside as passed:
        raise passed.error from passed.error.__cause__
    except explain.REFUSALS as error:
        raise explain.refusal(error, origin) from error
    except (TypeError, ValueError) as error:  # a refusal of the arguments
        if wrong := explain.no_range(given.overrides) or explain.no_choice(given.overrides, origin):
            raise wrong from error
        if isinstance(error, TypeError):
            raise
        raise ConfigError(str(error), where="command line", fix="see alignment run --help") from error
    if single:
        execute(single, None)
    return 0


@contextmanager
def many_objects() -> Iterator[None]:
    """The points of a sweep are millions of objects that stay: looking at them for garbage is a fifth of planning."""
    usual = gc.get_threshold()
    gc.set_threshold(200_000, *usual[1:])
    try:
        yield
    finally:
        gc.set_threshold(*usual)


def _value(value: Any) -> Any:
    if isinstance(value, Exception):
        raise value
    return value


class AllPoints(Launcher):
    """Hydra's launcher of ours, in the place of its basic one: the jobs that a sweeper asks for are executed as one
    graph, in which what is equal is made once."""

    execute: ClassVar[Execute]
    places: ClassVar[tuple[str, ...]]

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self._loader: Any = hydra_context.config_loader  # a Loader
        self._master = config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        if not job_overrides:
            with aside():
                raise explain.no_points(as_given(self._master.hydra.overrides.task), self._loader)
        points = [self._point(list(one), number) for number, one in enumerate(job_overrides, start=initial_job_idx)]
        returns = [JobReturn(overrides=point.overrides) for point in points]
        with aside():
            values = type(self).execute(points, self._master)
        for told, value in zip(returns, values, strict=True):
            # Hydra ends a plain sweep at the first failure that it is told of; who learns from values must know.
            failed = isinstance(value, Exception) and learns(self._master)
            told.status = JobStatus.FAILED if failed else JobStatus.COMPLETED
            told.return_value = None if isinstance(value, Exception) and not failed else value
        return returns

    def _point(self, overrides: list[str], number: int) -> Point | Refused:
        """Settings of a search may be right one by one, and not together: that is a failure of this trial alone."""
        try:
            experiment = self._loader.experiment(self._master, overrides, number)
            return Point(experiment, overrides, (*self.places, *overrides))
        except Aside as aside:
            if isinstance(aside.error, AlignmentError) and learns(self._master):
                return Refused(aside.error, overrides)
            raise


def _planned(app: Any) -> Experiment | None:
    """The experiment of this job of a sweep if it is known already; a launcher's other processes do not know it."""
    loader = GlobalHydra.instance().config_loader()
    return loader.points.known(app, as_given(app.overrides.task)) if isinstance(loader, Loader) else None


@contextmanager
def _hydra_as_ours(
    arguments: list[str], execute: Execute = lambda points, master: [], places: tuple[str, ...] = ()
) -> Iterator[None]:
    """Hydra reads these arguments, loads configs by our loader, launches by our launcher, has Optuna asked by our loop,
    and raises its errors instead of printing them."""
    os.environ["HYDRA_FULL_ERROR"] = "1"
    theirs = sys.argv, internals.ConfigLoaderImpl
    sys.argv, internals.ConfigLoaderImpl = ["alignment run", *arguments], Loader  # type: ignore[misc]
    plugins, name = Plugins.instance().class_name_to_class, f"{BasicLauncher.__module__}.{BasicLauncher.__name__}"
    ours: dict[str, type[Plugin]] = {name: AllPoints, **({OPTUNA: Search} if OPTUNA in plugins else {})}
    replaced = {place: plugins[place] for place in ours}
    plugins.update(ours)
    AllPoints.execute, AllPoints.places = staticmethod(execute), places
    try:
        yield
    finally:
        sys.argv, internals.ConfigLoaderImpl = theirs  # type: ignore[misc]
        plugins.update(replaced)


def _places(given: Any) -> tuple[str, ...]:
    """The arguments that say where configs are looked for: a point of a sweep is not found without, alone."""
    folder = ["--config-dir", given.config_dir] if given.config_dir else []
    return (*folder, *(one for one in given.overrides if one.lstrip("+~").startswith("hydra.searchpath=")))


def _read(arguments: list[str]) -> Any:
    """The arguments as Hydra reads them, abbreviations included. Raises ConfigError for flags that are refused."""

    def error(message: str) -> NoReturn:
        # argparse does not take up a list again after a flag
        apart = re.match(r"unrecognized arguments:( [^- =][^ =]*=\S*)+$", message)
        fix = "give the settings together, flags before or after all of them" if apart else "see alignment run --help"
        raise ConfigError(message, where="command line", fix=fix)

    parser = get_args_parser()
    parser.error = error  # type: ignore[method-assign]
    given = parser.parse_args(arguments)
    if given.experimental_rerun is not None:
        raise ConfigError("--experimental-rerun is refused: it loads a pickle", fix="give the settings instead")
    if given.config_path is not None or given.config_name is not None:
        what = "--config-path and --config-name are refused: the first config is conf/config.yaml"
        raise ConfigError(what, fix="put yours into FOLDER/experiment/NAME.yaml: --config-dir FOLDER experiment=NAME")
    return given
