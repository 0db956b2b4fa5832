from __future__ import annotations

import bz2
import csv
import gzip
import json
import lzma
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import fsspec
import pyarrow
import pytest
import zstandard
from datasets import Dataset, DatasetDict
from pyarrow import feather, ipc, parquet

from alignment.data.sources import Row, Unreadable, read, read_rows
from alignment.errors import InputError, MachineError
from alignment.places import stream


def rows(path: Path, content: str | bytes) -> list[tuple[dict, int | None]]:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return [(row.value, row.line) for row in read_rows(path)]


def test_json_lines_keep_their_line_numbers_over_blank_lines_and_line_separators(tmp_path: Path) -> None:
    content = '\ufeff{"a": 1}\n\n{"a": "x\u2028y"}\r\n'
    assert rows(tmp_path / "r.jsonl", content) == [({"a": 1}, 1), ({"a": "x\u2028y"}, 3)]


def test_elements_of_a_json_array_know_the_line_they_begin_on(tmp_path: Path) -> None:
    content = '[\n {"a": 1},\n {\n  "a": [1,\n 2]\n },  {"a": 3}\n]\n'
    assert rows(tmp_path / "r.json", content) == [({"a": 1}, 2), ({"a": [1, 2]}, 3), ({"a": 3}, 6)]


def test_json_lines_under_the_name_json_are_read(tmp_path: Path) -> None:
    assert rows(tmp_path / "r.json", '{"a": 1}\n{"a": 2}\n') == [({"a": 1}, 1), ({"a": 2}, 2)]


def test_lines_with_commas_behind_them_are_told_by_line_and_an_object_over_lines_as_one(tmp_path: Path) -> None:
    found = shape(tmp_path / "r.json", '{"a": 1},\n{"a": 2} ,\n{"a": 3}\n')
    assert found == [
        (1, "is not valid JSON: Extra data at column 9"), (2, "is not valid JSON: Extra data at column 10"), {"a": 3}
    ]  # fmt: skip
    for content in ('{\n"a": 1}', '{"a": [\n1]}', '{"a":\n1}', '{"a": 1,\n"b": 2}'):
        with pytest.raises(InputError, match=r"r.json:1: is one object, not a list of rows"):
            shape(tmp_path / "r.json", content)


@pytest.mark.parametrize("name", ["r.parquet", "r.feather"])
def test_what_is_null_inside_of_a_column_of_objects_counts_as_absent(name: str, tmp_path: Path) -> None:
    """A struct has all keys that any row has: here each call would have the arguments of the other."""
    values = [{"call": {"arguments": {key: 1}}, "turns": [{"role": key, key: "x"}], "note": None} for key in ("a", "b")]
    table = pyarrow.Table.from_pylist(values)
    assert table.column("call")[0].as_py() == {"arguments": {"a": 1, "b": None}}
    (parquet.write_table if name == "r.parquet" else feather.write_feather)(table, tmp_path / name)
    assert shape(tmp_path / name) == values, "the row's own columns stay, null or not"


def test_csv_rows_may_span_lines(tmp_path: Path) -> None:
    content = 'prompt,completion\n"two\nlines",x\n\nlast,"y,z"\n'
    expected = [({"prompt": "two\nlines", "completion": "x"}, 2), ({"prompt": "last", "completion": "y,z"}, 5)]
    assert rows(tmp_path / "r.csv", content) == expected


def test_parquet_rows_have_numbers_instead_of_lines(tmp_path: Path) -> None:
    path = tmp_path / "r.parquet"
    values = [{"messages": [{"role": "user", "content": "hi"}]}, {"messages": []}]
    parquet.write_table(pyarrow.Table.from_pylist(values), path)
    read = list(read_rows(path))
    assert [row.value for row in read] == values
    assert read[1].where == f"{path}, row 2"


