"""Checkpoints on the disk: a folder that counts only when it is whole.

    checkpoints/step-00000012/   rank-00000-of-00002.safetensors ...  each process's part
                                 state.json       what is the same on all processes
                                 manifest.json    key, step, and size and SHA-256 of every other file
    checkpoints/.step-...        one that is being written: not looked at, and gone when the next attempt begins

Everything is made durable before one rename gives a checkpoint its name. Free of any trainer; the only one to write,
name and delete here is the main process, but for the parts that each process writes of its own.
"""

from __future__ import annotations

import errno
import json
import math
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alignment.config.execution import Checkpoint
from alignment.errors import InputError, MachineError
from alignment.files import digest, fsync, read_json, remove, sha256, write_json

FORMAT = 1
NAME = re.compile(r"step-(\d{8,})")
MANIFEST, STATE = "manifest.json", "state.json"
STATE_KEYS = {"step", "layout", "record", "trainer"}
# What a file that is not there, or is no file, is refused with. Whatever else the system says (too many open files, a
# disk or a server that fails, permissions) says nothing about the checkpoint.
GONE = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP)


def part_name(rank: int, world_size: int) -> str:
    return f"rank-{rank:05d}-of-{world_size:05d}.safetensors"


def size_of_one(trained: int, moving: bool) -> int:
    """Bytes of a checkpoint: fp32 weights that are trained, two moments of each, and of a reference that moves its
    weights."""
    return 4 * (3 + moving) * trained


def most_at_once(settings: Checkpoint) -> int:
    """How many of a stage lie on the disk at a time: one is written before another goes. 0: none is saved."""
    if settings.every_minutes is None and settings.every_steps is None:
        return 0
    return settings.keep_last + settings.keep_best + 1


