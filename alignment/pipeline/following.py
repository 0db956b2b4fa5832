"""A machine that has joined a run by hand, with launcher.rank above 0: starts its processes of each attempt that rank 0
begins on all machines, passes on requests to stop, and ends when the run does."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from alignment.config.launchers import TorchrunLauncher
from alignment.errors import (
    BY_CODE,
    AlignmentError,
    ConfigError,
    LostError,
    MachineError,
    PreemptedError,
    StageFailed,
)
from alignment.files import read_json
from alignment.launchers.base import Job
from alignment.launchers.joined import SILENCE, Board, Facts, Presence, Watched, leave_lost, told
from alignment.launchers.local import Process, ask, meeting, torchrun
from alignment.life import Beat, beats
from alignment.pipeline.attempts import GOES_ON
from alignment.pipeline.identity import code_digest, difference
from alignment.pipeline.runner import Run
from alignment.pipeline.store import JOINED, Lock, Store
from alignment.signals import Listener, Stopped

POLL = 0.2  # seconds
GRACE = 3.0  # seconds that processes have to end by themselves once rank 0 has ended its own
WORD = 10.0  # seconds for rank 0 to say what became of the run, after processes here that were asked to stop have ended
BEFORE = 10.0  # seconds for the processes of a command before this one to be gone


class Follower:
    """Of one command. say: told what people should know."""

    def __init__(self, store: Store, launcher: TorchrunLauncher, stop: Listener, say: Callable[[str], None]):
        assert launcher.head is not None
        self._store, self._launcher, self._stop, self._say = store, launcher, stop, say
        self._rank, self._head_at = launcher.rank, launcher.head
        self._board = Board(store.root, launcher.head)
        self._lock = store.machine_lock(self._board.name, self._rank)
        _take(self._lock, self._rank)
        self._presence = Presence(self._board, self._rank, head=None, run=None, at=None, left=None)
        self._head = Watched(self._board, 0)
        self._part: Part | None = None
        self._done: Facts = {}  # the order that was last acted on
        self._leave_at: float | None = None
        self._waits_since: float | None = None  # for the files of an attempt

    def follow(self, run: Run) -> None:
        """Until rank 0 has made the run, or all of it is in the store. Raises the error that it has ended with."""
        if _is_made(run):
            self._say(f"{run.id}  all of it is in the store")
            return
        self._say(f"{run.id}  rank {self._rank} of {self._launcher.nodes}: follows rank 0 at {self._head_at}")
        self._presence.say(run=None, at=None, left=None)
        try:
            with self._stop.deferred():
                word = self._until_over(run)
        except BaseException as error:
            self._end_part()
            left = {"head": (self._head.look() or {}).get("start"), "why": str(error) or type(error).__name__}
            self._presence.say(run=None, at=None, left=left)
            raise
        self._presence.say(run=None)
        if ended := _error_of(word):
            raise ended
        self._say(f"{run.id}  done")

    def _until_over(self, run: Run) -> Facts:
        """What rank 0 says became of the run."""
        joined = None  # the start of rank 0 that was joined
        while True:
            head = self._head.look()
            if self._part:
                self._mind(self._part)
            elif head and (word := head["ended"].get(run.id)):
                return dict(word)
            elif self._stop.asked and self._may_leave():
                raise Stopped(self._stop.asked)
            elif head and self._is_at(run, head):
                if joined != head["start"]:
                    joined = head["start"]
                    self._presence.say(head=joined, run=run.id)
                    self._say(f"  has joined rank 0 on {head['host']}")
                self._begin(run, head)
            if self._head.silent >= self._launcher.join_s:
                if _is_made(run):  # rank 0 was gone when this one came
                    return {"code": 0}
                raise self._alone(joined)
            time.sleep(POLL)

    def _alone(self, joined: str | None) -> AlignmentError:
        seconds = f"{self._launcher.join_s} s (launcher.join_s)"
        if joined:
            fix = "run the same command on all machines: it goes on from what is saved"
            return LostError(f"rank 0 has shown no life for {seconds}", fix=fix)
        fix = "run the same command with launcher.rank=0 on its machine; both must see this folder"
        return MachineError(f"rank 0 was not found within {seconds}", where=str(self._store.root), fix=fix)

    def _may_leave(self) -> bool:
        """What was asked to stop has ended, and rank 0 would have said by now if that is the end of the run."""
        return self._leave_at is None or time.monotonic() >= self._leave_at

    # --- the same run -------------------------------------------------------------------------------------------------

    def _is_at(self, run: Run, head: Facts) -> bool:
        """Whether rank 0 makes this run now. Raises ConfigError or MachineError if it never will."""
        where = f"launcher.rank={self._rank} on {socket.gethostname()}"
        mine = Presence.here()
        if head["host"] == mine["host"] and head["boot"] != mine["boot"]:
            what = f"the machine of rank 0 is called {head['host']}, too"
            raise MachineError(what, where=where, fix="give each machine a host name of its own")
        if head["store"] != str(self._store.root):
            what = f"the store is {self._store.root} here, and {head['store']} on rank 0"
            raise ConfigError(what, where=where, fix="the same path on all machines")
        for name in ("nodes", "processes"):
            if head[name] != (here := getattr(self._launcher, name)):
                what = f"`launcher.{name}` is {here} here, and {head[name]} on rank 0"
                raise ConfigError(what, where=where, fix="the same on all machines")
        if head["code"] != code_digest():
            raise ConfigError("alignment itself is not the same as on rank 0", where=where, fix="install one version")
        if head["now"] and run.id not in head["runs"]:
            plan = told(self._board.plan) or {}
            if plan.get("head") == head["start"] and plan.get("run") == head["now"]:
                fix = "give the same settings, files and packages on all machines"
                raise ConfigError(f"this is not the run of rank 0: {_unlike(plan, run)}", where=where, fix=fix)
        return bool(head["now"] == run.id)

    # --- this machine's part of an attempt ----------------------------------------------------------------------------

    def _begin(self, run: Run, head: Facts) -> None:
        """Start it, if rank 0 has begun one, and all that it needs is seen from here."""
        order = told(self._board.order)
        if not order or order == self._done or order["head"] != head["start"]:
            return
        if order["members"].get(str(self._rank)) != self._presence.start:  # it began with another one of this rank
            return
        folder = run.store.root / "work" / order["folder"]
        if not self._sees(run, folder, order):
            self._waits_since = self._waits_since or time.monotonic()
            if time.monotonic() - self._waits_since > SILENCE:
                what = f"attempt {order['attempt']} of rank 0 at {order['name']} is not seen from here"
                raise MachineError(what, where=str(folder), fix="is the store shared by all machines?")
            return
        self._waits_since, self._done = None, order
        log = run.folder / f"machine-{self._rank}.txt"
        log.parent.mkdir(parents=True, exist_ok=True)
        self._presence.say(at=[order["name"], order["attempt"]])
        self._part = Part(order, folder, run, self._rank, self._head_at, self._lock, log)
        self._say(f"  {order['name']}  attempt {order['attempt']} begins; what its processes here say is in {log}")

    def _sees(self, run: Run, folder: Path, order: Facts) -> bool:
        """A shared file system may show late what another machine has written."""
        try:
            stage = read_json(folder / "stage.json")
        except (OSError, ValueError):
            return False
        node = next((node for node in run.nodes if node.key == stage["key"]), None)
        parents = node.parents.values() if node else ()
        return bool(stage["attempt"] == order["attempt"]) and all(run.store.record(parent.key) for parent in parents)

    def _mind(self, part: Part) -> None:
        if self._stop.asked:
            part.ask()
        order, code = told(self._board.order), part.status()
        called_off = order is not None and order != part.order
        if code is None and not (called_off and part.late()):
            return
        if code and not called_off:
            part.leave_word(code)
        self._say(f"  {part.order['name']}  attempt {part.order['attempt']} has ended here")
        self._leave_at = time.monotonic() + WORD
        self._end_part()
        self._presence.say(at=None)

    def _end_part(self) -> None:
        if self._part:
            self._part.end()
            self._part = None


class Part(Process):
    """This machine's processes of one attempt."""

    def __init__(self, order: Facts, folder: Path, run: Run, rank: int, head: str, lock: Lock, log: Path):
        self.order, self._folder, self._log, self._rank = order, folder, log, rank
        nodes, processes = order["nodes"], order["processes"]
        self._ranks = range(rank * processes, (rank + 1) * processes)
        self._told: set[int] = set()
        self._started: dict[int, Beat] = {}
        self._called_off: float | None = None
        threads = run.experiment.engine.threads
        job = Job(order["name"], folder, nodes, processes, order["attempt"], threads, lock.fileno)
        command = torchrun(folder, processes, meeting(nodes, rank, head))
        super().__init__(command, job, log, {JOINED: str(lock.path)})

    def status(self) -> int | None:
        code = super().status()
        if code is None and len(self._started) < len(self._ranks):
            self._started |= self.ranks()
        return code

    def ask(self) -> None:
        ask(self._folder, self._ranks, self._told)

    def late(self) -> bool:
        """Whether it has had the time to end by itself, since it was first asked here."""
        self._called_off = self._called_off or time.monotonic()
        return time.monotonic() - self._called_off >= GRACE

    def leave_word(self, code: int) -> None:
        how = f"by signal {-code}" if code < 0 else f"with exit code {code}"
        what = f"the processes of rank {self._rank} on {socket.gethostname()} have ended {how}"
        leave_lost(self._folder, self._ranks.start, what, f"see {self._log}")

    def end(self) -> None:
        """At once, and wait, not long, until they are gone: torchrun's death does not end one that still starts."""
        mine = {rank: beat for rank, beat in beats(self._folder).items() if rank in self._ranks and beat.here}
        known = [*mine.values(), *(self._started | self.ranks()).values()]
        self.kill()
        until = time.monotonic() + 10.0
        while (left := [beat for beat in known if not beat.gone]) and time.monotonic() < until:
            for beat in left:
                beat.signal(9)
            time.sleep(0.02)


