"""Rows of Parquet and Arrow files: pairs of None (they have no lines) and a value, or a Fault in a value's place."""

from __future__ import annotations

import io
import mmap
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import IO, TYPE_CHECKING, Any

from alignment.data.sources.faults import Fault
from alignment.errors import AlignmentError, InputError
from alignment.places import is_url

if TYPE_CHECKING:
    import pyarrow

AT_ONCE = 1 << 24  # bytes of rows that are made Python objects at a time, about
MOST = 1000  # rows of them
BUFFER = 1 << 20  # bytes that are read of a column of a Parquet file at a time

Item = tuple[None, Any]


def parquet_rows(stream: io.BufferedReader[Any], file: str) -> Iterator[Item]:
    from pyarrow import parquet

    # By the buffer, not whole columns of a group, of which pyarrow itself writes a million rows; by one thread: the
    # memory of several is given back late, and reading is not what takes the time.
    by_buffers = {"buffer_size": BUFFER, "pre_buffer": False}
    with _readable("Parquet", file), _seekable(stream) as opened, parquet.ParquetFile(opened, **by_buffers) as table:
        _check_names(table.schema_arrow, file)
        for group in range(table.num_row_groups):
            facts = table.metadata.row_group(group)
            rows = _at_once(facts.total_byte_size, facts.num_rows)
            for batch in table.iter_batches(rows, row_groups=[group], use_threads=False):
                yield from _values(batch)


def arrow_rows(stream: io.BufferedReader[Any], file: str) -> Iterator[Item]:
    """Of Arrow's IPC format: a file, with its index at the end, or a stream, as `datasets` writes it."""
    from pyarrow import ipc

    with _readable("Arrow", file):
        if stream.peek(6)[:6] != b"ARROW1":
            with _mapped(stream, file) as (opened, forget), ipc.open_stream(opened) as batches:
                _check_names(batches.schema, file)
                for batch in batches:
                    yield from _in_parts(batch, forget)
            return
        with (
            _seekable(stream) as seekable,
            _mapped(seekable, file) as (opened, forget),
            ipc.open_file(opened) as table,
        ):
            _check_names(table.schema, file)
            for index in range(table.num_record_batches):
                yield from _in_parts(table.get_batch(index), forget)


@contextmanager
def _mapped(stream: IO[bytes], file: str) -> Iterator[tuple[Any, Callable[[], None]]]:
    """The file as a map where it lies here: a batch, which may be all of it, is not copied; and a call that takes what
    was read out of memory. Elsewhere the stream, of which each batch is in memory whole."""
    import pyarrow

    if is_url(file):
        yield stream, lambda: None
        return
    with open(file, "rb") as opened:
        held = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)  # gone when the last batch of it is
    yield pyarrow.BufferReader(pyarrow.py_buffer(held)), lambda: held.madvise(mmap.MADV_DONTNEED)


def _in_parts(batch: pyarrow.RecordBatch, forget: Callable[[], None]) -> Iterator[Item]:
    batch.validate(full=True)  # what of it is not so would be read from elsewhere in memory
    rows = _at_once(batch.nbytes, batch.num_rows)
    for begin in range(0, batch.num_rows, rows):
        forget()
        yield from _values(batch.slice(begin, rows))


def _at_once(size: int, rows: int) -> int:
    return max(1, min(MOST, AT_ONCE * rows // max(1, size)))


def _values(batch: pyarrow.RecordBatch) -> Iterator[Item]:
    try:
        values = batch.to_pylist()
    except Exception:  # of some row: text that is no UTF-8, a time beyond Python's, ...
        values = [_value(batch.slice(number, 1)) for number in range(batch.num_rows)]
    yield from ((None, _said(value) if isinstance(value, dict) else value) for value in values)


def _said(row: dict[str, Any]) -> dict[str, Any]:
    """Without the nulls inside of its columns: a struct has all keys that any row has, so a call of one function would
    have the arguments of all others."""
    return {name: _without_nulls(value) if isinstance(value, dict | list) else value for name, value in row.items()}


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(part) for key, part in value.items() if part is not None}
    return [_without_nulls(part) for part in value] if isinstance(value, list) else value


def _value(row: pyarrow.RecordBatch) -> Any:
    try:
        return row.to_pylist()[0]
    except Exception as error:
        return Fault(f"has a value that cannot be read: {_line(error)}", "write it as text")


def _check_names(schema: pyarrow.Schema, file: str) -> None:
    names = schema.names
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise InputError(f"two columns are called {twice!r}", where=file, fix="rename one")


@contextmanager
def _seekable(stream: io.BufferedReader[Any]) -> Iterator[IO[bytes]]:
    """The stream, or its copy on disk: some servers give a file only from its beginning to its end."""
    if stream.seekable():
        yield stream
        return
    with tempfile.TemporaryFile() as copy:
        shutil.copyfileobj(stream, copy)
        copy.seek(0, io.SEEK_SET)
        yield copy


@contextmanager
def _readable(kind: str, file: str) -> Iterator[None]:
    try:
        yield
    except AlignmentError:
        raise
    except Exception as error:  # of broken bytes pyarrow raises half a dozen classes
        raise InputError(f"is not a readable {kind} file: {_line(error)}", where=file) from error


def _line(error: Exception) -> str:
    return (" ".join(str(error).split()) or type(error).__name__)[:200]
