"""The driver of one stage inside its SLURM job: `python -m alignment.job <batch.json> <index>`, on its first node.

It does for one node of the graph what `alignment run` does for all: takes the key's lock, runs attempts (as steps of
the job), watches over them, commits. A stage that was stopped in order has the job queued again, to go on from there.
"""

from __future__ import annotations

import math
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from alignment.allocation import Allocation, allocation
from alignment.config.launchers import SlurmLauncher
from alignment.config.schema import Experiment
from alignment.errors import AlignmentError, InputError, LostError, MachineError, PreemptedError, word_of_a_job
from alignment.files import read_json
from alignment.launchers import slurm
from alignment.pipeline.graph import Node
from alignment.pipeline.identity import difference
from alignment.pipeline.runner import Run, bring
from alignment.reporting import page
from alignment.reporting.terminal import StageProgress
from alignment.signals import SIGNALS, TIME_LIMIT, Asked, Listener, Stopped

Answer = TypeVar("Answer")
QUIET = 30.0  # seconds between two lines of progress
TOO_OFTEN = "the same command submits it again, and it goes on; launcher.max_restarts is the bound"
INSISTENT = 120.0  # seconds to ask SLURM again that does not answer
EARLY = 60.0  # seconds that SLURM, which counts in minutes, may ask too soon
TO_BE_KILLED = 120.0  # seconds that SLURM gets to end this process, once it has queued the job again


def main(arguments: list[str]) -> int:
    stop = Listener().listen(again=lambda: None)  # SLURM signals more than once, and kills whom it wants to be gone
    here = allocation()
    try:
        if here is None:
            raise MachineError("this is no job of a cluster", fix="alignment run launcher=slurm queues them")
        with stop.deferred():  # all that takes time looks at what was asked
            run, node = _run(read_json(Path(arguments[0]))[arguments[1]])
            return _bring(run, node, here, stop)
    except AlignmentError as error:
        print(word_of_a_job(error), file=sys.stderr, flush=True)
        return error.exit_code
    except Exception:
        traceback.print_exc()
        return 1


def _run(order: dict[str, Any]) -> tuple[Run, Node]:
    """The run and its node. Raises InputError if this node computes another key than the submission did."""
    given = read_json(Path(order["settings"]))
    run = Run(Experiment.model_validate(given["config"]), given["command"], writes=False, sweep=given["sweep"])
    node = run.node(order["node"])
    if node.key != order["key"]:
        at, was, now = difference(order["identity"], node.identity)
        what = f"{node.name} is not what was submitted: {at} was {was!r}, is {now!r}"
        raise InputError(what, where=f"on {os.uname().nodename}", fix="submit it again, with the same packages here")
    return run, node


class Request:
    """A Listener's, of which is known whether SLURM makes it because the job's time is over."""

    def __init__(self, listener: Listener, time_to_work: float | None):
        self._listener, self.deferred = listener, listener.deferred
        self._late = math.inf
        if time_to_work is not None:
            self._late = time.monotonic() + time_to_work - min(EARLY, time_to_work / 2)
        self._why: str | None = None

    @property
    def asked(self) -> str | None:
        if self._why is None and (asked := self._listener.asked):
            self._why = TIME_LIMIT if asked == "SIGUSR1" and time.monotonic() > self._late else asked
        return self._why


def _bring(run: Run, node: Node, here: Allocation, listener: Listener) -> int:
    launcher = run.experiment.launcher
    assert isinstance(launcher, SlurmLauncher)
    _say(f"{node.name} of {run.id}: job {here.job} on {here.nodes}, restart {here.restarts}")
    if here.restarts > launcher.max_restarts:  # by SLURM itself: a node that dies each time, say
        raise LostError(
            f"the job has started again {here.restarts} times", where="launcher.max_restarts", fix=TOO_OFTEN
        )
    stop = Request(listener, launcher.time_to_work(node.stage, node.name))
    try:
        _require_parents(run, node, stop)
        if run.store.lock(node.key).take_over():
            _say("an earlier start of this job still holds the lock: its node is cut off. It is replaced")
        with StageProgress(every=QUIET) as observer:
            bring(run, node, observer, stop)
    except (PreemptedError, Stopped) as stopped:
        _say(f"{stopped}")
        return _again(here, launcher, "was stopped in order")
    except LostError as lost:
        if not (gone := _silent_nodes(here)):
            raise
        _say(f"{lost}")
        return _again(here, launcher, f"has lost {', '.join(gone)}")
    _report(run)
    return 0


def _require_parents(run: Run, node: Node, stop: Asked) -> None:
    for role, parent in node.parents.items():
        if role in node.settings.ordering or run.store.awaited(parent.key, lambda: stop.asked) is not None:
            continue
        if stop.asked:
            raise Stopped(stop.asked)
        what = f"the result of {parent.name} is not there: its job has failed, or it was removed"
        raise MachineError(what, where=str(run.store.result(parent.key)), fix="alignment status; then run it again")


def _silent_nodes(here: Allocation) -> list[str]:
    try:
        return insist(lambda: slurm.silent_nodes(here.nodes))
    except MachineError as error:
        _say(f"{error}")
        return []


def _report(run: Run) -> None:
    """By the last of a run's jobs. That it cannot be written must not make a stage fail that is done."""
    try:
        if run.finished():
            _say(f"{run.id} is done: {page.write_report(run.folder, run.store.root)}")
    except (AlignmentError, OSError) as error:
        _say(f"the report cannot be written: {error}")


def _again(here: Allocation, launcher: SlurmLauncher, why: str) -> int:
    """Queue the job again, unless it was cancelled or has been often enough. SLURM then ends this process."""
    state = insist(lambda: slurm.state(here.job))
    if state != "RUNNING":  # cancelled, or queued again by SLURM itself: by now it is COMPLETING
        _say(f"the job {why}, and is {state}")
        return PreemptedError.exit_code
    if insist(lambda: slurm.restarts(here.job)) != here.restarts:  # this one was cut off: the job runs elsewhere by now
        _say(f"the job {why}, and has started again without this one")
        return PreemptedError.exit_code
    if here.restarts >= launcher.max_restarts:
        what = f"the job {why}, after {here.restarts} restarts: it is not queued again"
        print(word_of_a_job(LostError(what, fix=TOO_OFTEN)), file=sys.stderr, flush=True)
        return PreemptedError.exit_code
    _say(f"the job {why}: it is queued again")
    insist(lambda: slurm.requeue(here.job))
    _wait_to_be_ended()
    return PreemptedError.exit_code


def insist(ask: Callable[[], Answer]) -> Answer:
    """SLURM's answer, however often it takes: all is saved, and a controller that restarts must not lose it."""
    until, wait = time.monotonic() + INSISTENT, 1.0
    while True:
        try:
            return ask()
        except MachineError as error:
            if time.monotonic() + wait > until:
                raise
            _say(f"{error}; asked again in {wait:g} s")
        time.sleep(wait)
        wait = min(2 * wait, 15.0)


def _wait_to_be_ended() -> None:
    for number in SIGNALS:
        signal.signal(number, signal.SIG_DFL)
    time.sleep(TO_BE_KILLED)


def _say(text: str) -> None:
    print(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}", flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
