"""The content-addressed store: a result is there whole, under the key of what made it, or not at all.

store/<key16>/   committed results, each with record.json     work/<key16>/   stages in progress, or failed
locks/<key16>    who works on a key now                       runs/<run id>/  run.json and report.html
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from alignment.allocation import allocation
from alignment.errors import MachineError
from alignment.files import LATE, fsync, read_json, remove, sha256

CHECKPOINTS = "checkpoints"  # of a stage at work; beside its result those that record["checkpoints"] names
NEXT = "next_attempt.json"  # what an attempt has learned and leaves to the next one
# W&B's files and the log may still grow or go while a result is committed; checkpoints are no part of a result.
OUTCOME = "outcome.json"  # that, and how, a stage has stopped in order
SAMPLED = "sampled.jsonl"  # answers of a stage at work that samples
PASSING = ("beats", "lost.json", OUTCOME, NEXT, SAMPLED)  # of a stage at work only: gone from its result
VOLATILE = tuple(f"{name}/" for name in ("wandb", "log.txt", "progress.json", "stacks", CHECKPOINTS, *PASSING))
# Variable of processes that a machine has started which has joined a run by hand: the lock that it holds meanwhile.
JOINED = "ALIGNMENT_JOINED"
METRICS = "metrics.jsonl"
ROLLOUTS = "rollouts.jsonl"  # some of the answers that were trained on online
ROWS = (METRICS, ROLLOUTS)  # by step; of those after a checkpoint each is written again
WARNINGS = "warnings.txt"  # a line a warning, in the stage's folder
# What a new attempt takes over from those before: training state, answers, what they have told, who they were.
KEPT = frozenset({CHECKPOINTS, SAMPLED, NEXT, *ROWS, "attempts.jsonl", "log.txt", "stacks", "wandb_run_id"})

FOLDERS = frozenset({CHECKPOINTS, "stacks"})  # of what is kept; the rest are plain files


class Store:
    def __init__(self, root: Path):
        self.root = root.resolve()

    def result(self, key: str) -> Path:
        return self.root / "store" / key[:16]

    def work(self, key: str) -> Path:
        return self.root / "work" / key[:16]

    def run_folder(self, run: str) -> Path:
        return self.root / "runs" / run

    def record(self, key: str) -> dict[str, Any] | None:
        """The record of a committed result whose files are all there with their sizes, else None."""
        return self._look(key, self.result(key))[0]

    def damage(self, key: str) -> str | None:
        """Of a result that is there and not whole: what is wrong with it, and its folder. `record` knows none then."""
        folder = self.result(key)
        record, wrong = self._look(key, folder)
        return f"damaged: {wrong} (in {folder})" if record is None and os.path.lexists(folder) else None

    def sealed(self, key: str) -> dict[str, Any] | None:
        """The record of a result that lay whole in the work folder, as a kill or a refusal at the last moment leaves
        it, and now has its place. The caller holds the key's lock."""
        record, _ = self._look(key, self.work(key))
        if record is not None:
            for name in (*PASSING, "error.json"):  # the last: of the refusal itself
                remove(self.work(key) / name)
            self._place(key, record)
        return record

    def _look(self, key: str, folder: Path) -> tuple[dict[str, Any] | None, str]:
        """The record, or else what is wrong."""
        try:
            record = read_json(folder / "record.json")
        except (OSError, ValueError) as error:
            return None, f"record.json {'is gone' if isinstance(error, FileNotFoundError) else 'cannot be read'}"
        try:
            sizes = [(name, file["bytes"]) for name, file in record["files"].items()]
            if record["key"] != key:
                return None, "record.json is of another result"
        except (KeyError, TypeError, AttributeError):
            return None, "record.json is no record of a result"
        wrong = next((wrong for name, size in sizes if (wrong := _wrong(folder, name, size))), None)
        return (None, wrong) if wrong else (record, "")

    def awaited(self, key: str, asked: Callable[[], str | None] = lambda: None) -> dict[str, Any] | None:
        """`record`, inside of a cluster's job for as long as a file system may hide what another machine has just
        committed: it is there, or this job would not have been started. asked: why to give up."""
        until = time.monotonic() + (LATE if allocation() else 0.0)
        while (record := self.record(key)) is None and time.monotonic() < until and not asked():
            time.sleep(1.0)
            self.look_anew()
        return record

    def look_anew(self) -> None:
        """NFS remembers that a name was not there till it sees the folder anew."""
        with suppress(OSError):
            os.listdir(self.root / "store")

    def begin(self, key: str, warn: Callable[[str], None] = lambda text: None) -> Path:
        """The work folder for a new attempt, with nothing in it but what is KEPT; the caller holds the key's lock.

        What is kept stays where it is: a death at any moment loses none of it. warn: told of what `remove_odd` does.
        Raises OSError if no result could get its place: better now than after the work.
        """
        self.remove_odd(key, warn)
        folder, results = self.work(key), self.result(key).parent
        for needed in (folder, results):
            needed.mkdir(parents=True, exist_ok=True)
        _require_way(folder, results)
        aside = folder.with_name(f".{folder.name}.{time.time_ns()}")
        for path in list(folder.iterdir()):
            if path.name not in KEPT:
                aside.mkdir(exist_ok=True)
                path.rename(aside / path.name)
        for remains in folder.parent.glob(f".{folder.name}.*"):
            shutil.rmtree(remains, ignore_errors=True)  # W&B's helper may live on for seconds, and write there
        return folder

    def remove_odd(self, key: str, warn: Callable[[str], None] = lambda text: None) -> None:
        """From the work folder, or in its place: links, which are never followed, and what is a folder instead of a
        file, or no plain file. The caller holds the key's lock. warn: told of each."""
        folder = self.work(key)
        _remove_odd(folder, True, warn)
        for path in folder.iterdir() if folder.is_dir() else ():
            if path.name in KEPT or path.is_symlink():
                _remove_odd(path, path.name in FOLDERS, warn)
        for path in [path for name in FOLDERS for path in (folder / name).rglob("*") if path.is_symlink()]:
            _remove_odd(path, True, warn)

    def commit(self, key: str, record: dict[str, Any]) -> Path:
        """Seal the work folder and give it its place by one rename. The caller holds the key's lock.

        Checkpoints go only once the result is there; a kill between leaves some, for `tidy` by whoever finds them.
        """
        folder = self.work(key)
        files, folders = {}, [folder]
        for stacks in folder.glob("stacks/*.txt"):
            if not stacks.stat().st_size:  # nobody had to ask
                stacks.unlink()
        for path in _lasting(folder):
            if path.is_dir():
                folders.append(path)
            else:
                fsync(path)
                files[str(path.relative_to(folder))] = {"bytes": path.stat().st_size, "sha256": sha256(path)}
        (folder / "record.json").write_text(json.dumps({**record, "files": files}, indent=1) + "\n", encoding="utf-8")
        fsync(folder / "record.json")
        for name in PASSING:  # as late as can be: who watches takes a process without a beat for lost
            remove(folder / name)
        for path in reversed(folders):  # the names in them, the work folder's last
            fsync(path)
        return self._place(key, record)

    def _place(self, key: str, record: dict[str, Any]) -> Path:
        folder, place = self.work(key), self.result(key)
        place.parent.mkdir(parents=True, exist_ok=True)
        if place.exists():  # damaged, else its record would have been found
            os.replace(place, place.with_name(f"{place.name}.damaged-{time.time_ns()}"))
        os.rename(folder, place)
        fsync(place.parent)
        self.tidy(key, record)
        return place

    def tidy(self, key: str, record: dict[str, Any]) -> None:
        """Remove the checkpoints of a committed result but for those that its record names."""
        folder, stay = self.result(key) / CHECKPOINTS, set(record.get("checkpoints") or ())
        if folder.is_symlink() or not folder.is_dir():
            return
        for path in folder.iterdir():
            if path.name not in stay:
                remove(path)
        if not stay:
            remove(folder)

    def lock(self, key: str) -> Lock:
        return Lock(self.root / "locks" / key[:16])

    def run_lock(self, run: str) -> Lock:
        """Held by a run's driver: run.json has one writer."""
        return Lock(self.root / "locks" / run)

    def sweep_lock(self, sweep: str) -> Lock:
        """Held for the moment in which sweep.json is changed: two processes of one command both add to it."""
        return Lock(self.root / "locks" / f"sweep-{sweep}")

    def driver_lock(self, sweep: str) -> Lock:
        """Held by a command that works on a sweep or waits for it, for as long as it lives; by one, if several do."""
        return Lock(self.root / "locks" / f"driver-{sweep}")

    def machine_lock(self, head: str, rank: int) -> Lock:
        """Held by the machine that has this rank among those that meet there."""
        return Lock(self.root / "locks" / f"joined-{head}-{rank}")

    def is_held(self, key: str) -> bool:
        """Whether a living process works on the key."""
        return self.lock(key).is_held()

    def require_space(self, gigabytes: float) -> None:
        self.root.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(self.root).free / 1e9
        if free < gigabytes:
            raise MachineError(
                f"{free:.1f} GB of disk are free, {gigabytes:g} GB are asked for",
                where=str(self.root),
                fix="free some space, or set store=... or min_free_gb=...",
            )


