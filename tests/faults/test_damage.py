"""Checkpoints that are damaged, swapped or lead elsewhere, files that would run code, caches that cannot be written."""

from __future__ import annotations

import os
import pickle
import re
import shutil
import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.conftest import write_tiny_model
from tests.faults.driver import Fault
from tests.faults.runs import Case, Ground, cells, faults

FILES = {"part": "rank-00000-of-*.safetensors", "state": "state.json", "manifest": "manifest.json"}


def halfway(ground: Ground, kind: str, engine: str, name: str, *settings: str) -> Case:
    """A run that was killed with two whole checkpoints. Made once; cases are copies of its store."""
    folder = ground.folder / f"halfway-{name}-{kind}-{engine}"
    if not folder.exists():
        case = ground.case(kind, engine, folder, "checkpoint.asynchronous=false", *settings)
        options = {"moment": "training", "nth": 5, "do": "signal_self", "number": signal.SIGKILL}
        case.run("retries=0", code=6, faults=[Fault("at", options)])
        assert [path.name for path in case.checkpoints()][-2:] == ["step-00000003", "step-00000004"]
    return Case(ground, kind, engine, folder, folder / "store", ())


@pytest.fixture
def going_on(ground: Ground, tmp_path: Path) -> Iterator[Callable[[str, str], Case]]:
    made: list[Case] = []

    def copy(kind: str, engine: str) -> Case:
        shutil.copytree(halfway(ground, kind, engine, "own").store, tmp_path / "store", symlinks=True)
        made.append(Case(ground, kind, engine, tmp_path, tmp_path / "store", ()))
        return made[-1]

    yield copy
    for case in made:
        case.end()


def missing(path: Path, other: Path) -> None:
    path.unlink()