def _is_made(run: Run) -> bool:
    return all(run.store.record(node.key) for node in run.nodes)


def _take(lock: Lock, rank: int) -> None:
    until = time.monotonic() + BEFORE
    while not lock.acquire(f"rank {rank}"):
        if time.monotonic() >= until:
            holder = lock.holder()
            what = f"rank {rank} has joined already: process {holder.get('pid')} on {holder.get('host')}"
            raise ConfigError(what, where="launcher.rank", fix="each machine has a rank of its own")
        time.sleep(POLL)


def _unlike(plan: Facts, run: Run) -> str:
    """Where rank 0's run and this one first differ."""
    for node in run.nodes:
        theirs = plan["nodes"].get(node.name)
        if theirs is None:
            return f"its pipeline has no {node.name}"
        if theirs["key"] != node.key:
            at, there, here = difference(theirs["identity"], node.identity)
            return f"{node.name}: {at} is {here!r} here, and {there!r} there"
    if missing := set(plan["nodes"]) - {node.name for node in run.nodes}:
        return f"its pipeline has {', '.join(sorted(missing))}, too"
    return f"its name is {plan['name']!r}"


def _error_of(word: dict[str, Any]) -> AlignmentError | None:
    if not word["code"]:
        return None
    kind = BY_CODE.get(word["code"], StageFailed)
    fix = word["fix"] or (GOES_ON if kind is PreemptedError else None)
    return kind(word["what"], where=word["where"], fix=fix)
