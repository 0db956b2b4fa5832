"""How tokens are drawn: uniform random numbers, and which token such a number means. Shapes: B rows, V vocabulary."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

NUCLEUS = 1024  # most probable tokens looked at first: sorting 64 rows of 50k takes 150 ms on two cores, this 18 ms
NUMBERS = 1 << 20  # drawn at once (3 ms, 4 MB); the generator's state before them takes 5 kB


class Noise:
    """[prompts, answers, tokens], uniform in [0, 1): what torch.rand of this shape draws from the seed, of which only
    the prompts that are asked for are there. All at once they may be many gigabytes."""

    def __init__(self, prompts: int, answers: int, tokens: int, seed: int):
        self.shape = prompts, answers, tokens
        self._together = max(1, NUMBERS // (answers * tokens))  # prompts of one state
        generator, self._states = torch.Generator().manual_seed(seed), []
        for first in range(0, prompts, self._together):
            self._states.append(generator.get_state())
            if first + self._together < prompts:
                self._next(generator, self._together)

    def __getitem__(self, rows: Sequence[int]) -> Tensor:
        """Of these prompts, in their order."""
        found, generator = torch.empty(len(rows), *self.shape[1:]), torch.Generator()
        for block in {row // self._together for row in rows}:
            generator.set_state(self._states[block])
            first = block * self._together
            drawn = self._next(generator, min(self._together, self.shape[0] - first))
            for place, row in enumerate(rows):
                if row // self._together == block:
                    found[place] = drawn[row - first]
        return found

    def _next(self, generator: torch.Generator, prompts: int) -> Tensor:
        return torch.rand(prompts, *self.shape[1:], generator=generator)


def choose(logits: Tensor, noise: Tensor, *, temperature: float, top_p: float) -> Tensor:
    """Next tokens [B] from logits [B, V] and uniform noise [B]: the arg max, or a draw by inverting the distribution.

    top_p: only the fewest most probable tokens whose probabilities reach it are drawn (Holtzman et al. 2020,
    arXiv:1904.09751).
    """
    if temperature == 0:
        return logits.argmax(-1)
    probs = torch.softmax(logits / temperature, -1)
    if top_p >= 1:
        return _invert(probs, noise)
    best, ids = probs.topk(min(NUCLEUS, probs.shape[-1]))
    tokens = _nucleus(best, ids, noise, top_p)
    flat = best.sum(-1) < top_p  # rows whose nucleus is wider than that: only they are sorted whole
    if best.shape[-1] < probs.shape[-1] and flat.any():
        best, ids = probs[flat].sort(-1, descending=True)
        tokens[flat] = _nucleus(best, ids, noise[flat], top_p)
    return tokens


def _nucleus(best: Tensor, ids: Tensor, noise: Tensor, top_p: float) -> Tensor:
    """best [B, K]: probabilities, falling; ids [B, K]: whose they are."""
    before = best.cumsum(-1) - best
    chosen = _invert(best * (before < top_p), noise)
    return ids.gather(-1, chosen[:, None])[:, 0]


def _invert(weights: Tensor, noise: Tensor) -> Tensor:
    """Index [B] where the running sum of weights [B, K] passes noise times their total."""
    running = weights.cumsum(-1)
    total = running[:, -1:]
    index = torch.searchsorted(running, noise.to(running)[:, None] * total, right=True)[:, 0]
    return torch.minimum(index, (running < total).sum(-1))  # rounding must not reach beyond the last weight
