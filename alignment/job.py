"""The driver of one stage inside its SLURM job: `python -m alignment.job <batch.json> <index>`, on its first node.

It does for one node of the graph what `alignment run` does for all: takes the key's lock, runs attempts (as steps of
the job), watches over them, commits. A stage that was stopped in order has the job queued again, to go on from there.
"""

from __future__ import annotations

import os
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from alignment.allocation import Allocation, allocation
from alignment.config.schema import Experiment, SlurmLauncher
from alignment.errors import AlignmentError, InputError, LostError, MachineError, PreemptedError
from alignment.files import read_json
from alignment.launchers import slurm
from alignment.pipeline.graph import Node
from alignment.pipeline.identity import difference
from alignment.pipeline.runner import Run, bring
from alignment.reporting import page
from alignment.reporting.terminal import StageProgress
from alignment.signals import SIGNALS, Listener, Stopped

QUIET = 30.0  # seconds between two lines of progress
TOO_OFTEN = "the same command submits it again, and it goes on; launcher.max_restarts is the bound"
TO_BE_KILLED = 120.0  # seconds that SLURM gets to end this process, once it has queued the job again


def main(arguments: list[str]) -> int:
    stop = Listener().listen(again=lambda: None)  # SLURM signals more than once, and kills whom it wants to be gone
    here = allocation()
    try:
        if here is None:
            raise MachineError("this is no job of a cluster", fix="alignment run launcher=slurm queues them")
        with stop.deferred():
            run, node = _run(read_json(Path(arguments[0]))[arguments[1]])
        return _bring(run, node, here, stop)
    except AlignmentError as error:
        print(f"alignment: error: {error}", file=sys.stderr, flush=True)
        return error.exit_code
    except Exception:
        traceback.print_exc()
        return 1


def _run(order: dict[str, Any]) -> tuple[Run, Node]:
    """The run and its node. Raises InputError if this node computes another key than the submission did."""
    state = read_json(Path(order["run"]) / "run.json")
    run = Run(Experiment.model_validate(state["config"]), state["command"], writes=False, sweep=state.get("sweep"))
    node = run.node(order["node"])
    if node.key != order["key"]:
        at, was, now = difference(order["identity"], node.identity)
        what = f"{node.name} is not what was submitted: {at} was {was!r}, is {now!r}"
        raise InputError(what, where=f"on {os.uname().nodename}", fix="submit it again, with the same packages here")
    return run, node


def _bring(run: Run, node: Node, here: Allocation, stop: Listener) -> int:
    launcher = run.experiment.launcher
    assert isinstance(launcher, SlurmLauncher)
    _say(f"{node.name} of {run.id}: job {here.job} on {here.nodes}, restart {here.restarts}")
    for parent in node.parents.values():
        if run.store.record(parent.key) is None:
            what = f"the result of {parent.name} is not there: its job has failed, or it was removed"
            raise MachineError(what, where=str(run.store.result(parent.key)), fix="alignment status; then run it again")
    if run.store.lock(node.key).take_over():
        _say("an earlier start of this job still holds the lock: its node is cut off. It is replaced")
    try:
        with StageProgress(every=QUIET) as observer:
            bring(run, node, observer, stop)
    except (PreemptedError, Stopped) as stopped:
        _say(f"{stopped}")
        return _again(here, launcher, "was stopped in order")
    except LostError as lost:
        if not (gone := slurm.silent_nodes(here.nodes)):
            raise
        _say(f"{lost}")
        return _again(here, launcher, f"has lost {', '.join(gone)}")
    _report(run)
    return 0


def _report(run: Run) -> None:
    """By the last of a run's jobs. That it cannot be written must not make a stage fail that is done."""
    try:
        if run.finished():
            _say(f"{run.id} is done: {page.write_report(run.folder, run.store.root)}")
    except (AlignmentError, OSError) as error:
        _say(f"the report cannot be written: {error}")


def _again(here: Allocation, launcher: SlurmLauncher, why: str) -> int:
    """Queue the job again, unless it was cancelled or has been often enough. SLURM then ends this process."""
    state = slurm.state(here.job)
    if state != "RUNNING":  # cancelled, or queued again by SLURM itself: by now it is COMPLETING
        _say(f"the job {why}, and is {state}")
        return PreemptedError.exit_code
    if slurm.restarts(here.job) != here.restarts:  # this one was cut off: the job runs elsewhere by now
        _say(f"the job {why}, and has started again without this one")
        return PreemptedError.exit_code
    if here.restarts >= launcher.max_restarts:
        what = f"the job {why}, after {here.restarts} restarts: it is not queued again"
        print(f"alignment: error: {LostError(what, fix=TOO_OFTEN)}", file=sys.stderr, flush=True)
        return PreemptedError.exit_code
    _say(f"the job {why}: it is queued again")
    slurm.requeue(here.job)
    _wait_to_be_ended()
    return PreemptedError.exit_code


def _wait_to_be_ended() -> None:
    for number in SIGNALS:
        signal.signal(number, signal.SIG_DFL)
    time.sleep(TO_BE_KILLED)


def _say(text: str) -> None:
    print(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}", flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
