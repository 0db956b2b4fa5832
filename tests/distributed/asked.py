"""A keeper whose process is asked to stop, is lost, or writes slowly, at chosen steps; and a loss with random parts."""

from __future__ import annotations

import hashlib
import json
import random
from concurrent.futures import wait
from threading import Event
from typing import Any

import numpy as np
import torch

from alignment.training import preference, ranks, trainers
from alignment.training.keeper import Keeper


class LostError(Exception):
    """The attempt breaks off: nothing is saved, what was being written is not brought to its end."""


class Asked(Keeper):
    """After every step of its process, a line of generators-<rank>.jsonl beside its checkpoints."""

    def __init__(
        self, *arguments: Any, stop: int | None = None, lose: int | None = None, behind: int = 0, **options: Any
    ) -> None:
        """stop, lose: what happens while so many steps, from where it began, are computed. behind: what is saved is
        written no sooner than so many steps later, and just then, if nobody waits for it earlier."""
        super().__init__(*arguments, **options)
        self._stops, self._loses, self._behind, self._computed, self._begun = stop, lose, behind, 0, 0
        self._gate = Event()
        self._generators = self.checkpoints.folder.parent / f"generators-{ranks.rank()}.jsonl"

    def wishes(self) -> Any:
        self._computed += 1
        if self._computed == self._loses:
            raise LostError
        if self._computed == self._stops:
            self.stage.stop.asked = "SIGTERM"
        if self._write is not None and self._computed - self._begun == self._behind:
            self._gate.set()
            wait([self._write.part])
        return super().wishes()

    def after_step(self, trainer: Any, step: int, *arguments: Any, **options: Any) -> None:
        with open(self._generators, "a", encoding="utf-8") as stream:
            stream.write(json.dumps([step, *generators()]) + "\n")
        super().after_step(trainer, step, *arguments, **options)

    def _save(self, *arguments: Any) -> None:
        self._begun = self._computed
        if self._behind:
            self._gate.clear()
        super()._save(*arguments)

    def _part(self, *arguments: Any) -> Any:
        if self._behind:
            self._gate.wait()
        return super()._part(*arguments)

    def settle(self) -> None:
        self._gate.set()
        super().settle()

    def close(self, wait: bool = True) -> None:
        """The thread is waited for in any case: the next attempt in this process writes files of the same names."""
        self._gate.set()
        super().close()


def generators() -> list[str]:
    """What tells the states of torch's, numpy's and Python's generators from others."""
    kind, keys, *rest = np.random.get_state()
    states = torch.get_rng_state().tolist(), [kind, np.asarray(keys).tolist(), *rest], random.getstate()
    return [hashlib.sha256(repr(state).encode()).hexdigest()[:16] for state in states]


def noise(monkeypatch: Any) -> None:
    """Losses are multiplied by random numbers of all three generators; the next rank draws once more."""
    for kind in (trainers.SFT, preference.Referenced):
        monkeypatch.setattr(kind, "_scale", _noisy(kind._scale))


def _noisy(scale: Any) -> Any:
    def wrapped(*arguments: Any) -> float:
        factor = 1.0
        for _ in range(ranks.rank() + 1):
            factor *= 0.75 + (torch.rand(()).item() + np.random.random() + random.random()) / 6
        return float(scale(*arguments) * factor)

    return wrapped
