"""Rows of JSON lines, JSON arrays, CSV and TSV: pairs of a line and a value, or a Fault in a value's place."""

from __future__ import annotations

import codecs
import csv
import io
import json
import re
from collections.abc import Iterator
from typing import Any

from alignment.data.sources.faults import Fault, escaped, not_utf8
from alignment.errors import AlignmentError, InputError
from alignment.files import CHUNK

HALF = re.compile("[\ud800-\udfff]")  # of a character beyond U+FFFF, without the other: no text that can be written
HALVES = re.compile(r"\\u[dD]")  # how they are written
SPACE = " \t\r\n"  # JSON's; others are not blank
LONGEST_TOKEN = 16  # characters, with some to spare: of -Infinity, \ud83d\ude00 and the end of a number
LONGEST_FIELD = 1 << 26  # characters; a quote that is never closed would else take the rest of a file into memory

Item = tuple[int, Any]

csv.field_size_limit(LONGEST_FIELD)


class _Decoder(json.JSONDecoder):
    """Python's, but it keeps in `fault` what it would else pass over, or fail at without a position."""

    def __init__(self) -> None:
        super().__init__(object_pairs_hook=self._object, parse_int=self._integer)
        self.fault: Fault | None = None

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        value = dict(pairs)
        if len(value) != len(pairs):
            keys = [key for key, _ in pairs]
            twice = next(key for key in keys if keys.count(key) > 1)
            self.fault = Fault(f"two values for the key {twice!r}", "keep one")
        return value

    def _integer(self, digits: str) -> int:
        try:
            return int(digits)
        except ValueError:
            self.fault = Fault(f"has an integer of {len(digits.lstrip('-'))} digits", "write it as text")
            return 0


def json_lines(stream: io.BufferedReader[Any], file: str) -> Iterator[Item]:
    decoder, number = _Decoder(), 0
    while line := stream.readline():
        number += 1
        if number == 1:
            line = line.removeprefix(codecs.BOM_UTF8)
        if line.strip(SPACE.encode()):
            yield number, _line(line.removesuffix(b"\n"), decoder)


def _line(line: bytes, decoder: _Decoder) -> Any:
    """The value of a line, or its fault."""
    try:
        text = line.decode()
        return _decoded(decoder, text, len(text) - len(text.lstrip(SPACE)), whole=True)[0]
    except UnicodeDecodeError as error:
        return not_utf8(line[error.start])
    except json.JSONDecodeError as error:
        return Fault(f"is not valid JSON: {_what(error, error.colno)}")
    except RecursionError:
        return Fault("is nested too deep", "flatten it")


def _decoded(decoder: _Decoder, text: str, begin: int, *, whole: bool) -> tuple[Any, int]:
    """(the value that begins there, or its fault; where it ends). whole: nothing may follow.

    Raises json.JSONDecodeError or RecursionError.
    """
    decoder.fault = None
    value, end = decoder.raw_decode(text, begin)
    if whole and (rest := text[end:].lstrip(SPACE)):
        raise json.JSONDecodeError("Extra data", text, len(text) - len(rest))
    return decoder.fault or _fault(value, text, begin, end) or value, end


def _fault(value: Any, text: str, begin: int, end: int) -> Fault | None:
    """What JSON lets pass. text[begin:end]: that the value was read from. Raises RecursionError."""
    if not text.isascii() and (fault := escaped(text[begin:end])):
        return fault
    if isinstance(value, dict) and HALVES.search(text, begin, end):
        for key, part in value.items():
            if half := HALF.search(json.dumps([key, part], ensure_ascii=False)):
                what = f"{key!a} has half a character, {half[0]!a}, which is no text"
                return Fault(what, "write the whole character, in UTF-8 or as both halves")
    return None


def _what(error: json.JSONDecodeError, column: int) -> str:
    """Some of json's messages end with an "at" of their own."""
    return f"{error.msg.removesuffix(' at')} at column {column}"


def json_rows(stream: io.BufferedReader[Any], file: str) -> Iterator[Item]:
    """The elements of one array, decoded one by one so that each has its line; or lines under another name."""
    window = _Window(stream, file)
    first = window.skip()
    if first == "{":  # rows without a list around them: JSON lines under another name
        window.check_lines()
        before = window.line - 1
        lines = json_lines(io.BufferedReader(_Again(window.rest(), stream)), file)
        yield from ((before + line, value) for line, value in lines)
        return
    if not first:
        return
    if first != "[":
        raise InputError("must be a list of objects", where=f"{file}:{window.line}")
    window.take(1)
    if window.skip() != "]":
        yield window.row()
        while window.skip() == ",":
            window.take(1)
            yield window.row()
    window.take(1)
    if window.skip():
        raise InputError("is not valid JSON: something follows the list", where=f"{file}:{window.line}")


class _Again(io.RawIOBase):
    """Bytes that were read already, then those of the stream."""

    def __init__(self, begun: bytes, stream: io.BufferedReader[Any]):
        self.begun, self.stream = begun, stream

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        block = self.begun[: len(buffer)] or self.stream.read1(len(buffer))
        self.begun = self.begun[len(block) :]
        buffer[: len(block)] = block
        return len(block)


