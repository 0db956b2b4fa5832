"""Rows that fit -> held-out rows, prompts and rows to train on: splits that share no prompt, and mixtures by weight."""

from __future__ import annotations

import math
import random
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from alignment.config.stages.preparing import Splits
from alignment.data import evaluated
from alignment.data.preparation import TOO_LONG, Judged, left_out
from alignment.errors import InputError


@dataclass(frozen=True)
class Share:
    """How much of a data set is used. cap: rows at most; epochs: times that each is trained on; weight: its share of
    the rows trained on, beside the others' weights; None: all of them."""

    cap: int | None = None
    epochs: float = 1.0
    weight: float | None = None


Parts = dict[str, np.ndarray]  # split -> rows of the table, in order


def divide(
    judged: Judged, sizes: Splits, seed: int, shares: Sequence[Share], elsewhere: evaluated.Prompts = ()
) -> Parts:
    """Rows of each split: by one seeded shuffle held-out first, then prompts, then train; what is over is "unused".

    No opening lies in two splits, and no row of the others is near a held-out one or says an evaluation prompt, unless
    checks keep it; what is dropped leaves `judged.fit`. The same rows, sizes, seed and shares give the same splits,
    whatever the number of workers. shares: one a data set; elsewhere: prompts that models are evaluated on beside the
    held-out ones. Raises InputError if there are too few rows.
    """
    order = _shuffled(judged.fit, seed)
    if any(share.cap is not None for share in shares):
        order = _capped(order, judged.table.column("source"), shares)
    openings = judged.table.column("opening")
    asks = judged.table.column("prompt_tokens") > 0  # texts do not: they are trained on, or unused
    heldout = order[asks[order]][: sizes.heldout]
    order = order[~np.isin(order, heldout)]
    near = {
        "near_leak": evaluated.near_heldout(judged, order, heldout),
        "contamination": evaluated.contaminated(judged, order, heldout, elsewhere),
    }
    asking, leaks = order[asks[order]], _leaks(order, openings, heldout)
    prompts, left = _first_fit(judged, asking, {"leak": leaks, **near}, sizes.prompts)
    order = order[~np.isin(order, asking[: len(asking) - len(left)])]
    leaks = _leaks(order, openings, np.concatenate([heldout, prompts]))
    most = sizes.train if _is_plain(shares) else None  # of a mixture any row may be used
    train, over = _first_fit(judged, order, {"leak": leaks, **near}, most)
    train = np.concatenate([train, over])
    mixed = _mixed(train, judged, shares, seed)[: sizes.train]
    unused = train[~np.isin(train, mixed)]
    parts = {"heldout": heldout, "prompts": prompts, "train": mixed, "unused": unused}
    _check_sizes(judged, parts, sizes)
    return parts


def _shuffled(rows: np.ndarray, seed: int) -> np.ndarray:
    order = array("q", rows.tobytes())
    random.Random(seed).shuffle(order)
    return np.frombuffer(order, np.int64) if len(order) else rows


def _capped(order: np.ndarray, source: np.ndarray, shares: Sequence[Share]) -> np.ndarray:
    """The first rows of each data set, as many as its cap."""
    stays = np.ones(len(order), bool)
    for number, share in enumerate(shares):
        if share.cap is not None:
            stays[np.flatnonzero(source[order] == number)[share.cap :]] = False
    return order[stays]


def _leaks(order: np.ndarray, openings: np.ndarray, others: np.ndarray) -> evaluated.Found:
    return dict.fromkeys(order[np.isin(openings[order], openings[others])].tolist(), "")


def _first_fit(
    judged: Judged, order: np.ndarray, faults: Mapping[str, evaluated.Found], size: int | None
) -> tuple[np.ndarray, np.ndarray]:
    """The first rows that no fault drops, as many as size says, None for all; and those after them, which are looked at
    later or not used: these leak nothing, and are not counted. What is dropped leaves `judged.fit`. faults: fault ->
    the rows that have it, and why."""
    dropping = [rows for fault, rows in faults.items() if getattr(judged.policy.checks, fault) != "keep"]
    stays = ~np.isin(order, [row for rows in dropping for row in rows])
    end = len(order) if size is None else int(np.searchsorted(np.cumsum(stays), size)) + 1 if size else 0
    for number in order[:end].tolist():
        for fault, rows in faults.items():
            if number in rows and left_out(judged, fault, number, rows[number]):
                break
    judged.fit = judged.fit[~np.isin(judged.fit, order[:end][~stays[:end]])]
    return order[:end][stays[:end]], order[end:]


