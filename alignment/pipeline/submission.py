"""Runs as jobs of a SLURM cluster: one graph of what the store lacks, each key once, as few submissions as can be.

jobs/<submission>/       the scripts as they were submitted, what each element of an array is to do, what jobs print
jobs/<submission>/runs/  the settings that they were submitted with: what becomes of run.json is nothing to them
"""

from __future__ import annotations

import os
import secrets
import shlex
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from alignment.config.launchers import Resources, SlurmLauncher
from alignment.errors import MachineError
from alignment.files import remove, write_json, write_text
from alignment.launchers import slurm
from alignment.pipeline import claims, ledger, snapshot
from alignment.pipeline.batches import Batch, Task, Wait, batches, nearest
from alignment.pipeline.graph import Node
from alignment.pipeline.runner import Run
from alignment.signals import Asked, Stopped

TEMPLATE = "job.sbatch.jinja"
LAUNCHERS = Path(slurm.__file__).resolve().parent
LARGEST = 1001  # of an array, where SLURM is not asked
Say = Callable[[str], None]


@dataclass(frozen=True)
class Owner:
    """A node that is to be made, and the first of the runs that need it."""

    run: Run
    node: Node

    @property
    def launcher(self) -> SlurmLauncher:
        launcher = self.run.experiment.launcher
        assert isinstance(launcher, SlurmLauncher)
        return launcher

    @cached_property
    def resources(self) -> Resources:
        return self.launcher.resources(self.node.stage, self.node.name, distributed=self.node.settings.distributed)


