"""Whatever the bytes are: rows, unreadable rows, or one line of an error. Nothing else, and nothing passed over."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import math
import tempfile
from pathlib import Path
from typing import Any

import pyarrow
import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyarrow import ipc, parquet

from alignment.data.sources import SUFFIXES, Row, Unreadable, read
from alignment.errors import InputError, MachineError

QUICK = settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
TEXTS = (".jsonl", ".json", ".csv", ".tsv")
ZSTD = zstandard.ZstdCompressor().compress
COMPRESS = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": ZSTD}
NAMES = [*SUFFIXES, *(kind + compressed for kind in TEXTS for compressed in COMPRESS)]

TEXT = st.text(st.characters(codec="utf-8"))  # with NUL, U+2028 and what lies beyond U+FFFF
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4),
    max_leaves=12,
)
ROWS = st.lists(st.dictionaries(TEXT, VALUES, max_size=4), min_size=1, max_size=8)
PIECES = [
    b"{",
    b"}",
    b"[",
    b"]",
    b'"',
    b":",
    b",",
    b"\\",
    b"\\u",
    b"d800",
    b"\n",
    b"\r",
    b"\0",
    b"\xff",
    b"\xc3",
    b"NaN",
]
PIECES += [b'"a"', b"1", b"-", b"e9", b"\xef\xbb\xbf", b"\xe2\x80\xa8", b"\t", b"true", b"[" * 5000, b"9" * 5000, b" "]
PIECES += [b'{"a": 1}', b'{"a": 1}\n', b"a,b\n", b"1,2\n", b"\xc2\xa0", b"\x1c"]
MIXED = st.lists(st.sampled_from(PIECES), max_size=30).map(b"".join)


def read_back(name: str, data: bytes) -> list[Row | Unreadable | str]:
    """Rows, and the last error's line, if there is one."""
    found: list[Row | Unreadable | str] = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        path.write_bytes(data)
        try:
            for row in read(path):
                assert isinstance(row, Row | Unreadable) and row.where.startswith(str(path))
                assert "\n" not in str(row.error if isinstance(row, Unreadable) else "")
                found.append(row)
        except (InputError, MachineError) as error:
            assert str(path) in str(error) and "\n" not in str(error)
            found.append(str(error))
    return found


def values(name: str, data: bytes) -> list[Any]:
    return [row.value if isinstance(row, Row) else row for row in read_back(name, data)]


def written(kind: str, rows: list[dict[str, Any]]) -> bytes:
    """Rows as the libraries write them."""
    if kind == ".jsonl":
        return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    if kind == ".json":
        return json.dumps(rows, indent=1).encode()
    if kind in (".csv", ".tsv"):
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, [*rows[0]], delimiter="," if kind == ".csv" else "\t")
        writer.writeheader()
        writer.writerows(rows)
        return text.getvalue().encode()
    table, sink = pyarrow.Table.from_pylist(rows), io.BytesIO()
    if kind == ".parquet":
        parquet.write_table(table, sink)
    else:
        with (ipc.new_file if kind == ".feather" else ipc.new_stream)(sink, table.schema) as writer:
            writer.write_table(table)
    return sink.getvalue()


@pytest.mark.parametrize("name", NAMES)
def test_any_bytes_are_rows_or_one_line_of_an_error(name: str) -> None:
    @QUICK
    @given(st.binary(max_size=200) | MIXED)
    def check(data: bytes) -> None:
        assert read_back(f"r{name}", data)  # no file is passed over

    @QUICK
    @given(MIXED)
    def check_inside(data: bytes) -> None:
        compress = COMPRESS.get(Path(name).suffix, bytes)
        plain = read_back(f"r{Path(name).stem or name}", data) if name.count(".") > 1 else None
        found = read_back(f"r{name}", compress(data))
        assert plain is None or len(found) == len(plain)

    check()
    check_inside()


@QUICK
@given(MIXED, st.sampled_from(["utf-8", "utf-16", "latin-1"]))
def test_every_line_of_json_lines_that_is_not_blank_is_a_row_or_unreadable(data: bytes, encoding: str) -> None:
    data = data + '\n{"ä": "ö"}\n'.encode(encoding)
    lines = data.removeprefix(b"\xef\xbb\xbf").split(b"\n")
    expected = [number for number, line in enumerate(lines, start=1) if line.strip(b" \t\r\n")]
    found = read_back("r.jsonl", data)
    assert [getattr(row, "line", row) for row in found] == expected
    assert [getattr(row, "number", row) for row in found] == [*range(1, len(expected) + 1)]


