"""Stages as processes of this machine: one process, or several under torchrun for the stages that train."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from contextlib import suppress

from alignment.launchers.base import Handle, Job, environment
from alignment.life import Beat, die_with_parent, started_by
from alignment.signals import SIGNALS


class Process:
    """A running job: the process group that was started for it."""

    def __init__(self, command: list[str], job: Job, processes: int):
        parent, self._several = os.getpid(), processes > 1
        with open(job.folder / "log.txt", "ab") as log:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment(job, processes),
                pass_fds=[job.lock],
                start_new_session=True,  # Ctrl-C reaches the driver alone, which then has the job stop in order
                preexec_fn=lambda: _begin(parent),
            )

    def status(self) -> int | None:
        return self._process.poll()

    def ranks(self) -> dict[int, Beat]:
        return started_by(self._process.pid) if self._several else {}

    def kill(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(10.0)


class LocalLauncher:
    """Every stage as one process."""

    def submit(self, job: Job) -> Handle:
        return Process([sys.executable, "-m", "alignment.worker", str(job.folder)], job, 1)


class TorchrunLauncher:
    """`processes` processes a training stage; everything else as one."""

    def __init__(self, processes: int):
        self.processes = processes

    def submit(self, job: Job) -> Handle:
        if not job.distributed:
            return LocalLauncher().submit(job)
        command = [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"),
            *("--nproc-per-node", str(self.processes), "--max-restarts", "0"),
            *("--signals-to-handle", "SIGQUIT"),  # the others stay blocked, as `_begin` has left them
            *("-m", "alignment.worker", str(job.folder)),
        ]
        return Process(command, job, self.processes)


def _begin(parent: int) -> None:
    """In the new process, before its program: signals to stop wait until the worker listens to them itself.

    So none is lost on an interpreter that is still starting, and none ends torchrun, which would take with it the ranks
    that still save: the driver asks those one by one.
    """
    die_with_parent(parent)
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
