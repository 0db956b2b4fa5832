"""Disks that are full, for good or for a while, files that may not grow, read-only folders: real file systems."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.conftest import fill
from tests.faults.driver import Fault
from tests.faults.runs import Case, Driver, cells, faults

MOMENTS = {"loading": 1, "reference": 1, "training": 2, "saving": 2, "committing": 2, "model": 1, "result": 1}
EVERYWHERE = ["training", "model"]
FULL = ("No space left", "no space left", "no room is left", "of weights do not fit")


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 12 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=12m", "alignment", folder], check=False).returncode:
        pytest.skip("a file system of its own needs root")
    yield folder
    for _ in range(4):  # read-only folders are mounted in it
        subprocess.run(["umount", "-l", "-R", folder], check=False, capture_output=True)


def ends_in_order(case: Case, driver: Driver, *words: str) -> int:
    """It has ended well, or with one line that says why and code 4; no checkpoint counts that is not whole."""
    code = driver.wait()
    assert code in (0, 4), f"{code}\n{driver.told}\n{case.trained_log()[-6000:]}"
    if code == 4:
        last = driver.told.rstrip().splitlines()[-1]
        assert last.startswith("alignment: error: ")
        assert any(word in last for word in words or FULL), last
        assert all((path / "manifest.json").exists() for path in case.checkpoints())
    return code


@pytest.mark.fault("the disk is full from this on: {what}")
@pytest.mark.quick("dpo-single-training", "sft-zero3-model")
@faults(EVERYWHERE, [what for what in MOMENTS if what not in EVERYWHERE], {("dpo", "single"), ("dpo", "zero3")})
def test_a_full_disk_is_said_and_with_room_the_run_goes_on(
    kind: str, engine: str, what: str, disk: Path, make: Callable[..., Case]
) -> None:
    case = make(kind, engine, store=disk / "store")
    options = {"moment": what, "nth": MOMENTS[what], "do": "fill", "disk": str(disk)}
    driver = case.run(faults=[Fault("at", options, 0)])
    code = ends_in_order(case, driver)
    # Where an older checkpoint goes, there may be room for the small model.
    assert code == 4 or (what in ("training", "saving", "committing") and "could not be written" in driver.told)
    (disk / "filler").unlink()
    if code == 0:
        case.require_same()
        return
    reached = max(0, case.reached())
    case.run(code=0)
    assert case.begun() == [0, reached]
    case.require_same()


@pytest.mark.fault("asked to stop with a full disk")
@cells(kinds=("dpo",))
def test_who_is_asked_to_stop_and_cannot_save_says_what_is_kept(
    kind: str, engine: str, disk: Path, make: Callable[..., Case]
) -> None:
    case = make(kind, engine, "checkpoint.asynchronous=false", store=disk / "store")
    options = [
        {"moment": "training", "nth": 4, "do": "fill", "disk": str(disk)},
        {"moment": "committing", "nth": 4, "do": "fill", "disk": str(disk)},
        {"moment": "training", "nth": 4, "do": "signal_self", "number": signal.SIGTERM},
    ]
    driver = case.run(code=75, faults=[Fault("at", option, 0) for option in options])
    assert "could not be saved, the checkpoint of step 3 is kept" in driver.told, driver.told
    (disk / "filler").unlink()
    case.run(code=0)
    assert case.outcomes() == ["preempted", "done"]
    assert case.begun() == [0, 3]
    case.require_same()


@pytest.mark.fault("the disk is full at every write in turn")
@pytest.mark.parametrize(
    ("kind", "engine", "amounts"),
    [
        ("dpo", "single", [0, 4, 8, 12, 16, 24, 32, 48, 64, 128, 256, 512, 1000, 1400, 1800, 2200, 2600, 3000]),
        ("sft", "zero3", [0, 16, 64, 400, 900, 1500, 2200]),
        ("dpo", "ddp", [8, 48, 700, 1600]),
    ],
)
def test_with_so_many_kilobytes_left(
    kind: str, engine: str, amounts: list[int], disk: Path, make: Callable[..., Case]
) -> None:
    codes = []
    for amount in amounts:
        case = make(kind, engine, store=disk / f"store-{amount}")
        fill(disk, amount * 1024)
        codes.append(ends_in_order(case, case.run()))
        (disk / "filler").unlink()
        if codes[-1]:
            case.run(code=0)
        case.require_same()
        subprocess.run(["rm", "-rf", case.store], check=True)
    assert 4 in codes


@pytest.mark.fault("the disk is full for a while")
@cells(kinds=("dpo",))
def test_a_disk_that_is_full_for_a_while_costs_checkpoints_only(
    kind: str, engine: str, disk: Path, make: Callable[..., Case]
) -> None:
    case = make(kind, engine, "checkpoint.max_failures=9", store=disk / "store")
    ways = [{"do": "fill", "nth": 2}, {"do": "free", "nth": 5}]
    parts = [Fault("at", {"moment": "training", "disk": str(disk), **way}, 0) for way in ways]
    driver = case.run(code=0, faults=parts)
    assert "could not be written" in driver.told
    assert case.outcomes() == ["done"]
    case.require_same()


@pytest.mark.fault("one rank may not write large files")
@cells(kinds=("sft",))
def test_a_rank_that_cannot_write_its_part_ends_all_in_order(kind: str, engine: str, make: Callable[..., Case]) -> None:
    long = f"stage.{kind}.max_steps=40"  # a write may take several of these steps, and three have to fail
    case = make(kind, engine, long)
    rank = 0 if engine == "single" else 1
    driver = case.run(code=4, faults=[Fault("small_files", {"size": 60_000}, rank)])
    assert "3 saves in a row failed: " in driver.told
    assert not case.checkpoints()
    case.run(code=0)
    case.require_same(long)


@pytest.mark.fault("the checkpoints' folder becomes read-only")
@cells(kinds=("dpo",), engines=("single", "zero2"))
def test_a_folder_that_becomes_read_only_ends_it_in_order(
    kind: str, engine: str, disk: Path, make: Callable[..., Case]
) -> None:
    case = make(kind, engine, store=disk / "store")
    driver = case.start("engine.watchdog_s=60", faults=[Fault("read_only_checkpoints", {"store": str(case.store)}, 0)])
    assert ends_in_order(case, driver, "Read-only file system") == 4
    subprocess.run(["umount", next(case.store.glob("work/*/checkpoints"))], check=True)
    case.run(code=0)
    case.require_same()


@pytest.mark.fault("the store is read-only", kind="sft", engine="single")
def test_a_store_that_is_read_only_is_said(disk: Path, make: Callable[..., Case]) -> None:
    case = make("sft", "single", store=disk / "store")
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    driver = case.run(code=4)
    assert driver.told.rstrip().splitlines()[-1].startswith("alignment: error: ")
    subprocess.run(["mount", "-o", "remount,rw", disk], check=True)
    case.run(code=0)
    case.require_same()