class Submission:
    """What is missing of these runs, as jobs. queued: key -> job that makes it already.

    After `submit` jobs: key -> job, of all that is queued."""

    def __init__(self, runs: Sequence[Run], name: str, queued: Mapping[str, str], largest: int = LARGEST):
        self.store, self.name, self.jobs = runs[0].store, name, dict(queued)
        self.id = f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"
        self.folder = self.store.root / ledger.JOBS / self.id
        self.numbers: dict[int, str] = {}  # of batches that are submitted
        self.owners = missing(runs)
        self.count = len({node.key for run in runs for node in run.nodes})  # of all stages, each once
        above = nearest(_parents(self.owners))
        tasks = [
            Task(key, owner.node.name, _alike(owner), above[key])
            for key, owner in self.owners.items()
            if key not in queued
        ]
        self.batches = batches(tasks, queued, largest)

    def scripts(self) -> list[str]:
        """As `submit` would send them; jobs that have no number yet are named."""
        code = self.store.root / "code" / "CODE"
        return [self._script(batch, code, self._unnumbered) for batch in self.batches]

    def waits_for(self, batch: Batch) -> str:
        """In words: job numbers, after `submit`."""
        return ", ".join(dict.fromkeys(_dependency(wait, self.numbers.__getitem__) for wait in batch.waits))

    def _unnumbered(self, number: int) -> str:
        return f"<{self._path(self.batches[number]).name}>"

    def submit(self, asked: Callable[[], str | None] = lambda: None) -> None:
        """Queue all batches. What is queued stays if a later one is refused, or if this process is asked to stop
        (Stopped): the same command submits the rest. asked: why to."""
        code = snapshot.take(self.store.root)
        self._write_settings()
        begun = self.folder / ledger.BEGUN
        write_text(begun, self.name)
        for batch in self.batches:
            if why := asked():
                raise Stopped(
                    f"{why}, {len(self.numbers)} of {len(self.batches)} submissions of {self.name} are queued"
                )
            script = self._script(batch, code, self.numbers.__getitem__)
            path = self._path(batch)
            orders = {str(index): self._order(task) for index, task in batch.elements.items()}
            write_json(path.with_suffix(".json"), orders)
            write_text(path.with_suffix(".sbatch"), script)
            try:
                self.numbers[batch.number] = number = slurm.submit(script)
            except MachineError as error:
                raise self._half(error) from error
            self.jobs |= ledger.note(self.store, path, number, orders, array=batch.array)
        remove(begun)

    def _half(self, error: MachineError) -> MachineError:
        """An error that also says what is queued already."""
        if not self.numbers:
            return error
        what = f"{error.what}; {len(self.numbers)} of {len(self.batches)} submissions are queued"
        fix = f"the same command queues the rest, alignment cancel {self.name} ends these"
        return MachineError(what, where=error.where, fix=fix)

    def claim(self, runs: Sequence[Run]) -> None:
        """Have the jobs that there are so far stay in the queue for these runs. Raises OSError."""
        waited_for = {run.id: [self.jobs[node.key] for node in run.nodes if node.key in self.jobs] for run in runs}
        claims.add(self.store, self.name, waited_for)

    def _write_settings(self) -> None:
        runs = [self.owners[task.key].run for batch in self.batches for task in batch.elements.values()]
        for run in {run.id: run for run in runs}.values():
            told = {name: run.state[name] for name in ("config", "command", "sweep")}
            write_json(self._settings(run), told, durable=False)

    def _settings(self, run: Run) -> Path:
        return self.folder / "runs" / f"{run.id}.json"

    def _order(self, task: Task) -> dict[str, Any]:
        run, node = self.owners[task.key].run, self.owners[task.key].node
        told = {"run": run.id, "node": task.name, "key": task.key}
        return {**told, "settings": str(self._settings(run)), "identity": node.identity}

    def _path(self, batch: Batch) -> Path:
        """Without its ending, of the files that belong to a batch."""
        return self.folder / f"{batch.number:03d}-{next(iter(batch.elements.values())).name}"

    def _label(self, batch: Batch) -> str:
        first, count = next(iter(batch.elements.values())), len(batch.elements)
        return f"{first.name}-{batch.number}" if not batch.array else f"{first.name}-{batch.number}, {count} of them"

    def _script(self, batch: Batch, code: Path, number_of: Callable[[int], str]) -> str:
        owner = self.owners[next(iter(batch.elements.values())).key]
        path = self._path(batch)
        options = self._options(batch, owner, path, number_of)
        return script(
            f"{self._label(batch)} of {self.name}",
            options,
            owner.launcher,
            code,
            "alignment.job",
            path.with_suffix(".json"),
        )

    def _options(
        self, batch: Batch, owner: Owner, path: Path, number_of: Callable[[int], str]
    ) -> dict[str, str | int | bool]:
        launcher = owner.launcher
        options: dict[str, str | int | bool] = {"job-name": f"{self.name}.{owner.node.name}"}
        if batch.array:
            most = f"%{launcher.max_parallel}" if launcher.max_parallel else ""
            options["array"] = _ranges(batch.elements) + most
        if batch.waits:
            options["dependency"] = ",".join(_dependency(wait, number_of) for wait in batch.waits)
        options["kill-on-invalid-dep"] = "yes"
        options |= asked(owner.resources)
        options |= {
            "requeue": True,
            "open-mode": "append",
            "output": literal(path) + ("-%A_%a.out" if batch.array else "-%j.out"),
            "signal": f"B:USR1@{launcher.grace}",
            "chdir": os.getcwd(),
        }
        return {**options, **launcher.options}


def script(what: str, options: Mapping[str, Any], launcher: SlurmLauncher, code: Path, module: str, told: Path) -> str:
    """A job's: it prepares the environment as launcher says, and runs the module, whose argument is the file `told`."""
    environment = Environment(
        loader=FileSystemLoader(LAUNCHERS), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
        keep_trailing_newline=True, autoescape=False,
    )  # fmt: skip
    environment.filters["quote"] = shlex.quote
    return environment.get_template(TEMPLATE).render(
        what=what,
        directives=directives(options),
        setup=launcher.setup,
        code=str(code),
        variables={"PYTHONSAFEPATH": "1", **_network(launcher)},
        command=f"{shlex.quote(launcher.python or sys.executable)} -m {module} {shlex.quote(str(told))}",
    )


def missing(runs: Sequence[Run]) -> dict[str, Owner]:
    """Key -> what is to be made, parents first."""
    found: dict[str, Owner] = {}
    done: set[str] = set()
    for run in runs:
        for node in run.nodes:
            if node.key in found or node.key in done:
                continue
            if run.store.record(node.key) is not None:
                done.add(node.key)
            else:
                found[node.key] = Owner(run, node)
    return found


