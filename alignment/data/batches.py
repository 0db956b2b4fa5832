"""Rows by the chunk: what a worker makes of one, as columns; and the file of all of them, which is memory-mapped.

Nothing is kept of a row but what stands in that file.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from alignment.data.checks import Dropped, prompt_key
from alignment.data.examples import Example, Reading, examples
from alignment.data.formats import kept
from alignment.data.sources import Row, Unreadable
from alignment.data.tokens import IGNORED, TRAINED
from alignment.data.turns import said

IDS = pa.list_(pa.int32())
TOKENS = {  # task -> columns that are trained on
    "sft": {"input_ids": IDS, "labels": IDS},
    "preference": {"prompt_ids": IDS, "chosen_ids": IDS, "rejected_ids": IDS, "margin": pa.float64()},
    "unpaired": {"prompt_ids": IDS, "completion_ids": IDS, "label": pa.bool_()},
    "scored": {"prompt_ids": IDS, "completion_ids": IDS, "score": pa.float64()},
}
# source, file: their numbers. same, turned: keys of the row, and of one that would contradict it (0: nothing would).
PLACE = {"source": pa.int16(), "file": pa.int32(), "number": pa.int64(), "line": pa.int64(), "id": pa.string()}
KEYS = {"opening": pa.uint64(), "same": pa.uint64(), "turned": pa.uint64()}
LENGTHS = {"prompt_tokens": pa.int32(), "tokens": pa.int32(), "trained": pa.int32()}
TEXTS = {"text": pa.string(), "kept": pa.string()}  # the row as train.jsonl has it, without id; what rewards look at


@dataclass(frozen=True)
class Chunk:
    """Rows of one file that go to a worker together."""

    source: int
    file: int
    rows: list[Row | Unreadable]


@dataclass
class Batch:
    """What became of a chunk. dropped: those that were left out; forms, kept: format or fault -> rows that passed."""

    dropped: list[Dropped]
    forms: dict[str, int] = field(default_factory=dict)
    kept: dict[str, int] = field(default_factory=dict)
    rows: Any = None  # a pyarrow.RecordBatch


def schema(task: str) -> pa.Schema:
    return pa.schema({**TOKENS[task], **PLACE, **KEYS, **LENGTHS, **TEXTS})


def made_of(chunk: Chunk, reading: Reading) -> Batch:
    """Raises InputError at the first row with a fault that is an error."""
    columns: dict[str, list[Any]] = {name: [] for name in schema(reading.task).names}
    batch = Batch([])
    for row in chunk.rows:
        for made in examples(row, reading):
            if isinstance(made, Dropped):
                batch.dropped.append(made)
                continue
            values = _values(made, chunk)
            for name, column in columns.items():
                column.append(values.get(name))
            batch.forms[made.form] = batch.forms.get(made.form, 0) + 1
            for fault in made.kept:
                batch.kept[fault] = batch.kept.get(fault, 0) + 1
    batch.rows = pa.RecordBatch.from_pydict(columns, schema(reading.task))
    return batch


def _values(made: Example, chunk: Chunk) -> dict[str, Any]:
    opening, same, turned = keys(made)
    beside = kept(made.row)
    return {
        **made.columns,
        "source": chunk.source, "file": chunk.file, "number": made.row.number, "line": made.row.line, "id": made.id,
        "opening": opening, "same": same, "turned": turned,
        "prompt_tokens": made.prompt_tokens, "tokens": made.tokens, "trained": _trained(made),
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
    """A file of record batches that is written once and then mapped. column(name): as numpy, whole."""

    def __init__(self, path: Path, task: str):
        self.path, self.task = path, task
        self._writer = pa.ipc.new_stream(str(path), schema(task))
        self._rows: Any = None

    def add(self, rows: pa.RecordBatch) -> None:
        if rows.num_rows:
            self._writer.write_batch(rows)

    def close(self) -> None:
        import datasets

        datasets.disable_progress_bars()
        self._writer.close()
        self._rows = datasets.Dataset.from_file(str(self.path))

    def column(self, name: str) -> np.ndarray:
        return np.asarray(self._rows.data.column(name).to_numpy())

    def all_differ(self, name: str) -> bool:
        """Whether each row has a value of its own there."""
        return int(pc.count_distinct(self._rows.data.column(name), mode="only_valid").as_py()) == len(self._rows)

    def take(self, rows: Sequence[int] | np.ndarray) -> Any:
        """A datasets.Dataset of these rows, in this order, not copied."""
        return self._rows.select(rows)

    def row(self, number: int) -> dict[str, Any]:
        return dict(self._rows[number])
