"""Watches over one running job until it has ended: passes on requests to stop, ends what has crashed or hangs."""

from __future__ import annotations

import re
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alignment import life
from alignment.errors import AlignmentError, LostError
from alignment.files import read_json
from alignment.life import Beat
from alignment.pipeline.attempts import silent, word_of
from alignment.pipeline.store import WARNINGS
from alignment.signals import PASSED_ON, PRUNED, TIME_LIMIT, Asked

if TYPE_CHECKING:
    from alignment.launchers import Handle

POLL = 0.1  # seconds between two looks at a running job
LOOK = 0.5  # seconds between two looks at its beats
GRACE = 5.0  # seconds that a job has to end by itself once one of its processes has failed
# Times the patience with a stage that does not get on until its first step: a model may load long.
LENIENT = 6
LAST_WORDS = 3.0  # seconds that torchrun has, once they are all gone, to say how each of them ended
SILENT = 3 * life.EVERY  # seconds after which a process that should beat is out of the ordinary
STACKS = 3.0  # seconds that processes get to write where they are
FAILURES = ("error.json", "lost.json")


@dataclass(frozen=True)
class Patience:
    """watchdog_s: seconds without a sign of life, or without getting on, after which a job is hung.
    time_limit: seconds that this attempt may take before it is asked to stop; None: any."""

    watchdog_s: float
    time_limit: float | None = None


