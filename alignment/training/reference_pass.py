"""The reference's log-probs of the rows that a run will train on: computed once, before its first step, and kept.

The reference of a run is its policy before the first update, so the engine that will train computes them, or one like
it in a stage before (scoring.py): no second model is loaded, sharded or held. With a store, the rows that another run
with the same start weights and precision has computed are read, and those computed here are there for the next: a sweep
over beta, losses, rates or seeds pays once.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from alignment.errors import TrainingError
from alignment.files import near
from alignment.training import sequence
from alignment.training.batching import GlobalBatches
from alignment.training.ranks import all_gather, broadcast
from alignment.training.reference import ReferenceStore, computing, row_digests

BLOCK = 256  # pairs whose log-probs are stored together: what a killed pass loses at most


class References:
    """Row number -> log-probs of the reference, float32 [tokens of chosen + tokens of rejected], in nats.

    store: None keeps them in memory, for this run alone. progress(step, total, note=...): what is shown meanwhile.
    """

    def __init__(
        self,
        store: ReferenceStore | None,
        progress: Callable[..., None] = lambda *args, **facts: None,
        warn: Callable[[str], None] = print,
    ) -> None:
        self.store, self._progress, self._warn = store, progress, warn
        self._computed: dict[int, np.ndarray] = {}
        self._digests: np.ndarray | None = None
        self._safe_point: Callable[[bool], None] = lambda kept: None
        self._names: list[str] = []  # of segments that are whole
        self.needed = 0  # pairs that this run will see
        self.computed = self.tokens = 0  # pairs of these that it had to compute, and their tokens, a prompt once
        self.seconds = 0.0  # that it took

    @property
    def digest(self) -> str | None:
        """Of the reference's weights, where they are kept."""
        return None if self.store is None else self.store.weights

    @property
    def where(self) -> str | None:
        """The folder that keeps them, for errors."""
        return None if self.store is None else near(self.store.folder)

    def spread(self, numbers: Sequence[int], labels: Tensor) -> Tensor:
        """[2 pairs, width - 1]: log-probs of these pairs' labelled tokens, 0 elsewhere. labels: [2 pairs, width]."""
        scored = labels[:, 1:] != -100
        counts, pairs = scored.sum(1).tolist(), len(numbers)
        rows = [self._of(number) for number in numbers]
        for number, row, chosen, rejected in zip(numbers, rows, counts[:pairs], counts[pairs:], strict=True):
            if len(row) != chosen + rejected:
                what = f"pair {number} has {chosen + rejected} tokens to score, {len(row)} reference log-probs are kept"
                raise TrainingError(what, where=self.where, fix="delete that folder")
        flat = [row[:count] for row, count in zip(rows, counts[:pairs], strict=True)]
        flat += [row[count:] for row, count in zip(rows, counts[:pairs], strict=True)]
        values = torch.from_numpy(np.concatenate(flat))  # a copy: the store's are views of its files
        return torch.zeros(scored.shape).masked_scatter(scored, values)

    def _of(self, number: int) -> np.ndarray:
        if self.store is None:
            return self._computed[number]
        assert self._digests is not None
        return self.store[self._digests[number].tobytes()]

    def missing(self, rows: Any, batches: GlobalBatches) -> np.ndarray:
        """Of the rows that these batches hold those whose log-probs are not there, ascending. A collective."""
        needed = np.unique([row for step in range(batches.steps) for row in batches.rows(step)])
        self.needed = len(needed)
        if self.store is None:
            return needed
        if self._digests is None:
            self._digests = row_digests(rows)
        self._names = broadcast(lambda: self.store.segments(self._warn, self._names))  # type: ignore[union-attr]
        self.store.open(self._names)
        return needed[self.store.missing(self._digests[needed])]

    def complete(self, trainer: Any, safe_point: Callable[[bool], None]) -> None:
        """Compute what is not yet there of the rows that this run will see. A collective: every process enters.

        safe_point: a collective too, called where the pass may end and lose nothing; told whether anything new stays.
        """
        self._safe_point = safe_point
        missing = self.missing(trainer.train_dataset, trainer.batches_of_start)
        if self.store is None:
            self.compute(trainer, missing)
            return
        if len(missing):
            waiting = "another run computes this reference's log-probs: waiting for it"
            with computing(self.store, lambda: trainer.say(waiting), ask=self._ask):
                missing = self.missing(
                    trainer.train_dataset, trainer.batches_of_start
                )  # others have added some meanwhile
                if len(missing):
                    self.store.open([*self._names, *self.compute(trainer, missing)])
        trainer.say(self.says(len(missing)))

    def says(self, computed: int) -> str:
        found = f"{self.needed - computed} of {self.needed} pairs were in the store, {computed} were computed"
        return f"reference log-probs: {found}"

    def _ask(self, take: Callable[[], bool]) -> bool:
        self._safe_point(False)
        self._progress(0, 0, note="reference log-probs: asking for their lock")  # who waits is not hung
        return bool(broadcast(take))

    def compute(self, trainer: Any, rows: np.ndarray) -> list[str]:
        """Of these rows. Returns the names of the segments that the processes wrote. A collective."""
        names: list[str] = []
        batches = replace(trainer.batches, tokens_per_micro_batch=trainer.tokens_without_gradients)
        world = batches.world_size
        began = time.monotonic()
        for first in range(0, len(rows), BLOCK):
            self._safe_point(bool(names))
            block = rows[first : first + BLOCK].tolist()
            padded = block + block[:1] * max(0, world - len(block))  # every process must enter every forward
            mine: dict[int, np.ndarray] = {}
            micro_batches = batches.split(padded)[trainer.share]
            for number, numbers in enumerate(micro_batches, start=1):
                mine.update(zip(numbers, trainer.score(numbers), strict=True))
                done = first + len(block) * number / len(micro_batches)
                self._progress(int(done), len(rows), note="reference log-probs")
            self.computed += len(block)
            self.tokens += sum(int(batches.lengths[row]) for row in block)
            if self.store is None:
                for part in all_gather(mine):
                    self._computed.update(part)
            else:
                assert self._digests is not None
                first_of = sequence.place() == 0  # sharers of a sequence have the same
                name = self.store.append(self._digests[list(mine)], list(mine.values())) if first_of else None
                names += [one for one in all_gather(name) if one is not None]
        self.seconds += time.monotonic() - began
        return names
