"""What a stage's processes find in their environment."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from alignment.launchers.base import Job, environment


@pytest.mark.parametrize("processes", [1, 2])
def test_the_group_that_started_us_is_not_the_stages_group(processes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pods of Kubeflow export these; a single process that took them would wait for peers, or not commit."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "TORCHELASTIC_RUN_ID"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("LOCAL_MODEL", "/kept")
    given = environment(Job("sft", Path("x"), 1, processes, 1, 3, 0))
    assert not {"RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "TORCHELASTIC_RUN_ID"} & set(given)
    assert (given["LOCAL_MODEL"], given["OMP_NUM_THREADS"]) == ("/kept", "3")


@pytest.mark.parametrize(("name", "value"), [("GOMP_SPINCOUNT", "7"), ("OMP_WAIT_POLICY", "ACTIVE")])
def test_how_threads_wait_is_the_users_to_say(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for other in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.delenv(other, raising=False)
    job = Job("sft", Path("x"), 1, 1, 1, 3, 0)
    assert environment(job)["GOMP_SPINCOUNT"] == "1000"
    monkeypatch.setenv(name, value)
    given = environment(job)
    assert given[name] == value
    assert name == "GOMP_SPINCOUNT" or "GOMP_SPINCOUNT" not in given


LOAD = """
import pickle, sys, torch
class Evil:
    def __reduce__(self):
        return open, (sys.argv[1] + ".ran", "w")
with open(sys.argv[1], "wb") as stream:
    torch.save({"weights": torch.ones(2), "evil": Evil()}, stream)
try:
    torch.load(sys.argv[1], weights_only=False)
except pickle.UnpicklingError as error:
    from alignment.worker import _known
    told = _known(error, "work")
    print(type(told).__name__, told)
"""


def test_no_library_can_load_a_pickle_that_runs_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    given = environment(Job("sft", tmp_path, 1, 1, 1, 1, 0))
    file = tmp_path / "optimizer.pt"
    done = subprocess.run([sys.executable, "-c", LOAD, file], env=given, capture_output=True, text=True, check=True)
    assert done.stdout.startswith(f"InputError {file}: a file holds a pickle with code: refused")
    assert not os.path.exists(f"{file}.ran")
