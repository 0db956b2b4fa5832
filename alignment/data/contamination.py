"""Contamination of training data by evaluation prompts, by n-grams as of Tulu 3 (Lambert et al. 2024, arXiv:2411.15124,
section 3.2): a training text contaminates a prompt if more than half of the prompt's words stand in 8-grams of both.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import xxhash
from numpy.typing import NDArray

from alignment.data.ngrams import words
from alignment.errors import InputError

SIZE = 8  # words of an n-gram
MIX = np.uint64(0x9E3779B97F4A7C15)  # odd, so that multiplying by it loses nothing


class Index:
    """The n-grams of evaluation prompts, as hashes of 64 bits without a salt; 16 bytes each. Can be pickled.

    too_short: prompts of fewer words than `size`, which have none, so that nothing contaminates them. Two different
    n-grams have one hash with a chance of 2^-64.
    """

    def __init__(self, prompts: Iterable[tuple[str, str]], size: int = SIZE, share: float = 0.5) -> None:
        """prompts: (id, text). size: words of an n-gram. share: a prompt is contaminated if more of its words than this
        share stand in n-grams of both. Raises InputError."""
        if size < 1:
            raise InputError(f"size is {size}", fix="an n-gram has at least one word")
        if not 0 <= share < 1:
            raise InputError(f"share is {share:g}", fix="give a share from 0 to below 1")
        self.size, self.share = size, share
        self.ids: list[str] = []
        self.too_short = 0
        grams, starts, lengths = [np.empty(0, np.uint64)], [np.empty(0, np.int64)], [0]
        for name, text in prompts:
            said = _hashes(words(text))
            if len(said) < size:
                self.too_short += 1
                continue
            grams.append(_grams(said, size))
            starts.append(lengths[-1] + np.arange(len(grams[-1])))
            lengths.append(lengths[-1] + len(said))
            self.ids.append(name)
        self._bounds = np.array(lengths)  # prompt i has the words bounds[i] to bounds[i + 1] of all words
        together = np.concatenate(grams)
        order = np.argsort(together, kind="stable")
        self._grams, self._starts = together[order], np.concatenate(starts)[order]
        self._own = np.diff(self._bounds)  # words of each prompt that count

    @property
    def grams(self) -> NDArray[np.uint64]:
        """All different n-grams, ascending."""
        return np.unique(self._grams)

    def leave_out(self, grams: NDArray[np.uint64]) -> int:
        """From now on these n-grams are in no prompt, and words that stand in them alone are not counted, neither as
        shared nor as the prompt's. Returns how many prompts have no n-gram left: nothing contaminates these."""
        stay = ~np.isin(self._grams, grams)
        self._grams, self._starts = self._grams[stay], self._starts[stay]
        prompts, covered = self._covered(self._starts)
        self._own = np.zeros(len(self.ids), np.int64)
        self._own[prompts] = covered
        return len(self.ids) - len(prompts)

    def find(self, text: str) -> str | None:
        """The id of the first prompt that the text contaminates, None if it does none."""
        said = _hashes(words(text))
        own = np.unique(_grams(said, self.size))
        low = np.searchsorted(self._grams, own)
        many = np.searchsorted(self._grams, own, "right") - low
        if not many.any():
            return None
        hits = np.repeat(low - np.cumsum(many) + many, many) + np.arange(many.sum())
        prompts, covered = self._covered(self._starts[hits])
        over = prompts[covered > self.share * self._own[prompts]]
        return self.ids[over[0]] if len(over) else None

    def _covered(self, starts: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Prompts, ascending, that n-grams from these words on are of, and how many words of each they cover."""
        places = np.unique(starts[:, None] + np.arange(self.size))
        return np.unique(np.searchsorted(self._bounds, places, "right") - 1, return_counts=True)


def grams_of(text: str, size: int = SIZE) -> NDArray[np.uint64]:
    """The different n-grams of a text, ascending; none of one with fewer words than `size`."""
    return np.unique(_grams(_hashes(words(text)), size))


def _hashes(said: Sequence[str]) -> NDArray[np.uint64]:
    return np.array([xxhash.xxh3_64_intdigest(word.encode()) for word in said], np.uint64)


def _grams(said: NDArray[np.uint64], size: int) -> NDArray[np.uint64]:
    """A hash of each run of `size` words, in order."""
    many = max(len(said) - size + 1, 0)
    mixed = np.full(many, size, np.uint64)
    for place in range(size):
        mixed = ((mixed ^ (mixed >> np.uint64(29))) + said[place : place + many]) * MIX
    return mixed
