"""Stages as processes of this machine: one process, or several under torchrun for the stages that train."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

from alignment.launchers.base import Handle, Job, environment
from alignment.life import Beat, beats, die_with_parent, started_by
from alignment.signals import PASSED_ON, SIGNALS


class Process:
    """A running job: the process group that was started for it.

    log: where its output goes, if not into the work folder's. more: variables of its environment.
    """

    def __init__(self, command: list[str], job: Job, log: Path | None = None, more: dict[str, str] | None = None):
        self._several = job.world_size > 1
        with open(log or job.folder / "log.txt", "ab") as output:
            self._process = start(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment(job) | (more or {}),
                pass_fds=[job.lock],
                start_new_session=True,  # Ctrl-C reaches the driver alone, which then has the job stop in order
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
        return Process(worker(job.folder), job)


class TorchrunLauncher:
    """A stage that can use several processes gets them."""

    def submit(self, job: Job) -> Handle:
        if job.world_size == 1:
            return LocalLauncher().submit(job)
        return Process(torchrun(job.folder, job.processes, ["--standalone", "--local-addr", "127.0.0.1"]), job)


def worker(folder: Path) -> list[str]:
    """The command of a stage that is one process."""
    return [sys.executable, "-m", "alignment.worker", str(folder)]


def torchrun(folder: Path, processes: int, meeting: list[str]) -> list[str]:
    """The command of this machine's processes of a stage. meeting: torchrun's arguments of where they meet others."""
    return [
        *(sys.executable, "-m", "torch.distributed.run", *meeting),
        *("--nproc-per-node", str(processes), "--max-restarts", "0"),
        *("--signals-to-handle", "SIGQUIT"),  # the others stay blocked, as `begin` has left them
        *("-m", "alignment.worker", str(folder)),
    ]


def meeting(nodes: int, rank: int, head: str) -> list[str]:
    """torchrun's arguments of a machine that has this rank among several. head: host:port on that of rank 0.

    Static: by c10d's own election rank 0 is often on another machine than the one that leads.
    """
    host, _, port = head.rpartition(":")
    return ["--nnodes", str(nodes), "--node-rank", str(rank), "--master-addr", host, "--master-port", port]


def ask(folder: Path, ranks: range, told: set[int]) -> None:
    """Pass a request to stop on to those ranks that live here, to each once, as soon as it listens: it does when it
    shows life. told: their pids; grows."""
    for rank, beat in beats(folder).items():
        if rank in ranks and beat.pid not in told and not beat.ended:
            told.add(beat.pid)
            beat.signal(PASSED_ON)


def start(command: list[str], **how: Any) -> subprocess.Popen[bytes]:
    """A child that begins as `begin` says."""
    parent = os.getpid()
    return subprocess.Popen(command, preexec_fn=lambda: begin(parent), **how)


def begin(parent: int) -> None:
    """In a new process, before its program: it dies with its parent, and signals to stop wait until the worker listens
    to them itself.

    So none is lost on an interpreter that is still starting, and none ends torchrun, which would take with it the ranks
    that still save: who asks them does so one by one.
    """
    die_with_parent(parent)
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
