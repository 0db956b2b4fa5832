"""What a worker makes of an error that comes out of a library."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
from safetensors import SafetensorError

from alignment import worker
from alignment.errors import MachineError

# What safetensors 0.8 raises on a full disk: a class of its own, the system's error number only in its text.
SAFETENSORS = SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), SAFETENSORS], ids=["os", "rust"])
def test_a_full_disk_is_said_as_such_whichever_library_meets_it(error: Exception) -> None:
    told = worker._known(error, Path("work/ab"))
    assert (type(told), told.exit_code) == (MachineError, 4)
    assert str(told).startswith("work/ab: no space left on the disk")