class _Window:
    """The part of a text that is being decoded. It grows while a row does not end in it, by as much as it has: a row of
    n characters is tried log n times."""

    def __init__(self, stream: io.BufferedReader[Any], file: str):
        self.stream, self.file, self.decoder = stream, file, _Decoder()
        self.bytes = codecs.getincrementaldecoder("utf-8-sig")("surrogateescape")  # so that a bad row spoils no others
        self.text, self.at, self.line, self.column = "", 0, 1, 1  # line and column: of text[at], from 1
        self.ended = False
        self.broken: AlignmentError | None = None  # raised when what came before it has been decoded

    def skip(self) -> str:
        """The next character that is no space, "" at the end. Raises what the stream raises."""
        while True:
            end = self.at
            while end < len(self.text) and self.text[end] in SPACE:
                end += 1
            self.take(end - self.at)
            if end < len(self.text) or self.ended:
                return self.text[end : end + 1]
            self._grow()

    def take(self, count: int) -> None:
        end = self.at + count
        if lines := self.text.count("\n", self.at, end):
            self.line += lines
            self.column = end - self.text.rfind("\n", self.at, end)
        else:
            self.column += count
        self.at = end

    def row(self) -> Item:
        """The next value, or its fault, and its line; what follows it is checked, but not taken.

        Raises InputError where that is no JSON: the array cannot be gone on with.
        """
        self.skip()
        while True:
            try:
                value, end = _decoded(self.decoder, self.text, self.at, whole=False)
                if self.ended or end + LONGEST_TOKEN < len(self.text):
                    line = self.line
                    self.take(end - self.at)
                    if self.skip() not in (",", "]"):
                        self._fail(json.JSONDecodeError("Expecting ',' or ']' after the row", self.text, self.at))
                    return line, value
            except json.JSONDecodeError as error:
                near_end = error.pos + LONGEST_TOKEN > len(self.text)
                if self.ended or not (near_end or error.msg.startswith("Unterminated string")):
                    self._fail(error)
            except RecursionError as error:
                raise InputError("is nested too deep", where=f"{self.file}:{self.line}", fix="flatten it") from error
            self._grow()

    def _fail(self, error: json.JSONDecodeError) -> None:
        self.take(error.pos - self.at)
        raise InputError(f"is not valid JSON: {_what(error, self.column)}", where=f"{self.file}:{self.line}") from error

    def check_lines(self) -> None:
        """Raises InputError if what begins here is an object over several lines. One that ends in its line, a comma
        behind it, is a row that is wrong by itself."""
        line, end, _ = self.text[self.at :].partition("\n")
        line = line.rstrip(SPACE)
        if end and line.endswith(("{", "[", ",", ":")) and not re.search(rf"}}[{SPACE}]*,$", line):
            fix = "give the list alone, or a row a line: jq -c '.data[]', with the key that it stands under"
            raise InputError("is one object, not a list of rows", where=f"{self.file}:{self.line}", fix=fix)

    def rest(self) -> bytes:
        """What has been read and not taken, as the bytes it was."""
        return self.text[self.at :].encode(errors="surrogateescape") + self.bytes.getstate()[0]

    def _grow(self) -> None:
        """Raises what the stream raises, where nothing comes before it."""
        if self.broken:
            raise self.broken
        parts, wanted = [self.text[self.at :]], max(CHUNK, len(self.text) - self.at)
        while wanted > 0 and not self.ended and not self.broken:
            try:
                block = self.stream.read1(CHUNK)
                self.ended = not block
                parts.append(self.bytes.decode(block, final=self.ended))
            except AlignmentError as error:
                self.broken = error
            wanted -= len(parts[-1])
        self.text, self.at = "".join(parts), 0


def csv_rows(stream: io.BufferedReader[Any], file: str) -> Iterator[Item]:
    yield from _records(stream, file, ",")


def tsv_rows(stream: io.BufferedReader[Any], file: str) -> Iterator[Item]:
    yield from _records(stream, file, "\t")


def _records(stream: io.BufferedReader[Any], file: str, delimiter: str) -> Iterator[Item]:
    """Of CSV: all values are texts. Raises InputError where quotes are wrong: no one can say where the next begins."""
    text = io.TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape", newline="")
    reader = csv.reader(text, delimiter=delimiter, strict=True)
    header: list[str] = []
    try:
        begun = 1
        for fields in reader:
            if not header and fields:
                header = _header(fields, f"{file}:{begun}")
            elif fields:
                yield begun, _record(header, fields)
            begun = reader.line_num + 1
    except csv.Error as error:
        raise InputError(f"is not valid CSV: {error}", where=f"{file}:{reader.line_num}") from error


def _header(fields: list[str], where: str) -> list[str]:
    if fault := escaped("".join(fields)):
        raise InputError(fault.what, where=where, fix=fault.fix)
    if twice := next((name for name in fields if fields.count(name) > 1), None):
        raise InputError(f"two columns are called {twice!r}", where=where, fix="rename one")
    return fields


def _record(header: list[str], fields: list[str]) -> dict[str, str] | Fault:
    if fault := escaped("".join(fields)):
        return fault
    if len(fields) != len(header):
        return Fault(f"has {len(fields)} fields, the header names {len(header)}")
    return dict(zip(header, fields, strict=True))
