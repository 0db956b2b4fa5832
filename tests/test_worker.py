"""What a worker makes of an error that comes out of a library."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
from safetensors import SafetensorError

from alignment import worker
from alignment.errors import LostError, MachineError

# What safetensors 0.8 raises on a full disk: a class of its own, the system's error number only in its text.
SAFETENSORS = SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), SAFETENSORS], ids=["os", "rust"])
def test_a_full_disk_is_said_as_such_whichever_library_meets_it(error: Exception) -> None:
    told = worker._known(error, Path("work/ab"))
    assert (type(told), told.exit_code) == (MachineError, 4)
    assert str(told).startswith("work/ab: no space left on the disk")


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer [::1]:4"),
        RuntimeError(
            "[../third_party/gloo/gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 1800000ms for recv"
        ),
        type("DistBackendError", (RuntimeError,), {})("NCCL error: remote process exited or there was a network error"),
    ],
    ids=["gloo", "timeout", "nccl"],
)
def test_that_another_process_is_gone_does_not_hide_why(error: Exception, tmp_path: Path) -> None:
    told = worker._known(error, tmp_path)
    assert isinstance(told, LostError)
    worker._tell(tmp_path, told, "", retry=True)
    worker._tell(tmp_path, MachineError("out of memory"), "", retry=False)
    worker._tell(tmp_path, MachineError("later"), "", retry=False)
    assert "lost contact" in (tmp_path / "lost.json").read_text()
    assert "out of memory" in (tmp_path / "error.json").read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["error.json", "lost.json"]


def test_a_server_that_hangs_up_is_not_a_lost_process(tmp_path: Path) -> None:
    assert not isinstance(worker._known(ConnectionResetError("Connection reset by peer"), tmp_path), LostError)
