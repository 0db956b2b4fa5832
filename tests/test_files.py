"""What is written whole or not at all, where there is no room for it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from alignment.errors import unusable
from alignment.files import append, write_text
from tests.conftest import fill


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
