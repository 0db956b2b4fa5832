"""Rows of any number of data sets -> one table of checked, tokenised rows; of what was dropped, a file that says why.

Of what was read some chunks are with the workers at a time, what they make goes to a file that is mapped, and rows are
compared with each other by 64-bit keys.
"""

from __future__ import annotations

import json
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field, replace
from itertools import chain
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from alignment.cores import usable
from alignment.data.batches import Batch, Chunk, Table, key_of, made_of
from alignment.data.checks import EXAMPLES, Counts, Drop, Dropped, Policy, Tally, count
from alignment.data.examples import Reading
from alignment.data.near import WORDLESS, groups
from alignment.data.sources import Row, Unreadable
from alignment.errors import AlignmentError, MachineError

ENOUGH, ENOUGH_TEXT = 10_000, 1 << 23  # rows, characters: fewer are tokenised before other processes are ready
CHUNK, CHUNK_TEXT = 200, 1 << 22  # rows, characters that go to a worker at a time, or one row that is larger
AHEAD = 4  # chunks a worker may have waiting
Item = TypeVar("Item")
SHARED = "alignment.data.shared"
TOO_LONG = {"long_prompt": "max_prompt_length", "long_row": "max_length"}  # fault -> the limit


@dataclass(frozen=True)
class Source:
    """A data set: its rows, and how they are read. guess: how many there may be, None if nobody knows."""

    name: str
    rows: Iterable[Row | Unreadable]
    reading: Reading
    described: str
    guess: int | None = None


@dataclass
class Judged:
    """What was read. table: rows that passed by themselves; fit: those of them that passed beside the others, too, and,
    once they are split, beside what is held out: every row was dropped or is one of these.

    read: data set -> rows read. forms, languages: data set -> format or language -> rows of the table; personal: data
    set -> kind -> how many there are in them. compared: how many evaluation prompts were compared with, how many not.
    """

    sources: Sequence[Source]
    table: Table
    tally: Tally
    policy: Policy
    files: list[str] = field(default_factory=list)
    read: dict[str, int] = field(default_factory=dict)
    forms: Counts = field(default_factory=dict)
    languages: Counts = field(default_factory=dict)
    personal: Counts = field(default_factory=dict)
    compared: dict[str, int] = field(default_factory=dict)
    fit: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))

    @property
    def task(self) -> str:
        return self.table.task

    @property
    def total(self) -> int:
        return sum(self.read.values())

    def place(self, number: int) -> tuple[str, Row]:
        """The data set and the row that a row of the table was made of; its value as train.jsonl would have it."""
        row = self.table.row(number, ("source", "file", "number", "line", "text"))
        value = json.loads(row["text"])
        return self.sources[row["source"]].name, Row(value, self.files[row["file"]], row["number"], row["line"])


def judge(
    sources: Sequence[Source],
    folder: Path,
    progress: Callable[..., None],
    workers: int | None,
    heldout: Set[str] = frozenset(),
) -> Judged:
    """Read, check and tokenise rows; folder: where rows.arrow and dropped.jsonl are written.

    heldout: openings that models are evaluated on elsewhere. progress(step, total, **facts) is called meanwhile.
    workers: processes at most, None for one a core; what is made is the same. Raises InputError at the first row with a
    fault that is an error, MachineError if a worker is killed.
    """
    task, policy = sources[0].reading.task, Policy(sources[0].reading.checks)
    made = Judged(sources, Table(folder / "rows.arrow", task), Tally(folder / "dropped.jsonl"), policy)
    guess = None if any(source.guess is None for source in sources) else sum(source.guess or 0 for source in sources)
    rows = 0
    try:
        for chunk, batch in _batches(sources, made.files, workers or usable()):
            name = sources[chunk.source].name
            made.table.add(batch)
            made.read[name] = made.read.get(name, 0) + len(chunk.rows)
            for one in batch.dropped:
                made.tally.drop(name, one)
            made.tally.keep(name, batch.kept, chain.from_iterable(batch.first.values()))
            for counts, found in (
                (made.forms, batch.forms),
                (made.languages, batch.languages),
                (made.personal, batch.personal),
            ):
                for key, many in found.items():
                    count(counts, name, key, many)
            rows += batch.rows.num_rows
            note = f"{', '.join(made.forms.get(name, {})) or 'rows'}: {rows} of {made.total} rows fit"
            progress(made.total, max(guess or 0, made.total), note=note)
    finally:
        made.table.close()
    made.fit = _beside_others(made, heldout)
    return made


