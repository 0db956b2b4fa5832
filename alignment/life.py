"""Signs of life: what each process of a stage leaves for the driver that watches over it, and how that reads it.

beats/rank-00000.json    a line that the process overwrites every second
stacks/rank-00000.txt    where the process was when it was asked
"""

from __future__ import annotations

import ctypes
import faulthandler
import json
import os
import signal
import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from alignment.files import listed

EVERY = 1.0  # seconds between two beats
LONGEST = 3600.0  # seconds that one operation may take without a word
SIZE = 512  # bytes of a beat's file: the same at every beat, so that a full disk cannot stop it
BEATS, STACKS = "beats", "stacks"
WORD = 32_768  # bytes kept free for a process's last word
REPLACED = 6  # exit code
PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Beat:
    """A process as it last told of itself.

    born: start of the process in clock ticks since the host's; with pid it names one process, not a later one of that
    number. beat: grows every second. ticks: grows as the stage gets on, on all ranks alike: who has fewer is behind.
    ended: it left in order, whatever its result. alone: grows as this process gets on with what others need not do.
    """

    rank: int
    pid: int
    born: int
    host: str
    beat: int
    ticks: int
    ended: bool
    alone: int = 0

    @property
    def here(self) -> bool:
        return self.host == socket.gethostname()

    @property
    def gone(self) -> bool:
        """Whether the process is known to have died: never of another host's."""
        return self.here and _born(self.pid) != self.born

    def signal(self, number: int) -> None:
        """Send it a signal, if it lives here. A signal is never sent to a later process of the same number."""
        if self.here and not self.gone:
            with suppress(OSError):
                os.kill(self.pid, number)


class Pulse:
    """Shows this process to be alive until `end`. Raises OSError if the folder cannot take its two small files.

    got_on: asked at every beat for Beat.ticks and Beat.alone. replaced: asked at every beat whether another process has
    taken this one's place, which must then end at once, and leave no word.
    """

    def __init__(self, folder: Path, rank: int, replaced: Callable[[], bool] = lambda: False):
        self.got_on: Callable[[], tuple[int, int]] = lambda: (0, 0)
        self._replaced = replaced
        self._rank, self._host, self._born = rank, socket.gethostname(), _born(os.getpid()) or 0
        self._count, self._over, self._lock = 0, threading.Event(), threading.Lock()
        (folder / BEATS).mkdir(exist_ok=True)
        (folder / STACKS).mkdir(exist_ok=True)
        self._stacks = open(stacks(folder, rank), "a")  # noqa: SIM115 - open for as long as the process lives
        # From C, and of all threads: even a process that is stuck in a library says where.
        faulthandler.register(signal.SIGUSR2, file=self._stacks, all_threads=True, chain=False)
        self._file = os.open(folder / BEATS / f"rank-{rank:05d}.json", os.O_WRONLY | os.O_CREAT, 0o644)
        self._write(ended=False)
        threading.Thread(target=self._go_on, name="pulse", daemon=True).start()

    def end(self) -> None:
        """The last beat: this process is about to leave by its own will."""
        self._over.set()
        with suppress(OSError):
            self._write(ended=True)

    def _go_on(self) -> None:
        while not self._over.wait(EVERY):
            if self._replaced():
                os._exit(REPLACED)
            with suppress(OSError):
                self._write(ended=False)

    def _write(self, *, ended: bool) -> None:
        with self._lock:
            if self._over.is_set() and not ended:
                return
            self._count += 1
            ticks, alone = self.got_on()
            beat = Beat(self._rank, os.getpid(), self._born, self._host, self._count, ticks, ended, alone)
            os.pwrite(self._file, json.dumps(asdict(beat)).ljust(SIZE - 1).encode() + b"\n", 0)


def beats(folder: Path) -> dict[int, Beat]:
    """The last beat of each rank of a work folder; one that is just being overwritten is left out."""
    found = {}
    for path in listed(folder / BEATS, "rank-*.json"):
        with suppress(OSError, ValueError, TypeError):
            beat = Beat(**json.loads(path.read_bytes()))
            found[beat.rank] = beat
    return found


def started_by(parent: int) -> dict[int, Beat]:
    """The ranks that this process has started and that live, as `unheard`. None on a kernel that does not list them.

    They are known by their environment. It comes with their program: until then they are a copy of their parent.
    """
    found = {}
    for path in listed(Path(f"/proc/{parent}/task"), "*/children"):
        with suppress(OSError):  # a thread that has ended meanwhile
            for pid in map(int, path.read_text().split()):
                rank = _environment(pid).get("RANK", "")
                if rank.isdecimal() and (beat := unheard(int(rank), pid)):
                    found[beat.rank] = beat
    return found


def unheard(rank: int, pid: int) -> Beat | None:
    """A rank that has not beaten yet, by its process; None if that does not live."""
    born = _born(pid)
    return None if born is None else Beat(rank, pid, born, socket.gethostname(), 0, 0, False)


def stacks(folder: Path, rank: int) -> Path:
    return folder / STACKS / f"rank-{rank:05d}.txt"


def word(folder: Path, rank: int) -> Path:
    """Where the disk for a process's last word is kept."""
    return folder / BEATS / f"word-{rank:05d}"


def die_with_parent(parent: int) -> None:
    """Have the kernel end this process when its parent dies, so that a killed driver leaves no worker behind."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before we asked
        os._exit(1)


def _environment(pid: int) -> dict[str, str]:
    """What the process was started with; nothing if there is none, or only a zombie."""
    try:
        told = Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace")
    except OSError:
        return {}
    return dict(entry.split("=", 1) for entry in told.split("\0") if "=" in entry)


def _born(pid: int) -> int | None:
    """When the process started, in clock ticks since the host did; None if there is none, or only a zombie."""
    try:
        state, *rest = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (OSError, ValueError):
        return None
    return None if state in "ZX" else int(rest[18])
