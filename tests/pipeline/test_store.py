"""The store: whole or not at all, one worker a key, a lock that dies with its holder."""

from __future__ import annotations

import errno
import fcntl
import multiprocessing
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from alignment.errors import MachineError, unusable
from alignment.pipeline.store import Store

KEY = "0123456789abcdef" * 4


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


def commit(store: Store, text: str = "weights") -> Path:
    folder = store.begin(KEY)
    (folder / "model.bin").write_text(text)
    return store.commit(KEY, {"key": KEY, "seconds": 1.0, "metrics": {}})


def test_a_result_is_found_only_after_its_commit(store: Store) -> None:
    folder = store.begin(KEY)
    (folder / "model.bin").write_text("half")
    assert store.record(KEY) is None
    commit(store)
    record = store.record(KEY)
    assert record is not None
    # printf weights | sha256sum
    assert record["files"]["model.bin"] == {
        "bytes": 7,
        "sha256": "9a129038d9a00aed0cf6a7ea059ca50a813449061ab87848cf1a13eafdf33b2c",
    }
    assert not store.work(KEY).exists()


def _dying_at(fatal: int, act: Callable[[], object]) -> int:
    """Act in a child that ends, unannounced, at its `fatal`-th system call that matters; its exit code."""
    child = os.fork()
    if child == 0:
        calls = 0

        def counted(call: Any) -> Any:
            def wrapped(*arguments: Any, **kwargs: Any) -> Any:
                nonlocal calls
                calls += 1
                if calls == fatal:
                    os._exit(9)
                return call(*arguments, **kwargs)

            return wrapped

        for name in ("open", "fsync", "rename", "replace", "unlink", "rmdir"):
            setattr(os, name, counted(getattr(os, name)))
        for name in ("mkdir", "write_text", "write_bytes", "rename", "unlink"):
            setattr(Path, name, counted(getattr(Path, name)))
        act()
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_a_commit_killed_anywhere_leaves_the_whole_result_or_none(store: Store) -> None:
    """Every point of death in turn: what the store then says is there is there, byte for byte, and it goes on."""
    whole, fatal, found_late = [], 0, 0
    while True:
        fatal += 1
        shutil.rmtree(store.root, ignore_errors=True)
        checkpoint = store.work(KEY) / "checkpoints" / "step-00000007" / "manifest.json"
        checkpoint.parent.mkdir(parents=True)
        checkpoint.write_text("{}")
        code = _dying_at(fatal, lambda: commit(store))
        record = store.record(KEY)
        if record is not None:
            assert (store.result(KEY) / "model.bin").read_text() == "weights"
            store.tidy(KEY, record)
            assert not (store.result(KEY) / "checkpoints").exists()
        else:
            assert checkpoint.exists(), "what training goes on from goes only when the result is there"
        whole.append(record is not None)
        if record is None and (late := store.sealed(KEY)):  # killed once all was written: nothing has to be done again
            assert store.record(KEY) == late and (store.result(KEY) / "model.bin").read_text() == "weights"
            assert not store.work(KEY).exists() and not (store.result(KEY) / "checkpoints").exists()
            found_late += 1
            continue
        commit(store)
        assert store.record(KEY) is not None
        if code == 0:
            break
        assert code == 9
    assert found_late > 2, "between the record and the rename"
    assert fatal > 8, "there are more steps in a commit than that"
    assert whole == sorted(whole), "once committed it stays"
    assert whole[-1]
    assert not whole[0]


