from __future__ import annotations

import json
from pathlib import Path

import pytest

from alignment.data.sources import read_rows
from alignment.errors import InputError


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


def test_csv_rows_may_span_lines(tmp_path: Path) -> None:
    content = 'prompt,completion\n"two\nlines",x\n\nlast,"y,z"\n'
    expected = [({"prompt": "two\nlines", "completion": "x"}, 2), ({"prompt": "last", "completion": "y,z"}, 5)]
    assert rows(tmp_path / "r.csv", content) == expected


def test_parquet_rows_have_numbers_instead_of_lines(tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

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
    "text after the array": ("r.json", '[{"a": 1}]\nx', ":1: is not valid JSON: something follows the list"),
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