def _require_way(folder: Path, results: Path) -> None:
    """Raises OSError unless what stands beside this work folder can be renamed into the results: neither rights nor the
    numbers of file systems tell. An empty folder that a kill left there is no hindrance, and goes."""
    probe = folder.with_name(f".{folder.name}.way")
    probe.mkdir(exist_ok=True)
    try:
        os.rename(probe, results / probe.name)
    except OSError as error:
        probe.rmdir()
        raise OSError(error.errno, f"no result can be put there: {error.strerror}", str(results)) from error
    (results / probe.name).rmdir()


def _wrong(folder: Path, name: str, size: Any) -> str | None:
    """Of a file that has this size in a record."""
    try:
        found = (folder / name).stat().st_size
    except FileNotFoundError:
        return f"{name} is gone"
    except OSError as error:
        return f"{name} cannot be read: {error.strerror}"
    return None if found == size else f"{name} has {found} bytes instead of {size}"


def _lasting(folder: Path) -> list[Path]:
    """Files and folders in it that are neither VOLATILE nor links. What is volatile is not looked into: it may go."""
    found = []
    for place, folders, files in os.walk(folder):
        here = Path(place).relative_to(folder)
        last = [name for name in (*folders, *files) if not f"{here / name}/".startswith(VOLATILE)]
        found += [Path(place) / name for name in last if not (Path(place) / name).is_symlink()]
        folders[:] = [name for name in folders if name in last]
    return sorted(found)


