"""Per-token log-probabilities of the reference model, computed once and shared by all runs of a sweep.

<root>/<key16>/  key.json                      what the key stands for, in words
                 <sha256>.safetensors          a segment, named after its bytes: rows [n, 32] uint8 (digests),
                                               offsets [n + 1] int64, log_probs [tokens] float32 (nats)
                 .<host>-<pid>-<ns>.tmp        a segment being written
                 <name>.damaged-<ns>           a segment whose bytes are not what its name says, removed after a day
                 lock                          held by the run that computes

Segments are never changed, so any number of processes and runs add theirs at the same time without asking each other.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from safetensors.numpy import save

from alignment.errors import InputError, TrainingError
from alignment.files import digest, fsync, model_files, near, read_json, sha256, write_json

FORMAT = 1  # raised when the computation or the files change
DTYPES = ("fp32", "bf16-autocast", "bf16-weights")  # DeepSpeed keeps weights and residuals in bf16, autocast does not
DIGEST_BYTES = 32
FIELDS = ("prompt_ids", "chosen_ids", "rejected_ids")
SEGMENT = re.compile(r"[0-9a-f]{64}\.safetensors")
TENSORS = {"rows": ("U8", "u1"), "offsets": ("I64", "<i8"), "log_probs": ("F32", "<f4")}  # names for safetensors, numpy
STALE_AFTER = 24 * 3600  # seconds: nobody takes a day to write one segment


def row_digests(rows: Any) -> np.ndarray:
    """rows: a datasets.Dataset with prompt_ids, chosen_ids, rejected_ids. Returns uint8 [n, 32], SHA-256 of each row.

    Hashed are the three lengths, then the tokens as int32: neither the type nor the chunks of the table matter, and a
    token moved from one field to the next makes another row. Raises ArrowInvalid for a token beyond int32.
    """
    found = bytearray()
    for table in rows.with_format("arrow").iter(batch_size=10_000):
        fields = [_lists(table.column(name)) for name in FIELDS]
        lengths = np.stack([counts for counts, _ in fields], axis=1).astype("<i8")
        starts = np.concatenate([np.zeros((1, 3), np.int64), np.cumsum(lengths, axis=0)]).tolist()
        tokens = [memoryview(flat.astype("<i4").tobytes()) for _, flat in fields]
        for row, (first, last) in enumerate(pairwise(starts)):
            hashed = hashlib.sha256(lengths[row].tobytes())
            for field in range(3):
                hashed.update(tokens[field][4 * first[field] : 4 * last[field]])
            found += hashed.digest()
    return np.frombuffer(bytes(found), np.uint8).reshape(-1, DIGEST_BYTES)


def _lists(column: pa.ChunkedArray) -> tuple[np.ndarray, np.ndarray]:
    """Lengths int64 [n] and all values int32 of a column of lists, a missing list as an empty one."""
    lists = column.combine_chunks()
    lengths = pc.fill_null(pc.list_value_length(lists), 0)
    flat = lists.flatten().cast(pa.int32())  # flatten, unlike .values, keeps to the slice
    return lengths.to_numpy(zero_copy_only=False), flat.to_numpy(zero_copy_only=False)


def weights_digest(folder: Path) -> str:
    """SHA-256 (hex) of a model folder: config.json and the *.safetensors files, names and contents.

    A result of the store has the hashes of its files in the record beside it, written after them: they are not read
    again if they have the sizes written there and none is newer than the record. Raises InputError if there are no
    weights.
    """
    files = [file for file in model_files(folder) if file.suffix == ".safetensors" or file.name == "config.json"]
    if not any(file.suffix == ".safetensors" for file in files):
        raise InputError("no *.safetensors files", where=near(folder))
    recorded = _recorded(folder, files)
    return digest([[file.name, recorded.get(file.name) or sha256(file)] for file in files])


def _recorded(folder: Path, files: list[Path]) -> dict[str, str]:
    """name -> sha256 of record.json beside the folder, if all files are in it with their sizes and none is newer than
    it, as an edited one is; else nothing."""
    record = folder.parent / "record.json"
    try:
        recorded, written = read_json(record)["files"], record.stat().st_mtime_ns
        entries = {file.name: recorded[f"{folder.name}/{file.name}"] for file in files}
        facts = {file.name: file.stat() for file in files}
        whole = all(
            facts[name].st_size == entry["bytes"] and facts[name].st_mtime_ns <= written
            for name, entry in entries.items()
        )
        return {name: str(entry["sha256"]) for name, entry in entries.items()} if whole else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


class _Segment(NamedTuple):
    """Views of a mapped file."""

    rows: np.ndarray  # uint8 [n, 32]
    offsets: np.ndarray  # int64 [n + 1]
    log_probs: np.ndarray  # float32 [tokens], nats


class ReferenceStore:
    """The log-probabilities of one reference: weights, adapter and the type they are computed in.

    weights, adapter: digests in hex, None without an adapter. dtype: of DTYPES. What computes them, the libraries and
    the kind of device, is in the key too. Nothing is read or written yet.
    """

    def __init__(self, root: Path, *, weights: str, adapter: str | None, dtype: str):
        if dtype not in DTYPES:
            raise ValueError(f"dtype is one of {', '.join(DTYPES)}, not {dtype}")
        self.weights = weights
        self._key = {"format": FORMAT, "weights": weights, "adapter": adapter, "dtype": dtype, **_computed_by()}
        self.folder = root / digest(self._key)[:16]
        self.open([])

    # --- reading ------------------------------------------------------------------------------------------------------

    def segments(self, warn: Callable[[str], None], known: Sequence[str] = ()) -> list[str]:
        """Names of the whole segments. Reads and hashes every file but those known: for one process, which tells the
        others.

        A file that is not what its name says is moved aside, its rows are missing from now on, and `warn` gets a line.
        What writers that died have left is removed.
        """
        self._remove_stale()
        names = []
        for path in sorted(self.folder.glob("[!.]*.safetensors")):
            try:
                trouble = None if path.name in known else _trouble(path)
                if trouble is None:
                    names.append(path.name)
                    continue
                aside = path.with_name(f"{path.name}.damaged-{time.time_ns()}")
                path.rename(aside)
            except FileNotFoundError:  # another run found the same trouble, and moved it aside first
                continue
            warn(f"{near(path)}: {trouble}; moved aside, its reference log-probs are computed again")
        return names

    def open(self, names: Sequence[str]) -> None:
        """Map these segments and no others. Of a row in several of them the first by name is taken.

        Raises FileNotFoundError for a segment that is gone, ValueError for a file that is not one. Bytes are not
        compared with names again: `segments` has.
        """
        self._segments = [_map(self.folder / name) for name in sorted(names)]
        counts = [len(segment.rows) for segment in self._segments]
        self._firsts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)  # number of each segment's first row
        rows = np.concatenate([np.zeros((0, DIGEST_BYTES), np.uint8), *(segment.rows for segment in self._segments)])
        # Sorted digests rather than a dict: 40 bytes a row in each process. `unique` gives the first of equals.
        self._digests, self._numbers = np.unique(_keys(rows), return_index=True)

    def __len__(self) -> int:
        """Distinct rows held."""
        return len(self._digests)

    def missing(self, digests: np.ndarray) -> np.ndarray:
        """digests: uint8 [n, 32]. Returns int64: ascending numbers of those not held, of equal ones the first."""
        distinct, firsts = np.unique(_keys(digests), return_index=True)
        held = np.zeros(len(distinct), bool)
        if len(self):
            places = np.minimum(np.searchsorted(self._digests, distinct), len(self) - 1)
            held = self._digests[places] == distinct
        return np.sort(firsts[~held]).astype(np.int64)

    def get(self, row: bytes) -> np.ndarray:
        """row: a digest of 32 bytes. Returns float32 [tokens], nats: a read-only view of the file. Else KeyError."""
        key = np.frombuffer(row, f"S{DIGEST_BYTES}")
        place = int(np.searchsorted(self._digests, key)[0])
        if place == len(self) or self._digests[place] != key[0]:
            raise KeyError(row.hex())
        number = int(self._numbers[place])
        at = int(np.searchsorted(self._firsts, number, side="right")) - 1
        segment, inside = self._segments[at], number - int(self._firsts[at])
        return segment.log_probs[segment.offsets[inside] : segment.offsets[inside + 1]]

    __getitem__ = get

    # --- writing ------------------------------------------------------------------------------------------------------

    def append(self, digests: np.ndarray, values: Sequence[np.ndarray]) -> str:
        """Write one segment, durably, and return its name; `open` decides when it is read.

        digests: uint8 [n, 32], n > 0. values: n arrays [tokens], nats; float32 is kept exactly. The file is made in
        memory first. Raises TrainingError for values that are not finite, OSError if the disk is full.
        """
        if not len(values) or digests.shape != (len(values), DIGEST_BYTES) or digests.dtype != np.uint8:
            raise ValueError(f"{len(values)} rows of values, digests {digests.dtype} {digests.shape}")
        log_probs = np.concatenate([np.asarray(value, "<f4") for value in values])
        if not np.isfinite(log_probs).all():
            raise TrainingError("the reference model gives log-probs that are NaN or infinite", fix="look at the model")
        offsets = np.concatenate([[0], np.cumsum([len(value) for value in values])]).astype("<i8")
        content = save({"rows": np.ascontiguousarray(digests), "offsets": offsets, "log_probs": log_probs})
        name = f"{hashlib.sha256(content).hexdigest()}.safetensors"
        self.prepare()
        aside = self.folder / f".{socket.gethostname()}-{os.getpid()}-{time.time_ns()}.tmp"
        try:
            with open(aside, "xb") as stream:
                stream.write(content)
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(aside, self.folder / name)
        except BaseException:
            aside.unlink(missing_ok=True)
            raise
        fsync(self.folder)
        return name

    def prepare(self) -> None:
        """Make the folder, with its key in words."""
        path, words = self.folder / "key.json", {"key": digest(self._key), **self._key}
        try:
            if read_json(path) == words:
                return
        except (OSError, ValueError):  # missing, or damaged
            pass
        write_json(path, words)

    def _remove_stale(self) -> None:
        for path in [*self.folder.glob(".*.tmp"), *self.folder.glob("*.damaged-*")]:
            try:
                if time.time() - path.stat().st_mtime > STALE_AFTER:
                    path.unlink()
            except (FileNotFoundError, IsADirectoryError, PermissionError):  # finished, gone, or not ours to remove
                continue


def _computed_by() -> dict[str, str]:
    versions = {name: version(name) for name in ("torch", "transformers")}
    return {**versions, "device": "cuda" if torch.cuda.is_available() else "cpu"}


@contextmanager
def computing(
    store: ReferenceStore,
    waiting: Callable[[], None],
    every: float = 1.0,
    ask: Callable[[Callable[[], bool]], bool] = lambda take: take(),
) -> Iterator[None]:
    """Held by the one run that computes what the store lacks, so that a sweep started at once computes it once.

    waiting: called once if another process holds it; then it is asked for again each `every` seconds. ask(take): of
    several processes of a run one takes it, and tells the others whether it could; they wait here and not in a
    collective, which would give up. It only saves work: nothing breaks where a file system has no locks, there
    everybody computes. The kernel drops a dead holder's.
    """
    ask(lambda: _prepared(store))
    with open(store.folder / "lock", "a", encoding="utf-8") as stream:
        told = False
        while not ask(lambda: _take(stream.fileno())):
            if not told:
                waiting()
            told = True
            time.sleep(every)
        try:
            yield
        finally:
            with suppress(OSError):  # closing is not enough: children made by fork have the file open too
                fcntl.flock(stream, fcntl.LOCK_UN)


def _prepared(store: ReferenceStore) -> bool:
    store.prepare()
    return True


def _take(handle: int) -> bool:
    """False while another has it. Where the file system has no locks, everybody has it."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass
    return True


