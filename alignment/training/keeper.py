"""Nothing that was computed is lost: when a checkpoint is written, what becomes of it, when training stops in order.

Processes decide together. Each brings its wishes (asked to stop, time to save, part written, part failed) to the one
reduction of every step, so all know the same before the optimiser moves and act on it alike after the step. Writing
goes on in a thread while training does; a write that fails on one process fails for all of them, with a warning.
"""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from alignment.config.execution import Checkpoint
from alignment.config.launchers import LONGEST_GRACE
from alignment.errors import MachineError, PreemptedError, is_out_of_memory
from alignment.signals import TIME_LIMIT, Listener
from alignment.training import ranks, state, tensors
from alignment.training.checkpoints import Checkpoints, part_name
from alignment.training.room import host_share

# Before a time limit: seconds to spare, and how fast a disk is taken to be until a save has been timed.
SPARE, SLOW_DISK = 5.0, 100e6
RECENT = 20  # steps that tell how long the next one may take


class Wishes(NamedTuple):
    """Of one process, or the sum over all. fatal: saving has failed too often."""

    stop: float = 0
    due: float = 0
    written: float = 0
    failed: float = 0
    fatal: float = 0


class Stage(Protocol):
    """What is needed of the stage; stages.context.StageContext has it all.

    deadline: time.monotonic() by which the attempt must have ended. flush: what must be on the disk before a
    checkpoint counts.
    """

    stop: Listener
    deadline: float | None

    def flush(self) -> None: ...
    def metrics_digest(self) -> str: ...
    def tick(self) -> None: ...
    def alone(self) -> None: ...
    def note(self, text: str) -> None: ...
    def busy(self, note: str) -> AbstractContextManager[None]: ...
    def tell_next(self, **facts: Any) -> None: ...


class Write(NamedTuple):
    """A checkpoint under way: this process's part, and what is common."""

    step: int
    part: Future[dict[str, Any]]
    facts: dict[str, Any]
    score: float | None


