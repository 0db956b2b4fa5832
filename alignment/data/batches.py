"""Rows by the chunk: what a worker makes of one, as columns; and the file of all of them, which is memory-mapped.

Nothing is kept of a row but what stands in that file.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from alignment.config.data_checks import Checks
from alignment.data.checks import Dropped, note, prompt_key
from alignment.data.contamination import grams_of
from alignment.data.examples import Example, Reading, examples
from alignment.data.formats import kept
from alignment.data.language import language
from alignment.data.near import CHUNK, PERMUTATIONS, Signatures, signature
from alignment.data.sources import Row, Unreadable
from alignment.data.tokens import IGNORED, TRAINED
from alignment.data.turns import said

ALL_LANGUAGES, EVERY = 2000, 16  # rows of a file whose language is looked at, and of those after them every so many
IDS = pa.list_(pa.int32())
TOKENS = {  # task -> columns that are trained on
    "sft": {"input_ids": IDS, "labels": IDS},
    "preference": {"prompt_ids": IDS, "chosen_ids": IDS, "rejected_ids": IDS, "margin": pa.float64()},
    "unpaired": {"prompt_ids": IDS, "completion_ids": IDS, "label": pa.bool_()},
    "scored": {"prompt_ids": IDS, "completion_ids": IDS, "score": pa.float64()},
}
# source, file: their numbers. same, turned: keys of the row, and of one that would contradict it (0: nothing would).
# part: of a row that became several, which; id: its own.
PLACE = {"source": pa.int16(), "file": pa.int32(), "number": pa.int64(), "line": pa.int64(), "part": pa.int32()}
PLACE |= {"id": pa.string()}
KEYS = {"opening": pa.uint64(), "same": pa.uint64(), "turned": pa.uint64()}
LENGTHS = {"prompt_tokens": pa.int32(), "tokens": pa.int32(), "trained": pa.int32()}
GRAMS = {"grams": pa.list_(pa.uint64())}  # the n-grams of its questions, as evaluation prompts are compared by
TEXTS = {"text": pa.string(), "kept": pa.string()}  # the row as train.jsonl has it, without id; what rewards look at


@dataclass(frozen=True)
class Chunk:
    """Rows of one file that go to a worker together. size: characters of theirs, about."""

    source: int
    file: int
    rows: list[Row | Unreadable]
    size: int


@dataclass
class Batch:
    """What became of a chunk. dropped: those that were left out; of rows that passed, forms, kept, languages: how many
    have each; personal: kind -> how many there are in them; first: the first that were kept with a fault.

    rows: a pyarrow.RecordBatch. signatures: theirs, (rows, PERMUTATIONS), or (0, PERMUTATIONS) if nobody compares them.
    """

    dropped: list[Dropped] = field(default_factory=list)
    forms: dict[str, int] = field(default_factory=dict)
    kept: dict[str, int] = field(default_factory=dict)
    languages: dict[str, int] = field(default_factory=dict)
    personal: dict[str, int] = field(default_factory=dict)
    first: dict[str, list[Dropped]] = field(default_factory=dict)
    rows: Any = None
    signatures: Signatures = field(default_factory=lambda: np.empty((0, PERMUTATIONS), np.uint32))


def schema(task: str) -> pa.Schema:
    return pa.schema({**TOKENS[task], **PLACE, **KEYS, **LENGTHS, **GRAMS, **TEXTS})


def made_of(chunk: Chunk, reading: Reading) -> Batch:
    """Raises InputError at the first row with a fault that is an error."""
    columns: dict[str, list[Any]] = {name: [] for name in schema(reading.task).names}
    batch, signatures = Batch(), list[Signatures]()
    for row in chunk.rows:
        found = examples(row, reading)
        for part, made in enumerate(found, start=1):
            if isinstance(made, Dropped):
                batch.dropped.append(made)
                continue
            values = {**_values(made, chunk, reading.checks), "part": part if len(found) > 1 else None}
            for name, column in columns.items():
                column.append(values.get(name))
            _count(made, batch, reading.checks)
            if reading.checks.near_threshold is not None:
                signatures.append(signature(made.said("user", "assistant")))
    batch.rows = pa.RecordBatch.from_pydict(columns, schema(reading.task))
    if signatures:
        batch.signatures = np.stack(signatures)
    return batch


def _count(made: Example, batch: Batch, checks: Checks) -> None:
    looked_at = checks.languages and (made.row.number <= ALL_LANGUAGES or made.row.number % EVERY == 0)
    said = {language(made.answer["content"]): 1} if looked_at else {}
    for counts, found in (
        (batch.forms, {made.form: 1}),
        (batch.kept, dict.fromkeys(made.kept, 1)),
        (batch.languages, said),
        (batch.personal, made.personal),
    ):
        for name, many in found.items():
            counts[name] = counts.get(name, 0) + many
    for fault, why in made.kept.items():
        note(batch.first, Dropped(replace(made.row, value={}), fault, why))


def _values(made: Example, chunk: Chunk, checks: Checks) -> dict[str, Any]:
    opening, same, turned = keys(made)
    beside = kept(made.row)
    compared = grams_of(made.said("user")) if checks.contamination_share is not None else None
    return {
        **made.columns,
        "source": chunk.source, "file": chunk.file, "number": made.row.number, "line": made.row.line, "id": made.id,
        "opening": opening, "same": same, "turned": turned,
        "prompt_tokens": made.prompt_tokens, "tokens": made.tokens, "trained": _trained(made),
        "grams": compared,
        "text": json.dumps(made.text(), ensure_ascii=False), "kept": json.dumps(beside) if beside else None,
    }  # fmt: skip


def _trained(made: Example) -> int:
    """Tokens that carry a gradient."""
    answers = [ids for name, ids in made.columns.items() if name in TRAINED]
    return sum(label != IGNORED for ids in answers for label in ids)


def key_of(*texts: str) -> int:
    """64 bits: among a million different texts two agree once in forty million such sets."""
    return int.from_bytes(blake2b("\0".join(texts).encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


def keys(made: Example) -> tuple[int, int, int]:
    """opening, same, turned. A prompt may have several pairs, labels or scores, but none twice or turned round."""
    asked, answer, turned = prompt_key(made.prompt), said(made.answer), 0
    if (label := made.columns.get("label")) is not None:
        same, turned = key_of(asked, answer, str(label)), key_of(asked, answer, str(not label))
    elif made.rejected is not None:
        other = said(made.rejected)
        same = key_of(asked, answer, other)
        turned = key_of(asked, other, answer) if other != answer else 0
    else:
        same = key_of(asked, answer) if "score" in made.columns else key_of(asked or made.opening)
    return key_of(made.opening), same, turned


class Table:
    """A file of record batches, and one of signatures, that are written once and then mapped. column(name): as numpy,
    whole."""

    def __init__(self, path: Path, task: str):
        self.path, self.task = path, task
        self._writer = pa.ipc.new_stream(str(path), schema(task))
        self._signed = open(path.with_suffix(".signatures"), "wb")  # noqa: SIM115 - closed by close()
        self._rows: Any = None

    def add(self, batch: Batch) -> None:
        if batch.rows.num_rows:
            self._writer.write_batch(batch.rows)
            batch.signatures.tofile(self._signed)

    def close(self) -> None:
        import datasets

        datasets.disable_progress_bars()
        self._writer.close()
        self._signed.close()
        self._rows = datasets.Dataset.from_file(str(self.path))

    def remove(self) -> None:
        """The files; what was taken of them stays readable."""
        self.path.unlink()
        Path(self._signed.name).unlink()

    def column(self, name: str) -> np.ndarray:
        return np.asarray(self._rows.data.column(name).to_numpy())

    def lists(self, name: str) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """A column of lists, by parts: the number of its first row, the rows' lengths, and what they hold, in order."""
        start = 0
        for part in self._rows.data.column(name).chunks:
            lengths = pc.fill_null(pc.list_value_length(part), 0).to_numpy(zero_copy_only=False)
            yield start, lengths, part.flatten().to_numpy(zero_copy_only=False)
            start += len(part)

    def lengths(self, name: str) -> np.ndarray:
        """How many each list of a column holds."""
        return np.concatenate([np.zeros(0, np.int32), *(lengths for _, lengths, _ in self.lists(name))])

    def signatures(self, rows: np.ndarray | None = None) -> Signatures:
        """(rows, PERMUTATIONS) of these rows, or of all; mapped."""
        path = Path(self._signed.name)
        whole = _mapped(path, len(self._rows))
        if rows is None or len(rows) == len(whole):
            return whole
        part = path.with_suffix(".part")
        with open(part, "wb") as stream:
            for start in range(0, len(rows), CHUNK):
                whole[rows[start : start + CHUNK]].tofile(stream)
        mapped = _mapped(part, len(rows))
        part.unlink()  # it is there for as long as it is mapped
        return mapped

    def all_differ(self, name: str) -> bool:
        """Whether each row has a value of its own there."""
        return int(pc.count_distinct(self._rows.data.column(name), mode="only_valid").as_py()) == len(self._rows)

    def take(self, rows: Sequence[int] | np.ndarray) -> Any:
        """A datasets.Dataset of these rows, in this order, not copied."""
        return self._rows.select(rows)

    def row(self, number: int, names: Sequence[str] = ()) -> dict[str, Any]:
        """Its values in these columns; in all of them where none is named."""
        part = self._rows.data.fast_slice(number, 1)
        return dict((part.select(names) if names else part).to_pylist()[0])


def _mapped(path: Path, rows: int) -> Signatures:
    shape = rows, PERMUTATIONS
    return np.memmap(path, np.uint32, "r", shape=shape) if rows else np.empty(shape, np.uint32)
