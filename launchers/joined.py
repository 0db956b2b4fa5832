"""Machines that work on a run together without a scheduler: what each says to the others, in a folder that all see.

joined/<host>-<port>/ in the store, named after launcher.head:
    rank-00000.json, rank-00000.beat    what the machine of that rank says, written as it changes, and its sign of life
    plan.json                           what rank 0 runs now: keys, and what they are made of
    order.json                          the attempt that rank 0 has begun on all machines, for as long as it lasts
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from alignment.config.launchers import TorchrunLauncher as Settings
from alignment.files import read_json, write_json
from alignment.launchers.base import Handle, Job
from alignment.launchers.local import Process, TorchrunLauncher, meeting, torchrun

EVERY = 1.0  # seconds between two beats
SILENCE = 60.0  # seconds without a beat after which a machine counts as gone; those that share files see them late
SIZE = 64  # bytes of a beat: the same each time, so that a full disk cannot stop it
Facts = dict[str, Any]


class Board:
    """The folder. head: HOST:PORT. Two runs cannot meet at one, so it is known before the run is."""

    def __init__(self, store: Path, head: str):
        self.name = head.replace(":", "-")
        self.folder = store / "joined" / self.name
        self.order, self.plan = self.folder / "order.json", self.folder / "plan.json"

    def facts(self, rank: int) -> Path:
        return self.folder / f"rank-{rank:05d}.json"

    def beat(self, rank: int) -> Path:
        return self.folder / f"rank-{rank:05d}.beat"

    def told(self, rank: int) -> Facts:
        return told(self.facts(rank)) or {}


def told(path: Path) -> Facts | None:
    """What a file says; nothing if there is none; None if it cannot be read now."""
    try:
        value = read_json(path)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None


class Presence:
    """Says that this machine is here, and what it does, for as long as this process lives.

    start: tells it from whoever has had the same rank before.
    """

    def __init__(self, board: Board, rank: int, **facts: Any):
        self.start = secrets.token_hex(8)
        self._board, self._rank, self._count, self._unsaid = board, rank, 0, True
        self._lock = threading.Lock()
        self._facts = {"start": self.start, **self.here(), **facts}
        board.folder.mkdir(parents=True, exist_ok=True)
        self.say()
        self._beat()
        threading.Thread(target=self._go_on, name="presence", daemon=True).start()

    @staticmethod
    def here() -> Facts:
        """Of this machine and process. boot: tells this machine from others that have its name."""
        try:
            boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        except OSError:
            boot = ""
        return {"host": socket.gethostname(), "boot": boot, "pid": os.getpid()}

    def say(self, **facts: Any) -> None:
        """Change what it says. What a full disk does not take is tried again with the next beat."""
        with self._lock:
            self._facts |= facts
            self._unsaid = True
            self._write()

    def _write(self) -> None:
        with suppress(OSError):
            write_json(self._board.facts(self._rank), self._facts)
            self._unsaid = False

    def _go_on(self) -> None:
        while True:
            time.sleep(EVERY)
            with self._lock, suppress(OSError):
                if self._unsaid:
                    self._write()
                self._beat()

    def _beat(self) -> None:
        """In place, and closed each time: a shared file system shows it to others only then."""
        self._count += 1
        handle = os.open(self._board.beat(self._rank), os.O_WRONLY | os.O_CREAT, 0o644)
        try:
            os.pwrite(handle, f"{self.start} {self._count}".ljust(SIZE).encode(), 0)
        finally:
            os.close(handle)


class Watched:
    """Another machine, as seen from here. Only a beat that changes is life: the file may be left from an earlier run.
    All by the clock of this machine."""

    def __init__(self, board: Board, rank: int, clock: Callable[[], float] = time.monotonic):
        self.rank, self._board, self._clock = rank, board, clock
        self._last: str | None = None
        self._alive: float | None = None  # when its beat was last another one
        self._began = clock()

    @property
    def silent(self) -> float:
        """Seconds since it has shown life, or since this one watches."""
        return self._clock() - (self._began if self._alive is None else self._alive)

    @property
    def here(self) -> bool:
        return self._alive is not None and self.silent < SILENCE

    def look(self) -> Facts | None:
        """What it says, or None if it is not there."""
        try:
            beat = self._board.beat(self.rank).read_text()
        except FileNotFoundError:
            beat = ""
        except (OSError, ValueError):
            beat = self._last or ""
        if beat and self._last is not None and beat != self._last:
            self._alive = self._clock()
        self._last = beat
        facts = self._board.told(self.rank)
        return facts if self.here and facts.get("start") == beat.partition(" ")[0] else None


class JoinedLauncher:
    """Of rank 0. A stage that can use several processes gets those of all machines; `pipeline.leading` has seen to it
    that they are there."""

    def __init__(self, settings: Settings):
        self._settings = settings

    def submit(self, job: Job) -> Handle:
        if job.nodes == 1:
            return TorchrunLauncher().submit(job)
        assert self._settings.head is not None
        return Together(Board(job.folder.parent.parent, self._settings.head), job, self._settings.head)


class Together(Process):
    """This machine's processes of an attempt, and the order that has the others start theirs."""

    def __init__(self, board: Board, job: Job, head: str):
        self._board, self._folder, self._processes, self._looked = board, job.folder, job.processes, 0.0
        self._others = {rank: (Watched(board, rank), board.told(rank)) for rank in range(1, job.nodes)}
        super().__init__(torchrun(job.folder, job.processes, meeting(job.nodes, 0, head)), job)
        order = {"head": board.told(0)["start"], "name": job.name, "folder": job.folder.name, "attempt": job.attempt}
        order |= {"nodes": job.nodes, "processes": job.processes}
        order["members"] = {str(rank): told.get("start") for rank, (_, told) in self._others.items()}
        try:
            write_json(board.order, order)
        except OSError:
            super().kill()
            raise

    def status(self) -> int | None:
        code = super().status()
        if code is None and time.monotonic() - self._looked >= EVERY:
            self._looked = time.monotonic()
            for rank, (machine, before) in self._others.items():
                if why := _trouble(machine, before):
                    if not self._folder.exists():  # the result is there: torchrun need not wait for that one's
                        return 0
                    leave_lost(self._folder, rank * self._processes, f"rank {rank} ({before.get('host')}) {why}")
        return code

    def kill(self) -> None:
        """Take back the order: the others end theirs when they see it."""
        with suppress(OSError):
            write_json(self._board.order, {})
        super().kill()


def _trouble(machine: Watched, before: Facts) -> str | None:
    """Why a machine cannot go on with the attempt that it has begun."""
    now = machine.look()
    if machine.silent >= SILENCE:
        return f"has shown no life for {SILENCE:g} s"
    if now is None:
        return None
    if now["start"] != before.get("start"):
        return "was started again in the middle of an attempt"
    return f"has left: {now['left']['why']}" if now.get("left") else None


def leave_lost(folder: Path, rank: int, what: str, fix: str = "") -> None:
    """In the work folder, as a rank says it, unless something was said already. rank: the first of its machine."""
    message = f"{what} ({fix})" if fix else what
    said = {"code": 6, "what": what, "where": None, "fix": fix or None, "message": message, "asked": None}
    said |= {"retry": True, "traceback": "", "rank": rank}
    if any((folder / name).exists() for name in ("error.json", "lost.json")):
        return
    aside = folder / f".lost-{rank:05d}"
    with suppress(OSError):
        aside.write_text(json.dumps(said))
        aside.rename(folder / "lost.json")


def can_listen(port: int) -> bool:
    """Whether nobody listens on it here, such as the processes of an attempt that is still ending."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
            probe.listen()
        except OSError:
            return False
    return True
