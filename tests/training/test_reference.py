from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from datasets import Dataset, Features, List, Value, concatenate_datasets

from alignment.errors import InputError, TrainingError
from alignment.files import read_json, sha256, write_json
from alignment.pipeline.store import Store
from alignment.training import reference
from alignment.training.reference import FIELDS, ReferenceStore, computing, row_digests, weights_digest
from tests.forks import FORKING
from tests.training.tiny import pair_rows

KEY: dict[str, Any] = {"weights": "ab" * 32, "adapter": None, "dtype": "fp32"}
# What the processes below start with: a store, and rows whose digests and values follow from a number.
CHILD = """
import hashlib, os, signal, sys, time
from pathlib import Path
import numpy as np
from alignment.training.reference import ReferenceStore, computing
store = ReferenceStore(Path(sys.argv[1]), weights="ab" * 32, adapter=None, dtype="fp32")
def rows(*numbers):
    digests = b"".join(hashlib.sha256(str(n).encode()).digest() for n in numbers)
    return np.frombuffer(digests, np.uint8).reshape(-1, 32), [np.full(n % 7, -n, np.float32) for n in numbers]
"""


def rows(*numbers: int) -> tuple[np.ndarray, list[np.ndarray]]:
    digests = b"".join(hashlib.sha256(str(n).encode()).digest() for n in numbers)
    return np.frombuffer(digests, np.uint8).reshape(-1, 32), [np.full(n % 7, -n, np.float32) for n in numbers]


