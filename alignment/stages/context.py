"""What a stage's function is given: its settings, its parents' results, its folder, and a way to say how far it is."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from alignment.config.schema import Experiment
from alignment.files import append, read_json, write_json, write_text
from alignment.life import LONGEST
from alignment.pipeline.store import METRICS, NEXT, ROWS, WARNINGS
from alignment.signals import Listener


@dataclass
class _Count:
    """Steps to a total, and when the first one that was told of was there."""

    total: int
    first: int
    began: float
    last: int = 0

    def left(self, now: float) -> float | None:
        """Seconds, if the other steps take as long as those since the first."""
        done = self.last - self.first
        return (now - self.began) / done * (self.total - self.last) if done else None


@dataclass
class StageContext:
    """One stage in one process group.

    folder: the private work folder; what lies in it when the function returns is the stage's result.
    inputs: role -> folder of the parent's committed result. settings: this stage's part of the experiment.
    rank, world_size: of this process; files are written by rank 0 unless the stage says otherwise.
    shared: a folder that all runs of a store share, for what they may leave each other; None: nothing is shared.
    listeners: also told each row of metrics (tracking is one).
    stop: whether this process was asked to stop. deadline: time.monotonic() by which an attempt must have ended.
        A stage that can use several processes must look at it where all of them can; of others a request is raised.
    checkpoints: names of those that stay beside the result.
    code: files of code that the reward names, as they were when the stage began; what becomes of them later changes
        nothing here. A file that is not among them is read when it is needed.
    """

    name: str
    run: str
    key: str
    folder: Path
    settings: Any
    experiment: Experiment
    inputs: dict[str, Path]
    rank: int = 0
    world_size: int = 1
    shared: Path | None = None
    listeners: list[Callable[[int, dict[str, float]], None]] = field(default_factory=list)
    stop: Listener = field(default_factory=Listener)
    deadline: float | None = None
    checkpoints: list[str] = field(default_factory=list)
    code: dict[Path, bytes] = field(default_factory=dict)
    _ticks: int = 0
    _alone: int = 0
    _busy_until: float = 0.0
    _started: float = field(default_factory=time.monotonic)
    _shown: float = 0.0
    _count: _Count | None = None
    _unsaid: list[str] = field(default_factory=list)  # warnings
    # Rows that a full disk did not take, by file.
    _unwritten: dict[str, list[str]] = field(default_factory=lambda: {name: [] for name in ROWS})

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def got_on(self) -> tuple[int, int]:
        """Who watches over hanging processes asks: calls of `tick`, of which all ranks have as many, and of `alone`."""
        if time.monotonic() < self._busy_until:
            self._alone += 1
        return self._ticks, self._alone

    def tick(self) -> None:
        """This process has got on, if only to where it waits for the others: who stays behind them can be named."""
        self._ticks += 1

    def alone(self) -> None:
        """This process has got on with what it does for itself, such as writing a file."""
        self._alone += 1

    def note(self, text: str, force: bool = True) -> None:
        """Say what is being done now, beside how far the stage is. force: at once; else at most five times a second."""
        count = self._count or _Count(0, 0, 0.0)
        self.alone()
        if force or time.monotonic() - self._shown >= 0.2:
            self._tell(count.last, count.total, True, {"note": text})

    @contextmanager
    def busy(self, note: str) -> Iterator[None]:
        """For one long operation that cannot say how far it is, such as writing a large file: while it lasts, at most
        LONGEST seconds, the stage counts as getting on. A process that shows no life at all is still noticed."""
        before, self._busy_until = self._busy_until, time.monotonic() + LONGEST
        self.note(note)
        try:
            yield
        finally:
            self._busy_until = before

    def told(self) -> dict[str, Any]:
        """What earlier attempts have left for this one."""
        try:
            told = read_json(self.folder / NEXT)
        except (OSError, ValueError):
            return {}
        return told if isinstance(told, dict) else {}

    def tell_next(self, **facts: Any) -> None:
        """Leave something for the next attempt. Raises OSError. An attempt that did so has not failed in vain: the next
        one will do differently, and is not counted against `retries`."""
        write_json(self.folder / NEXT, {**self.told(), **facts})

    def progress(self, step: int, total: int, *, force: bool = False, **facts: Any) -> None:
        """Say how far the stage is: facts are few and shown (loss=..., tokens_per_s=..., note="...").

        Cheap enough to be called at every step: the file is written at most five times a second. Another total, or a
        step before the last one, begins another count: what is left of it is not reckoned from what came before.
        """
        self.tick()
        self._tell(step, total, force, facts)

    def _tell(self, step: int, total: int, force: bool, facts: dict[str, Any]) -> None:
        now = time.monotonic()
        if self._count is None or total != self._count.total or step < self._count.last:
            self._count = _Count(total, step, now)
        self._count.last = step
        if not self.is_main or (now - self._shown < 0.2 and step < total and not force):
            return
        self._shown = now
        elapsed = now - self._started
        left = self._count.left(now)
        told = {"step": step, "total": total, "elapsed_s": elapsed, "left_s": left, "at": time.time(), **facts}
        with suppress(OSError):  # a disk that is full for a while must not end what can wait for it
            write_json(self.folder / "progress.json", told, durable=False)

    def warn(self, text: str) -> None:
        """Say what people should know though the stage goes on: in its log, and, by the driver, in the terminal."""
        with suppress(OSError):
            print(f"warning: {text}", flush=True)
        self._unsaid.append(" ".join(text.split()) + "\n")
        self._say()

    def _say(self) -> None:
        """Warnings that a full disk has not taken wait for the next row of metrics."""
        if self._unsaid:
            with suppress(OSError):
                append(self.folder / WARNINGS, "".join(self._unsaid))
                self._unsaid.clear()

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Append one row to the stage's metrics.jsonl: {"step", "time" (unix seconds), name: value ...}. A value that
        is no number is left out.

        Rows that cannot be written now wait in memory for the next one, or for `flush`.
        """
        if not self.is_main:
            return
        metrics = {name: value for name, value in metrics.items() if math.isfinite(value)}
        self.write_row(METRICS, {"step": step, "time": time.time(), **metrics})
        for listener in self.listeners:
            listener(step, metrics)

    def write_row(self, file: str, row: dict[str, Any]) -> None:
        """Append it to one of ROWS. row: has its "step". Rows that cannot be written now wait in memory."""
        if not self.is_main:
            return
        self._unwritten[file].append(json.dumps(row, ensure_ascii=False) + "\n")
        try:
            self.flush()
        except OSError as error:
            if len(self._unwritten[file]) == 1:
                self.warn(f"rows of {file} wait in memory: {error.strerror or error}")

    def flush(self) -> None:
        """Write the rows that wait, durably, of a file all of them or none. Raises OSError if that cannot be done."""
        self._say()
        for file, rows in self._unwritten.items():
            if rows:
                append(self.folder / file, "".join(rows))
                rows.clear()

    def metrics_digest(self) -> str:
        """SHA-256 of all rows of metrics so far, also of those that are not on disk yet."""
        path = self.folder / METRICS
        digest = hashlib.sha256(path.read_bytes() if path.is_file() else b"")
        digest.update("".join(self._unwritten[METRICS]).encode())
        return digest.hexdigest()

    def rewind(self, step: int) -> None:
        """Forget the rows of ROWS after `step`, and what a killed process had half written: they come again."""
        for path in (self.folder / name for name in ROWS):
            if self.is_main and path.exists():
                _rewind(path, step)


def _rewind(path: Path, step: int) -> None:
    with open(path, encoding="utf-8", errors="replace", newline="\n") as stream:
        whole = list(stream)  # texts may have other ends of lines in them
    kept = []
    for line in whole:
        try:
            if line.endswith("\n") and json.loads(line)["step"] <= step:
                kept.append(line)
        except (ValueError, KeyError, TypeError):
            continue
    if kept != whole:
        write_text(path, "".join(kept))