def _parents(owners: Mapping[str, Owner]) -> dict[str, list[str]]:
    """Of each the parents that are to be made too."""
    return {
        key: [parent.key for parent in owner.node.parents.values() if parent.key in owners]
        for key, owner in owners.items()
    }


def _alike(owner: Owner) -> tuple[Any, ...]:
    """Equal for stages whose jobs may differ in nothing but what they work on."""
    return owner.node.stage, owner.node.kind, repr(owner.resources), owner.launcher.model_dump_json()


def asked(resources: Resources) -> dict[str, str | int | bool]:
    """Resources as options of sbatch."""
    cpus = resources.cpus_per_process
    limit = resources.time_limit
    named = {
        "nodes": resources.nodes,
        "ntasks-per-node": 1,  # an agent, which starts the processes
        "cpus-per-task": cpus * resources.processes if cpus else None,
        "gpus-per-node": resources.gpus_per_node,
        "mem": resources.memory,
        "time": None if limit is None else -(-limit // 60),
        "partition": resources.partition,
        "account": resources.account,
        "qos": resources.qos,
        "constraint": resources.constraint,
        "exclude": resources.exclude,
        "comment": resources.comment,
    }
    return {name: value for name, value in named.items() if value is not None}


def literal(path: Path) -> str:
    """As a part of sbatch's --output, where a % begins what SLURM fills in: %j is the job's number."""
    return str(path).replace("%", "%%")


def directives(options: Mapping[str, str | int | bool]) -> list[str]:
    """Options of sbatch as lines of a script; a True has no value, a False is no line."""
    return [f"#SBATCH --{name}{_value(value)}" for name, value in options.items() if value is not False]


def _value(value: str | int | bool) -> str:
    if value is True:
        return ""
    text = str(value)
    return f'="{text}"' if " " in text or "\t" in text else f"={text}"


def _network(launcher: SlurmLauncher) -> dict[str, str]:
    """NCCL reads `=` before exact names and `^` before those that it may not take; gloo reads names alone."""
    if launcher.interface is None:
        return {}
    nccl = {"NCCL_SOCKET_IFNAME": launcher.interface}
    return nccl if "^" in launcher.interface else {**nccl, "GLOO_SOCKET_IFNAME": launcher.interface.lstrip("=")}


def _dependency(wait: Wait, number_of: Callable[[int], str]) -> str:
    if wait.job is not None:
        return f"{wait.how}:{wait.job}"
    assert wait.batch is not None
    number = number_of(wait.batch)
    return f"{wait.how}:{number}" if wait.index is None else f"{wait.how}:{number}_{wait.index}"


def _ranges(numbers: Iterable[int]) -> str:
    """0-3,7 of 0, 1, 2, 3, 7."""
    found: list[list[int]] = []
    for number in sorted(numbers):
        if found and number == found[-1][1] + 1:
            found[-1][1] = number
        else:
            found.append([number, number])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in found)


def submit(
    runs: Sequence[Run],
    name: str,
    say: Say = lambda text: None,
    stop: Asked | None = None,
) -> Submission:
    """Queue what is missing of these runs; at once, however much it is. stop: hears the signals of this process, so
    that none comes between a job and the note of it; between two submissions it is raised as Stopped."""
    with suppress(OSError):
        runs[0].store.root.mkdir(parents=True, exist_ok=True)
    with ledger.alone(runs[0].store, name, say):
        if stop and stop.asked:
            raise Stopped(stop.asked)
        ledger.remember(runs[0].store)
        submission = Submission(runs, name, ledger.queued(runs, say), slurm.largest_array())
        with stop.deferred() if stop else nullcontext():
            for run in runs:
                run.submitted(submission.owners)
            submission.claim(runs)  # what is queued already must not be cancelled from under us, if this is killed
            submission.submit(lambda: stop.asked if stop else None)
            submission.claim(runs)
    return submission
