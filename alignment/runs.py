"""From settings to work: one run here, the points of a sweep one after the other, or all as jobs of a cluster."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from alignment.config.schema import SlurmLauncher, TorchrunLauncher
from alignment.errors import AlignmentError, ConfigError, LostError, PreemptedError
from alignment.hydra_app import Point, learns
from alignment.pipeline import runner, sanity, submission, sweeps
from alignment.pipeline.following import Follower
from alignment.pipeline.identity import one_look
from alignment.pipeline.leading import Leader
from alignment.reporting import gather, page, queue, terminal, watching
from alignment.signals import Listener, Stopped

Value = float | AlignmentError | None  # of a point: its reward, why it failed, or nothing (yet)


class Session:
    """What one `alignment run` asks for. stop: hears the signals of this process. wait: until jobs of a cluster have
    ended; a sweeper that chooses its next points by the values of these waits in any case."""

    def __init__(self, stop: Listener, wait: bool, arguments: Sequence[str]):
        self._stop, self._wait, self._arguments = stop, wait, arguments
        self._sweep: sweeps.Sweep | None = None
        self._failed: dict[str, AlignmentError] = {}  # stages that are not tried again for the next point
        self._errors: dict[str, AlignmentError] = {}  # points that failed
        self._count = 0
        self._probed = False  # a sweeper that learns comes back for each of its rounds
        self._leader: Leader | None = None  # what the other machines of a run see of this one
        self._follower: Follower | None = None

    def execute(self, points: Sequence[Point], master: DictConfig | None) -> Sequence[Value]:
        """The value of each point. One that fails does not stop the others: `finish` raises what became of it.

        master: the config of the multirun that the points belong to, or None.
        """
        with one_look():  # at each file that keys are made of
            runs = [runner.Run(point.experiment, point.command) for point in points]
        self._count += len(runs)
        self._meet(runs)
        if self._follower is not None:
            return [self._here(run) for run in runs]
        name = runs[0].id if master is None else self._note_sweep(master, points, runs)
        clustered = {isinstance(run.experiment.launcher, SlurmLauncher) for run in runs}
        if clustered == {False}:
            return [self._here(run) for run in runs]
        if len(clustered) > 1 or len({run.store.root for run in runs}) > 1:
            what = "the points of a sweep of jobs share one launcher and one store"
            raise ConfigError(what, where="command line", fix="sweep over something else than `launcher` and `store`")
        return self._queue(runs, name, wait=self._wait or (master is not None and learns(master)))

    def finish(self) -> None:
        """Raises the failure of the only run, or what became of the points of a sweep."""
        errors = list(self._errors.values())
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

    def _note_sweep(self, master: DictConfig, points: Sequence[Point], runs: Sequence[runner.Run]) -> str:
        if self._sweep is None:
            self._sweep = sweeps.Sweep([*master.hydra.overrides.task, *master.hydra.overrides.hydra], self._arguments)
        self._sweep.add([(run, point.overrides) for run, point in zip(runs, points, strict=True)])
        return self._sweep.id

    def _here(self, run: runner.Run) -> Value:
        if self._stop.asked:  # while the point before ended well
            raise Stopped(self._stop.asked)
        try:
            if self._follower is not None:
                return _followed(run, self._follower)
            return _from_plan_to_report(run, self._stop, self._failed, self._leader)
        except PreemptedError:
            raise
        except AlignmentError as error:
            self._errors[run.id] = error
            if self._sweep is not None:
                queue.say(f"✗ {run.id}  {error}")
            return error

    def _queue(self, runs: Sequence[runner.Run], name: str, wait: bool) -> Sequence[Value]:
        """All of them as one graph of jobs; whoever wants their values waits for them."""
        sanity.check(runs, name, queue.say, probe=not self._probed)
        self._probed = True
        queue.show_submission(name, len(runs), submission.submit(runs, name, queue.say))
        for run in runs:
            with suppress(AlignmentError, OSError):  # its jobs write it when they are done, if there are any
                if run.finished():
                    page.write_report(run.folder, run.store.root)
        if not wait:
            return [None] * len(runs)
        ended = watching.until_done([run.folder for run in runs], runs[0].store, self._stop)
        return [self._value(state, runs[0].store.root) for state in ended]

    def _value(self, state: dict[str, Any], store: Path) -> Value:
        """Of a run whose jobs have ended."""
        with suppress(AlignmentError, OSError):
            page.write_report(Path(state["folder"]), store, state)
        failed = next((node for node in state["nodes"] if node["state"] in ("failed", "cancelled")), None)
        if failed is None:
            return gather.objective(gather.summarise(state, store))
        error = LostError(f"{failed['name']} has {failed['state']}: {failed['error']}", where=state["run"])
        self._errors[state["run"]] = error
        return error


def _meeting(run: runner.Run) -> tuple[Any, ...] | None:
    """Of several machines that were joined by hand: where, and as what this one."""
    launcher = run.experiment.launcher
    if not isinstance(launcher, TorchrunLauncher) or launcher.nodes == 1:
        return None
    return run.store.root, launcher.head, launcher.nodes, launcher.processes, launcher.rank


def _followed(run: runner.Run, follower: Follower) -> float | None:
    follower.follow(run)
    for line in run.state["nodes"]:  # rank 0 writes run.json
        line["state"] = "reused"
    return gather.objective(gather.summarise(run.state, run.store.root))


def _from_plan_to_report(
    run: runner.Run, stop: Listener, failed: dict[str, AlignmentError], leader: Leader | None
) -> float | None:
    terminal.announce(run.id, run.folder, runner.plan(run))
    try:
        with leader.at(run) if leader else nullcontext(), terminal.StageProgress() as observer:
            runner.execute(run, observer, stop, failed)
    except (AlignmentError, Stopped):
        with suppress(AlignmentError, OSError):  # what there is, and what failed; the cause itself comes first
            terminal.show_report(page.write_report(run.folder, run.store.root))
        raise
    report = page.write_report(run.folder, run.store.root)
    summary = gather.summarise(run.state, run.store.root)
    terminal.show_summary(summary, report)
    return gather.objective(summary)