BAD = {
    "a broken line": ("r.jsonl", '{"a": 1}\n{"a": \n', ":2: is not valid JSON: Expecting value at column 7"),
    "a text without an end": ("r.jsonl", '{"a": "b', ":1: is not valid JSON: Unterminated string starting at column 7"),
    "a truncated array": ("r.json", '[\n{"a": 1},\n{"a"', ":3: is not valid JSON: Expecting ':' delimiter at column 5"),
    "an array without end": ("r.json", '[{"a": 1}', ":1: is not valid JSON: Expecting ',' or ']' after the row"),
    "text after the array": ("r.json", '[{"a": 1}]\nx', ":2: is not valid JSON: something follows the list"),
    "a bare value": ("r.json", "\n3", ":2: must be a list of objects"),
    "a row that is no object": ("r.jsonl", '{"a": 1}\n[1]\n', ":2: a row must be an object, is a list"),
    "half a character": (
        "r.jsonl",
        '{"a": "\\ud83d\\ude00"}\n{"a": "x", "b": [{"c": "a \\ud800b"}]}\n',
        r":2: 'b' has half a character, '\ud800', which is no text (write the whole character",
    ),
    "half a character in an array": (
        "r.json",
        '[{"a": "x"},\n{"a": "\\uDC00"}]',
        r":2: 'a' has half a character, '\udc00', which is no text",
    ),
    "an empty file": ("r.jsonl", "", ": holds no rows"),
    "an empty array": ("r.json", "[ ]", ": holds no rows"),
    "a header alone": ("r.csv", "a,b\n", ": holds no rows"),
    "a missing field": ("r.csv", "a,b\n1,2\n1\n", ":3: has 1 fields, the header names 2"),
    "an open quote": ("r.csv", 'a,b\n"1,2\n', ":2: is not valid CSV: unexpected end of data"),
    "another encoding": (
        "r.jsonl",
        b'{"a": 1}\n{"a": "\xe9"}\n',
        ":2: is not UTF-8 (byte 0xe9) (save the file as UTF-8)",
    ),
    "not Parquet": ("r.parquet", "hello", ": is not a readable Parquet file: "),
    "another kind of file": (
        "r.txt",
        "hello",
        ": cannot read '.txt' (give one of .json, .jsonl, .csv, .tsv, .parquet, ",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_file_is_an_error_that_names_file_and_line(case: str, tmp_path: Path) -> None:
    name, content, message = BAD[case]
    with pytest.raises(InputError) as caught:
        rows(tmp_path / name, content)
    assert str(caught.value).startswith(f"{tmp_path / name}{message}")


def test_a_missing_file_and_a_folder_are_errors(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        list(read_rows(tmp_path / "none.jsonl"))
    with pytest.raises(InputError, match="is a folder"):
        list(read_rows(tmp_path))


def test_rows_before_a_broken_line_are_still_read(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    path.write_text(json.dumps({"a": 1}) + "\n{")
    reader = read_rows(path)
    assert next(reader).value == {"a": 1}
    with pytest.raises(InputError, match=":2: "):
        next(reader)


def shape(path: Path | str, content: str | bytes | None = None) -> list[Any]:
    """Of each row its value, or of an unreadable one (line, what)."""
    if content is not None:
        Path(path).write_bytes(content.encode() if isinstance(content, str) else content)
    return [row.value if isinstance(row, Row) else (row.line, row.what) for row in read(path)]


def test_reading_goes_on_after_lines_that_cannot_be_read(tmp_path: Path) -> None:
    lines = [b'{"a": 1}', b"{", b"", b"[1]", b'{"a": "\xe9"}', b'{"a": "\\ud800"}', b'{"a": 1, "a": 2}']
    lines += [b'{"a": ' + b"[" * 100_000, b'{"a": ' + b"9" * 5000 + b"}", b'{"a": "\x00"}', b'{"a": 2}']
    read_back = shape(tmp_path / "r.jsonl", b"\r\n".join(lines))
    assert read_back == [
        {"a": 1},
        (2, "is not valid JSON: Expecting property name enclosed in double quotes at column 3"),
        (4, "a row must be an object, is a list"),
        (5, "is not UTF-8 (byte 0xe9)"),
        (6, r"'a' has half a character, '\ud800', which is no text"),
        (7, "two values for the key 'a'"),
        (8, "is nested too deep"),
        (9, "has an integer of 5000 digits"),
        (10, "is not valid JSON: Invalid control character at column 8"),
        {"a": 2},
    ]
    found = [row for row in read(tmp_path / "r.jsonl") if isinstance(row, Unreadable)]
    assert found[0].number == 2 and found[0].where == f"{tmp_path / 'r.jsonl'}:2"
    assert str(found[2].error) == f"{tmp_path / 'r.jsonl'}:5: is not UTF-8 (byte 0xe9) (save the file as UTF-8)"


def test_reading_goes_on_after_elements_of_an_array_that_are_no_rows(tmp_path: Path) -> None:
    content = b'[{"a": 1, "a": 2},\n3,\n{"a": "\xff"},\n{"a": "\\udc00"}, {"a": NaN, "b": ' + b"1" * 1000 + b"}]"
    found = shape(tmp_path / "r.json", content)
    assert found[:4] == [
        (1, "two values for the key 'a'"),
        (2, "a row must be an object, is a number"),
        (3, "is not UTF-8 (byte 0xff)"),
        (4, r"'a' has half a character, '\udc00', which is no text"),
    ]
    assert found[4]["a"] != found[4]["a"] and found[4]["b"] == int("1" * 1000)


def test_an_array_whose_rows_end_anywhere_in_the_buffer_comes_back(tmp_path: Path) -> None:
    """Rows of many lengths, one of 10 MB, so that every token is cut somewhere by the end of what has been read."""
    values = [{"t": "ü\\😀\n" * (number % 997), "n": -1.5e-7 * number, "b": [True, None]} for number in range(4000)]
    values.insert(2000, {"t": "x" * 10_000_000})
    (tmp_path / "r.json").write_text(json.dumps(values, indent=1))
    (tmp_path / "one.json").write_text(json.dumps(values, ensure_ascii=False))
    assert shape(tmp_path / "r.json") == values and shape(tmp_path / "one.json") == values
    cut = (tmp_path / "r.json").read_bytes()[:-30_000_000]
    with pytest.raises(InputError, match=r"r.json:\d+: is not valid JSON"):
        shape(tmp_path / "r.json", cut)


def test_records_of_csv_with_the_wrong_number_of_fields_or_bad_bytes_are_passed_by_name(tmp_path: Path) -> None:
    content = b'\xef\xbb\xbfa,b\r\n1,"x\n\xe2\x80\xa8"\r\n\r\n3\n\xe9,5\n6,\x00\n'
    expected = [{"a": "1", "b": "x\n\u2028"}, (5, "has 1 fields, the header names 2"), (6, "is not UTF-8 (byte 0xe9)")]
    assert shape(tmp_path / "r.csv", content) == [*expected, {"a": "6", "b": "\x00"}]
    assert shape(tmp_path / "r.tsv", 'a\tb\n1\t"x,""y"\n') == [{"a": "1", "b": 'x,"y'}]
    assert shape(tmp_path / "r.csv", "a\n" + "x" * 1_000_000)[0] == {"a": "x" * 1_000_000}
    with pytest.raises(InputError, match=r"r.csv:1: two columns are called 'a' \(rename one\)"):
        shape(tmp_path / "r.csv", "a,a\n1,2\n")


ZSTD = zstandard.ZstdCompressor().compress
COMPRESS = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": ZSTD}


@pytest.mark.parametrize("suffix", COMPRESS)
@pytest.mark.parametrize("kind", [".jsonl", ".json", ".csv", ".tsv"])
def test_compressed_texts_are_read_and_a_cut_is_found_after_the_rows_before_it(
    kind: str, suffix: str, tmp_path: Path
) -> None:
    values = [{"a": f"{number * 7919 % 100_003:x}" * 9} for number in range(40_000)]
    if kind in (".csv", ".tsv"):
        text = "\n".join(["a", *(value["a"] for value in values)])
    else:
        text = json.dumps(values) if kind == ".json" else "\n".join(map(json.dumps, values))
    path, data = tmp_path / f"r{kind}{suffix}", text.encode()
    halves = COMPRESS[suffix](data[: len(data) // 2]) + COMPRESS[suffix](data[len(data) // 2 :])
    assert shape(path, halves) == values  # of two members or frames
    path.write_bytes(halves[: len(halves) * 3 // 4])
    reader, before = read(path), []
    with pytest.raises(InputError, match=rf", after row \d+: the \{suffix} is cut or broken") as caught:
        before.extend(row.value for row in reader)  # type: ignore[union-attr]
    number = int(str(caught.value).partition("after row ")[2].partition(":")[0])
    assert number >= len(values) // 2 - 1  # of an array, the last row's comma may be cut off


@pytest.mark.parametrize("kind", ["", *COMPRESS])
def test_a_file_that_was_left_is_closed(kind: str, tmp_path: Path) -> None:
    path = tmp_path / f"r.jsonl{kind}"
    path.write_bytes(COMPRESS.get(kind, bytes)(b'{"a": 1}\n' * 10_000))

    def opened() -> bool:
        return any(os.path.realpath(one) == str(path) for one in Path("/proc/self/fd").iterdir())

    with stream(path, kind) as reader:
        assert reader.readline() == b'{"a": 1}\n' and opened()
    assert not opened()


@pytest.mark.parametrize(
    ("kind", "module", "fix"),
    [
        (".zst", "zstandard", "pip install zstandard"),
        (".bz2", "bz2", "take a Python that was built with bz2"),
        (".xz", "lzma", "take a Python that was built with lzma"),
    ],
)
def test_a_decompressor_that_is_missing_is_one_line(
    kind: str, module: str, fix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / f"r.jsonl{kind}"
    path.write_bytes(COMPRESS[kind](b'{"a": 1}\n'))
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MachineError) as caught:
        shape(path)
    assert str(caught.value) == f"{path}: {kind} needs the module {module}, which is missing ({fix})"


def test_compressed_lines_under_the_name_json_are_read(tmp_path: Path) -> None:
    values = [{"a": "ü" * 100, "n": number} for number in range(20_000)]
    text = "\ufeff\n" + "\n".join(json.dumps(value, ensure_ascii=False) for value in values)
    path = tmp_path / "r.json.gz"
    path.write_bytes(gzip.compress(text.encode()))
    assert [(row.value, row.line) for row in read(path)] == [(v, n) for n, v in enumerate(values, start=2)]


def test_arrow_files_streams_and_feather_come_back(tmp_path: Path) -> None:
    values = [{"m": [{"role": "user", "content": "hi" * number}], "n": number} for number in range(3000)]
    table = pyarrow.Table.from_pylist(values)
    for name, opened in (("file.arrow", ipc.new_file), ("stream.arrow", ipc.new_stream)):
        with opened(tmp_path / name, table.schema) as writer:
            writer.write_table(table, max_chunksize=700)
    feather.write_feather(table, tmp_path / "r.feather", compression="zstd")
    parquet.write_table(table, tmp_path / "r.parquet", row_group_size=700)
    for name in ("file.arrow", "stream.arrow", "r.feather", "r.parquet"):
        assert shape(tmp_path / name) == values
        data = (tmp_path / name).read_bytes()
        with pytest.raises(InputError, match="is not a readable"):
            shape(tmp_path / f"cut-{name}", data[: len(data) // 2])


def test_values_of_columns_that_python_cannot_hold_are_unreadable_rows(tmp_path: Path) -> None:
    table = pyarrow.table({"t": pyarrow.array([0, 1 << 60, 5], pyarrow.timestamp("s"))})
    parquet.write_table(
        table.cast(pyarrow.schema([("t", pyarrow.timestamp("ms"))]), safe=False), tmp_path / "r.parquet"
    )
    bad = pyarrow.StringArray.from_buffers(2, *pyarrow.array([b"ok", b"\xff"]).buffers()[1:])
    parquet.write_table(pyarrow.table({"a": bad}), tmp_path / "b.parquet")
    first, second = read(tmp_path / "b.parquet")
    assert isinstance(first, Row) and first.value == {"a": "ok"}
    assert isinstance(second, Unreadable) and second.where.endswith("b.parquet, row 2")


def test_folders_of_datasets_are_read_and_those_of_several_splits_name_them(tmp_path: Path) -> None:
    values = [{"a": number} for number in range(10)]
    Dataset.from_list(values).save_to_disk(tmp_path / "d", num_shards=3)
    assert shape(tmp_path / "d") == values
    assert [*read(tmp_path / "d")][-1].where == f"{tmp_path}/d/data-00002-of-00003.arrow, row 3"
    DatasetDict(train=Dataset.from_list(values), test=Dataset.from_list(values)).save_to_disk(tmp_path / "dd")
    with pytest.raises(InputError, match=r"several splits: train, test \(name the folder of one, .*/dd/train\)"):
        shape(tmp_path / "dd")
    assert shape(tmp_path / "dd" / "train") == values
    (tmp_path / "d" / "state.json").write_text('{"_data_files": [{"filename": "../x.arrow"}]}')
    with pytest.raises(InputError, match="names no files of the folder"):
        shape(tmp_path / "d")


def test_patterns_mean_their_files_in_order_with_rows_counted_in_each(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.jsonl", "[c].jsonl"):
        (tmp_path / name).write_text('{"a": 1}\n{"a": 2}\n')
    places = [(Path(row.file).name, row.number) for row in read(tmp_path / "[ab].jsonl")]
    assert places == [("a.jsonl", 1), ("a.jsonl", 2), ("b.jsonl", 1), ("b.jsonl", 2)]
    assert [Path(row.file).name for row in read(tmp_path / "[c].jsonl")] == ["[c].jsonl"] * 2
    with pytest.raises(InputError, match="no file matches"):
        shape(tmp_path / "*.csv")


@pytest.fixture
def web(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(tmp_path)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", tmp_path
    server.shutdown()
    server.server_close()


def test_addresses_of_the_web_are_read(web: tuple[str, Path]) -> None:
    url, folder = web
    values = [{"a": "x" * number} for number in range(2000)]
    (folder / "r.jsonl.gz").write_bytes(gzip.compress("\n".join(map(json.dumps, values)).encode()))
    parquet.write_table(pyarrow.Table.from_pylist(values), folder / "r.parquet")
    assert shape(f"{url}/r.jsonl.gz?download=true") == values
    assert shape(f"{url}/r.parquet") == values
    with pytest.raises(InputError, match=r"none.jsonl: no such file"):
        shape(f"{url}/none.jsonl")
    with pytest.raises(
        MachineError, match=r"http://127.0.0.1:9/r.jsonl: cannot be read: .* \(check credentials and net"
    ):
        shape("http://127.0.0.1:9/r.jsonl")


def test_files_of_other_systems_are_read_and_missing_drivers_named() -> None:
    with fsspec.open_files(["memory://sources/b.csv", "memory://sources/a.csv"], "wt")[1] as file:
        csv.writer(file).writerows([["x"], ["1"]])
    fsspec.filesystem("memory").pipe("/sources/b.csv", b"x\n2\n")
    assert [(row.file, row.value) for row in read_rows("memory://sources/*.csv")] == [
        ("memory:///sources/a.csv", {"x": "1"}),
        ("memory:///sources/b.csv", {"x": "2"}),
    ]
    with pytest.raises(MachineError, match=r"s3:// needs a package that is not installed \(pip install s3fs\)"):
        shape("s3://bucket/r.jsonl")
    with pytest.raises(InputError, match="no kind of address begins with nowhere://"):
        shape("nowhere://bucket/r.jsonl")


GROWTH = """
import sys
from alignment.data.sources import read
import pyarrow.parquet

def peak():  # MB; ru_maxrss would count the process that this one is forked from
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM"))


before = peak()
count = sum(1 for _ in read(sys.argv[1]))
print(count, peak() - before)
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", [".jsonl", ".json", ".csv", ".jsonl.zst", ".parquet", ".arrow"])
def test_300_mb_of_rows_take_less_than_100_mb_of_memory(kind: str, tmp_path: Path) -> None:
    row, rows, path = {"text": "some words " * 136}, 200_000, tmp_path / f"r{kind}"
    line = json.dumps(row).encode()
    if kind in (".parquet", ".arrow"):
        part = pyarrow.Table.from_pylist([{"text": f"{number} {row['text']}"} for number in range(10_000)])
        is_parquet = kind == ".parquet"
        opened = parquet.ParquetWriter(path, part.schema) if is_parquet else ipc.new_file(path, part.schema)
        with opened as writer:
            for _ in range(rows // 10_000):
                writer.write_table(part)
    elif kind == ".jsonl.zst":
        with zstandard.open(path, "wb") as file:
            for _ in range(rows):
                file.write(line + b"\n")
    else:
        begin, between, end = {
            ".json": (b"[", b",", b"]"),
            ".jsonl": (b"", b"\n", b""),
            ".csv": (b"text\n", b"\n", b""),
        }[kind]
        with open(path, "wb") as file:
            file.write(begin + (row["text"].encode() if kind == ".csv" else line))
            file.writelines(between + (row["text"].encode() if kind == ".csv" else line) for _ in range(rows - 1))
            file.write(end)
    done = subprocess.run([sys.executable, "-c", GROWTH, str(path)], capture_output=True, text=True, check=True)
    count, growth = done.stdout.split()
    print(kind, growth)
    assert int(count) == rows and float(growth) < 100, growth


OWN = """
import sys
from alignment.data.sources import read
import pyarrow.parquet

def own():  # MB of the process's own; of a map it is the system that keeps what it has room for
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("RssAnon"))


before = own()
seen = [own() for count, _ in enumerate(read(sys.argv[1])) if count % 1000 == 999]
print(len(seen), max(seen) - before)
"""


@pytest.mark.parametrize("kind", ["group.parquet", "file.arrow", "stream.arrow"])
def test_114_mb_in_one_row_group_take_less_than_64_mb_of_memory(kind: str, tmp_path: Path) -> None:
    """60,000 rows that cannot be compressed, as pyarrow writes them: by default up to a million in a row group."""
    columns = {name: [os.urandom(475).hex() for _ in range(60_000)] for name in ("prompt", "completion")}
    table, path = pyarrow.table(columns), tmp_path / kind
    if kind == "group.parquet":
        parquet.write_table(table, path)
        assert parquet.read_metadata(path).num_row_groups == 1
    else:
        with (ipc.new_file if kind == "file.arrow" else ipc.new_stream)(path, table.schema) as writer:
            writer.write_batch(table.to_batches()[0])
    assert path.stat().st_size > 114e6
    done = subprocess.run([sys.executable, "-c", OWN, str(path)], capture_output=True, text=True, check=True)
    thousands, growth = done.stdout.split()
    assert thousands == "60" and float(growth) < 64, growth
