"""Stages as processes of this machine: one process, or several under torchrun for the stages that train."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time

from alignment.launchers.base import Handle, Job, environment

PR_SET_PDEATHSIG = 1


class Process:
    """A running job: the process group that was started for it."""

    def __init__(self, command: list[str], job: Job, processes: int):
        parent = os.getpid()
        with open(job.folder / "log.txt", "ab") as log:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment(job, processes),
                pass_fds=[job.lock],
                start_new_session=True,  # Ctrl-C reaches the driver alone, which then stops the job in order
                preexec_fn=lambda: die_with_parent(parent),
            )

    def status(self) -> int | None:
        return self._process.poll()

    def stop(self, grace: float) -> None:
        for sign, patience in ((signal.SIGTERM, grace), (signal.SIGKILL, 10.0)):
            try:
                os.killpg(self._process.pid, sign)
            except ProcessLookupError:
                return
            end = time.monotonic() + patience
            while self._process.poll() is None and time.monotonic() < end:
                time.sleep(0.05)
            if self._process.poll() is not None:
                return


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
            *("-m", "alignment.worker", str(job.folder)),
        ]
        return Process(command, job, self.processes)


def die_with_parent(parent: int) -> None:
    """Have the kernel end this process when its parent dies, so that a killed driver leaves no worker behind."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before we asked
        os._exit(1)