def child(store: Path, code: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", CHILD + code, str(store)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2])


def silent(line: str) -> None:
    raise AssertionError(f"no warning is due: {line}")


def reopened(store: ReferenceStore) -> ReferenceStore:
    store.open(store.segments(silent))
    return store


# --- digests ----------------------------------------------------------------------------------------------------------


def test_a_digest_is_of_the_lengths_and_the_tokens() -> None:
    found = row_digests(Dataset.from_list([{"prompt_ids": [7], "chosen_ids": [], "rejected_ids": [8, 9]}]))
    assert found.shape == (1, 32) and found.dtype == np.uint8
    text = np.array([1, 0, 2], "<i8").tobytes() + np.array([7, 8, 9], "<i4").tobytes()
    assert found[0].tobytes() == hashlib.sha256(text).digest()


def test_digests_do_not_depend_on_chunks_slices_or_integer_types() -> None:
    plain = Dataset.from_list(pair_rows(30))
    wanted = row_digests(plain)
    assert len({row.tobytes() for row in wanted}) == 30
    narrow = plain.cast(Features({name: List(Value("int32")) for name in FIELDS}))
    large = Dataset(pa.table({name: plain.data.column(name).cast(pa.large_list(pa.int32())) for name in FIELDS}))
    chunked = concatenate_datasets([plain.select(range(7)), narrow.cast(plain.features).select(range(7, 30))])
    sliced = Dataset(plain.data.table.slice(5, 11))
    for rows in (narrow, large, chunked, plain.map(lambda row: row, batched=True, batch_size=4)):
        assert (row_digests(rows) == wanted).all()
    assert (row_digests(sliced) == wanted[5:16]).all()
    assert (row_digests(plain.select([9, 2, 2, 29])) == wanted[[9, 2, 2, 29]]).all()
    assert row_digests(plain.select([])).shape == (0, 32)


def test_tokens_moved_between_fields_make_another_row() -> None:
    splits = [([1, 2, 3], [4], [5]), ([1, 2], [3, 4], [5]), ([1, 2], [3], [4, 5]), ([1, 2, 3, 4, 5], [], [])]
    found = row_digests(Dataset.from_list([dict(zip(FIELDS, split, strict=True)) for split in splits]))
    assert len({row.tobytes() for row in found}) == len(splits)


def test_a_token_beyond_int32_is_refused() -> None:
    row = {"prompt_ids": [2**31], "chosen_ids": [1], "rejected_ids": [1]}
    with pytest.raises(pa.ArrowInvalid):
        row_digests(Dataset.from_list([row]))


def test_the_digest_of_weights_follows_names_and_contents(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    with pytest.raises(InputError):
        weights_digest(model)
    (model / "config.json").write_text("{}")
    (model / "model.safetensors").write_bytes(b"weights")
    first = weights_digest(model)
    (model / "tokenizer.json").write_text("{}")
    assert weights_digest(model) == first
    (model / "config.json").write_text("{ }")
    assert weights_digest(model) != first
    (model / "config.json").write_text("{}")
    (model / "model.safetensors").write_bytes(b"weightz")
    assert weights_digest(model) != first


def test_recorded_hashes_are_taken_if_all_sizes_match_and_no_file_is_newer(tmp_path: Path) -> None:
    model, names = tmp_path / "model", ("config.json", "model.safetensors")
    model.mkdir()
    for name in names:
        (model / name).write_bytes(b"12345")
    honest = weights_digest(model)
    files = {f"model/{name}": {"sha256": sha256(model / name), "bytes": 5} for name in names}
    write_json(tmp_path / "record.json", {"files": files})
    assert weights_digest(model) == honest
    files["model/model.safetensors"]["sha256"] = "0" * 64  # tells whether it was the record that was believed
    write_json(tmp_path / "record.json", {"files": files})
    assert weights_digest(model) != honest
    later = (tmp_path / "record.json").stat().st_mtime_ns + 1
    os.utime(model / "config.json", ns=(later, later))
    assert weights_digest(model) == honest, "a file newer than the record may have been edited"
    os.utime(model / "config.json", ns=(later - 1, later - 1))
    assert weights_digest(model) != honest
    files["model/model.safetensors"]["bytes"] = 6
    write_json(tmp_path / "record.json", {"files": files})
    assert weights_digest(model) == honest
    write_json(tmp_path / "record.json", {"files": ["nonsense"]})
    assert weights_digest(model) == honest


def test_a_result_of_the_store_is_not_hashed_again_until_a_file_of_it_is_edited(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(tmp_path)
    model = store.begin("ab" * 32) / "model"
    model.mkdir()
    for name in ("config.json", "model.safetensors"):
        (model / name).write_bytes(b"12345")
    model = store.commit("ab" * 32, {"key": "ab" * 32}) / "model"
    read: list[str] = []
    monkeypatch.setattr(reference, "sha256", lambda path: read.append(path.name) or sha256(path))
    first = weights_digest(model)
    assert not read
    time.sleep(0.02)  # longer than the clock of files ticks
    (model / "model.safetensors").write_bytes(b"12346")
    assert weights_digest(model) != first and read == ["config.json", "model.safetensors"]


# --- the store --------------------------------------------------------------------------------------------------------


def test_what_is_written_is_read_back_exactly(tmp_path: Path) -> None:
    store = ReferenceStore(tmp_path, **KEY)
    assert not store.folder.exists() and store.segments(silent) == [] and len(store) == 0
    data = Dataset.from_list(pair_rows(20))
    digests, random = row_digests(data), np.random.default_rng(0)
    values = [-random.random(len(row["chosen_ids"]) + len(row["rejected_ids"])).astype(np.float32) for row in data]
    values[3] = values[3][:0]
    assert store.missing(digests).tolist() == list(range(20))
    names = [store.append(digests[:12], values[:12]), store.append(digests[12:], values[12:])]
    assert len(store) == 0  # until it is opened
    other = reopened(ReferenceStore(tmp_path, **KEY))
    assert other.segments(silent) == sorted(names) and len(other) == 20
    for row, value in zip(digests, values, strict=True):
        assert other[row.tobytes()].dtype == np.float32 and (other.get(row.tobytes()) == value).all()
    assert len(other.missing(digests)) == 0
    with pytest.raises(KeyError):
        other[bytes(32)]
    assert read_json(store.folder / "key.json").items() >= KEY.items()
    assert not list(store.folder.glob(".*"))


def test_references_do_not_mix(tmp_path: Path) -> None:
    changes: list[dict[str, Any]] = [{}, {"weights": "cd" * 32}, {"adapter": "ab" * 32}, {"dtype": "bf16-autocast"}]
    assert len({ReferenceStore(tmp_path, **{**KEY, **change}).folder for change in changes}) == 4
    with pytest.raises(ValueError):
        ReferenceStore(tmp_path, **{**KEY, "dtype": "float32"})


def test_missing_names_each_distinct_row_once(tmp_path: Path) -> None:
    store = ReferenceStore(tmp_path, **KEY)
    store.append(*rows(1, 2))
    reopened(store)
    assert store.missing(rows(5, 1, 4, 5, 2, 3, 4)[0]).tolist() == [0, 2, 5]
    assert store.missing(rows()[0]).tolist() == []


def test_digests_that_end_in_zeros_are_rows_like_others(tmp_path: Path) -> None:
    store = ReferenceStore(tmp_path, **KEY)
    digests = np.zeros((3, 32), np.uint8)
    digests[1, 0], digests[2, :2] = 7, (7, 1)
    store.append(digests, [np.full(1, -number, np.float32) for number in range(3)])
    reopened(store)
    assert [store[row.tobytes()].item() for row in digests] == [0, -1, -2]


def test_of_a_row_in_two_segments_the_first_by_name_is_taken(tmp_path: Path) -> None:
    store = ReferenceStore(tmp_path, **KEY)
    digests, _ = rows(1)
    written = {store.append(digests, [np.full(2, value, np.float32)]): value for value in (-1.0, -2.0, -3.0)}
    for names in (sorted(written), sorted(written, reverse=True)):
        store.open(names)
        assert len(store) == 1
        assert store[digests[0].tobytes()].tolist() == [written[min(written)]] * 2


def test_the_same_rows_written_twice_are_one_file(tmp_path: Path) -> None:
    store = ReferenceStore(tmp_path, **KEY)
    assert store.append(*rows(1, 2)) == store.append(*rows(1, 2))
    assert len(store.segments(silent)) == 1


def test_what_cannot_be_a_segment_is_not_written(tmp_path: Path) -> None:
    store = ReferenceStore(tmp_path, **KEY)
    digests, _ = rows(1)
    with pytest.raises(TrainingError, match="NaN"):
        store.append(digests, [np.array([-1, np.nan], np.float32)])
    for wrong in (digests[:0], digests[:, :31], digests.astype(np.int64)):
        with pytest.raises(ValueError):
            store.append(wrong, [np.zeros(1, np.float32)] * len(wrong))
    assert store.segments(silent) == []


def test_values_are_views_of_the_file(tmp_path: Path) -> None:
    store = ReferenceStore(tmp_path, **KEY)
    digests, _ = rows(1, 2)
    store.append(digests, [np.full(16 << 20, -1, np.float32), np.full(3, -2, np.float32)])  # 64 MB
    names = store.segments(silent)
    before = resident_bytes()
    store.open(names)
    assert store[digests[1].tobytes()].tolist() == [-2.0] * 3
    assert resident_bytes() - before < 8 << 20
    value: Any = store[digests[0].tobytes()]
    assert not value.flags.writeable and not value.flags.owndata
    while isinstance(value.base, np.ndarray):
        value = value.base
    assert type(value.base).__name__ == "mmap"


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


# --- several processes ------------------------------------------------------------------------------------------------


def write(folder: Path, me: int) -> None:
    store = ReferenceStore(folder, **KEY)
    for n in range(20):
        store.append(*rows(1000 * me + n, 1000 * me + 500 + n, n))


def test_processes_that_write_at_once_lose_nothing(tmp_path: Path) -> None:
    writers = [FORKING.Process(target=write, args=(tmp_path, me)) for me in range(1, 5)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(60)
    assert [writer.exitcode for writer in writers] == [0] * 4
    store = reopened(ReferenceStore(tmp_path, **KEY))
    numbers = [1000 * me + 500 * half + n for me in range(1, 5) for half in (0, 1) for n in range(20)] + [*range(20)]
    digests, values = rows(*numbers)
    assert len(store) == len(numbers) and len(store.segments(silent)) == 80
    assert all((store[row.tobytes()] == value).all() for row, value in zip(digests, values, strict=True))


def test_a_writer_killed_before_the_rename_leaves_a_store_that_works(tmp_path: Path) -> None:
    store = ReferenceStore(tmp_path, **KEY)
    store.append(*rows(1))
    writer = child(tmp_path, "os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\nstore.append(*rows(2))")
    assert writer.wait(timeout=60) == -signal.SIGKILL
    (left,) = store.folder.glob(".*.tmp")
    reopened(store)
    assert len(store) == 1 and store.missing(rows(1, 2)[0]).tolist() == [1]
    assert left.exists()  # as far as anybody can tell it is still being written
    long_ago = time.time() - 2 * 24 * 3600
    os.utime(left, (long_ago, long_ago))
    store.append(*rows(2))
    assert len(reopened(store)) == 2 and not left.exists()


def test_a_write_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = ReferenceStore(tmp_path, **KEY)
    store.prepare()

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        store.append(*rows(1))
    assert {path.name for path in store.folder.iterdir()} == {"key.json"}


# --- damage -----------------------------------------------------------------------------------------------------------


def truncated(path: Path) -> Path:
    os.truncate(path, path.stat().st_size - 1)
    return path


def flipped(path: Path) -> Path:
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    return path


def emptied(path: Path) -> Path:
    os.truncate(path, 0)
    return path


def renamed(path: Path) -> Path:
    return path.rename(path.with_name(f"{'0' * 64}.safetensors"))


def misnamed(path: Path) -> Path:
    return path.rename(path.with_name("values.safetensors"))


def foreign(path: Path) -> Path:
    """A file whose name is its hash, and whose bytes are something else than a segment."""
    path.unlink()
    path = path.with_name(f"{hashlib.sha256(b'nothing').hexdigest()}.safetensors")
    path.write_bytes(b"nothing")
    return path


def folder(path: Path) -> Path:
    path.unlink()
    path.mkdir()
    return path


@pytest.mark.parametrize("damage", [truncated, flipped, emptied, renamed, misnamed, foreign, folder])
def test_damage_is_noticed_once_and_the_rows_are_missing(tmp_path: Path, damage: Any) -> None:
    store = ReferenceStore(tmp_path, **KEY)
    kept, hurt = store.append(*rows(1, 2, 3)), store.append(*rows(4, 5, 6))
    path = damage(store.folder / hurt)
    lines: list[str] = []
    assert store.segments(lines.append) == [kept]
    assert store.segments(lines.append) == [kept]
    (line,) = lines
    assert path.name in line and "computed again" in line and "\n" not in line
    assert len(list(store.folder.glob(f"{path.name}.damaged-*"))) == 1
    store.open([kept])
    assert store.missing(rows(1, 4, 5, 6)[0]).tolist() == [1, 2, 3]
    assert store.append(*rows(4, 5, 6)) == hurt  # computed again: the same file
    assert len(reopened(store)) == 6


def test_what_was_moved_aside_goes_after_a_day_and_a_damaged_key_is_written_anew(tmp_path: Path) -> None:
    store = ReferenceStore(tmp_path, **KEY)
    path = truncated(store.folder / store.append(*rows(1)))
    key = (store.folder / "key.json").read_bytes()
    (store.folder / "key.json").write_text("garbage")
    store.segments(lambda line: None)
    (aside,) = store.folder.glob(f"{path.name}.damaged-*")
    store.prepare()
    assert (store.folder / "key.json").read_bytes() == key and aside.exists()
    os.utime(aside, (0, 0))
    store.segments(silent)
    assert not aside.exists()


def test_opening_what_is_gone_or_no_segment_fails(tmp_path: Path) -> None:
    store = ReferenceStore(tmp_path, **KEY)
    name = store.append(*rows(1))
    foreign(store.folder / name)
    for wrong, error in ((name, FileNotFoundError), ("key.json", ValueError)):
        with pytest.raises(error):
            store.open([wrong])


# --- the lock ---------------------------------------------------------------------------------------------------------


def test_the_lock_is_waited_for_and_dropped_by_a_killed_holder(tmp_path: Path) -> None:
    holder = child(tmp_path, "with computing(store, print):\n    print('held', flush=True)\n    time.sleep(60)")
    assert holder.stdout is not None and holder.stdout.readline() == "held\n"
    told = []

    def waiting() -> None:
        told.append("told")
        holder.kill()

    with computing(ReferenceStore(tmp_path, **KEY), waiting, every=0.01):
        holder.wait(timeout=60)
    assert told == ["told"]


def test_the_lock_is_free_again_after_an_error_and_for_other_references(tmp_path: Path) -> None:
    store, other = ReferenceStore(tmp_path, **KEY), ReferenceStore(tmp_path, **{**KEY, "dtype": "bf16-autocast"})

    def waiting() -> None:
        raise AssertionError("nobody holds it")

    with pytest.raises(RuntimeError), computing(store, waiting), computing(other, waiting):
        raise RuntimeError
    with computing(store, waiting):
        pass


def test_without_locks_everybody_computes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*_: Any) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr("fcntl.flock", none)
    with computing(ReferenceStore(tmp_path, **KEY), lambda: None):
        pass
