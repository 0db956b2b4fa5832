"""Which rows make which optimiser step, and on which process: a function of the seed and the step alone.

Free of torch and of any trainer. The rows of all epochs are one endless stream, each epoch a permutation of the data;
step s takes the rows s*B .. (s+1)*B of the stream, whatever the number of processes. Every process knows every length,
so all of them compute the same split without talking to each other.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
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

    lengths: cost of each row in tokens of a padded forward: a micro-batch of rows R costs len(R) * max(lengths of R).
    weights: what each row adds to the divisor of the loss: its trained tokens (SFT), or 1 a pair (DPO).
    tokens_per_micro_batch: most tokens, padding included, of a micro-batch; a longer row is a micro-batch of its own.
    """

    lengths: Sequence[int]
    weights: Sequence[int]
    global_batch_size: int
    steps: int
    seed: int
    world_size: int = 1
    tokens_per_micro_batch: int = 2048

    def __post_init__(self) -> None:
        if self.global_batch_size < self.world_size:
            raise ConfigError(
                f"a global batch of {self.global_batch_size} cannot be shared by {self.world_size} processes",
                where="global_batch_size",
                fix="raise global_batch_size, or lower launcher.processes",
            )

    def rows(self, step: int) -> list[int]:
        """Row numbers of one global batch, in the order of the stream."""
        first, count = step * self.global_batch_size, len(self.lengths)
        places = (divmod(place, count) for place in range(first, first + self.global_batch_size))
        return [int(_permutation(self.seed, epoch, count)[place]) for epoch, place in places]

    def weight(self, step: int) -> int:
        """The divisor of the step's loss: trained tokens or pairs of the whole global batch."""
        return sum(self.weights[row] for row in self.rows(step))

    def micro_batches(self, step: int) -> list[list[list[int]]]:
        """[process][micro-batch] -> row numbers; every process has the same number of micro-batches, none is empty."""
        shares = self._shares(self.rows(step))
        cuts = [self._cut(share) for share in shares]
        # Only if the batch does not divide by the processes may the smallest share lack rows for the count needed;
        # then the others' micro-batches exceed the budget a little.
        count = min(max(map(len, cuts)), min(map(len, shares)))
        return [self._with_count(cut, count) for cut in cuts]

    def _shares(self, rows: list[int]) -> list[list[int]]:
        """Longest processing time first (Graham 1969): the longest row left goes to the process with the fewest tokens.

        Shares differ by at most one row, so that all can be cut into the same number of micro-batches.
        """
        least, larger = divmod(len(rows), self.world_size)
        shares: list[list[int]] = [[] for _ in range(self.world_size)]
        load = [0] * self.world_size
        for row in self._longest_first(rows):
            open_to = [r for r, share in enumerate(shares) if len(share) < least or (len(share) == least and larger)]
            rank = min(open_to, key=lambda r: load[r])
            larger -= len(shares[rank]) == least
            shares[rank].append(row)
            load[rank] += self.lengths[row]
        return shares

    def _cut(self, share: list[int]) -> list[list[int]]:
        """The fewest micro-batches within the budget; rows of like length together, so that little is padded."""
        cut: list[list[int]] = []
        for row in self._longest_first(share):
            if cut and (len(cut[-1]) + 1) * self.lengths[cut[-1][0]] <= self.tokens_per_micro_batch:
                cut[-1].append(row)
            else:
                cut.append([row])
        return cut

    def _with_count(self, cut: list[list[int]], count: int) -> list[list[int]]:
        """The same rows in `count` micro-batches: the dearest is halved, or the cheapest neighbours are joined."""
        cut = [list(rows) for rows in cut]
        while len(cut) < count:
            at = max((i for i, rows in enumerate(cut) if len(rows) > 1), key=lambda i: self._cost(cut[i]))
            half = (len(cut[at]) + 1) // 2
            cut[at : at + 1] = [cut[at][:half], cut[at][half:]]
        while len(cut) > count:
            at = min(range(len(cut) - 1), key=lambda i: self._cost(cut[i] + cut[i + 1]))
            cut[at : at + 2] = [cut[at] + cut[at + 1]]
        return cut

    def _cost(self, rows: list[int]) -> int:
        return len(rows) * max(self.lengths[row] for row in rows)

    def _longest_first(self, rows: list[int]) -> list[int]:
        return sorted(rows, key=lambda row: -self.lengths[row])


@lru_cache(maxsize=4)
def _permutation(seed: int, epoch: int, count: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(count)
