"""`alignment run` as it is, but for one thing: the ranks are forks of this process instead of new interpreters.

The command line, the driver, its supervisor, retries and store, and the worker from `main` on are the product's own.
"""

from __future__ import annotations

import atexit
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any, NoReturn

from alignment.files import read_json
from alignment.launchers.base import Job, environment
from alignment.launchers.local import begin
from alignment.life import Beat, unheard
from alignment.pipeline.supervisor import GRACE
from tests.forks import free_port, rank_environment, say_into


@dataclass(frozen=True)
class Fault:
    """What is done to a rank from within, before its worker begins.

    name: a function of tests.faults.inside. rank, attempt: which one has it; None: each.
    """

    name: str
    options: dict[str, Any] = field(default_factory=dict)
    rank: int | None = None
    attempt: int | None = 1


@dataclass(frozen=True)
class Order:
    """A driver to start. told: the file that takes what it says; errors: what it says to stderr, if not that one too.
    environment: beside that of the fork server."""

    arguments: list[str]
    told: Path
    environment: dict[str, str]
    faults: Sequence[Fault] = ()
    errors: Path | None = None


def drive(order: Order) -> NoReturn:
    """In a fork of its own: `alignment <arguments>`, and the end of the process."""
    os.setsid()
    os.environ.update(order.environment)
    os.chdir(order.told.parent)
    say_into(order.told, order.errors)
    from alignment import cli
    from alignment.pipeline import runner

    runner.launcher_for = lambda settings: Forking(order.faults)
    _leave(cli.main(order.arguments))


@dataclass(frozen=True)
class Forking:
    """A launcher like any other."""

    faults: Sequence[Fault]

    def submit(self, job: Job) -> Ranks:
        trains = read_json(job.folder / "stage.json")["distributed"]
        return Ranks(job, job.world_size, self.faults if trains else ())


class Ranks:
    """A running job. Once a rank has failed the others are asked to end, then ended, as torchrun does, but sooner."""

    def __init__(self, job: Job, processes: int, faults: Sequence[Fault]):
        self._several, self._parent, self._codes = processes > 1, os.getpid(), {}
        self._failed: float | None = None  # when the first rank did
        port, attempt = free_port(), read_json(job.folder / "stage.json")["attempt"]
        sys.stdout.flush(), sys.stderr.flush()
        for rank in range(processes):
            mine = [fault for fault in faults if fault.rank in (None, rank) and fault.attempt in (None, attempt)]
            pid = os.fork()
            if pid == 0:
                self._work(job, rank, processes, port, mine)
            self._codes[pid] = None

    def status(self) -> int | None:
        for pid, code in self._codes.items():
            if code is None and (found := os.waitpid(pid, os.WNOHANG))[0]:
                self._codes[pid] = os.waitstatus_to_exitcode(found[1])
        codes = list(self._codes.values())
        if None not in codes:
            return int(any(codes)) if self._several else codes[0]
        if self._several and any(codes):
            late = self._failed is not None and time.monotonic() - self._failed > GRACE
            if self._failed is None or late:
                self._send(signal.SIGKILL if late else signal.SIGTERM)
                self._failed = self._failed or time.monotonic()
        return None

    def ranks(self) -> dict[int, Beat]:
        found = (unheard(rank, pid) for rank, pid in enumerate(self._codes) if self._several)
        return {beat.rank: beat for beat in found if beat}

    def kill(self) -> None:
        self._send(signal.SIGKILL)
        for pid in [pid for pid, code in self._codes.items() if code is None]:
            self._codes[pid] = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

    def _send(self, number: int) -> None:
        for pid, code in self._codes.items():
            if code is None:
                with suppress(ProcessLookupError):
                    os.kill(pid, number)

    def _work(self, job: Job, rank: int, processes: int, port: int, faults: list[Fault]) -> NoReturn:
        """What a launcher's process would be, from its birth to its end."""
        code = 1
        try:
            os.setsid()
            begin(self._parent)
            kept = {0, 1, 2} if self._several else {0, 1, 2, job.lock}  # torchrun shares the lock, its ranks do not
            kept.add(resource_tracker._resource_tracker._fd)  # type: ignore[attr-defined]
            for handle in {int(name) for name in os.listdir("/proc/self/fd")} - kept:
                with suppress(OSError):
                    os.close(handle)
            given = environment(job)
            if self._several:
                given |= rank_environment(rank, processes, port)
            os.environ.clear()
            os.environ.update(given)
            say_into(job.folder / "log.txt")
            from alignment import worker
            from tests.faults import inside

            for fault in faults:
                getattr(inside, fault.name)(**fault.options)
            code = worker.main(job.folder)
        except BaseException:
            traceback.print_exc()
        finally:
            _leave(code)


def _leave(code: int) -> NoReturn:
    """As an interpreter ends, but for the frames that a fork has above it."""
    with suppress(BaseException):
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
    with suppress(OSError):
        sys.stdout.flush(), sys.stderr.flush()
    os._exit(code)
