"""The code as it was when jobs were submitted: what runs is this, whatever becomes of the checkout while they wait."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path

from alignment.errors import MachineError
from alignment.files import fsync
from alignment.pipeline.identity import SOURCES, package_root, source_digest

TRIES = 5


def take(store: Path) -> Path:
    """The folder, below the store, that holds a copy of the package: to be the first of PYTHONPATH. Equal code is
    copied once; a copy that has lost files (scratch is tidied) is replaced."""
    root = package_root()
    for _ in range(TRIES):
        place = store / "code" / source_digest(root)[:16]
        if place.is_dir() and not _is_whole(root, place):
            place.rename(place.with_name(f".{place.name}.damaged-{time.time_ns()}"))
        if place.is_dir() or _copied(root, place):
            return place
    raise MachineError("the code changes while it is copied", where=str(root), fix="run the command again")


def _is_whole(root: Path, place: Path) -> bool:
    return source_digest(place / root.name)[:16] == place.name


def _copied(root: Path, place: Path) -> bool:
    """False if the copy is not what the place's name says: somebody has edited a file meanwhile."""
    place.parent.mkdir(parents=True, exist_ok=True)
    fresh = place.with_name(f".{place.name}.{os.getpid()}.{time.time_ns()}")
    try:
        for folder, _, names in os.walk(root, followlinks=True):
            into = fresh / root.name / Path(folder).relative_to(root)
            for name in names:
                if name.endswith(SOURCES):
                    into.mkdir(parents=True, exist_ok=True)
                    shutil.copy2(Path(folder) / name, into / name)
                    fsync(into / name)
        if source_digest(fresh / root.name)[:16] != place.name:
            return False
        fresh.rename(place)
        return True
    except OSError:
        if place.is_dir():  # another one was faster
            return True
        raise
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