def truncated(path: Path, other: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def flipped(path: Path, other: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def swapped(path: Path, other: Path) -> None:
    """With the file of the same name of another run, whose seed is another."""
    shutil.copy(other, path)


def linked(path: Path, other: Path) -> None:
    """Whole, but elsewhere."""
    moved = path.parents[4] / path.name
    path.rename(moved)
    path.symlink_to(moved)


HARMS = {harm.__name__: harm for harm in (missing, truncated, flipped, swapped, linked)}
ALL = ["part flipped", "part swapped", "state truncated", "manifest missing"]
FEW = [f"{file} {harm}" for file in FILES for harm in HARMS if f"{file} {harm}" not in ALL]


@pytest.mark.fault("of the newest checkpoint: {what}")
@pytest.mark.quick("sft-zero3-part flipped", "dpo-single-part swapped", "dpo-single-manifest truncated")
@faults(ALL, FEW, {("dpo", "single"), ("dpo", "zero2")}, further=ALL[:1])
def test_a_damaged_checkpoint_is_said_and_the_one_before_is_used(
    kind: str, engine: str, what: str, ground: Ground, going_on: Callable[..., Case]
) -> None:
    case, (file, harm) = going_on(kind, engine), what.split()
    (path,) = case.checkpoints()[-1].glob(FILES[file])
    other = path
    if harm == "swapped":
        theirs = halfway(ground, kind, engine, "other", f"stage.{kind}.seed=77")
        (other,) = theirs.checkpoints()[-1].glob(FILES[file])
        assert path.read_bytes() != other.read_bytes()
    HARMS[harm](path, other)
    driver = case.run(code=0)
    assert "checkpoint of step 4: " in driver.told
    assert case.begun()[-1] == 3
    case.require_same()


@pytest.mark.fault("every checkpoint is damaged")
@cells(engines=("single", "zero1"))
def test_with_no_whole_checkpoint_it_begins_anew(kind: str, engine: str, going_on: Callable[..., Case]) -> None:
    case = going_on(kind, engine)
    for checkpoint in case.checkpoints():
        flipped(next(checkpoint.glob(FILES["part"])), checkpoint)
    case.run(code=0)
    assert case.begun()[-1] == 0
    case.require_same()


@pytest.mark.fault("{what} leads out of the store")
@pytest.mark.parametrize("what", ["checkpoints", "step", "work"])
@cells(kinds=("dpo",), engines=("single", "ddp"))
def test_a_link_out_of_the_store_is_not_followed(
    kind: str, engine: str, what: str, tmp_path: Path, going_on: Callable[..., Case]
) -> None:
    case = going_on(kind, engine)
    assert case.work is not None
    path = {"checkpoints": case.work / "checkpoints", "step": case.checkpoints()[-1], "work": case.work}[what]
    outside = tmp_path / "outside"
    path.rename(outside)
    path.symlink_to(outside)
    before = {file: file.read_bytes() for file in outside.rglob("*") if file.is_file()}
    driver = case.run(code=0)
    assert "link" in driver.told or "not a folder of this store" in driver.told
    assert {file: file.read_bytes() for file in outside.rglob("*") if file.is_file()} == before
    assert case.begun()[-1] == (3 if what == "step" else 0)
    case.require_same()


@pytest.mark.fault("metrics.jsonl is {what}")
@pytest.mark.parametrize("what", ["gone", "cut", "a folder"])
@cells(kinds=("dpo",), engines=("single", "zero2"))
def test_rows_of_metrics_that_are_gone_are_said_and_the_weights_are_right(
    kind: str, engine: str, what: str, ground: Ground, going_on: Callable[..., Case]
) -> None:
    case = going_on(kind, engine)
    path = next(case.store.glob("work/*/metrics.jsonl"))
    if what == "cut":
        truncated(path, path)
    else:
        path.unlink()
        if what == "a folder":
            path.mkdir()
    driver = case.run(code=0)
    assert "metrics.jsonl has not the rows that it had at step 4" in driver.told
    assert case.begun()[-1] == 4
    assert case.result().weights == ground.whole(kind, engine).weights


class Canary:
    def __init__(self, path: Path):
        self._path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {self._path}",)


@pytest.mark.fault("a malicious pickle in {what}")
@pytest.mark.parametrize("what", ["checkpoint", "part"])
@cells(kinds=("sft",), engines=("single", "zero3"))
def test_a_pickle_in_a_checkpoint_never_runs(
    kind: str, engine: str, what: str, tmp_path: Path, going_on: Callable[..., Case]
) -> None:
    case, canary = going_on(kind, engine), tmp_path / "ran"
    newest = case.checkpoints()[-1]
    path = newest / "optimizer.pt" if what == "checkpoint" else next(newest.glob(FILES["part"]))
    path.write_bytes(pickle.dumps(Canary(canary)))
    driver = case.run(code=0)
    assert not canary.exists()
    assert re.search(
        rf"checkpoint of step 4: {re.escape(path.name)} (is not in its manifest|has \d+ bytes)", driver.told
    )
    assert case.begun()[-1] == 3
    case.require_same()


@pytest.mark.quick
@pytest.mark.fault("a malicious pickle as start model", kind="sft", engine="single")
def test_a_start_model_that_is_a_pickle_is_refused(make: Callable[..., Case], tmp_path: Path) -> None:
    case, canary, model = make("sft", "single"), tmp_path / "ran", write_tiny_model(tmp_path / "evil")
    (model / "model.safetensors").unlink()
    (model / "pytorch_model.bin").write_bytes(pickle.dumps(Canary(canary)))
    driver = case.run(f"model.source.path={model}")
    assert driver.wait() in (3, 4), driver.told
    assert not canary.exists()


@pytest.mark.quick
@pytest.mark.fault("a config that names code", kind="sft", engine="single")
def test_a_config_that_names_code_is_refused(make: Callable[..., Case], tmp_path: Path) -> None:
    case, canary = make("sft", "single"), tmp_path / "ran"
    setting = f"+hydra.callbacks.evil={{_target_: os.system, command: 'touch {canary}'}}"
    driver = case.run(setting, code=2)
    assert len(driver.told.splitlines()) == 1
    assert not canary.exists()


@pytest.mark.fault("the cache cannot be written")
@cells(kinds=("sft",))
def test_a_cache_that_is_a_file_does_not_matter_to_training(kind: str, engine: str, make: Callable[..., Case]) -> None:
    case = make(kind, engine)
    (case.folder / "cache").write_text("in the way")
    case.run(code=0)
    case.require_same()


def die_building(folder: str) -> None:
    """A build of a kernel as PyTorch does it, killed while it holds its lock."""
    from torch.utils.file_baton import FileBaton

    os.makedirs(folder, exist_ok=True)
    assert FileBaton(os.path.join(folder, "lock")).try_acquire()
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.fault("a kernel build was killed half-way")
@cells(kinds=("sft",), engines=("zero1", "zero2", "zero3"))
def test_the_lock_of_a_killed_build_holds_nobody_up(kind: str, engine: str, make: Callable[..., Case]) -> None:
    case = make(kind, engine)
    folder = case.folder / "cache" / "kernels" / socket.gethostname() / "deepspeed_shm_comm"
    pid = os.fork()
    if pid == 0:
        die_building(str(folder))
    os.waitpid(pid, 0)
    assert (folder / "lock").exists()
    case.run(code=0)
    assert not (folder / "lock").exists()
    case.require_same()
