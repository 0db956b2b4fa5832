"""Folders that count only when whole: every way in which one can be less, what stays, and a disk that is full."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import re
import resource
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from alignment.errors import InputError, MachineError
from alignment.files import digest
from alignment.training import tensors
from alignment.training.checkpoints import Checkpoints
from tests.training import tiny

KEY = "a" * 64
FACTS: dict[str, Any] = {"layout": {}, "record": {}, "trainer": {}}  # of state.json, with its step


def checkpoints(folder: Path, key: str = KEY, **settings: Any) -> Checkpoints:
    told: list[str] = []
    made = Checkpoints(folder / "checkpoints", key, tiny.checkpoint(**settings), told.append)
    made.told = told  # type: ignore[attr-defined]
    return made


def save(own: Checkpoints, step: int, score: float | None = None, values: int = 100) -> Path:
    own.aside(step).mkdir(parents=True)
    name = "rank-00000-of-00001.safetensors"
    content = {"weight:0:w": torch.arange(values, dtype=torch.float32)}
    file = tensors.write(own.aside(step) / name, content, {"step": step})
    own.commit(step, {name: file}, {"step": step, **FACTS}, score)
    return own.at(step)


def test_a_file_is_one_of_safetensors_with_the_digest_of_its_bytes(tmp_path: Path) -> None:
    given = {
        "floats": torch.randn(3, 5), "whole": torch.arange(7), "bytes": torch.arange(9, dtype=torch.uint8),
        "empty": torch.zeros(0), "number": torch.tensor([4]),
    }  # fmt: skip
    told = tensors.write(tmp_path / "file.safetensors", given, {"a": [1, 2.5, None]})
    read = load_file(tmp_path / "file.safetensors")
    assert set(read) == set(given)
    assert all(torch.equal(read[name], value) for name, value in given.items())
    assert tensors.facts(tmp_path / "file.safetensors") == {"a": [1, 2.5, None]}
    content = (tmp_path / "file.safetensors").read_bytes()
    assert told == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def test_what_is_saved_is_whole_and_the_newest_comes_first(tmp_path: Path) -> None:
    own = checkpoints(tmp_path)
    for step in (3, 12, 7):
        save(own, step)
    assert own.found() == [12, 7, 3]
    assert [own.trouble(step) for step in own.found()] == [None] * 3
    assert own.state(12) == {"step": 12, **FACTS}


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-3])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def add_pickle(path: Path) -> None:
    (path.parent / "optimizer.pt").write_bytes(b"\x80\x04")


def link(path: Path) -> None:
    moved = Path(tempfile.mkdtemp()) / path.name
    path.rename(moved)
    path.symlink_to(moved)


def link_folder(path: Path) -> None:
    link(path.parent)


DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "missing": (Path.unlink, "missing|no manifest"),
    "cut": (cut, "bytes instead of|no whole manifest|damaged"),
    "flipped": (flip, "damaged|no whole manifest|another stage"),
    "empty": (lambda path: path.write_bytes(b""), "bytes instead of|no whole manifest"),
    "more": (add_pickle, "optimizer.pt is not in its manifest"),
    "link": (link, "not a plain file|not a folder|no whole"),
    "folder": (link_folder, "not a folder of this store"),
}


@pytest.mark.parametrize("file", ["rank-00000-of-00001.safetensors", "state.json", "manifest.json"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_one_is_known(damage: str, file: str, tmp_path: Path) -> None:
    own = checkpoints(tmp_path)
    harm, told = DAMAGES[damage]
    harm(save(own, 5) / file)
    why = own.trouble(5)
    assert why is not None
    assert re.search(told, why)


def test_one_of_another_run_is_known_though_it_is_whole(tmp_path: Path) -> None:
    own, other = checkpoints(tmp_path / "own"), checkpoints(tmp_path / "other", key="b" * 64)
    save(own, 5), save(other, 5, values=50)
    shutil.copytree(other.at(5), own.at(6))
    assert own.trouble(6) == "it belongs to another stage or step"
    shutil.copytree(own.at(5), own.at(7))  # of this run, under another step's name
    assert own.trouble(7) == "it belongs to another stage or step"
    part = "rank-00000-of-00001.safetensors"
    shutil.copy(other.at(5) / part, own.at(5) / part)
    assert own.trouble(5) is not None


def test_a_manifest_that_was_written_to_fit_a_changed_file_is_of_no_use_without_its_digest(tmp_path: Path) -> None:
    own = checkpoints(tmp_path)
    path = save(own, 5) / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["files"]["state.json"]["bytes"] += 1
    path.write_text(json.dumps(manifest))
    assert own.trouble(5) == "its manifest.json is damaged"
    manifest.pop("sha256")
    path.write_text(json.dumps({**manifest, "sha256": digest(manifest)}))
    assert own.trouble(5) is not None


@pytest.mark.parametrize("name", ["state.json", "rank-00000-of-00001.safetensors"])
def test_a_file_that_its_manifest_was_written_to_fit_is_not_read_as_what_it_is_not(name: str, tmp_path: Path) -> None:
    own = checkpoints(tmp_path)
    folder = save(own, 5)
    content = b"{}" if name == "state.json" else pickle.dumps({"weight:0:w": [1.0]}).ljust(64, b"\0")
    (folder / name).write_bytes(content)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest.pop("sha256")
    manifest["files"][name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (folder / "manifest.json").write_text(json.dumps({**manifest, "sha256": digest(manifest)}))
    assert own.trouble(5) == f"{name} has not what it should"


def test_every_part_of_a_check_finds_what_lies_in_its_files(tmp_path: Path) -> None:
    own = checkpoints(tmp_path)
    flip(save(own, 5) / "rank-00000-of-00001.safetensors")
    found = [own.trouble(5, part, 2) for part in range(2)]
    assert sorted(map(bool, found)) == [False, True]


def test_the_last_ones_stay_and_the_best(tmp_path: Path) -> None:
    own = checkpoints(tmp_path, keep_last=2, keep_best=2)
    for step, score in ((1, 0.5), (2, 0.1), (3, 0.9), (4, None), (5, 0.2), (6, 0.8)):
        save(own, step, score)
        own.retain()
    assert own.found() == [6, 5, 2]
    assert own.best() == [2, 5]
    highest = checkpoints(tmp_path, keep_last=1, keep_best=1, best_is="highest")
    assert highest.best() == [6]


def test_those_that_cannot_be_used_are_all_kept(tmp_path: Path) -> None:
    own = checkpoints(tmp_path)
    for step in (1, 2):
        save(own, step)
        own.put_away(step, "it is damaged")
    names = sorted(path.name[:21] for path in own.folder.iterdir())
    assert names == ["damaged-step-00000001", "damaged-step-00000002"]


def test_room_for_the_model_is_made_of_older_ones_only(tmp_path: Path) -> None:
    own = checkpoints(tmp_path, keep_last=3, keep_best=1)
    for step, score in ((1, 0.1), (2, 0.3), (3, 0.2)):
        save(own, step, score)
    own.make_room(1)
    assert own.found() == [3, 2, 1]
    size = sum(file.stat().st_size for file in own.at(2).iterdir())
    assert abs(own.room() - size - shutil.disk_usage(own.folder).free) < 10_000_000  # others write there too
    assert own.kept_bytes() == pytest.approx(2 * size, rel=0.1)
    own.make_room(2**60)
    assert own.found() == [3, 1]


def test_what_was_put_away_goes_before_a_whole_one_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = checkpoints(tmp_path, keep_last=3)
    for step in (1, 2, 3):
        save(own, step)
    own.put_away(2, "it is damaged")
    free = iter([0, 100])  # a disk of our own would need root
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=next(free)))
    own.make_room(50)
    assert own.found() == [3, 1]
    assert not list(own.folder.glob("damaged-*"))


def test_one_of_another_format_is_said_to_be_so(tmp_path: Path) -> None:
    own = checkpoints(tmp_path)
    path = save(own, 5) / "manifest.json"
    manifest = {**json.loads(path.read_text()), "format": 99}
    manifest.pop("sha256")
    path.write_text(json.dumps({**manifest, "sha256": digest(manifest)}))
    with pytest.raises(InputError, match="step 5 has format 99, this version reads 1"):
        own.trouble(5)
    assert own.found() == [5]


def test_that_the_system_refuses_a_file_now_does_not_say_that_it_is_damaged(tmp_path: Path) -> None:
    own = checkpoints(tmp_path)
    save(own, 5)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
    try:
        with pytest.raises(MachineError, match="step 5 cannot be read now"):
            own.trouble(5)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert own.trouble(5) is None


def test_a_file_that_nobody_wants_any_more_is_given_up_between_two_pieces(tmp_path: Path) -> None:
    asked = iter([True, False])
    content = {"w": torch.zeros(tensors.PIECE, dtype=torch.uint8)}
    with pytest.raises(tensors.Cancelled):
        tensors.write(tmp_path / "file.safetensors", content, {}, lambda: next(asked))
    assert (tmp_path / "file.safetensors").stat().st_size < tensors.PIECE


def test_the_last_whole_one_is_never_removed(tmp_path: Path) -> None:
    own = checkpoints(tmp_path, keep_last=1)
    save(own, 1)
    own.retain()
    assert own.found() == [1]
    own.aside(2).write_text("in the way")
    with pytest.raises(OSError):
        own.commit(2, {}, {}, None)
    own.discard(2)
    own.retain()
    assert own.found() == [1]
    assert own.trouble(1) is None


def test_what_a_kill_left_goes_and_a_link_is_not_followed(tmp_path: Path) -> None:
    own = checkpoints(tmp_path)
    save(own, 1)
    own.aside(2).mkdir()
    (own.folder / ".removed-step-00000000-1").mkdir()
    own.clean()
    assert sorted(path.name for path in own.folder.iterdir()) == ["step-00000001"]
    elsewhere = tmp_path / "elsewhere"
    own.folder.rename(elsewhere)
    own.folder.symlink_to(elsewhere)
    assert own.found() == []
    own.clean()
    assert own.found() == []
    assert (elsewhere / "step-00000001" / "manifest.json").exists()
    assert "link out of the store" in own.told[-1]  # type: ignore[attr-defined]


def test_a_damaged_one_is_put_away_and_said(tmp_path: Path) -> None:
    own = checkpoints(tmp_path)
    save(own, 4)
    own.put_away(4, "it is damaged")
    assert own.found() == []
    assert len(list(own.folder.glob("damaged-step-00000004-*"))) == 1
    assert own.told[-1].startswith("checkpoint of step 4: it is damaged")  # type: ignore[attr-defined]


def test_a_pipe_that_is_named_like_a_checkpoint_is_removed_and_nobody_waits_at_it(tmp_path: Path) -> None:
    own = checkpoints(tmp_path)
    save(own, 4)
    os.mkfifo(own.at(7))
    os.mkfifo(own.folder / ".step-00000008")
    own.clean()
    assert own.trouble(7) == "it is not a folder of this store"
    own.put_away(7, "it is not a folder of this store")
    assert [path.name for path in own.folder.iterdir()] == ["step-00000004"]


def test_a_checkpoint_can_be_read_by_others(tmp_path: Path) -> None:
    with safe_open(save(checkpoints(tmp_path), 1) / "rank-00000-of-00001.safetensors", "pt") as stream:
        assert list(stream.keys()) == ["weight:0:w"]
