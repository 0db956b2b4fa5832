"""Which rows make which optimiser step, and on which process: a function of the seed and the step alone.

Free of torch and of any trainer. The rows of all epochs are one endless stream, each epoch a permutation of the data;
step s takes the rows s*B .. (s+1)*B of the stream, whatever the number of processes. Every process knows every length,
so all of them compute the same split without talking to each other.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from alignment.errors import ConfigError


def count_steps(rows: int, global_batch_size: int, epochs: float, max_steps: int | None) -> int:
    """Optimiser steps of a run. The last batch is filled from the next permutation: no row is seen too seldom."""
    if max_steps is not None:
        return max_steps
    return max(1, math.ceil(rows * epochs / global_batch_size - 1e-9))


@dataclass(frozen=True)
class GlobalBatches:
    """The batches of a run.

    lengths: packed tokens of each row, a prompt that its answers share counted once.
    weights: what each row adds to the divisor of the loss: its trained tokens (SFT), or 1 a pair (DPO).
    widths: tokens of each row when padded; given where the forward pads, so that a micro-batch of rows R is
    len(R) * max(widths of R) tokens. None where it packs: then it is the sum of their lengths.
    tokens_per_micro_batch: most tokens of a micro-batch; a longer row is a micro-batch of its own.
    quadratic: b / a of the time a*L + b*L^2 that a row of L tokens takes (attention against all else), 1 / tokens.
    """

    lengths: Sequence[int]
    weights: Sequence[int]
    global_batch_size: int
    steps: int
    seed: int
    world_size: int = 1
    tokens_per_micro_batch: int = 2048
    widths: Sequence[int] | None = None
    quadratic: float = 0.0

    def __post_init__(self) -> None:
        if self.global_batch_size < self.world_size:
            raise ConfigError(
                f"a global batch of {self.global_batch_size} cannot be shared by {self.world_size} processes",
                where="global_batch_size",
                fix="raise global_batch_size, or lower launcher.processes or launcher.nodes",
            )

    def rows(self, step: int) -> list[int]:
        """Row numbers of one global batch, in the order of the stream."""
        return self.stream(step * self.global_batch_size, self.global_batch_size)

    def stream(self, first: int, number: int) -> list[int]:
        """Row numbers at so many places of the stream."""
        count = len(self.lengths)
        places = (divmod(place, count) for place in range(first, first + number))
        return [int(_permutation(self.seed, epoch, count)[place]) for epoch, place in places]

    def weight(self, step: int) -> int:
        """The divisor of the step's loss: trained tokens or pairs of the whole global batch."""
        return sum(int(self.weights[row]) for row in self.rows(step))

    def micro_batches(self, step: int) -> list[list[list[int]]]:
        """[process][micro-batch] -> row numbers; every process has the same number of micro-batches, none is empty."""
        return self.split(self.rows(step))

    def split(self, rows: Sequence[int]) -> list[list[list[int]]]:
        """The fewest micro-batches a process that keep to the budget, or of very many a few more.

        rows: at least as many as there are processes.
        """
        shares = _longest_first_to_the_lightest(rows, self._cost, self.world_size, even=True)
        most = min(map(len, shares))
        # Only if the batch does not divide by the processes may the smallest share lack rows for the count needed;
        # then the others' micro-batches exceed the budget a little.
        count = self._fewest(shares)
        while True:
            split = [self._cut(share, count) for share in shares]
            cuts = (cut for share in split for cut in share)
            if count == most or all(len(cut) == 1 or self.tokens(cut) <= self.tokens_per_micro_batch for cut in cuts):
                return split
            count = min(most, count + 1 + count // 50)  # of many a few more than needed: trying each would take long

    def tokens(self, rows: Sequence[int]) -> int:
        """Tokens that a forward of these rows computes."""
        if self.widths is not None:
            return len(rows) * max(int(self.widths[row]) for row in rows)
        return sum(int(self.lengths[row]) for row in rows)

    def _fewest(self, shares: list[list[int]]) -> int:
        """No fewer micro-batches than this can hold the largest share: where the search begins."""
        budget, needed = self.tokens_per_micro_batch, 1
        for share in shares:
            alone = sum(2 * int(self.lengths[row]) > budget for row in share)  # no two of these fit together
            needed = max(needed, alone, -(-sum(int(self.lengths[row]) for row in share) // budget))
        return min(needed, min(map(len, shares)))

    def _cut(self, share: list[int], count: int) -> list[list[int]]:
        """A share in `count` micro-batches of about equal time; padded rows beside those of like width."""
        if self.widths is None:
            return _longest_first_to_the_lightest(share, self._cost, count)
        widest_first = sorted(share, key=lambda row: -self.widths[row])  # type: ignore[index]
        return [list(map(int, part)) for part in np.array_split(np.array(widest_first), count)]

    def _cost(self, row: int) -> float:
        length = float(self.lengths[row])
        return length + self.quadratic * length * length


def _longest_first_to_the_lightest(
    rows: Sequence[int], cost: Callable[[int], float], count: int, even: bool = False
) -> list[list[int]]:
    """Longest processing time first (Graham 1969): the dearest row left goes to the bin with the least to do.

    No bin stays empty (there are at least `count` rows). even: bins differ by at most one row, so that all of them can
    be cut into equally many micro-batches.
    """
    least, larger = divmod(len(rows), count)
    bins: list[list[int]] = [[] for _ in range(count)]
    lightest_first = [(0.0, 0, at) for at in range(count)]  # load, rows, bin: a heap
    for row in sorted(rows, key=lambda row: -cost(row)):
        while True:
            load, filled, at = heapq.heappop(lightest_first)
            if not even or filled < least or (filled == least and larger):
                break  # a bin that is full does not come back
        larger -= even and filled == least
        bins[at].append(row)
        heapq.heappush(lightest_first, (load + cost(row), filled + 1, at))
    return bins


@lru_cache(maxsize=4)
def _permutation(seed: int, epoch: int, count: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(count)
