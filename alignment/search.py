"""Optuna's part in a sweep: what it looks for, and the loop that asks it for trials and tells it what became of them.

The loop stands in the place of hydra-optuna-sweeper's, which knows a value or a failure and nothing else, and needs a
folder of Hydra's for its results. Settings, samplers and the way in which a search space is written are that package's.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, ListConfig, OmegaConf

from alignment.config.redact import setting_without_secrets
from alignment.config.rewards import HIGHER_IS_BETTER, better_of_terms
from alignment.config.schema import Experiment
from alignment.config.stages.answering import Compare, Evaluate
from alignment.config.stages.reward_model import OF_REWARD_MODELS, EvaluateReward
from alignment.errors import ConfigError, MachineError
from alignment.reporting import queue, words
from alignment.reporting.judges import deciding

OPTUNA = "hydra_plugins.hydra_optuna_sweeper.optuna_sweeper.OptunaSweeper"
LEARNS_NOTHING = "hydra._internal.core_plugins.basic_sweeper.BasicSweeper"
DIRECTIONS = ("minimize", "maximize")
KEY = "hydra.sweeper.direction"
BETTER = {**OF_REWARD_MODELS, **HIGHER_IS_BETTER}
Objective = list[dict[str, str]]  # {"metric", "direction"}, the first is what a sweep is ranked by


class Pruned(Exception):
    """What became of a trial that was stopped as hopeless."""


# --- what is looked for ----------------------------------------------------------------------------------------------


def learns(master: DictConfig) -> bool:
    """Whether the sweeper of a multirun chooses its next jobs by the values of those before."""
    return bool(master.hydra.sweeper.get("_target_") != LEARNS_NOTHING)


def objective(master: DictConfig, experiment: Experiment) -> Objective:
    """The metrics that a multirun looks at, and which way: as Optuna is told; else, of those that are better neither
    high nor low, as little as can be. Raises ConfigError if they cannot be measured."""
    if learns(master) and not _measures(experiment):
        what = "`objective` is what the final model's evaluation measures, and the pipeline evaluates no final model"
        raise ConfigError(what, where="command line", fix="choose a pipeline with an evaluation of pipeline.final")
    if master.hydra.sweeper.get("_target_") == OPTUNA:
        return _paired(experiment.objective, directions(master.hydra.sweeper.direction))
    better = {**BETTER, **experiment.reward.better}
    own = [DIRECTIONS[bool(better.get(metric, True))] for metric in experiment.objective]
    return _paired(experiment.objective, own)


def _measures(experiment: Experiment) -> bool:
    nodes = experiment.pipeline.nodes.values()
    kinds = [(node, experiment.stage[node.stage]) for node in nodes]
    final = experiment.pipeline.final
    evaluated = any(
        isinstance(kind, Evaluate | EvaluateReward) and node.inputs.get("model") == final for node, kind in kinds
    )
    return evaluated or any(isinstance(kind, Compare) for _, kind in kinds)


def _paired(metrics: Sequence[str], directions: Sequence[str]) -> Objective:
    return [{"metric": name, "direction": way} for name, way in zip(metrics, directions, strict=True)]


def directions(given: Any) -> list[str]:
    """Of hydra.sweeper.direction: a word, or a list of them."""
    several = isinstance(given, list | tuple | ListConfig)
    return [str(getattr(one, "name", one)) for one in (given if several else [given])]


def check_directions(metrics: Sequence[str], ways: Sequence[str], weights: Mapping[str, float]) -> None:
    """Raises ConfigError where they do not fit the metrics; says which of them look for the worst. weights: of those
    that are terms of the reward."""
    if wrong := next((way for way in ways if way not in DIRECTIONS), None):
        raise ConfigError(f"`{KEY}` is {wrong}", where=KEY, fix=f"one of: {', '.join(DIRECTIONS)}")
    if len(ways) != len(metrics):
        what = f"`{KEY}` has {len(ways)} of them, and `objective` names {len(metrics)}: {', '.join(metrics)}"
        fix = "one for each, in the same order: objective=[reward,kl] hydra.sweeper.direction=[maximize,minimize]"
        raise ConfigError(what, where=KEY, fix=fix)
    known = {**BETTER, **better_of_terms(weights)}
    for metric, way in zip(metrics, ways, strict=True):
        better = known.get(metric, True)
        if better is not None and DIRECTIONS[better] != way:
            queue.say(f"warning: {KEY} is {way} for {metric}, of which {'more' if better else 'less'} is better")


def check_judge(metrics: Sequence[str], varied: Collection[str], config: DictConfig) -> None:
    """Raises ConfigError where what is varied decides how a metric is measured: the best trial would be the one that
    measures most, as the largest weight makes the largest reward. config: of the multirun."""
    plain: Any = OmegaConf.to_container(config, resolve=False)
    keys = sorted(key.lstrip("+") for key in varied)
    for metric in metrics:
        if key := deciding(keys, metric, plain):
            what = f"`{key}` is varied, and decides how {metric} is measured: each trial would have its own judge"
            fix = "one that is measured in the same way in all trials, as a term of the reward that is not varied"
            raise ConfigError(what, where="objective", fix=fix)


# --- the loop --------------------------------------------------------------------------------------------------------


class Search(Sweeper):
    """Hydra's sweeper `optuna`, with our loop. Trials are asked for n_jobs at a time, and told when these have ended.

    A trial that was stopped as hopeless is told as pruned: samplers take it for worse than any that has ended (TPE), or
    leave it out. One that failed is told as failed, and the others go on; max_failure_rate is, as theirs, the share of
    those asked for at once that may fail without an end to the search. Settings that no trial can have end it too.
    """

    def __init__(self, n_trials: int, n_jobs: int, max_failure_rate: float, **settings: Any) -> None:
        from hydra_plugins.hydra_optuna_sweeper._impl import OptunaSweeperImpl  # Optuna is slow to import

        # Hydra would wrap an error of this method into words of its own, so `sweep` looks at what was given.
        self._rate = max_failure_rate
        settings |= {"n_trials": n_trials, "n_jobs": n_jobs, "max_failure_rate": 1.0}
        self._theirs: Any = OptunaSweeperImpl(**settings)
        self._counts = {"done": 0, "pruned": 0, "failed": 0}

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self._theirs.setup(hydra_context=hydra_context, task_function=task_function, config=config)

    def sweep(self, arguments: list[str]) -> None:
        import optuna

        theirs, ways = self._theirs, directions(self._theirs.direction)
        for name in ("n_trials", "n_jobs"):
            if (given := getattr(theirs, name)) < 1:
                raise ConfigError(f"{name} is {given}", where=f"hydra.sweeper.{name}", fix="at least 1")
        if not 0 <= self._rate <= 1:
            what = f"max_failure_rate is {self._rate}"
            raise ConfigError(what, where="hydra.sweeper.max_failure_rate", fix="from 0 to 1")
        self._metrics = [str(name) for name in theirs.config.objective]
        every = {name: OmegaConf.select(theirs.config, f"reward.terms.{name}.weight") for name in self._metrics}
        weights = {name: weight for name, weight in every.items() if isinstance(weight, int | float)}
        check_directions(self._metrics, ways, weights)
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        space, fixed = self._space(arguments)
        check_judge(self._metrics, space, theirs.config)
        if not space:
            queue.say("warning: nothing is varied: all trials are the same (stage.dpo.beta=interval(0.01, 1.0), ...)")
        left, sampler = theirs.n_trials, theirs.sampler
        if isinstance(sampler, functools.partial):  # of a grid, which only now is known
            grid = {name: theirs._to_grid_sampler_choices(distribution) for name, distribution in space.items()}
            sampler, left = sampler(grid), min(left, functools.reduce(int.__mul__, map(len, grid.values()), 1))
        with _storage(theirs.storage):
            study = optuna.create_study(
                study_name=theirs.study_name, storage=theirs.storage, sampler=sampler, directions=ways,
                load_if_exists=True,
            )  # fmt: skip
        asked, ended = 0, list[tuple[Any, dict[str, Any]]]()
        while left > 0:
            trials = [study.ask() for _ in range(min(left, theirs.n_jobs))]
            jobs = theirs._configure_trials(trials, space, fixed)
            told = theirs.launcher.launch(jobs, initial_job_idx=asked)
            asked, left = asked + len(trials), left - len(trials)
            states = [self._tell(study, trial, one) for trial, one in zip(trials, told, strict=True)]
            ended += [(one._return_value, trial.params) for trial, one in zip(trials, told, strict=True)]
            if error := _of_every_trial(ended, space):
                raise error
            if states.count("failed") / len(states) > self._rate:
                told_of = f"{states.count('failed')} of {len(states)} trials have failed"
                queue.say(f"the search ends: {told_of} (hydra.sweeper.max_failure_rate={self._rate:g})")
                break
        self._conclude(study)

    def _space(self, arguments: list[str]) -> tuple[dict[str, Any], dict[str, Any]]:
        """What is varied, and what is the same in all trials: hydra.sweeper.params, and above them the command line."""
        from hydra_plugins.hydra_optuna_sweeper._impl import create_params_from_overrides

        theirs = self._theirs
        theirs._process_searchspace_config()
        varied, fixed = create_params_from_overrides([*theirs._parse_sweeper_params_config(), *arguments])
        space = {**(theirs.search_space_distributions or {}), **varied}
        return {name: values for name, values in space.items() if name not in fixed}, fixed

    def _tell(self, study: Any, trial: Any, told: JobReturn) -> str:
        """done, pruned or failed."""
        from optuna.trial import TrialState

        value = told._return_value  # their property prints a line of its own for one that has failed
        if isinstance(value, Pruned):
            state, values = "pruned", None
        elif told.status != JobStatus.COMPLETED or value is None:
            state, values = "failed", None
            if value is None:
                setting = ", ".join(f"{name}={found}" for name, found in trial.params.items())
                queue.say(f"✗ trial {trial.number} ({setting}) has no {' and '.join(self._metrics)}")
        else:
            state, values = "done", list(value) if isinstance(value, tuple) else [value]
        states = {"pruned": TrialState.PRUNED, "failed": TrialState.FAIL, "done": TrialState.COMPLETE}
        with suppress(RuntimeError):  # the grid's sampler stops the study at its last trial, which is for others to do
            study.tell(trial, values, states[state])
        self._counts[state] += 1
        return state

    def _conclude(self, study: Any) -> None:
        """In a line or two: how many trials there were, and the best of them, or those that no other beats."""
        from optuna.trial import TrialState

        counts = ", ".join(f"{count} {state}" for state, count in self._counts.items() if count)
        total = sum(self._counts.values())
        queue.say(f"{total} trial{'s' if total > 1 else ''}: {counts}")
        if not study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)):
            return
        best = study.best_trials
        if len(self._metrics) > 1:
            queue.say(f"{len(best)} that no other beats in all of {', '.join(self._metrics)}:")
        for trial in best if len(self._metrics) > 1 else best[:1]:
            values = ", ".join(
                f"{words.metric(name).title.lower()} {words.metric_value(name, value)}"
                for name, value in zip(self._metrics, trial.values, strict=True)
            )
            settings = "  ".join(f"{name}={value}" for name, value in trial.params.items())
            queue.say(f"best: {values}  with {settings or 'nothing varied'}")


@contextmanager
def _storage(url: str | None) -> Iterator[None]:
    """Where the study is kept: of a database that cannot be had, in a line, without its password."""
    from sqlalchemy.exc import SQLAlchemyError  # slow to import

    try:
        yield
    except (SQLAlchemyError, ImportError) as error:
        what = str(getattr(error, "orig", None) or error).splitlines()[0]
        where = setting_without_secrets(f"hydra.sweeper.storage={url}")
        fix = "a database that can be opened: sqlite:////a/folder/that/is/there/study.db"
        raise MachineError(f"the study cannot be kept: {what}", where=where, fix=fix) from error


def _of_every_trial(ended: Sequence[tuple[Any, dict[str, Any]]], space: dict[str, Any]) -> ConfigError | None:
    """What is wrong whatever the values: all trials so far were refused in the same words, with every value of what is
    chosen, and two of what lies in a range. ended: what each came to, and its values."""
    error = ended[0][0]
    if not isinstance(error, ConfigError) or any(str(other) != str(error) for other, _ in ended):
        return None
    for name, values in space.items():
        choices = getattr(values, "choices", None)
        enough = len({repr(choice) for choice in choices}) if choices else 1 if values.single() else 2
        if len({repr(params[name]) for _, params in ended}) < enough:
            return None
    return error
