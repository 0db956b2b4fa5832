"""What befalls a rank from within. Each function is called in the rank, before its worker begins; see driver.Fault.

The product knows nothing of it: a moment is a function of it that is about to be called for the n-th time.
"""

from __future__ import annotations

import os
import resource
import subprocess
import time
from concurrent.futures import wait
from pathlib import Path
from typing import Any

import pytest
import torch

from alignment import generation, worker
from alignment.pipeline.store import Store
from alignment.rewards import Judge
from alignment.signals import ECHO
from alignment.stages import train
from alignment.tracking import Tracker
from alignment.training import engine, model, tensors, trainers
from alignment.training.checkpoints import Checkpoints
from alignment.training.keeper import Keeper
from alignment.training.reference import ReferenceStore
from tests.conftest import fill as fill_disk
from tests.training import poison

MOMENTS: dict[str, tuple[Any, str]] = {
    "import": (worker, "_require_parents"),
    "loading": (engine, "start"),
    "trial": (trainers.AlignedTrainer, "_before_training"),
    "reference": (ReferenceStore, "append"),
    "sampling": (generation, "draw"),
    "judging": (Judge, "score"),
    "training": (trainers.AlignedTrainer, "training_step"),
    "saving": (tensors, "write"),
    "committing": (Checkpoints, "commit"),
    "removing": (Checkpoints, "remove"),
    "finishing": (Keeper, "close"),
    "model": (train, "consolidate"),
    "writing": (model, "_write"),
    "summary": (worker, "_all_done"),
    "tracker": (Tracker, "result"),
    "result": (Store, "commit"),
    "fsync": (os, "fsync"),
    "rename": (os, "rename"),
    "replace": (os, "replace"),
}


def at(moment: str, do: str, nth: int = 1, **options: Any) -> None:
    """Have `do`, a function below, happen when the moment comes for the nth time; at its "start": now."""
    if moment == "start":
        globals()[do](**options)
        return
    owner, name = MOMENTS[moment]
    real, count = getattr(owner, name), [0]

    def wrapped(*arguments: Any, **named: Any) -> Any:
        count[0] += 1
        if count[0] == nth:
            globals()[do](**options)
        return real(*arguments, **named)

    setattr(owner, name, wrapped)


def signal_self(number: int) -> None:
    os.kill(os.getpid(), number)


def insist(number: int) -> None:
    """Twice, and far enough apart to be two requests."""
    signal_self(number)
    time.sleep(ECHO + 0.5)
    signal_self(number)


def slow_disk(seconds: float) -> None:
    """It takes so long for each piece of a file, from now on."""
    real = tensors._pieces

    def pieces(*arguments: Any) -> Any:
        for piece in real(*arguments):
            time.sleep(seconds)
            yield piece

    tensors._pieces = pieces


def keep_up() -> None:
    """The disk is as fast as training: what is written while a step is computed is there at its end."""
    real = Keeper.wishes

    def wishes(keeper: Keeper) -> Any:
        if keeper._write is not None:
            wait([keeper._write.part])
        return real(keeper)

    Keeper.wishes = wishes  # type: ignore[method-assign]


def fail(what: str) -> None:
    raise RuntimeError(what)


def exhaust() -> None:
    """What PyTorch's allocator refuses."""
    torch.empty(1 << 50)


def rest(seconds: float) -> None:
    time.sleep(seconds)


def fill(disk: str, leave: int = 0) -> None:
    fill_disk(Path(disk), leave)


def free(disk: str) -> None:
    (Path(disk) / "filler").unlink(missing_ok=True)


def small_files(size: int) -> None:
    """The kernel lets this process write no file larger than this: EFBIG."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def read_only_checkpoints(store: str) -> None:
    """The folder of checkpoints, as soon as one is in it."""
    at("training", "read_only", nth=3, store=store)


def read_only(store: str) -> None:
    (folder,) = Path(store).glob("work/*/checkpoints")
    subprocess.run(["mount", "--bind", folder, folder], check=True)
    subprocess.run(["mount", "-o", "remount,ro,bind", folder], check=True)


def wait_for(path: str) -> None:
    """Stay here until the file is there; that it stays is told by another one."""
    Path(f"{path}-waits").touch()
    while not Path(path).exists():
        time.sleep(0.05)


def set_clock(seconds: float) -> None:
    """The wall clock, as Python tells it, is another one from now on."""
    real, real_ns = time.time, time.time_ns
    time.time, time.time_ns = lambda: real() + seconds, lambda: real_ns() + int(seconds * 1e9)


def poisoned(where: str, steps: list[int]) -> None:
    poison.into(pytest.MonkeyPatch(), where, steps)