@dataclass
class Checkpoints:
    """Those of one stage. key: of the stage, which must be that of what is resumed. warn: one line for people."""

    folder: Path
    key: str
    settings: Checkpoint
    warn: Callable[[str], None]

    # --- reading --------------------------------------------------------------------------------------------------

    def found(self) -> list[int]:
        """Steps of what has a checkpoint's name, the newest first; whether one is whole, `trouble` says."""
        if self.folder.is_symlink() or not self.folder.is_dir():
            return []
        named = ((NAME.fullmatch(path.name), path) for path in self.folder.iterdir())
        return sorted((int(name[1]) for name, _ in named if name), reverse=True)

    def at(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}"

    def trouble(self, step: int, part: int = 0, parts: int = 1) -> str | None:
        """How the checkpoint is damaged, or None. Of its files, each part-th of so many parts is hashed.

        Raises MachineError where the system does not let it be read now, and InputError for one in another format:
        neither says that it is damaged.
        """
        try:
            return self._trouble(step, part, parts)
        except OSError as error:
            if error.errno in GONE:
                return f"it cannot be read ({error.strerror})"
            what = f"the checkpoint of step {step} cannot be read now ({error.strerror or error})"
            fix = "run the same command again when it can; to go on without it, move its folder away"
            raise MachineError(what, where=str(error.filename or self.at(step)), fix=fix) from error

    def _trouble(self, step: int, part: int, parts: int) -> str | None:
        folder = self.at(step)
        if folder.is_symlink() or not folder.is_dir():
            return "it is not a folder of this store"
        if (folder / MANIFEST).is_symlink():
            return f"{MANIFEST} is not a plain file"
        try:
            manifest = read_json(folder / MANIFEST)
            said = manifest.pop("sha256")
            files = dict(sorted(manifest["files"].items()))
            if said != digest(manifest):
                return f"its {MANIFEST} is damaged"
            if manifest["format"] != FORMAT:
                what = f"the checkpoint of step {step} has format {manifest['format']}, this version reads {FORMAT}"
                fix = "go on with the version that wrote it; to begin anew, move the folder away"
                raise InputError(what, where=str(folder), fix=fix)
            if (manifest["key"], manifest["step"]) != (self.key, step):
                return "it belongs to another stage or step"
        except (ValueError, KeyError, TypeError, AttributeError):
            return f"it has no whole {MANIFEST}"
        except OSError as error:
            if error.errno not in GONE:
                raise
            return f"it has no {MANIFEST}"
        there = {str(path.relative_to(folder)) for path in _within(folder)} - {MANIFEST}
        if there != set(files):
            odd = sorted(there ^ set(files))[0]
            return f"{odd} is missing" if odd in files else f"{odd} is not in its manifest"
        for number, (name, file) in enumerate(files.items()):
            path = folder / name
            if path.is_symlink() or not path.is_file():
                return f"{name} is not a plain file"
            if path.stat().st_size != file["bytes"]:
                return f"{name} has {path.stat().st_size} bytes instead of {file['bytes']}"
            if number % parts == part and sha256(path) != file["sha256"]:
                return f"{name} is damaged"
            if not (_has_state(path) if name == STATE else _has_tensors(path)):  # whatever its manifest says
                return f"{name} has not what it should"
        return None

    def state(self, step: int) -> dict[str, Any]:
        return dict(read_json(self.at(step) / STATE))

    # --- writing --------------------------------------------------------------------------------------------------

    def clean(self) -> None:
        """What killed attempts left half-written goes. Links are not followed: they go."""
        if self.folder.is_symlink():
            self.warn(f"{self.folder.name} was a link out of the store: it is not read, and is removed")
            self.folder.unlink()
        self.folder.mkdir(parents=True, exist_ok=True)
        for path in self.folder.glob(".*"):
            remove(path)

    def aside(self, step: int) -> Path:
        """Where the checkpoint is written before it counts."""
        return self.folder / f".{self.at(step).name}"

    def commit(self, step: int, files: dict[str, dict[str, Any]], state: dict[str, Any], score: float | None) -> None:
        """Give the checkpoint its name. files: the parts, durable already: name -> bytes, sha256. Raises OSError."""
        aside = self.aside(step)
        write_json(aside / STATE, state, indent=None)  # training waits, and there may be a rollout in it
        size = (aside / STATE).stat().st_size
        files = {**files, STATE: {"bytes": size, "sha256": sha256(aside / STATE)}}
        manifest = {"format": FORMAT, "key": self.key, "step": step, "score": score, "files": files}
        write_json(aside / MANIFEST, {**manifest, "sha256": digest(manifest)})
        fsync(aside)
        self.remove(step)
        aside.rename(self.at(step))
        fsync(self.folder)

    def discard(self, step: int) -> None:
        """One that could not be written."""
        remove(self.aside(step))

    def put_away(self, step: int, why: str) -> None:
        """One that cannot be used: said, and moved out of the way. It stays: what could not be read may be well."""
        path, kept = self.at(step), self.folder / f"damaged-{self.at(step).name}-{time.time_ns()}"
        if path.is_symlink() or not path.is_dir():
            path.unlink()
            self.warn(f"checkpoint of step {step}: {why}: it is not used, and removed")
            return
        path.rename(kept)
        until = "until the stage is done or the disk is full"
        self.warn(f"checkpoint of step {step}: {why}: it is not used, and kept as {kept.name} {until}")

    def remove(self, step: int) -> None:
        self._remove(self.at(step))

    def _remove(self, path: Path) -> None:
        """The name goes first, then the files: a kill between leaves nothing that looks whole."""
        if path.is_symlink():
            path.unlink()
        elif path.exists():
            gone = self.folder / f".removed-{path.name}-{time.time_ns()}"
            path.rename(gone)
            remove(gone)

    def retain(self) -> None:
        """Remove what settings.keep_last and keep_best do not keep. The newest one always stays. One that cannot be
        removed is warned of."""
        try:
            steps = self.found()
            kept = {*steps[: self.settings.keep_last], *self.best()}
            for step in steps:
                if step not in kept:
                    self.remove(step)
        except OSError as error:
            self.warn(f"checkpoints that are no longer wanted stay: {error}")

    def best(self) -> list[int]:
        """Steps of the settings.keep_best best, the best first."""
        lowest = self.settings.best_is == "lowest"
        scored = [(score, step) for step in self.found() if (score := self._score(step)) is not None]
        ranked = sorted(scored, key=lambda pair: pair[0] if lowest else -pair[0])
        return [step for _, step in ranked[: self.settings.keep_best]]

    def room(self) -> int:
        """Bytes that the disk has, with what `make_room` can remove."""
        return shutil.disk_usage(self.folder).free + sum(map(_size, self._spare()))

    def kept_bytes(self) -> int:
        """Of the checkpoints that `make_room` leaves."""
        return sum(_size(self.at(step)) for step in self._kept())

    def make_room(self, size: float) -> None:
        """Of the disk, for so many bytes: while they are not free, those that are put away go, then all but the newest
        checkpoint and the best, the oldest first."""
        for path in self._spare():
            if shutil.disk_usage(self.folder).free >= size:
                return
            self._remove(path)

    def _kept(self) -> set[int]:
        return {*self.found()[:1], *self.best()}

    def _spare(self) -> list[Path]:
        kept = self._kept()
        put_away = sorted(path for path in self.folder.glob("damaged-*") if path.is_dir() and not path.is_symlink())
        return [*put_away, *(self.at(step) for step in reversed(self.found()) if step not in kept)]

    def _score(self, step: int) -> float | None:
        try:
            score = read_json(self.at(step) / MANIFEST)["score"]
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return float(score) if isinstance(score, int | float) and math.isfinite(score) else None


def _has_state(path: Path) -> bool:
    try:
        return set(read_json(path)) >= STATE_KEYS
    except (ValueError, TypeError):
        return False


def _has_tensors(path: Path) -> bool:
    """Whether it has the header of a safetensors file. Raises OSError."""
    with open(path, "rb") as stream:
        size = int.from_bytes(stream.read(8), "little")
        try:
            return size <= path.stat().st_size and isinstance(json.loads(stream.read(size)), dict)
        except ValueError:
            return False


def _within(folder: Path) -> Iterator[Path]:
    """All that lies in it; unlike Path.rglob it raises OSError for a folder that cannot be listed."""

    def refuse(error: OSError) -> None:
        raise error

    for place, folders, files in os.walk(folder, onerror=refuse):
        yield from (Path(place) / name for name in (*folders, *files))


def _size(folder: Path) -> int:
    """Bytes of the files in it."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