# --- by several processes ---------------------------------------------------------------------------------------------


def _batches(sources: Sequence[Source], files: list[str], workers: int) -> Iterator[tuple[Chunk, Batch]]:
    """What becomes of each chunk, in order; by several processes if there is enough to do. files: is added to."""
    failed: list[AlignmentError] = []
    chunks = _until(failed, _chunks(sources, files))
    first, enough = _first_of(chunks)
    every = chain(_let_go(first), chunks, _raised(failed))
    if workers < 2 or not enough:
        for chunk in every:
            yield chunk, made_of(chunk, sources[chunk.source].reading)
        return
    try:
        yield from _by_workers(every, [source.reading for source in sources], workers)
    except BrokenProcessPool as error:
        what = f"one of {workers} processes that prepare rows was killed"
        raise MachineError(what, fix="for want of memory, probably: give more, or lower the stage's workers") from error


def _by_workers(chunks: Iterable[Chunk], readings: list[Reading], workers: int) -> Iterator[tuple[Chunk, Batch]]:
    # Not forked from here: the tracker's threads may hold a lock that a child would wait for for ever. Forked from a
    # process that has imported what they need, they share that memory.
    context = get_context("forkserver")
    context.set_forkserver_preload([SHARED if any(one.checks.languages for one in readings) else __name__])
    with ProcessPoolExecutor(workers, context, _become_worker, (readings,)) as pool:
        waiting: deque[tuple[Chunk, Future[Batch]]] = deque()
        try:
            for chunk in chunks:
                waiting.append((chunk, pool.submit(_work, chunk)))
                if len(waiting) > AHEAD * workers:
                    done, future = waiting.popleft()
                    yield done, future.result()
            while waiting:
                done, future = waiting.popleft()
                yield done, future.result()
        finally:
            for _, future in waiting:
                future.cancel()


def _first_of(chunks: Iterator[Chunk]) -> tuple[deque[Chunk], bool]:
    """The first chunks, and whether they are enough for several processes."""
    first, rows, size = deque[Chunk](), 0, 0
    for chunk in chunks:
        first.append(chunk)
        rows, size = rows + len(chunk.rows), size + chunk.size
        if rows >= ENOUGH or size >= ENOUGH_TEXT:
            return first, True
    return first, False


def _let_go(chunks: deque[Chunk]) -> Iterator[Chunk]:
    """Each is nobody's any more once it is taken."""
    while chunks:
        yield chunks.popleft()


def _chunks(sources: Sequence[Source], files: list[str]) -> Iterator[Chunk]:
    """Rows in order, by the file; an error of reading comes after the rows before it."""
    for number, source in enumerate(sources):
        rows, size, failed = list[Row | Unreadable](), 0, list[AlignmentError]()
        for row in _until(failed, source.rows):
            more = _size(row.value) if isinstance(row, Row) else 0
            if rows and (len(rows) == CHUNK or size + more > CHUNK_TEXT or row.file != rows[0].file):
                yield Chunk(number, _numbered(rows[0].file, files), rows, size)
                rows, size = [], 0
            rows.append(row)
            size += more
        if rows:
            yield Chunk(number, _numbered(rows[0].file, files), rows, size)
        yield from _raised(failed)


def _until(failed: list[AlignmentError], items: Iterable[Item]) -> Iterator[Item]:
    """Up to the first error, which is put into `failed`."""
    try:
        yield from items
    except AlignmentError as error:
        failed.append(error)


def _raised(failed: list[AlignmentError]) -> Iterator[Any]:
    """Nothing; raises the error if there is one by then."""
    for error in failed:
        raise error
    yield from ()


