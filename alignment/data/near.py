"""Near-duplicates: MinHash signatures (Broder 1997) of word 5-grams, and groups of rows whose signatures agree.

Signatures come from rensa. Measured beside datasketch 2.0 on texts of 200 words, 128 permutations, one core: 21 µs a
row against 313 µs, an import of 4 ms against 0.5 s, and no dependencies against SciPy (113 MB); its estimate has no
bias (mean error < 0.002 at Jaccard 0.1 to 0.9). datasketch is older and has more users; rensa has wheels for CPython
3.10 to 3.14. Signatures depend on rensa's version (`RMinHash.ALGORITHM_VERSION`) and on nothing else: its hash has no
salt. Its LSH index holds all signatures in memory; the groups below take 28 s and 140 MB beside a memory map of a
million rows, of which a fifth are near-duplicates.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray
from rensa import RMinHash

from alignment.data.ngrams import words
from alignment.errors import InputError

PERMUTATIONS = 128  # values of a signature: the estimate of a Jaccard index J has the deviation sqrt(J (1 - J) / 128)
SHINGLE = 5  # words
SEED = 1
RECALL = 0.99  # chance at least that a pair with just the threshold's Jaccard index is looked at
CHUNK = 1 << 14  # rows at once
MIX = np.uint64(0x9E3779B97F4A7C15)  # 2^64 / golden ratio: multiplied by it, near numbers go far from each other

Signatures = NDArray[np.uint32]


def signature(text: str) -> Signatures:
    """(PERMUTATIONS,) of the set of its runs of SHINGLE words; of all its words, where they are fewer.

    Texts without any word are alike: they have the same signature.
    """
    said = words(text)
    shingles = [" ".join(said[i : i + SHINGLE]) for i in range(max(len(said) - SHINGLE + 1, min(len(said), 1)))]
    sketch = RMinHash(num_perm=PERMUTATIONS, seed=SEED)
    sketch.update(shingles)
    return np.array(sketch.digest(), np.uint32)


WORDLESS = signature("")  # of texts without any word; each value is the largest, which hashes of words do not reach


def groups(signatures: Signatures, threshold: float) -> NDArray[np.int64]:
    """For each row the number of the first row of its group, (rows,); its own where it is the first.

    signatures: (rows, PERMUTATIONS), may be a memory map. Rows are taken in order. One joins the group whose first row
    has the lowest number among those that share a band with it and agree in at least `threshold` of the values, which
    estimates the Jaccard index of the two; else it begins a group. Rows are compared with first rows alone, not along
    chains, so all of a group are near its first row.

    Bands: a pair at the threshold shares one with a chance of at least RECALL. Memory beside the signatures: at most
    12 bytes per row and band, 21 bands at 0.8. Raises InputError for a threshold outside (0, 1].
    """
    _check(threshold)
    buckets, members = _buckets(_keys(signatures, _width(threshold)))
    firsts = np.empty(members, np.int32)  # of each bucket, from its number on, the rows that begin a group
    filled = np.zeros(members, np.int32)  # how many, at the bucket's number
    group = np.arange(len(signatures), dtype=np.int64)
    for row in np.flatnonzero((buckets >= 0).any(0)).tolist():
        mine = buckets[:, row]
        mine = mine[mine >= 0]
        counts = filled[mine]
        seen = [firsts[at : at + many] for at, many in zip(mine.tolist(), counts.tolist(), strict=True) if many]
        first = _first_near(signatures, row, np.unique(np.concatenate(seen)), threshold) if seen else None
        if first is None:
            firsts[mine + counts] = row
            filled[mine] += 1
        else:
            group[row] = first
    return group


def nearest(
    signatures: Signatures, rows: NDArray[np.int64], others: NDArray[np.int64], threshold: float
) -> NDArray[np.int64]:
    """For each of these rows the first of the others that agrees with it in at least `threshold` of the values, as a
    number in `others`, (rows,); -1 where none does.

    signatures: as of `groups`; rows, others: numbers there. A pair at the threshold is found with a chance of at least
    RECALL. Raises InputError for a threshold outside (0, 1].
    """
    _check(threshold)
    found, width = np.full(len(rows), -1, np.int64), _width(threshold)
    different, first = np.unique(signatures[others], axis=0, return_index=True)
    keys = _keys(different, width)
    orders = np.argsort(keys, axis=1, kind="stable")
    ordered = np.take_along_axis(keys, orders, axis=1)
    for start in range(0, len(rows), CHUNK):
        mine = np.asarray(signatures[rows[start : start + CHUNK]])
        for row, other in _candidates(_keys(mine, width), ordered, orders):
            near = (mine[row] == different[other]).mean(1) >= threshold
            best = np.full(len(mine), len(others))
            np.minimum.at(best, row[near], first[other[near]])
            known = found[start : start + CHUNK]
            known[:] = np.where(known < 0, np.where(best < len(others), best, -1), np.minimum(known, best))
    return found


def _candidates(
    keys: NDArray[np.uint32], ordered: NDArray[np.uint32], orders: NDArray[np.int64]
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Pairs (row, other) that share a band, about CHUNK at once. keys: (bands, rows); ordered, orders: of the others,
    by band, their keys ascending and whose they are."""
    for band, of_rows in enumerate(keys):
        low = np.searchsorted(ordered[band], of_rows)
        many = np.searchsorted(ordered[band], of_rows, "right") - low
        sharing, sums = np.flatnonzero(many), np.cumsum(many[many > 0])
        for part in np.split(sharing, np.flatnonzero(np.diff(sums // CHUNK)) + 1):
            counts = many[part]
            places = np.repeat(low[part] - np.cumsum(counts) + counts, counts) + np.arange(counts.sum())
            yield np.repeat(part, counts), orders[band][places]


def _check(threshold: float) -> None:
    if not 0 < threshold <= 1:
        raise InputError(f"threshold is {threshold:g}", fix="give a share above 0 and up to 1")


def _width(threshold: float) -> int:
    """Values per band: the most, so the fewest pairs to look at, with which RECALL is met."""
    widths = range(PERMUTATIONS, 1, -1)
    met = (width for width in widths if 1 - (1 - threshold**width) ** (PERMUTATIONS // width) >= RECALL)
    return next(met, 1)


def _keys(signatures: Signatures, width: int) -> NDArray[np.uint32]:
    """A hash of each band of each row, (bands, rows). Two bands with one hash cost a comparison and change nothing."""
    bands = PERMUTATIONS // width
    keys = np.empty((bands, len(signatures)), np.uint32)
    for start in range(0, len(signatures), CHUNK):
        values = np.asarray(signatures[start : start + CHUNK, : bands * width]).astype(np.uint64)
        values = values.reshape(-1, bands, width)
        mixed = np.zeros(values.shape[:2], np.uint64)
        for column in range(width):
            mixed = ((mixed ^ values[..., column]) * MIX) ^ (mixed >> np.uint64(29))
        keys[:, start : start + len(values)] = (mixed >> np.uint64(32)).T
    return keys


def _buckets(keys: NDArray[np.uint32]) -> tuple[NDArray[np.int32], int]:
    """For each band and row the number of its bucket, -1 where the row is alone in it, (bands, rows), in the memory of
    the keys; and how many members the buckets have together. A bucket's number is that of the members before it."""
    buckets, members = keys.view(np.int32), 0
    for band, of_rows in enumerate(keys):
        order = np.argsort(of_rows, kind="stable")
        ordered = of_rows[order]
        new = np.r_[True, ordered[1:] != ordered[:-1]][: len(ordered)]
        sizes = np.diff(np.r_[np.flatnonzero(new), len(ordered)])
        shared = np.where(sizes > 1, sizes, 0)
        numbers = np.where(sizes > 1, members + np.cumsum(shared) - shared, -1)
        buckets[band, order] = np.repeat(numbers, sizes)
        members += int(shared.sum())
    return buckets, members


def _first_near(signatures: Signatures, row: int, others: NDArray[np.int32], threshold: float) -> int | None:
    """The first of others, in order, that agrees with the row in enough values."""
    for start in range(0, len(others), CHUNK):
        part = others[start : start + CHUNK]
        near = (signatures[part] == signatures[row]).mean(1) >= threshold
        if near.any():
            return int(part[near.argmax()])
    return None
