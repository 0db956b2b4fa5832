"""Stages as steps of the SLURM job that this process is in: srun starts an agent on each node, that one the ranks."""

from __future__ import annotations

import errno
import os
import random
import re
import socket
import sys
from pathlib import Path

import alignment
from alignment.allocation import allocation
from alignment.config.launchers import Container, SlurmLauncher
from alignment.errors import MachineError
from alignment.launchers import slurm
from alignment.launchers.base import Handle, Job
from alignment.launchers.local import Process
from alignment.life import Beat

CODE = Path(alignment.__file__).parent.parent  # that the driver runs
APPTAINER = "apptainer"
CODE_FIRST = 'export PYTHONPATH="$0${PYTHONPATH:+:$PYTHONPATH}"; exec "$@"'
# Of a step whose program a node could not execute: its exit code is the system's error number, which is none of ours.
REFUSED = re.compile(r"^(?:slurmstepd|srun)\S*: error: execve\(\): (?P<program>.+): (?P<why>[^:\n]+)$", re.M)
NODE = re.compile(r"^srun: error: (\S+): tasks? \S+: Exited with exit code", re.M)
PORTS = range(20_000, 32_000)  # below those that kernels give to whoever asks for any


class Step(Process):
    """A running srun. Its ranks on this node are children of SLURM's daemon: they are known once they beat."""

    def ranks(self) -> dict[int, Beat]:
        return {}

    def kill(self) -> None:
        """srun alone, killed, would leave its processes to themselves."""
        if self.status() is None and (here := allocation()):
            slurm.kill_steps(here)
        super().kill()


class SrunLauncher:
    def __init__(self, settings: SlurmLauncher):
        self.settings = settings

    def submit(self, job: Job) -> Handle:
        command = step(self.settings, job.name, job.nodes, job.folder.parent.parent)
        command += ["-m", "alignment.launchers.agent", str(job.folder)]
        command += ["--nodes", str(job.nodes), "--processes", str(job.processes)]
        if job.world_size > 1:
            command += ["--meet", f"{slurm.head()}:{free_port(job.attempt)}"]
        return Step(command, job)


def step(settings: SlurmLauncher, name: str, nodes: int, store: Path) -> list[str]:
    """srun's command of one python on each node, but for python's arguments. In a container that sees the store."""
    command = ["srun", f"--nodes={nodes}", f"--ntasks={nodes}", "--ntasks-per-node=1"]
    command += ["--kill-on-bad-exit=1", "--unbuffered", f"--job-name={name}", "--input=none"]
    # A step does not take it from its job by itself. It is this job's: sbatch hears nothing of others.
    if cpus := os.environ.get("SLURM_CPUS_PER_TASK"):
        command.append(f"--cpus-per-task={cpus}")
    if settings.container is None:
        return [*command, settings.python or sys.executable]
    # The host's PYTHONPATH is for the host's python. An image may have its own, in the place of what it is given: that
    # comes behind the code.
    command = ["env", f"PYTHONPATH={CODE}", *command, *_inside(settings.container, store)]
    return [*command, "sh", "-c", CODE_FIRST, str(CODE), settings.python or "python3"]


def _inside(container: Container, store: Path) -> list[str]:
    """srun's arguments that have the rest of them run in a container, which sees the store and the code."""
    seen = [str(store), os.getcwd(), str(CODE)]
    if container.kind == "enroot":
        mounts = ",".join(f"{place}:{place}" for place in seen)
        workdir = f"--container-workdir={os.getcwd()}"
        return [f"--container-image={container.image}", f"--container-mounts={mounts}", workdir, *container.options]
    binds = [argument for place in seen for argument in ("--bind", place)]
    return [APPTAINER, "exec", *binds, "--pwd", os.getcwd(), *container.options, container.image]


def refused(said: str) -> MachineError | None:
    """If a node could not execute what it was to start, by srun's own words in what a step has said: what, where."""
    found = REFUSED.search(said)
    if found is None:
        return None
    program, why, node = found["program"], found["why"].strip(), NODE.search(said, found.end())
    on = f"on node {node[1]}" if node else "on a node of the job"
    missing = why == os.strerror(errno.ENOENT)
    what = f"{program} is not installed {on}" if missing else f"{program} cannot be started {on}: {why}"
    where = "launcher.container" if program == APPTAINER else "launcher.python"
    fix = (
        "install it there, have a line of launcher.setup put it on the PATH, or leave such nodes out: launcher.exclude"
    )
    return MachineError(what, where=where, fix=fix)


def free_port(attempt: int) -> int:
    """One that nobody listens on here. Jobs that start together on one node begin to look at different ones."""
    look = random.Random(f"{allocation()} {attempt}")
    for port in (look.choice(PORTS) for _ in range(1000)):
        with socket.socket() as probe:
            try:
                probe.bind(("", port))
            except OSError:
                continue
            return port
    raise OSError("no port between 20000 and 32000 is free")