def _remove_odd(path: Path, folder: bool, warn: Callable[[str], None]) -> None:
    """A link, or what is there and is no folder, or no plain file."""
    if path.is_symlink():
        path.unlink()
        warn(f"{path} was a link, which no stage makes: it is removed, and what it led to is left as it is")
    elif path.exists() and not (path.is_dir() if folder else path.is_file()):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
        warn(f"{path} was no {'folder' if folder else 'plain file'}: it is removed")


class Lock:
    """An advisory lock on a key, held through an open file: the kernel drops it when its last holder dies."""

    def __init__(self, path: Path):
        self.path = path
        self._stream: IO[str] | None = None

    @property
    def fileno(self) -> int:
        assert self._stream is not None
        return self._stream.fileno()

    def acquire(self, who: str) -> bool:
        """Try once. who: a word about the holder, for those who wait."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        stream = open(self.path, "a+", encoding="utf-8")  # noqa: SIM115 - it stays open while the lock is held
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            stream.close()
            return False
        except OSError as error:
            stream.close()
            raise self._unlockable(error) from error
        self._stream = stream
        if not self.holds():  # of a file that was taken from under us
            self.release()
            return False
        told = {"who": who, "host": socket.gethostname(), "pid": os.getpid(), "since": time.time()}
        if mine := allocation():
            told |= {"job": mine.job, "restarts": mine.restarts}
        stream.seek(0)
        stream.truncate()
        stream.write(json.dumps(told))
        stream.flush()
        return True

    def holds(self) -> bool:
        """Whether this process holds it, and nobody has taken it over."""
        if self._stream is None:
            return False
        try:
            return os.path.samestat(os.fstat(self._stream.fileno()), os.stat(self.path))
        except OSError:
            return False

    def take_over(self) -> bool:
        """From an earlier start of the same job, if that holds it: SLURM has started this one since it cannot reach the
        other, which may live on, cut off, and holds its lock until it finds out. Returns whether it did so."""
        before, mine = self.holder(), allocation()
        if mine is None or before.get("job") != mine.job or before.get("restarts", 0) >= mine.restarts:
            return False
        if not self.is_held():
            return False
        with suppress(FileNotFoundError):
            self.path.unlink()
        return True

    def is_held(self) -> bool:
        """Whether anybody holds it, through whatever open file. Those who ask do not keep each other from asking."""
        try:
            with open(self.path, encoding="utf-8") as stream:
                fcntl.flock(stream, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except (FileNotFoundError, NotADirectoryError):
            return False
        except BlockingIOError:
            return True
        except OSError as error:
            raise self._unlockable(error) from error
        return False

    def _unlockable(self, error: OSError) -> MachineError:
        what = f"the file system has no locks ({error.strerror})"
        return MachineError(what, where=str(self.path), fix="mount it with flock, or set store=... to another one")

    def wait(self, who: str, waiting: Callable[[dict[str, Any]], None], every: float = 0.5) -> None:
        """Acquire, however long it takes; `waiting` is told who holds it, each time it is asked."""
        while not self.acquire(who):
            waiting(self.holder())
            time.sleep(every)

    def holder(self) -> dict[str, Any]:
        try:
            return dict(json.loads(self.path.read_text(encoding="utf-8")))
        except (OSError, ValueError):
            return {}

    def release(self) -> None:
        if self._stream is not None:
            self._stream.close()
            self._stream = None