class Keeper:
    """Of one process of a stage that trains.

    first_step: where training goes on; 0 where there is nothing to go on from.
    """

    def __init__(
        self,
        checkpoints: Checkpoints,
        stage: Stage,
        layout: dict[str, Any],
        record: dict[str, Any],
        say: Callable[[str], None] = print,
        grace: float | None = None,
    ) -> None:
        """layout: of the engine: how many processes, how they share the work. record: what else a checkpoint says of
        where it comes from. grace: seconds that are left to save in once a scheduler has asked to stop."""
        self.checkpoints, self.stage, self.say, self.layout, self._record = checkpoints, stage, say, layout, record
        self._grace = math.inf if grace is None else grace
        self.settings: Checkpoint = checkpoints.settings
        self.first_step = 0
        self._thread, self._closed = ThreadPoolExecutor(1, "checkpoint"), threading.Event()
        self._write: Write | None = None
        self._due = False  # a save, on all processes alike
        self._failures = 0  # in a row; the main process counts
        self._problem = ""
        self._saved_at = self._step_at = time.monotonic()
        self._slowest_step = self._save_takes = 0.0
        self._recent: deque[float] = deque(maxlen=RECENT)

    # --- going on -------------------------------------------------------------------------------------------------

    def choose(self) -> int:
        """Find the newest whole checkpoint; those that are not are put away. A collective. Returns its step, or 0.

        Raises PreemptedError, and what `Checkpoints.trouble` does.
        """
        self.safe_point()  # engines take long to start
        main = ranks.rank() == 0
        if main:
            self.checkpoints.clean()
        for step in ranks.broadcast(self.checkpoints.found):
            with self.stage.busy(f"looking at the checkpoint of step {step}"):
                part = self.checkpoints.trouble(step, ranks.rank(), ranks.world_size())
            why = next((told for told in ranks.all_gather(part) if told), None)
            if why is None:
                self.first_step = step
                break
            if main:
                self.checkpoints.put_away(step, why)
        return self.first_step

    def layout_before(self) -> dict[str, Any]:
        """Of the chosen checkpoint, if as many processes of the same engine have written it; else empty."""
        before = self.checkpoints.state(self.first_step)["layout"] if self.first_step else {}
        return before if _words(before) == _words(self.layout) else {}

    def restore(self, trainer: Any) -> None:
        """Bring the chosen checkpoint into the engine. A collective."""
        facts = self.checkpoints.state(self.first_step)
        if ranks.rank() == 0 and facts.get("metrics") not in (None, self.stage.metrics_digest()):
            what = f"metrics.jsonl has not the rows that it had at step {self.first_step}"
            self.checkpoints.warn(f"{what}: the weights are right, its history is not whole")
        saved = state.Saved(self.checkpoints.at(self.first_step))
        state.load_state_dict(trainer, saved, self.stage.alone)
        mine = saved.generators(ranks.rank())
        if mine is not None:
            state.set_generators(mine[0], mine[1]["random"], trainer.args.device)
        same = facts["layout"].get("world_size") == ranks.world_size()
        meters = [saved.generators(rank)[1]["meter"] for rank in range(len(saved.files))]  # type: ignore[index]
        trainer.load_training_state(facts["trainer"], meters[ranks.rank()] if same else None, meters)
        written, now = _words(facts["layout"]), _words(self.layout)
        how = "" if written == now else f", saved by {written}, now {now}"
        self.say(f"going on from the checkpoint of step {self.first_step}{how}")
        if facts["record"].get("code_sha256") != self._record.get("code_sha256") and ranks.rank() == 0:
            what = f"the checkpoint of step {self.first_step} was written by another version of this program"
            self.checkpoints.warn(f"{what}: the steps from there on are computed as this one does")

    def start(self, trainer: Any) -> None:
        """The first step comes now: time is counted from here."""
        self._saved_at = self._step_at = time.monotonic()
        self._save_takes = state.size(trainer) / SLOW_DISK

    # --- every step -----------------------------------------------------------------------------------------------

    def wishes(self) -> Wishes:
        """This process's, for the reduction of the step that is being computed."""
        done = self._write is not None and self._write.part.done()
        failed = done and self._write.part.exception() is not None  # type: ignore[union-attr]
        minutes, main = self.settings.every_minutes, ranks.rank() == 0
        late = minutes is not None and time.monotonic() - self._saved_at >= 60 * minutes
        return Wishes(
            stop=float(self._why_stop() is not None),
            due=float(main and late and self._write is None),
            written=float(done and not failed),
            failed=float(failed),
            fatal=float(main and self._failures >= self.settings.max_failures),
        )

    def after_step(self, trainer: Any, step: int, agreed: Wishes, last: bool) -> None:
        """Act on what was agreed in this step. agreed: the sum over all. last: nothing follows this step, so what is
        being written is waited for.

        Raises PreemptedError when all have saved, MachineError when saving has failed too often.
        """
        now = time.monotonic()
        # The first one may have compiled: it counts once, until there are others.
        took, self._step_at = now - self._step_at, now
        if step > self.first_step + 1:
            self._recent.append(took)
        self._slowest_step = max(self._recent, default=took / 2)
        if agreed.fatal:
            problem = ranks.broadcast(lambda: self._problem)
            where, fix = str(self.checkpoints.folder), "free some space, or raise checkpoint.max_failures"
            raise MachineError(f"{self.settings.max_failures} saves in a row failed: {problem}", where=where, fix=fix)
        if self._write is not None and agreed.written + agreed.failed == ranks.world_size():
            self._conclude()
        if agreed.stop:
            raise self._stopped(trainer, step)
        if last:
            self.settle()
            return
        every = self.settings.every_steps
        self._due = self._due or bool(agreed.due or (every and step % every == 0))
        if self._due and self._write is None:  # else as soon as it is done
            self._due = False
            self._save(trainer, step)

    def safe_point(self, kept: bool = False) -> None:
        """Where nothing has to be saved: if any process was asked to stop, all do. A collective. kept: whether what
        was done so far stays for the next attempt."""
        reasons = ranks.all_gather(self._why_stop())
        if any(reasons):
            newest = next(iter(self.checkpoints.found()), 0)
            left = f"the checkpoint of step {newest} is kept" if newest else "nothing was made yet"
            left += ", what was computed is kept" if kept else ""
            error = PreemptedError(f"{_reason(reasons)}: {left}")
            error.kept = kept
            raise error

    def _why_stop(self) -> str | None:
        if self.stage.stop.asked:
            return self.stage.stop.asked
        if self.stage.deadline is not None:
            needed = SPARE + 2 * self._slowest_step + 2 * self._save_takes
            if time.monotonic() + needed >= self.stage.deadline:
                return TIME_LIMIT
        return None

    # --- saving ---------------------------------------------------------------------------------------------------

    def _save(self, trainer: Any, step: int) -> None:
        """Copy the state and have it written in the thread; or, where that is asked for, or memory is too short for a
        copy, write it now."""
        facts = {
            "metrics": self.stage.metrics_digest() if ranks.rank() == 0 else None,  # whose facts are written
            "step": step,
            "layout": self.layout,
            "record": self._record,
            "trainer": trainer.training_state(),
        }
        mine = {"meter": trainer.meter_values(), "random": state.random_state()}
        held = state.state_dict(trainer)
        path = self.checkpoints.aside(step) / part_name(ranks.rank(), ranks.world_size())
        copy = self._copied(held) if self.settings.asynchronous else None
        part = self._thread.submit(self._part, path, held if copy is None else copy, mine)
        if copy is None:
            self.stage.note(f"saving step {step}")
            wait([part])
        self._write = Write(step, part, facts, trainer.ranked_by(self.settings.best_by))
        if not self.settings.asynchronous:
            self.settle()

    def _copied(self, held: dict[str, Tensor]) -> dict[str, Tensor] | None:
        """None where memory is too short for it."""
        if sum(tensor.nbytes for tensor in held.values()) >= host_share() / 2:
            return None
        try:
            return state.cpu_copy(held)
        except (MemoryError, RuntimeError) as error:
            if is_out_of_memory(error):
                return None
            raise

    def _part(self, path: Path, held: dict[str, Tensor], facts: Any) -> dict[str, Any]:
        began = time.monotonic()
        path.parent.mkdir(parents=True, exist_ok=True)
        file = tensors.write(path, held, facts, self._may_write)
        self._save_takes = time.monotonic() - began
        return file

    def _may_write(self) -> bool:
        """Asked before every piece: that it is asked is a sign that the disk gets on."""
        self.stage.alone()
        return not self._closed.is_set()

    def settle(self) -> None:
        """Wait until all parts of what is being written are there, then conclude. A collective."""
        if self._write is not None:
            if not self._write.part.done():
                self.stage.note(f"saving step {self._write.step}")
            wait([self._write.part])
            self._conclude()

    def _conclude(self) -> None:
        """All parts are written, or have failed: the checkpoint counts, or goes. A collective."""
        assert self._write is not None
        write, self._write = self._write, None
        error = write.part.exception()
        told = (str(error) or repr(error)) if error is not None else None
        mine = None if told else write.part.result()
        parts = ranks.all_gather((part_name(ranks.rank(), ranks.world_size()), mine, told, self._save_takes))
        if ranks.rank() != 0:
            return
        problem = next((f"{part[2]} (rank {rank})" for rank, part in enumerate(parts) if part[2]), None)
        try:
            if problem is None:
                self.stage.flush()
                files = {name: file for name, file, *_ in parts}
                self.checkpoints.commit(write.step, files, write.facts, write.score)
                self._thread.submit(self.checkpoints.retain)  # large files take their time to go
                self._failures, self._saved_at = 0, time.monotonic()
                self._compare(write.step, max(part[-1] for part in parts))
                return
        except OSError as failed:
            problem = str(failed)
        self._failures, self._problem, self._saved_at = self._failures + 1, problem, time.monotonic()
        self.checkpoints.discard(write.step)
        left = next(iter(self.checkpoints.found()), None)
        whole = "there is none yet" if left is None else f"the newest whole one is of step {left}"
        self.checkpoints.warn(f"the checkpoint of step {write.step} could not be written, {whole}: {problem}")

    def _compare(self, step: int, took: float) -> None:
        """Say, once, that a write takes longer than a scheduler gives. Another one may be under way when it asks, so
        twice as much is needed."""
        if took > self._grace:
            what = f"launcher.grace is {self._grace:g} s, and the checkpoint of step {step} took {took:.0f} s to write"
            why = "a job that is stopped at its time limit may be killed before it has saved"
            enough = min(math.ceil(2 * took), LONGEST_GRACE)
            self.checkpoints.warn(f"{what}: {why} (launcher.grace={enough}, or a faster disk)")
            self._grace = math.inf

    def _stopped(self, trainer: Any, step: int) -> PreemptedError:
        """Save what this step has made, and say how that went. A collective."""
        reason = _reason(ranks.all_gather(self._why_stop()))
        self.settle()
        self._save(trainer, step)
        self.settle()
        if ranks.rank() == 0:  # what the thread was to do may not come to its turn
            wait([self._thread.submit(self.checkpoints.retain)])
        newest = ranks.broadcast(lambda: next(iter(self.checkpoints.found()), None))  # nobody leaves before it is there
        left = f"the checkpoint of step {newest} is kept" if newest else "there is no checkpoint"
        became = f": saved at step {step}" if newest == step else f" at step {step}: it could not be saved, {left}"
        error = PreemptedError(reason + became)
        error.kept = True if newest == step else None
        return error

    def close(self, wait: bool = True) -> None:
        """Training is over, well or not: nothing is written any more, and what is being written is given up. Of this
        process alone. wait: for the disk; an error must not."""
        self._closed.set()
        self._thread.shutdown(wait=wait, cancel_futures=True)
        self._write = None


def reduced(loss: Tensor, wishes: Wishes) -> tuple[float, Wishes]:
    """Sums over all processes, in one reduction. loss: float64 scalar."""
    both = torch.cat([loss.reshape(1), torch.tensor(wishes, dtype=torch.float64, device=loss.device)])
    if ranks.world_size() > 1:
        dist.all_reduce(both)
    total, *agreed = both.tolist()
    return total, Wishes(*agreed)


def _reason(reasons: list[str | None]) -> str:
    rank, why = next(((rank, why) for rank, why in enumerate(reasons) if why), (0, "asked to stop"))
    return f"{why} on rank {rank}" if len(reasons) > 1 else why


def _words(layout: dict[str, Any]) -> str:
    return f"{layout.get('world_size')} process(es) of engine {layout.get('strategy')}"