def _size(value: Any) -> int:
    """Characters of a value, about."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, dict):
        return sum(map(_size, value.values()))
    return sum(map(_size, value)) if isinstance(value, list) else 1


def _numbered(file: str, files: list[str]) -> int:
    if not files or files[-1] != file:
        files.append(file)
    return len(files) - 1


def _become_worker(readings: list[Reading]) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one thread a worker: they share the cores already
    global _worker
    _worker = readings


_worker: list[Reading]


def _work(chunk: Chunk) -> Batch:
    return made_of(chunk, _worker[chunk.source])


# --- beside each other ------------------------------------------------------------------------------------------------


def _beside_others(made: Judged, heldout: Set[str]) -> np.ndarray:
    """Numbers of the rows that may stay beside the others: none twice, nearly so, turned round, or held out."""
    same, turned, opening = (made.table.column(name) for name in ("same", "turned", "opening"))
    first = _first(same)
    unique, at = np.unique(same, return_index=True)
    found = np.minimum(np.searchsorted(unique, turned), max(len(unique) - 1, 0))
    opposite = np.where((turned != 0) & (unique[found] == turned), at[found], len(same)) if len(same) else turned
    contradicts = opposite < first
    stays = np.ones(len(same), bool)
    elsewhere = np.fromiter((key_of(one) for one in heldout), np.uint64, len(heldout))
    for fault, rows in (
        ("contradiction", contradicts),
        ("duplicate", ~contradicts & (first < np.arange(len(same)))),
        ("heldout", np.isin(opening, elsewhere)),
    ):
        numbers = np.flatnonzero(rows & stays)
        stays[numbers] = ~_left_out_of(made, fault, numbers)
    fit = np.flatnonzero(stays)
    return fit if made.policy.checks.near_threshold is None else _apart(made, fit, made.policy.checks.near_threshold)


def _apart(made: Judged, fit: np.ndarray, threshold: float) -> np.ndarray:
    """Those of these rows that are not nearly a row before, or are kept all the same."""
    signatures, opening = made.table.signatures(fit), made.table.column("opening")[fit]
    first = groups(signatures, threshold)
    near = (first < np.arange(len(fit))) & (signatures[:, 0] != WORDLESS[0])
    if made.task != "sft":  # a prompt may have several answers, and each says all of the prompt
        near &= opening != opening[first]
    others = {int(fit[place]): int(fit[first[place]]) for place in np.flatnonzero(near)}

    def why(number: int) -> str:
        return f"is nearly {made.place(others[number])[1].where}"

    return np.setdiff1d(fit, fit[near][_left_out_of(made, "near_duplicate", fit[near], why)])


def _first(keys: np.ndarray) -> np.ndarray:
    """For each row the number of the first one that has its key."""
    _, at, back = np.unique(keys, return_index=True, return_inverse=True)
    return at[back]


def _left_out_of(
    made: Judged, fault: str, numbers: np.ndarray, why: Callable[[int], str] = lambda number: ""
) -> np.ndarray:
    """Which of these rows of the table, which have the fault, are left out, [rows]. Of rows that are kept the first are
    looked at alone, and the others counted: there may be as many as rows. Raises InputError."""
    looked_at = EXAMPLES if made.policy.keeps(fault) else len(numbers)
    gone = [left_out(made, fault, int(number), why(int(number))) for number in numbers[:looked_at]]
    others = made.table.column("source")[numbers[looked_at:]]
    for source, rows in zip(*np.unique(others, return_counts=True), strict=True):
        made.tally.keep(made.sources[source].name, {fault: int(rows)}, [])
    return np.array(gone + [False] * len(others), bool)


def left_out(made: Judged, fault: str, number: int, why: str = "") -> bool:
    """What becomes of a row of the table that has the fault. Raises InputError where that is an error."""
    name, row = made.place(number)
    try:
        made.policy.meet(fault, row, why)
    except Drop as drop:
        made.tally.drop(name, Dropped(row, drop.fault, drop.why))
        return True
    made.policy.passed()
    made.tally.keep(name, {fault: 1}, [Dropped(replace(row, value={}), fault, why)])
    return False
