from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import fsspec
import pytest

from alignment.errors import InputError
from alignment.places import expand, fingerprint, kind


def test_suffix_and_compression_of_a_name() -> None:
    assert kind("a/B.JSONL.GZ") == (".jsonl", ".gz")
    assert kind("https://a.b/r.csv?x=1.gz#f") == (".csv", "") and kind("s3://b/c?.csv") == (".csv", "")
    assert kind("r") == ("", "")


def test_paths_patterns_and_addresses_mean_files(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    for name in ("b.csv", "a.csv", "sub/c.csv"):
        (tmp_path / name).touch()
    assert expand(tmp_path / "*.csv") == [str(tmp_path / "a.csv"), str(tmp_path / "b.csv")]
    assert expand(f"file://{tmp_path}/**/c.csv") == [str(tmp_path / "sub" / "c.csv")]
    for path, message in ((tmp_path, "is a folder"), (tmp_path / "x", "no such file"), ("a\0*", "no such file")):
        with pytest.raises(InputError, match=message):
            expand(path)
    memory = fsspec.filesystem("memory")
    for name in ("b.csv", "a.csv"):
        memory.pipe(f"/places/{name}", b"x")
    assert expand("memory://places/*.csv") == ["memory:///places/a.csv", "memory:///places/b.csv"]
    for path, message in (
        ("memory://places", "is a folder"),
        ("memory://x", "no such file"),
        ("memory://x*", "no file"),
    ):
        with pytest.raises(InputError, match=message):
            expand(path)


def test_the_fingerprint_of_an_address_changes_with_its_content() -> None:
    memory = fsspec.filesystem("memory")
    memory.pipe("/places/f.csv", b"one")
    first = fingerprint("memory://places/f.csv")
    assert fingerprint("memory://places/f.csv") == first
    memory.pipe("/places/f.csv", b"two")
    assert fingerprint("memory://places/f.csv") != first
    with pytest.raises(InputError, match="no such file"):
        fingerprint("memory://places/none.csv")


def test_paths_are_expanded_without_libraries_of_data() -> None:
    code = "import sys, alignment.places as p; p.expand(p.__file__); print({'fsspec', 'pyarrow'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