@pytest.mark.parametrize("kind", [".jsonl", ".json"])
def test_what_json_writes_comes_back_equal(kind: str) -> None:
    @QUICK
    @given(ROWS)
    def check(rows: list[dict[str, Any]]) -> None:
        assert values(f"r{kind}", written(kind, rows)) == rows

    check()


@pytest.mark.parametrize("kind", [".csv", ".tsv"])
def test_what_csv_writes_comes_back_equal(kind: str) -> None:
    @QUICK
    @given(st.lists(st.fixed_dictionaries({"a": TEXT, "b": TEXT}), min_size=1, max_size=8))
    def check(rows: list[dict[str, Any]]) -> None:
        assert values(f"r{kind}", written(kind, rows)) == rows

    check()


@pytest.mark.parametrize("kind", [".parquet", ".arrow", ".feather"])
def test_what_pyarrow_writes_comes_back_equal(kind: str) -> None:
    column = st.fixed_dictionaries({"t": TEXT, "n": st.integers(-(2**63), 2**63 - 1), "l": st.lists(TEXT, max_size=3)})

    @QUICK
    @given(st.lists(column, min_size=1, max_size=8))
    def check(rows: list[dict[str, Any]]) -> None:
        assert values(f"r{kind}", written(kind, rows)) == rows

    check()


@pytest.mark.parametrize("name", NAMES)
def test_a_file_that_is_cut_gives_rows_of_the_whole_one_and_then_an_error(name: str) -> None:
    rows = [{"a": f"ü{number}", "b": "x\ny" * number} for number in range(40)]
    kind = "." + name.split(".")[1]
    whole = COMPRESS.get(Path(name).suffix, bytes)(written(kind, rows))

    @settings(QUICK, max_examples=60)
    @given(st.integers(1, len(whole) - 1))
    def check(end: int) -> None:
        found = read_back(f"r{name}", whole[:end])
        good = [row.value for row in found if isinstance(row, Row)]
        if name in (".csv", ".tsv"):  # the last field may be cut: nothing in the format says how long it is
            good = good[:-1]
        assert good == rows[: len(good)]
        may_be_whole = name in (".jsonl", ".csv", ".tsv", ".arrow")  # a cut between rows or batches is no fault there
        assert may_be_whole or len(good) == len(rows) or not isinstance(found[-1], Row)

    check()


@pytest.mark.parametrize("kind", [".parquet", ".arrow", ".feather", ".jsonl.gz", ".jsonl.zst"])
def test_a_file_with_other_bytes_in_it_gives_rows_or_errors(kind: str) -> None:
    rows = [{"a": f"ü{number}", "b": number} for number in range(20)]
    whole = COMPRESS.get(Path(kind).suffix, bytes)(written("." + kind.split(".")[1], rows))

    @settings(QUICK, max_examples=100)
    @given(st.integers(0, len(whole) - 1), st.binary(min_size=1, max_size=8))
    def check(begin: int, other: bytes) -> None:
        read_back(f"r{kind}", whole[:begin] + other + whole[begin + len(other) :])

    check()


@pytest.mark.parametrize("kind", [".jsonl", ".json", ".csv"])
def test_a_row_of_10_mb_comes_back_whole_or_as_one_error(kind: str) -> None:
    rows = [{"a": "x"}, {"a": '"\\ü\n' * 2_500_000}, {"a": "y"}]
    data = written(kind, rows)
    assert values(f"r{kind}", data) == rows
    found = read_back(f"r{kind}", data[:9_000_000])
    assert isinstance(found[0], Row) and not isinstance(found[1], Row) and len(found) == 2


@pytest.mark.parametrize("depth", [100, 900, 2000, 100_000])
def test_depth_is_read_or_said(depth: int) -> None:
    nested = b'{"a": ' + b"[" * depth + b"]" * depth + b', "b": "\\ud83d"}'
    for kind, data in ((".jsonl", nested), (".json", b"[" + nested + b"]")):
        (found,) = read_back(f"r{kind}", data)
        assert not isinstance(found, Row)
    (found,) = read_back("r.jsonl", b'{"a": Infinity, "b": -1e999}')
    assert isinstance(found, Row) and math.isinf(found.value["a"])


@pytest.mark.parametrize("kind", [*SUFFIXES, *COMPRESS])
def test_a_wrong_suffix_is_rows_or_an_error(kind: str) -> None:
    rows = [{"a": "x", "b": "y"}] * 3
    data = COMPRESS[kind](written(".jsonl", rows)) if kind in COMPRESS else written(kind, rows)
    assert all(read_back(f"r{name}", data) for name in NAMES)
