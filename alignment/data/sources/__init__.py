"""Files of rows -> rows that know where they come from, so that every later error can say file and line.

Read row by row. In memory at a time are, beside the largest row, of text some MB; of Parquet a buffer, a page and the
dictionary of each column; of Arrow, where it is compressed or lies elsewhere, a record batch, else little.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alignment.data.sources import columns, text
from alignment.data.sources.faults import Fault, type_name
from alignment.errors import InputError
from alignment.places import COMPRESSED, expand, kind, stream

READERS = {
    ".json": text.json_rows,
    ".jsonl": text.json_lines,
    ".csv": text.csv_rows,
    ".tsv": text.tsv_rows,
    ".parquet": columns.parquet_rows,
    ".arrow": columns.arrow_rows,
    ".feather": columns.arrow_rows,
}
SUFFIXES = tuple(READERS)
OF_TEXTS = (".csv", ".tsv")  # all of their values are texts
BINARY = (".parquet", ".arrow", ".feather")

__all__ = ["SUFFIXES", "Row", "Unreadable", "read", "read_rows", "type_name"]


@dataclass(frozen=True)
class Row:
    """One row of a file. number counts rows from 1; line is that of its first character, None where there are none."""

    value: dict[str, Any]
    file: str
    number: int
    line: int | None

    @property
    def where(self) -> str:
        return f"{self.file}:{self.line}" if self.line else f"{self.file}, row {self.number}"

    @property
    def of_texts(self) -> bool:
        """Whether its file has no numbers, and no true and false, but texts that say so."""
        return kind(self.file)[0] in OF_TEXTS


@dataclass(frozen=True)
class Unreadable:
    """What stands in the place of a row and cannot be read, where those after it can. number and line: as Row's."""

    file: str
    number: int
    line: int | None
    what: str
    fix: str | None

    @property
    def where(self) -> str:
        return f"{self.file}:{self.line}" if self.line else f"{self.file}, row {self.number}"

    @property
    def error(self) -> InputError:
        return InputError(self.what, where=self.where, fix=self.fix)


def read_rows(path: str | Path) -> Iterator[Row]:
    """As `read`, but raises InputError at the first row that is malformed, too."""
    for row in read(path):
        if isinstance(row, Unreadable):
            raise row.error
        yield row


def read(path: str | Path) -> Iterator[Row | Unreadable]:
    """Rows of every file that the path means (`places.expand`), in order.

    Kinds, by suffix: .jsonl, .json (an array, or lines), .csv and .tsv (with a header; quoted as by Excel), each also
    as .gz, .zst, .bz2 and .xz; .parquet, .arrow, .feather. NaN and Infinity in JSON are read as such.

    Raises InputError for a missing or empty file or one of another kind, and, after the rows before it, for what cannot
    be gone on after: a cut file, a broken array. MachineError if a file is out of reach.
    """
    files, any_row = expand(path), False
    for file in files:
        _check_kind(file)
    for file in files:
        for row in _rows(file):
            any_row = True
            yield row
    if not any_row:
        raise InputError("holds no rows", where=str(path))


def _check_kind(file: str) -> None:
    suffix, compression = kind(file)
    if suffix in BINARY and compression:
        what = f"{suffix} is compressed inside, and cannot be read as {compression}"
        raise InputError(what, where=file, fix=f"decompress {compression}")
    if suffix not in READERS:
        text_kinds = ", ".join(one for one in SUFFIXES if one not in BINARY)
        fix = f"give one of {', '.join(SUFFIXES)}; of {text_kinds} also as {', '.join(COMPRESSED)}"
        raise InputError(f"cannot read {(suffix + compression) or 'a file without suffix'!r}", where=file, fix=fix)


def _rows(file: str) -> Iterator[Row | Unreadable]:
    suffix, compression = kind(file)
    number = 0
    try:
        with stream(file, compression) as opened:
            for number, (line, value) in enumerate(READERS[suffix](opened, file), start=1):
                if isinstance(value, dict):
                    yield Row(value, file, number, line)
                    continue
                fault = value if isinstance(value, Fault) else Fault(f"a row must be an object, is {type_name(value)}")
                yield Unreadable(file, number, line, fault.what, fault.fix)
    except InputError as error:
        if error.where == file and number:  # of the stream, which knows no rows
            raise InputError(error.what, where=f"{file}, after row {number}", fix=error.fix) from error
        raise
