"""From settings to work: one run here, the points of a sweep one after the other, or all as jobs of a cluster."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from alignment import hydra_app, launching, search
from alignment.config.execution import PercentilePruning
from alignment.config.given import unread
from alignment.config.launchers import SlurmLauncher, TorchrunLauncher
from alignment.config.provenance import quoted
from alignment.errors import (
    BY_CODE,
    AlignmentError,
    ConfigError,
    LostError,
    MachineError,
    PreemptedError,
    StageFailed,
)
from alignment.hydra_app import Point, Refused
from alignment.pipeline import runner, sanity, submission, sweeps
from alignment.pipeline.following import Follower
from alignment.pipeline.identity import one_look
from alignment.pipeline.leading import Leader
from alignment.reporting import cancelling, gather, page, pruning, queue, terminal, watching
from alignment.reporting.settings import own_settings
from alignment.reporting.status import UNKNOWN
from alignment.reporting.sweeps import objective
from alignment.reporting.words import DONE
from alignment.signals import CANCELLED, Asked, Either, Listener, Stopped

# Of a point: its objective, why it has none, or nothing (yet).
Value = float | tuple[float, ...] | AlignmentError | search.Pruned | None


class Session:
    """What one `alignment run` asks for. stop: hears the signals of this process. wait: until jobs of a cluster have
    ended; a sweep whose sweeper learns from them, or that stops hopeless trials, waits in any case. force: start what
    the check before it refuses."""

    def __init__(self, stop: Listener, wait: bool, arguments: Sequence[str], force: bool = False):
        self._stop, self._wait, self._arguments, self._force = stop, wait, arguments, force
        self._sweep: sweeps.Sweep | None = None
        self._local = False  # its stages run here
        self._trials = pruning.Trials(queue.say)
        self._failed: dict[str, AlignmentError] = {}  # stages that are not tried again for the next point
        self._errors: dict[str, AlignmentError] = {}  # points that failed
        self._refused: list[str] = []  # lines that are not yet said
        self._doomed: dict[str, AlignmentError] = {}  # looks before a launch that found why it would fail
        self._pruned: dict[str, str] = {}  # points that were stopped as hopeless, and why
        self._count = 0
        self._warned = self._probed = False  # a sweeper that learns comes back for each of its rounds
        self._leader: Leader | None = None  # what the other machines of a run see of this one
        self._follower: Follower | None = None

    def execute(self, points: Sequence[Point | Refused], master: DictConfig | None) -> Sequence[Value]:
        """The value of each point. One that fails does not stop the others: `finish` raises what became of it.

        master: the config of the multirun that the points belong to, or None.
        """
        for point in points:
            if isinstance(point, Refused):
                self._count += 1
                self._errors[" ".join(point.overrides)] = point.error
                self._refused.append(f"✗ {'  '.join(filter(None, [_own(point, master), str(point.error)]))}")
        able = [point for point in points if isinstance(point, Point)]
        # Those that all points so far have in common may end the command, which says them then, once.
        if able or len({str(error) for error in self._errors.values()}) > 1 or self._count > len(self._refused):
            for line in self._refused:
                queue.say(line)
            self._refused = []
        values = iter(self._execute(able, master) if able else [])
        return [point.error if isinstance(point, Refused) else next(values) for point in points]

    def _execute(self, points: Sequence[Point], master: DictConfig | None) -> Sequence[Value]:
        if why := self._is_cancelled():  # between two rounds of a search
            raise Stopped(why)
        with one_look():  # at each file that keys are made of
            runs = [runner.Run(point.experiment, point.command, own=_own(point, master)) for point in points]
        self._count += len(runs)
        if not self._warned and not (master is not None and search.learns(master)):  # whose next trials may read it
            queue.say_unread([unread(point.experiment, point.overrides) for point in points])
            self._warned = True
        self._meet(runs)
        if self._follower is None and not (master is not None and search.learns(master)):  # who may ask for one twice
            queue.say_alike(runs)
        if self._follower is not None:
            for run in runs:
                self._here(run)
            return [self._value(run, in_sweep=master is not None) for run in runs]
        clustered = _are_jobs(runs)
        name = runs[0].id if master is None else self._note_sweep(master, points, runs, write=not clustered)
        going = [run for run in runs if not self._was_pruned(run)]
        for run in going:
            self._errors.pop(run.id, None)  # a sweeper may ask for the same point again
        going = [run for run in going if self._may_go(run)]
        if not clustered:
            for run in going:
                self._here(run)
        elif going:
            prunes = any(isinstance(run.experiment.pruning, PercentilePruning) for run in going)
            wait = self._wait or (master is not None and (search.learns(master) or prunes))
            self._queue(going, name, wait)
            if not wait:
                return [None] * len(runs)
            if master is not None and search.learns(master) and (why := self._is_cancelled()):
                raise Stopped(why)  # trials that were cancelled with their search have not failed
        return [self._value(run, in_sweep=master is not None) for run in runs]

    def _may_go(self, run: runner.Run) -> bool:
        """Whether nothing is known that it would end with."""
        try:
            launching.look(run, self._force, self._doomed, queue.say)
        except AlignmentError as error:
            if self._stop.asked:  # a signal that the look's process heard, too
                raise Stopped(self._stop.asked) from error
            self._trials.drop(run)
            self._errors[run.id] = error
            if self._sweep is not None:
                queue.say(f"✗ {_called(run)}  {error}")
            return False
        return True

    def finish(self) -> None:
        """Raises the failure of the only run, or what became of the points of a sweep."""
        errors = list(self._errors.values())
        if self._sweep is not None and self._local:
            queue.say_ended(self._sweep.id, self._count, len(errors), len(self._pruned))
        if not errors:
            return
        first = errors[0]
        if self._count == 1:
            raise first
        what = f"{len(errors)} of {self._count} points failed; the first: {first.what}"
        raise type(first)(what, where=first.where, fix=first.fix) from first

    def _meet(self, runs: Sequence[runner.Run]) -> None:
        """Where several machines were joined by hand: show the others this one."""
        meetings = {_meeting(run) for run in runs}
        if meetings == {None}:
            return
        if len(meetings) > 1:
            what = "the points of a sweep on several machines share one launcher and one store"
            raise ConfigError(what, where="command line", fix="sweep over something else than `launcher` and `store`")
        launcher = runs[0].experiment.launcher
        assert isinstance(launcher, TorchrunLauncher)
        if launcher.rank:
            self._follower = self._follower or Follower(runs[0].store, launcher, self._stop, queue.say)
            return
        self._leader = self._leader or Leader(runs[0].store, launcher, queue.say)
        self._leader.expect(runs)

    def _note_sweep(
        self, master: DictConfig, points: Sequence[Point], runs: Sequence[runner.Run], *, write: bool
    ) -> str:
        """Its name. write: nothing can refuse its points any more."""
        if self._sweep is None:
            looked_at = search.objective(master, runs[0].experiment)
            self._sweep = sweeps.Sweep(_settings(master), self._arguments, looked_at)
        self._sweep.add([(run, point.overrides) for run, point in zip(runs, points, strict=True)], write)
        if write and not self._local:  # of jobs it is said with their numbers
            queue.say_begun(self._sweep.id)
            self._local = True
        for run in runs:
            self._trials.add(run)
        return self._sweep.id

    def _is_cancelled(self) -> str | None:
        return CANCELLED if self._sweep is not None and self._sweep.is_cancelled() else None

    def _value(self, run: runner.Run, in_sweep: bool) -> Value:
        if run.id in self._errors:
            return self._errors[run.id]
        if run.id in self._pruned:
            return search.Pruned(self._pruned[run.id])
        return objective(run.state, run.store.root, run.experiment.objective) if in_sweep else None

    # --- stages that run here ----------------------------------------------------------------------------------------

    def _here(self, run: runner.Run) -> None:
        if why := self._stop.asked or self._is_cancelled():  # while the point before ended well
            raise Stopped(why)
        doomed = pruning.Doomed(self._stop, lambda: self._trials.look(run))
        try:
            if self._follower is not None:
                _followed(run, self._follower)
            else:
                _from_plan_to_report(run, doomed, self._failed, self._leader)
        except (PreemptedError, Stopped):
            if self._stop.asked or not doomed.why:
                raise
            self._prune(run, doomed.why)
        except AlignmentError as error:
            self._trials.drop(run)
            self._errors[run.id] = error
            if self._sweep is not None:
                queue.say(f"✗ {_called(run)}  {error}")

    # --- stages that are jobs of a cluster ---------------------------------------------------------------------------

    def _queue(self, runs: Sequence[runner.Run], name: str, wait: bool) -> None:
        """All of them as one graph of jobs; whoever wants their values waits for them."""
        sanity.check(runs, name, queue.say, probe=not self._probed)
        self._probed = True
        if self._sweep is not None:  # what is refused is no sweep; what is queued must be one, to be cancelled
            self._sweep.write()
        stop = Either(self._stop, self._is_cancelled)
        queue.show_submission(name, len(runs), submission.submit(runs, name, queue.say, stop))
        for run in runs:
            with suppress(AlignmentError, OSError):  # its jobs write it when they are done, if there are any
                if run.finished():
                    page.write_report(run.folder, run.store.root)
        if self._stop.asked:  # while the last jobs were sent
            raise watching.jobs_go_on(self._stop.asked)
        if not wait:
            return
        store, folders = runs[0].store, [run.folder for run in runs]
        ended = watching.until_done(folders, store, self._stop, lambda states: self._prune_jobs(runs, states))
        for run, state in zip(runs, ended, strict=True):
            self._end(run, state)

    def _end(self, run: runner.Run, state: dict[str, Any]) -> None:
        """Of a run whose jobs have ended."""
        run.state["nodes"] = state["nodes"]  # what has become of its stages
        with suppress(AlignmentError, OSError):
            page.write_report(Path(state["folder"]), run.store.root, state)
        error = _failure(run, state)
        if error is not None and run.id not in self._pruned:
            self._trials.drop(run)
            self._errors[run.id] = error

    def _prune_jobs(self, runs: Sequence[runner.Run], states: Sequence[dict[str, Any]]) -> None:
        """Cancel the jobs of those that are hopeless now, unless a run that goes on needs what they train."""
        broken = {
            state["run"] for state in states if any(n["state"] in ("failed", "cancelled") for n in state["nodes"])
        }
        for run in runs:
            if run.id in broken:
                self._trials.drop(run)
        hopeless = self._trials.look_at(runs)
        found = [(run, hopeless[run.id]) for run in runs if run.id in hopeless]
        if not found:
            return
        assert self._sweep is not None  # trials are those of a sweep
        trained = {run.folder: pruning.judged(run).key for run, _ in found}
        try:
            pruned = cancelling.prune(runs[0].store, self._sweep.id, list(trained), trained, self._stop)
        except MachineError as error:
            queue.say(f"warning: hopeless trials go on for now: {error}")
            return
        for run, why in found:
            if run.folder in pruned:
                self._prune(run, why)

    # --- hopeless trials ---------------------------------------------------------------------------------------------

    def _prune(self, run: runner.Run, why: str) -> None:
        assert self._sweep is not None  # trials are those of a sweep
        self._pruned[run.id] = why
        self._trials.drop(run)
        run.note_pruned(why)
        self._sweep.prune(run)
        queue.say(f"✂ {_called(run)}  pruned: {why}")

    def _was_pruned(self, run: runner.Run) -> bool:
        """By the same command, when it was given before; what another one has made of it since counts."""
        if self._sweep is None or not self._sweep.is_pruned(run):
            return False
        if all(run.store.record(node.key) for node in run.nodes):
            self._sweep.prune(run, False)
            return False
        if run.id not in self._pruned:
            self._pruned[run.id] = "by this command, when it was given before"
            queue.say(f"✂ {_called(run)}  was pruned {self._pruned[run.id]}")
        self._trials.drop(run)
        return True


def plan_sweep(
    settings: Sequence[str], config_dir: Path | None = None
) -> tuple[str, list[runner.Run], list[list[str]]]:
    """The name of the sweep that `alignment run -m` would make of the settings, its runs, and of each the settings that
    nothing reads; nothing is stored."""
    points: list[Point] = []
    given: list[str] = []

    def note(some: Sequence[Point | Refused], master: DictConfig | None) -> list[None]:
        assert master is not None  # of -m
        if search.learns(master):
            what = "a search asks for its next trials by what became of the last ones: there is no sweep to plan"
            raise ConfigError(what, where="-m", fix="plan one trial: without -m, with a value for each setting")
        points.extend(point for point in some if isinstance(point, Point))  # only a search has others
        given[:] = [setting for setting in _settings(master) if setting != elsewhere]
        return [None] * len(some)

    with tempfile.TemporaryDirectory() as aside:  # for what Hydra's sweeper writes, before it asks for any job
        elsewhere = f"hydra.sweep.dir={quoted(aside)}"
        folders = ["--config-dir", str(config_dir)] if config_dir else []
        hydra_app.main(["--multirun", *folders, *settings, elsewhere], note, warn=False)
    with one_look():
        runs = [runner.Run(point.experiment, point.command) for point in points]
    _are_jobs(runs)
    queue.say_alike(runs)
    different: dict[Any, runner.Run] = {}
    for run in runs:  # the first of those that are alike makes it
        different.setdefault(run.place, run)
    idle = [unread(point.experiment, point.overrides) for point in points]
    return sweeps.name_of(runs[0], given), [*different.values()], idle


def _settings(master: DictConfig) -> list[str]:
    """That were given for a multirun."""
    return [*master.hydra.overrides.task, *master.hydra.overrides.hydra]


def _called(run: runner.Run) -> str:
    return "  ".join(filter(None, [run.id, run.own]))


def _own(point: Point | Refused, master: DictConfig | None) -> str:
    """In what it differs from the other points of its multirun, in words."""
    return own_settings(point.overrides, _settings(master)) if master is not None else ""


def _are_jobs(runs: Sequence[runner.Run]) -> bool:
    """Whether their stages are jobs of a cluster. Raises ConfigError for points that cannot be one graph."""
    clustered = {isinstance(run.experiment.launcher, SlurmLauncher) for run in runs}
    if len(clustered) > 1 or (clustered == {True} and len({run.store.root for run in runs}) > 1):
        what = "the points of a sweep of jobs share one launcher and one store"
        raise ConfigError(what, where="command line", fix="sweep over something else than `launcher` and `store`")
    return clustered == {True}


def _failure(run: runner.Run, state: dict[str, Any]) -> AlignmentError | None:
    """Of a run whose jobs have ended: why not all of its stages are there, in the words of the first that failed."""
    if state["state"] in UNKNOWN:
        return MachineError("its run.json cannot be read", where=str(run.folder), fix="alignment status")
    broken = [node for node in state["nodes"] if node["state"] not in DONE]
    if not broken:
        return None
    node = next((node for node in broken if node["state"] == "failed"), broken[0])
    kind = BY_CODE.get(node["code"], StageFailed) if "code" in node else LostError
    became = {"failed": "has failed", "cancelled": "was cancelled", "waiting": "was not made"}.get(node["state"])
    why = node.get("error") or "no job is known that makes it"
    return kind(f"{node['name']} {became or 'is ' + node['state']}: {why}", where=run.id)


def _meeting(run: runner.Run) -> tuple[Any, ...] | None:
    """Of several machines that were joined by hand: where, and as what this one."""
    launcher = run.experiment.launcher
    if not isinstance(launcher, TorchrunLauncher) or launcher.nodes == 1:
        return None
    return run.store.root, launcher.head, launcher.nodes, launcher.processes, launcher.rank


def _followed(run: runner.Run, follower: Follower) -> None:
    follower.follow(run)
    for line in run.state["nodes"]:  # rank 0 writes run.json
        line["state"] = "reused"


def _from_plan_to_report(
    run: runner.Run, stop: Asked, failed: dict[str, AlignmentError], leader: Leader | None
) -> None:
    terminal.announce(run.id, run.folder, runner.plan(run), run.own)
    try:
        with leader.at(run) if leader else nullcontext(), terminal.StageProgress() as observer:
            runner.execute(run, observer, stop, failed)
    except (AlignmentError, Stopped):
        with suppress(AlignmentError, OSError):  # what there is, and what failed; the cause itself comes first
            terminal.show_report(page.write_report(run.folder, run.store.root))
        raise
    report = page.write_report(run.folder, run.store.root)
    terminal.show_summary(gather.summarise(run.state, run.store.root), report)
