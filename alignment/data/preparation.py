"""Rows of any source -> checked, split, tokenised rows, and what was dropped and why."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence, Set
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context

from alignment.config.stages.preparing import Prepare
from alignment.data.checks import Drop, Dropped, Policy, Tally, prompt_key, split
from alignment.data.examples import Example, Reading, examples
from alignment.data.sources import Row
from alignment.errors import InputError

ROWS_PER_WORKER = 5000  # fewer are tokenised before a second process is ready
CHUNK = 200  # rows that go to a worker at a time
PROGRESS_EVERY = 50  # rows
TOO_LONG = {"long_prompt": "max_prompt_length", "long_row": "max_length"}  # fault -> the limit


@dataclass
class Judged:
    """Rows that were read and tokenised, before they are split. total: rows read; forms: format -> rows that fit."""

    task: str
    total: int
    fit: list[Example]
    forms: dict[str, int]
    tally: Tally
    policy: Policy


@dataclass
class Prepared:
    """parts: split -> rows, in training order. total counts the rows read, fit those that passed every check."""

    judged: Judged
    fit: int
    parts: dict[str, list[Example]]


def judge(
    rows: Sequence[Row],
    reading: Reading,
    settings: Prepare,
    progress: Callable[..., None],
    heldout: Set[str] = frozenset(),
) -> Judged:
    """Check and tokenise rows. heldout: openings that models are evaluated on elsewhere. progress(step, total, **facts)
    is called while rows are read. Raises InputError at the first row with a fault that is an error."""
    made = Judged(reading.task, len(rows), [], {}, Tally(), Policy(reading.checks))
    seen = _Seen()
    for number, (row, found) in enumerate(zip(rows, _tokenised(rows, reading), strict=True), start=1):
        for one in found:
            try:
                example = _fit(one, settings, made.policy, seen, heldout)
            except Drop as drop:
                made.tally.drop(row, drop)
            else:
                made.fit.append(example)
                made.tally.keep(example.kept)
                made.forms[example.form] = made.forms.get(example.form, 0) + 1
        if number % PROGRESS_EVERY == 0 or number == len(rows):
            note = f"{', '.join(made.forms) or 'rows'}: {len(made.fit)} of {number} rows fit"
            progress(number, len(rows), note=note)
    return made


def divide(judged: Judged, settings: Prepare, source: str) -> Prepared:
    """The rows that fit, split. Raises InputError for too few."""
    fit, tally = len(judged.fit), judged.tally
    try:
        parts = split(judged.fit, settings.splits, settings.seed, lambda example: _leaks(example, judged))
    except InputError as error:
        what = f"{error.what} (of {judged.total}: {tally})"
        raise InputError(what, where=source, fix=_more_rows(tally)) from None
    return Prepared(judged, fit, parts)


def check_dropped(judged: Judged, source: str) -> None:
    """Raises InputError where more of the rows were dropped than checks.max_dropped allows."""
    rows, most = len({one.row.number for one in judged.tally.dropped}), judged.policy.checks.max_dropped
    if rows <= most * judged.total:
        return
    what = f"{rows} of {judged.total} rows are dropped, a larger share than checks.max_dropped: {judged.tally}"
    limits = _limits(judged.tally)
    fix = f"raise the stage's {limits}, or checks.max_dropped={most:g}" if limits else ""
    raise InputError(what, where=source, fix=fix or "dropped.jsonl in the stage's folder has each; mend them")


def _limits(tally: Tally) -> str:
    return " and ".join(name for fault, name in TOO_LONG.items() if fault in tally.counts)


def _more_rows(tally: Tally) -> str:
    limits = _limits(tally)
    return "lower the stage's splits" + (f" or raise its {limits}" if limits else ", or mend the rows")


def _leaks(example: Example, judged: Judged) -> bool:
    try:
        judged.policy.meet("leak", example.row)
    except Drop as drop:
        judged.tally.drop(example.row, drop)
        return True
    judged.tally.keep(judged.policy.passed())
    return False


def _fit(made: Example | Dropped, settings: Prepare, policy: Policy, seen: _Seen, heldout: Set[str]) -> Example:
    """Raises InputError (for a fault that is an error) or Drop."""
    if isinstance(made, Dropped):
        raise Drop(made.fault, made.why)
    over = None
    if made.prompt_tokens > settings.max_prompt_length:
        over = "long_prompt", f"prompt of {made.prompt_tokens} tokens"
    elif made.tokens > settings.max_length:
        over = "long_row", f"row of {made.tokens} tokens"
    if over and settings.over_long == "error":
        limits = f"max_length is {settings.max_length}, max_prompt_length {settings.max_prompt_length}"
        fix = "raise the limit, or set over_long: drop"
        raise InputError(f"{over[1]}: {limits}", where=made.row.where, fix=fix)
    if over:
        raise Drop(*over)
    if fault := seen.fault(made):
        policy.meet(fault, made.row)
    if made.opening in heldout:
        policy.meet("heldout", made.row)
    made.kept += policy.passed()
    return made


def _ids(rows: Sequence[Row]) -> list[str]:
    """The rows' own `id` where each has a different one, else their numbers."""
    own = [str(row.value.get("id") or "") for row in rows]
    return own if all(own) and len(set(own)) == len(own) else [str(row.number) for row in rows]


class _Seen:
    """Prompts and pairs met so far, to find what stands twice in the data."""

    def __init__(self) -> None:
        self.keys: set[str] = set()

    def fault(self, example: Example) -> str | None:
        """A prompt may have several pairs, labels or scores, but none twice or turned round."""
        key, answer = prompt_key(example.prompt), example.answer["content"]
        if (label := example.columns.get("label")) is not None:
            return self._once((key, answer, str(label)), (key, answer, str(not label)))
        if example.rejected is not None:
            sides = answer, example.rejected["content"]
            return self._once((key, *sides), (key, *sides[::-1]))
        return self._once((key, answer) if "score" in example.columns else (key,))

    def _once(self, here: tuple[str, ...], turned: tuple[str, ...] | None = None) -> str | None:
        if "\0".join(here) in self.keys:
            return "duplicate"
        if turned is not None and "\0".join(turned) in self.keys and turned != here:
            return "contradiction"
        self.keys.add("\0".join(here))
        return None


def _tokenised(rows: Sequence[Row], reading: Reading) -> Iterator[list[Example | Dropped]]:
    """What becomes of each row, in order; by several processes if there is enough to do. Raises InputError at the first
    row with a fault that is an error."""
    named = list(zip(rows, _ids(rows), strict=True))
    workers = min(len(os.sched_getaffinity(0)), len(rows) // ROWS_PER_WORKER)
    if workers < 2:
        yield from (examples(row, name, reading) for row, name in named)
        return
    # Not forked from here: the tracker's threads may hold a lock that a child would wait for for ever.
    with ProcessPoolExecutor(workers, get_context("forkserver"), _become_worker, (reading,)) as pool:
        yield from pool.map(_work, named, chunksize=CHUNK)


def _become_worker(reading: Reading) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one thread a worker: they share the cores already
    global _worker
    _worker = reading


_worker: Reading


def _work(named: tuple[Row, str]) -> list[Example | Dropped]:
    return examples(*named, _worker)