def test_where_no_result_could_be_put_no_work_begins(store: Store) -> None:
    """A link to another file system, across which nothing is renamed; and a folder that others may not write to."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as elsewhere:
        store.root.mkdir()
        (store.root / "store").symlink_to(elsewhere)
        with pytest.raises(OSError, match="no result can be put there: Invalid cross-device link") as caught:
            store.begin(KEY)
        assert unusable(caught.value).where == str(store.root / "store")
    with tempfile.TemporaryDirectory() as name:
        theirs = Store(Path(name))
        for part in ("work", "store"):
            (theirs.root / part).mkdir()
            (theirs.root / part).chmod(0o777 if part == "work" else 0o555)
        theirs.root.chmod(0o755)
        child = os.fork()
        if child == 0:
            try:
                if not os.getuid():
                    os.setuid(65534)  # nobody: the superuser may write everywhere
                theirs.begin(KEY)
            except OSError as error:
                os._exit(
                    7 if str(unusable(error)).startswith(f"{name}/store: cannot be used: no result can be put") else 8
                )
            os._exit(9)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7


def test_of_checkpoints_only_those_stay_that_the_record_names_and_they_are_no_part_of_the_result(store: Store) -> None:
    folder = store.begin(KEY)
    for name in ("step-00000001", "step-00000002", ".step-00000003", "damaged-step-00000004-1"):
        (folder / "checkpoints" / name).mkdir(parents=True)
        (folder / "checkpoints" / name / "state.json").write_text("{}")
    os.mkfifo(folder / "checkpoints" / "step-00000005")  # at which whoever opens it would wait
    place = store.commit(KEY, {"key": KEY, "seconds": 1.0, "metrics": {}, "checkpoints": ["step-00000002"]})
    assert [path.name for path in (place / "checkpoints").iterdir()] == ["step-00000002"]
    record = store.record(KEY)
    assert record
    assert record["files"] == {}
    shutil.rmtree(place / "checkpoints")
    assert store.record(KEY) == record, "who needs the disk may remove them"


def test_a_result_with_a_file_lost_or_cut_is_no_result_and_is_kept_aside(store: Store) -> None:
    place = commit(store)
    (place / "model.bin").write_text("cut")
    assert store.record(KEY) is None
    assert store.damage(KEY) == f"damaged: model.bin has 3 bytes instead of 7 (in {place})"
    commit(store)
    assert store.record(KEY) is not None and store.damage(KEY) is None
    assert [path.name for path in place.parent.iterdir() if "damaged" in path.name]


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        (None, "is gone"),
        ("{", "cannot be read"),
        ("[]", "is no record of a result"),
        (f'{{"key": "{KEY}", "files": []}}', "is no record of a result"),
        (f'{{"key": "{KEY}", "files": {{"model.bin": null}}}}', "is no record of a result"),
    ],
)
def test_a_result_whose_record_is_damaged_is_none_and_says_so(store: Store, text: str | None, wrong: str) -> None:
    assert store.damage(KEY) is None, "where nothing is nothing is damaged"
    file = commit(store) / "record.json"
    if text is None:
        file.unlink()
    else:
        file.write_text(text)
    assert store.record(KEY) is None
    assert store.damage(KEY) == f"damaged: record.json {wrong} (in {file.parent})"


def test_a_result_under_anothers_short_name_is_no_result(store: Store) -> None:
    commit(store)
    other = KEY[:16] + "f" * 48
    assert store.record(other) is None
    assert "record.json is of another result" in str(store.damage(other))


def leave_an_attempt(store: Store) -> Path:
    """A work folder as an attempt leaves it: a checkpoint, what it has told, and half a result."""
    folder = store.begin(KEY)
    for name in ("checkpoints/step-7", "beats", "stacks", "model"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for name in (
        "checkpoints/step-7/manifest.json",
        "metrics.jsonl",
        "attempts.jsonl",
        "log.txt",
        "wandb_run_id",
        "sampled.jsonl",
    ):
        (folder / name).write_text(name)
    for name in ("beats/rank-00000.json", "error.json", "stage.json", "model/config.json", "warnings.txt"):
        (folder / name).write_text(name)
    return folder


KEPT = ["attempts.jsonl", "checkpoints", "log.txt", "metrics.jsonl", "sampled.jsonl", "stacks", "wandb_run_id"]


def test_a_new_attempt_goes_on_from_what_is_kept_wherever_its_beginning_was_killed(store: Store) -> None:
    fatal, code = 0, 9
    while code:
        fatal += 1
        folder = leave_an_attempt(store)
        code = _dying_at(fatal, lambda: store.begin(KEY))
        assert code in (0, 9)
        for name in ("checkpoints/step-7/manifest.json", "metrics.jsonl", "wandb_run_id"):
            assert (folder / name).read_text() == name
        store.begin(KEY)
        assert sorted(path.name for path in folder.iterdir()) == KEPT
        assert [path.name for path in folder.parent.iterdir()] == [KEY[:16]], "nothing is left aside"
    assert fatal > 8, "there are more steps in a beginning than that"


def test_links_in_a_work_folder_are_removed_and_never_followed(store: Store, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    (outside / "step-7").mkdir(parents=True)
    (outside / "step-7" / "manifest.json").write_text("theirs")
    folder = leave_an_attempt(store)
    shutil.rmtree(folder / "checkpoints")
    (folder / "checkpoints").symlink_to(outside)
    (folder / "model" / "data").symlink_to(outside)
    (folder / "stacks" / "rank-00000.txt").symlink_to(outside / "step-7" / "manifest.json")
    told: list[str] = []
    assert not (store.begin(KEY, told.append) / "checkpoints").exists()
    links = [folder / "checkpoints", folder / "stacks" / "rank-00000.txt"]
    assert [line.partition(" was a link")[0] for line in told] == list(map(str, links))
    shutil.rmtree(folder)
    folder.symlink_to(outside)
    assert list(store.begin(KEY, told.append).iterdir()) == []
    assert len(told) == 3
    assert (outside / "step-7" / "manifest.json").read_text() == "theirs"


def test_what_is_no_file_or_folder_where_one_belongs_is_removed_and_said(store: Store) -> None:
    folder = leave_an_attempt(store)
    shutil.rmtree(folder / "checkpoints")
    (folder / "checkpoints").write_text("a file")
    (folder / "metrics.jsonl").unlink(missing_ok=True)
    os.mkfifo(folder / "metrics.jsonl")  # whoever opens it would wait for ever
    (folder / "next_attempt.json").unlink(missing_ok=True)
    (folder / "next_attempt.json").mkdir()
    told: list[str] = []
    store.begin(KEY, told.append)
    assert sorted(line.rpartition("/")[2] for line in told) == [
        "checkpoints was no folder: it is removed",
        "metrics.jsonl was no plain file: it is removed",
        "next_attempt.json was no plain file: it is removed",
    ]
    shutil.rmtree(folder)
    folder.write_text("a file")
    assert list(store.begin(KEY).iterdir()) == []


def test_signs_of_life_are_no_part_of_a_result_but_stacks_that_were_asked_for_stay(store: Store) -> None:
    folder = leave_an_attempt(store)
    (folder / "lost.json").write_text("{}")
    (folder / "next_attempt.json").write_text("{}")
    (folder / "stacks" / "rank-00000.txt").write_text("")
    (folder / "stacks" / "rank-00001.txt").write_text("File ...")
    place = store.commit(KEY, {"key": KEY, "seconds": 1.0, "metrics": {}})
    record = store.record(KEY)
    assert record
    assert "attempts.jsonl" in record["files"]
    assert not {"beats/rank-00000.json", "lost.json", "stacks/rank-00001.txt"} & set(record["files"])
    assert [path.name for path in (place / "stacks").iterdir()] == ["rank-00001.txt"]
    assert not [name for name in ("beats", "lost.json", "next_attempt.json") if (place / name).exists()]


def _hold(root: Path, ready: multiprocessing.synchronize.Event) -> None:
    lock = Store(root).lock(KEY)
    assert lock.acquire("test")
    ready.set()
    time.sleep(60)


def test_a_lock_is_not_kept_by_a_dead_holder(store: Store) -> None:
    context = multiprocessing.get_context("spawn")
    ready = context.Event()
    holder = context.Process(target=_hold, args=(store.root, ready))
    holder.start()
    assert ready.wait(30)
    lock = store.lock(KEY)
    assert store.is_held(KEY)
    assert not lock.acquire("me")
    assert lock.holder()["pid"] == holder.pid
    assert holder.pid
    os.kill(holder.pid, signal.SIGKILL)
    holder.join()
    assert not store.is_held(KEY)
    assert lock.acquire("me")
    lock.release()


def test_waiting_ends_when_the_holder_lets_go(store: Store) -> None:
    first, second = store.lock(KEY), store.lock(KEY)
    assert first.acquire("first")
    told: list[str] = []

    def waiting(holder: dict[str, object]) -> None:
        told.append(str(holder["who"]))
        first.release()

    second.wait("second", waiting, every=0.01)
    assert told == ["first"]
    second.release()


def test_a_file_system_without_locks_is_said_instead_of_waiting_for_ever(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock = store.lock(KEY)
    assert lock.acquire("me")
    lock.release()

    def refuse(*arguments: object) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", refuse)
    for ask in (lambda: lock.acquire("me"), lock.is_held):
        with pytest.raises(MachineError, match="has no locks"):
            ask()


def test_remains_that_another_process_still_writes_to_do_not_stop_a_new_attempt(store: Store) -> None:
    (store.begin(KEY) / "wandb").mkdir()
    late = open(store.work(KEY) / "wandb" / "log", "w")  # noqa: SIM115
    folder = store.begin(KEY)
    late.write("more")
    late.close()
    assert list(folder.iterdir()) == []
    assert [path.name for path in folder.parent.iterdir()] == [KEY[:16]]


def test_too_little_disk_is_said_before_a_stage_starts(store: Store) -> None:
    with pytest.raises(MachineError, match=r"GB of disk are free, 1e\+09 GB are asked for"):
        store.require_space(1e9)
