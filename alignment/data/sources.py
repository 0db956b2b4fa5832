"""Files of rows -> rows that know where they come from, so that every later error can say file and line."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alignment.errors import InputError

SUFFIXES = (".json", ".jsonl", ".csv", ".parquet")
JSON_TYPES = {"str": "text", "int": "a number", "float": "a number", "bool": "true/false", "list": "a list"}
JSON_TYPES |= {"dict": "an object", "NoneType": "null"}
HALF = re.compile("[\ud800-\udfff]")  # of a character beyond U+FFFF, without the other: no text that can be written


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


def type_name(value: Any) -> str:
    return JSON_TYPES.get(type(value).__name__, type(value).__name__)


def read_rows(path: Path) -> Iterator[Row]:
    """Rows of a .json (array), .jsonl, .csv (with a header) or .parquet file, in order.

    Raises InputError for a missing, empty or unreadable file, and at the first malformed row, with its line.
    """
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "no such file"
        raise InputError(what, where=str(path), fix=f"give one file: {', '.join(SUFFIXES)}")
    readers = {".json": _json, ".jsonl": _jsonl, ".csv": _csv, ".parquet": _parquet}
    if path.suffix.lower() not in readers:
        raise InputError(f"cannot read {path.suffix or 'a file without suffix'!r}", where=str(path),
                         fix=f"give one of {', '.join(SUFFIXES)}")  # fmt: skip
    number = 0
    for number, (line, value) in enumerate(readers[path.suffix.lower()](path), start=1):
        row = Row(value, str(path), number, line)
        if not isinstance(value, dict):
            raise InputError(f"a row must be an object, is {type_name(value)}", where=row.where)
        yield row
    if not number:
        raise InputError("holds no rows", where=str(path))


def _text(path: Path) -> str:
    data = path.read_bytes()
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise InputError(f"is not UTF-8 (byte 0x{data[error.start]:02x})", where=f"{path}:{line}",
                         fix="save the file as UTF-8") from error  # fmt: skip


def _jsonl(path: Path) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(_text(path).split("\n"), start=1):  # not splitlines: U+2028 may stand inside a string
        if line.strip():
            try:
                value = json.loads(line)
            except json.JSONDecodeError as error:
                raise InputError(f"is not valid JSON: {_what(error)}", where=f"{path}:{number}") from error
            _check_halves(value, line, f"{path}:{number}")
            yield number, value


def _json(path: Path) -> Iterator[tuple[int, Any]]:
    """The elements of one array, decoded one by one so that each has its line."""
    text, decoder = _text(path), json.JSONDecoder()
    position = _skip(text, 0)
    if text[position : position + 1] == "{":  # rows without a list around them: JSON lines under another name
        yield from _jsonl(path)
        return
    if position == len(text):
        return
    if text[position] != "[":
        raise InputError("must be a list of objects", where=f"{path}:{text.count(chr(10), 0, position) + 1}")
    position, line, counted = _skip(text, position + 1), 1, 0
    while text[position : position + 1] != "]":
        line, counted = line + text.count("\n", counted, position), position
        try:
            value, end = decoder.raw_decode(text, position)
            position = _skip(text, end)
            if text[position : position + 1] not in (",", "]"):
                raise json.JSONDecodeError("Expecting ',' or ']' after the row", text, position)
        except json.JSONDecodeError as error:
            raise InputError(f"is not valid JSON: {_what(error)}", where=f"{path}:{error.lineno}") from error
        _check_halves(value, text[counted:end], f"{path}:{line}")
        yield line, value
        if text[position] == ",":
            position = _skip(text, position + 1)
    if _skip(text, position + 1) != len(text):
        line = text.count("\n", 0, position) + 1
        raise InputError("is not valid JSON: something follows the list", where=f"{path}:{line}")


def _check_halves(value: Any, text: str, where: str) -> None:
    """text: that the value was read from. Raises InputError."""
    if not isinstance(value, dict) or not re.search(r"\\u[dD]", text):
        return
    for key, part in value.items():
        if half := HALF.search(json.dumps([key, part], ensure_ascii=False)):
            what = f"{key!a} has half a character, {half[0]!a}, which is no text"
            raise InputError(what, where=where, fix="write the whole character, in UTF-8 or as both halves")


def _what(error: json.JSONDecodeError) -> str:
    """Some of json's messages end with an "at" of their own."""
    return f"{error.msg.removesuffix(' at')} at column {error.colno}"


def _skip(text: str, position: int) -> int:
    while position < len(text) and text[position] in " \t\r\n":
        position += 1
    return position


def _csv(path: Path) -> Iterator[tuple[int, Any]]:
    reader = csv.reader(io.StringIO(_text(path), newline=""), strict=True)
    try:
        header = next(reader, [])
        begun = reader.line_num + 1
        for fields in reader:
            if fields and len(fields) != len(header):
                raise InputError(f"has {len(fields)} fields, the header names {len(header)}", where=f"{path}:{begun}")
            if fields:
                yield begun, dict(zip(header, fields, strict=True))
            begun = reader.line_num + 1
    except csv.Error as error:
        raise InputError(f"is not valid CSV: {error}", where=f"{path}:{reader.line_num}") from error


def _parquet(path: Path) -> Iterator[tuple[None, Any]]:
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches():
                for value in batch.to_pylist():
                    yield None, value
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(f"is not a readable Parquet file: {error}", where=str(path)) from error