class Supervisor:
    """Of one attempt at a stage.

    progress: told the content of progress.json as it changes. say: told what people should know. Afterwards:
    asked: why the job was asked to stop, or None. fault: what went wrong, as far as only this one knows, or None.
    All is measured on the monotonic clock: a clock that is set does nothing.
    """

    def __init__(
        self,
        handle: Handle,
        folder: Path,
        patience: Patience,
        stop: Asked,
        progress: Callable[[dict[str, Any]], None],
        say: Callable[[str], None],
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ):
        self._handle, self._folder, self._patience, self._stop = handle, folder, patience, stop
        self._progress, self._say, self._clock, self._sleep = progress, say, clock, sleep
        self.asked: str | None = None
        self.fault: AlignmentError | None = None
        self._began = self._awake = clock()
        self._started: dict[int, Beat] = {}  # ranks that were seen alive, whether they have beaten or not
        self._beats: dict[int, Beat] = {}
        self._changed: dict[int, float] = {}  # rank -> when its beat was last another one
        self._got_on = self._began  # when any rank last got on
        self._looked = float("-inf")
        self._facts: dict[str, Any] | None = None
        self._stepping = False  # whether the stage has come past the first step of a count
        self._warned = 0  # bytes of the stage's warnings that were passed on
        self._told: set[int] = set()  # pids that were asked to stop
        self._dying: float | None = None  # when a failure was first seen
        self._killed = False  # whether those that it has left have been killed
        self._victim: Beat | None = None  # the first process that was gone without a last beat, or without any

    def watch(self) -> int:
        """The job's exit code, once it has ended or been ended; no process of it on this host is left."""
        while (code := self._handle.status()) is None:
            now = self._clock()
            self._forgive(now)
            self._tell_progress()
            self._ask(now)
            if not self._started or self._unheard():
                self._started |= self._handle.ranks()
            if now - self._looked >= LOOK:
                self._looked = now
                self.tell_warnings(self._folder)
                self._read_beats(now)
                if self._judge(now):
                    code = -signal.SIGKILL
                    break
            self._sleep(POLL)
        else:
            self._read_beats(self._clock())
            told = self._killed or (self._dying is not None and (self._folder / "error.json").exists())
            if code >= 0 and not told:  # else it was ended by a signal, by this driver, or by what that file says
                self._find_victim()
                self._find_victim_elsewhere()
        self._find_victim_elsewhere(killed=True)
        self.end()
        if self._victim and not self.fault:
            self.fault = self._lost(self._victim, code)
        return code

    def end(self) -> None:
        """End the job, whatever it does, and wait, not long, until its processes are gone."""
        self._handle.kill()
        until = time.monotonic() + 10.0
        while self._kill_ranks() and time.monotonic() < until:
            time.sleep(0.02)

    def _kill_ranks(self) -> bool:
        """Those on this host, torchrun's death does not end one that still starts. Returns whether any was left."""
        known = [*self._beats.values(), *self._started.values()]
        left = [beat for beat in known if beat.here and not beat.gone]
        for beat in left:
            beat.signal(signal.SIGKILL)
        return bool(left)

    def _forgive(self, now: float) -> None:
        """Who watches has slept itself (stopped, or the machine suspended): the others could not show life either."""
        if now - self._awake > min(5.0, self._patience.watchdog_s / 4) + POLL:
            self._changed = dict.fromkeys(self._changed, now)
            self._got_on = now
            if self._dying is not None:
                self._dying = now
        self._awake = now

    def _tell_progress(self) -> None:
        try:
            facts = read_json(self._folder / "progress.json")
        except (OSError, ValueError):
            return
        if not isinstance(facts, dict) or facts == self._facts:
            return
        same = self._facts is not None and facts.get("total") == self._facts.get("total")
        further = same and facts.get("step", 0) > self._facts.get("step", 0)  # type: ignore[union-attr]
        self._stepping = same and (self._stepping or further)
        self._facts = facts
        self._progress(facts)

    def tell_warnings(self, folder: Path) -> None:
        """Pass on the lines that the stage has left since the last look, now in this folder."""
        try:
            with open(folder / WARNINGS, "rb") as stream:
                stream.seek(self._warned)
                fresh = stream.read()
        except OSError:
            return
        whole = fresh[: fresh.rfind(b"\n") + 1]
        self._warned += len(whole)
        for line in whole.decode(errors="replace").splitlines():
            self._say(line)

    def _ask(self, now: float) -> None:
        """Pass a request to stop on to the ranks, to each once: to those that still start as soon as they beat."""
        if self.asked is None:
            limit = self._patience.time_limit
            late = limit is not None and now - self._began >= limit
            self.asked = self._stop.asked or (TIME_LIMIT if late else None)
            if self.asked is None:
                return
            self._got_on = now  # what it does now is another thing than what it did
            more = "" if self.asked in (TIME_LIMIT, PRUNED) else "; a second signal ends it at once"
            self._say(f"asked to stop ({self.asked}): saves what it can, and ends{more}")
        for beat in self._beats.values():
            if beat.pid not in self._told and not beat.ended:
                self._told.add(beat.pid)
                beat.signal(PASSED_ON)

    def _read_beats(self, now: float) -> None:
        for rank, beat in life.beats(self._folder).items():
            before = self._beats.get(rank)
            if before is None or beat != before:
                self._changed[rank] = now
                if before is None or (beat.ticks, beat.alone) != (before.ticks, before.alone):
                    self._got_on = now
                self._beats[rank] = beat

    def _unheard(self) -> list[Beat]:
        return [beat for rank, beat in self._started.items() if rank not in self._beats]

    def _judge(self, now: float) -> bool:
        """Whether the job must be ended now."""
        if self._dying is None:
            self._find_victim()
            if self._victim or any((self._folder / name).exists() for name in FAILURES):
                self._dying = now
        if self._dying is not None:
            if now - self._dying < GRACE:
                return False
            self._killed = True
            self._kill_ranks()
            return now - self._dying >= GRACE + LAST_WORDS
        patience = self._patience.watchdog_s
        silence = {rank: now - self._changed[rank] for rank, beat in self._beats.items() if not beat.ended}
        silent = max(sorted(silence), key=silence.__getitem__, default=None)
        if silent is not None and silence[silent] >= patience:
            return self._hung(f"rank {silent} has shown no life for {patience:g} s")
        if not self._stepping:
            patience *= LENIENT
        if now - self._got_on < patience:
            return False
        if silent is not None and silence[silent] >= SILENT:  # the others wait for this one
            return self._hung(f"rank {silent} has shown no life for {silence[silent]:.0f} s")
        return self._hung(f"{self._behind()} for {patience:g} s")

    def _find_victim(self) -> None:
        """A process that is gone without a last beat was killed, or has crashed below Python."""
        for rank, beat in sorted(self._beats.items()):
            if self._victim is None and not beat.ended and beat.gone:
                last = life.beats(self._folder).get(rank)
                if last is not None and not last.ended:  # no beats: the result is committed, the folder has moved on
                    self._victim = last
        for beat in self._unheard():  # torchrun notices too, but waits 30 s for the others, who wait for this one
            heard = beat.rank in life.beats(self._folder) or not self._folder.is_dir()
            if self._victim is None and beat.gone and not heard:
                self._victim = beat

    def _find_victim_elsewhere(self, killed: bool = False) -> None:
        """One of another host, of which this one knows no more than what torchrun has said there. killed: only by a
        signal, and not torchrun's own, which ends those that a failure has left; this driver's reach its host alone."""
        for _, beat in sorted(self._beats.items()):
            if self._victim is None and not beat.ended and not beat.here:
                said = self._said_of(beat)
                if said is not None and (not killed or (said < 0 and said != -signal.SIGTERM)):
                    self._victim = beat

    def _said_of(self, beat: Beat) -> int | None:
        """The exit code of a rank by torchrun's words, if it got to say them."""
        log = self._folder / "log.txt"
        text = log.read_text(errors="replace") if log.exists() else ""
        said = re.findall(rf"\(exitcode: (-?\d+)\) local_rank: \d+ \(pid: {beat.pid}\)", text)
        return int(said[-1]) if said else None

    def _lost(self, victim: Beat, code: int) -> AlignmentError:
        """code: of the job, which ends as its only process did."""
        if word := word_of(self._folder, victim.rank):
            return word
        who = f"rank {victim.rank}" + ("" if victim.here else f" on {victim.host}")
        said = self._said_of(victim)
        if said is None:
            said = 128 - code if code > 128 and len(self._beats) == 1 else 0
        return silent(who, -said, self._folder / "log.txt", victim.rank)

    def _behind(self) -> str:
        ticks = {rank: beat.ticks for rank, beat in self._beats.items() if not beat.ended}
        if not ticks:
            return "no process has shown life"
        late = [str(rank) for rank in sorted(ticks) if ticks[rank] < max(ticks.values())]
        return f"no process has got on{' (behind: rank ' + ', '.join(late) + ')' if late else ''}"

    def _hung(self, what: str) -> bool:
        """Have every process of this host write where it is, a stopped one too."""
        if note := (self._facts or {}).get("note"):
            what += f", in: {note}"
        here = [beat for beat in self._beats.values() if beat.here and not beat.gone]
        files = {beat.rank: life.stacks(self._folder, beat.rank) for beat in here}
        sizes = {}
        for beat in here:
            sizes[beat.rank] = 0
            with suppress(OSError):  # a full disk must not hide that it hangs
                with open(files[beat.rank], "a") as stream:
                    stream.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {what}\n")
                sizes[beat.rank] = files[beat.rank].stat().st_size
            beat.signal(signal.SIGCONT)
            beat.signal(signal.SIGUSR2)
        until = self._clock() + STACKS
        while self._clock() < until and any(_bytes(files[rank]) == sizes[rank] for rank in files):
            self._sleep(POLL)
        self._sleep(POLL)  # the rest of what has begun to be written
        fix = f"where its processes were is in {self._folder / life.STACKS}; engine.watchdog_s is the patience"
        self.fault = LostError(f"hung: {what}", fix=fix)
        return True


def _bytes(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0