def _keys(digests: np.ndarray) -> np.ndarray:
    """uint8 [n, 32] -> [n] strings of 32 bytes, which numpy sorts; zeros at the end count for nothing there."""
    return np.ascontiguousarray(digests, np.uint8).reshape(-1).view(f"S{DIGEST_BYTES}")


def _trouble(path: Path) -> str | None:
    """What is wrong with a segment, in words, or None."""
    if not SEGMENT.fullmatch(path.name):
        return "the name is not that of a segment"
    if not path.is_file():
        return "it is no file"
    if f"{sha256(path)}.safetensors" != path.name:
        return f"the file is damaged: its {path.stat().st_size} bytes do not have the hash in its name"
    try:
        _map(path)
    except ValueError as error:
        return str(error)
    return None


def _map(path: Path) -> _Segment:
    """The file's tensors as read-only views of one memory map. Raises ValueError if it is not a segment.

    The header is read here because safetensors' own reader copies values when asked for numpy arrays:
    https://huggingface.co/docs/safetensors (8 bytes with the header's length, the header in JSON, the values).
    """
    try:
        raw = np.asarray(np.memmap(path, np.uint8, mode="r"))
        start = 8 + int.from_bytes(raw[:8].tobytes(), "little")
        header = json.loads(raw[8:start].tobytes())
        rows, offsets, log_probs = (_tensor(raw[start:], header[name], *kind) for name, kind in TENSORS.items())
    except (ValueError, KeyError, TypeError, OverflowError) as error:
        raise ValueError(f"the file is not a segment ({error})") from error
    if rows.shape != (len(offsets) - 1, DIGEST_BYTES) or offsets[0] != 0 or offsets[-1] != len(log_probs):
        raise ValueError("the file is not a segment (rows, offsets and values do not fit)")
    return _Segment(rows, offsets, log_probs)


def _tensor(data: np.ndarray, entry: dict[str, Any], kind: str, dtype: str) -> np.ndarray:
    if entry["dtype"] != kind:
        raise ValueError(f"{entry['dtype']} instead of {kind}")
    first, last = entry["data_offsets"]
    return data[first:last].view(np.dtype(dtype)).reshape(entry["shape"])