# --- mixtures ---------------------------------------------------------------------------------------------------------


def _is_plain(shares: Sequence[Share]) -> bool:
    return all(share.epochs == 1.0 and share.weight is None for share in shares)


def _mixed(order: np.ndarray, judged: Judged, shares: Sequence[Share], seed: int) -> np.ndarray:
    """The rows to train on: each data set's as often as its epochs say, and no more of them than its weight allows; the
    largest mixture in which none is used more often. Raises InputError for a weight of no rows."""
    if _is_plain(shares):
        return order
    source = judged.table.column("source")[order]
    wanted = {n: round(np.count_nonzero(source == n) * share.epochs) for n, share in enumerate(shares)}
    weights = {number: share.weight for number, share in enumerate(shares) if share.weight is not None}
    if weights:
        wanted = _weighed(wanted, weights, judged)
    parts = [_repeated(order[source == number], count) for number, count in wanted.items()]
    return _shuffled(np.concatenate(parts), seed)


def _weighed(wanted: Mapping[int, int], weights: Mapping[int, float], judged: Judged) -> dict[int, int]:
    for number in weights:
        if not wanted[number]:
            source = judged.sources[number]
            fix = "mend its rows, raise its cap, limit or epochs, hold out fewer, or leave it out of the mixture"
            raise InputError("has a weight and no rows to train on", where=source.described, fix=fix)
    whole = sum(weights.values())
    total = min(wanted[number] * whole / weight for number, weight in weights.items())
    return {number: int(total * weight / whole + 1e-9) for number, weight in weights.items()}


def _repeated(rows: np.ndarray, count: int) -> np.ndarray:
    """The rows over and over, until there are so many."""
    return np.resize(rows, count) if len(rows) else rows


# --- too few ----------------------------------------------------------------------------------------------------------


def _check_sizes(judged: Judged, parts: Parts, sizes: Splits) -> None:
    least = {"heldout": sizes.heldout, "prompts": sizes.prompts, "train": sizes.train or 1}
    if all(len(parts[name]) >= size for name, size in least.items()):
        return
    asked = f"{sizes.heldout} held-out + {sizes.prompts} prompts + {sizes.train or 'at least 1'} train"
    what = f"{len(judged.fit)} rows are fit to use, the splits ask for {asked} (of {judged.total}: {judged.tally})"
    raise InputError(what, where=judged.sources[0].described, fix=_more_rows(judged))


def check_dropped(judged: Judged, each: str = "dropped.jsonl has each") -> None:
    """Raises InputError where more of a data set's rows were dropped than checks.max_dropped allows. each: where the
    rows can be seen."""
    most = judged.policy.checks.max_dropped
    source = judged.table.column("source")
    for number, one in enumerate(judged.sources):
        dropped = judged.tally.of(one.name)
        rows = dropped + int(np.count_nonzero(source[judged.fit] == number))
        if dropped > most * rows:
            what = f"{dropped} of {rows} rows are dropped, a larger share than checks.max_dropped: {judged.tally}"
            limits = _limits(judged)
            first = f"raise the stage's {limits}" if limits else f"{each}; mend them"
            fix = f"{first}, or checks.max_dropped={math.ceil(100 * dropped / rows) / 100:g}"
            raise InputError(what, where=one.described, fix=fix)


def _limits(judged: Judged) -> str:
    return " and ".join(name for fault, name in TOO_LONG.items() if fault in judged.tally.counts)


def _more_rows(judged: Judged) -> str:
    limits = _limits(judged)
    return "lower the stage's splits" + (f" or raise its {limits}" if limits else ", or mend the rows")
