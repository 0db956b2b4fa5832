"""What is written whole or not at all, where there is no room for it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from alignment.errors import unusable
from alignment.files import append, write_text
from tests.conftest import fill


def test_of_a_copy_the_full_disk_is_named_and_not_what_is_copied(small_disk: Path, tmp_path: Path) -> None:
    (tmp_path / "source").write_bytes(b"x" * 100_000)
    fill(small_disk)
    with pytest.raises(OSError, match="No space") as caught:
        shutil.copy2(tmp_path / "source", small_disk / "copy")
    assert str(unusable(caught.value)).startswith(f"{small_disk / 'copy'}: no room is left")


@pytest.mark.parametrize("write", [write_text, append])
def test_where_a_disk_is_full_is_said_and_the_file_is_as_it_was(
    write: Callable[[Path, str], None], small_disk: Path
) -> None:
    file = small_disk / "told.json"
    write(file, "as it was\n")
    fill(small_disk)
    with pytest.raises(OSError, match="No space") as caught:
        write(file, "x" * 100_000)
    assert str(unusable(caught.value)).startswith(f"{file}: no room is left (make room")
    assert file.read_text() == "as it was\n"
    assert {path.name for path in small_disk.iterdir()} == {"told.json", "filler"}, "and nothing half-written stays"
