"""Rank 0 of a run on several machines that were joined by hand: shows the others what it does, and waits for them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

from alignment.config.launchers import TorchrunLauncher
from alignment.errors import AlignmentError, LostError, MachineError, PreemptedError
from alignment.files import write_json
from alignment.launchers.joined import Board, Presence, Watched, can_listen
from alignment.pipeline.attempts import GOES_ON
from alignment.pipeline.identity import code_digest
from alignment.pipeline.store import Store
from alignment.signals import Stopped

if TYPE_CHECKING:
    from alignment.pipeline.runner import Run

POLL = 0.2  # seconds
QUIET = 3.0  # seconds of waiting of which nothing is said
PORT = 60.0  # seconds until the port is free that the processes of an attempt before have used
SAME = "run the same command with launcher.rank={} on its machine"


class Leader:
    """What this command is doing, as long as it lives. At one launcher.head there is one."""

    def __init__(self, store: Store, launcher: TorchrunLauncher, say: Callable[[str], None]):
        assert launcher.head is not None
        self._board, self._ended = Board(store.root, launcher.head), dict[str, Any]()
        self._lock = store.machine_lock(self._board.name, 0)
        if not self._lock.acquire("rank 0"):
            say(f"waits for another command whose launcher.head is {launcher.head}: {self._lock.holder()}")
            self._lock.wait("rank 0", lambda holder: None)
        with suppress(FileNotFoundError):
            self._board.order.unlink()
        self._presence = Presence(
            self._board, 0, nodes=launcher.nodes, processes=launcher.processes, store=str(store.root),
            code=code_digest(), runs=[], now=None, ended={},
        )  # fmt: skip

    def expect(self, runs: Sequence[Run]) -> None:
        """These will be made, in this order."""
        self._presence.say(runs=[run.id for run in runs])

    @contextmanager
    def at(self, run: Run) -> Iterator[None]:
        """While it is made. What became of it is told, whatever that is."""
        nodes = {node.name: {"key": node.key, "identity": node.identity} for node in run.nodes}
        told = {"head": self._presence.start, "run": run.id, "name": run.experiment.name, "nodes": nodes}
        write_json(self._board.plan, told)
        self._presence.say(now=run.id)
        try:
            yield
        except BaseException as error:
            self._end(run, error)
            raise
        self._end(run, None)

    def _end(self, run: Run, error: BaseException | None) -> None:
        self._ended[run.id] = _word(error)
        self._presence.say(now=None, ended=self._ended)


def _word(error: BaseException | None) -> dict[str, Any]:
    """What became of a run, for those who follow it: what `error_of` reads."""
    if error is None:
        return {"code": 0}
    if isinstance(error, AlignmentError):
        return {"code": error.exit_code, "what": error.what, "where": error.where, "fix": error.fix}
    if isinstance(error, Stopped):
        return {"code": PreemptedError.exit_code, "what": f"rank 0 has stopped ({error})", "where": None, "fix": None}
    what = "was ended at once" if isinstance(error, KeyboardInterrupt) else f"has failed: {type(error).__name__}"
    return {"code": LostError.exit_code, "what": f"rank 0 {what}", "where": None, "fix": None}


def gather(run: Run, nodes: int, asked: Callable[[], str | None], say: Callable[[str], None]) -> None:
    """Before an attempt on so many machines: wait until each has joined this run and has nothing of it at work, and
    nobody listens where they meet. Raises PreemptedError if asked to stop meanwhile, MachineError after some time."""
    launcher = run.experiment.launcher
    if nodes == 1 or not isinstance(launcher, TorchrunLauncher):
        return
    board = Board(run.store.root, str(launcher.head))
    machines = {rank: Watched(board, rank) for rank in range(1, nodes)}
    began = joined = time.monotonic()
    said = ""
    while True:
        start, waited = board.told(0).get("start"), time.monotonic() - began
        missing = {rank: why for rank, machine in machines.items() if (why := _missing(board, machine, run.id, start))}
        if not missing and can_listen(int(str(launcher.head).rpartition(":")[2])):
            return
        if missing:
            joined = time.monotonic()
        if why := asked():
            raise PreemptedError(f"stopped ({why}) while it waited for other machines", fix=GOES_ON)
        if missing and waited >= launcher.join_s:
            raise _not_joined(missing, launcher.join_s, run)
        if time.monotonic() - joined >= PORT:
            what = f"something else listens on the port of {launcher.head}"
            raise MachineError(what, where="launcher.head", fix="name a free one")
        if waited >= QUIET and (text := "; ".join(missing.values())) and text != said:
            said = text
            say(f"waits {launcher.join_s} s at most: {text}")
        time.sleep(POLL)


def _missing(board: Board, machine: Watched, run: str, start: str | None) -> str | None:
    """Why an attempt cannot begin on that machine."""
    rank, told = machine.rank, machine.look()
    here, told = told is not None, told or board.told(rank)
    left = told.get("left") or {}
    if left.get("head") == start and start:
        return f"rank {rank} ({told.get('host')}) has left: {left['why']}; {SAME.format(rank)}"
    if not here or told.get("head") != start or told.get("run") != run:
        return f"rank {rank} has not joined: {SAME.format(rank)}"
    return f"rank {rank} ({told['host']}) has not ended its part of an attempt before" if told.get("at") else None


def _not_joined(missing: dict[int, str], seconds: int, run: Run) -> MachineError:
    rank, why = next(iter(missing.items()))
    if "has not joined" not in why:
        return MachineError(f"{why}, and nothing has changed for {seconds} s", where=str(run.store.root))
    what = f"rank {rank} has not joined within {seconds} s (launcher.join_s)"
    return MachineError(what, where=str(run.store.root), fix=f"{SAME.format(rank)}; it must see this folder")
