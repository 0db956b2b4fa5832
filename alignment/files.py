"""Small file habits shared by every room: whole-or-nothing writes, JSON lines, digests."""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import shutil
import sys
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from alignment.errors import MachineError

CHUNK = 1 << 20
LATE = 60.0  # seconds after which a shared file system shows what another machine wrote
# What is read of a folder with a model: its config, weights, tokenizer and templates. Only these are fetched from a
# hub, and only these are in the key: not model cards, optimizer states, other formats or what a download left behind.
WEIGHTS = "*.safetensors"
MODEL_FILES = ("*.json", WEIGHTS, "*.jinja", "*.model", "*.txt", "additional_chat_templates/*.jinja")


def write_text(path: Path, text: str, *, durable: bool = True) -> None:
    """Write a file whole or not at all: a temporary neighbour, fsync, one rename."""
    write_lines(path, [text], durable=durable)


def write_lines(path: Path, lines: Iterable[str], *, durable: bool = True) -> int:
    """As write_text, of texts that need not be in memory together; how many there were."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside, count = path.with_name(f".{path.name}.{os.getpid()}.tmp"), 0
    try:
        with open(aside, "w", encoding="utf-8") as stream:
            for line in lines:
                stream.write(line)
                count += 1
            if durable:
                stream.flush()
                os.fsync(stream.fileno())
        os.replace(aside, path)
        if durable:
            fsync(path.parent)
    except OSError as error:
        with suppress(OSError):
            aside.unlink()
        error.filename = str(path)  # the system does not say where a disk is full
        raise
    return count


def append(path: Path, lines: str) -> None:
    """Whole lines to the end of a file, durably, all of them or none. Where a kill or a full disk has cut the last line
    that is there, a new one is begun. Raises OSError."""
    with open(path, "a+b", buffering=0) as stream:
        size = stream.seek(0, os.SEEK_END)
        stream.seek(max(0, size - 1))
        cut = stream.read(1) not in (b"", b"\n")
        try:
            rest = memoryview(("\n" * cut + lines).encode())
            while rest:
                rest = rest[stream.write(rest) :]
            os.fsync(stream.fileno())
        except OSError as error:
            error.filename = str(path)
            os.truncate(path, size)
            raise


def remove(path: Path) -> None:
    """Whatever it is: a folder with what is in it, a file, a pipe, a link, which is not followed. What cannot be
    removed stays."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


def fsync(path: Path) -> None:
    """To the disk: a file's bytes, or the names in a folder."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_json(path: Path, value: Any, *, durable: bool = True, indent: int | None = 1) -> None:
    """indent: None for what is long and read by programs only, which takes half the time."""
    write_text(path, json.dumps(value, indent=indent, ensure_ascii=False, sort_keys=False) + "\n", durable=durable)


def read_json(path: Path) -> Any:
    with open(path, encoding="utf-8") as stream:
        return json.load(stream)


def write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    write_lines(path, (json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def read_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    """Rows of a file this program wrote itself; for people's files use data.sources, which names the bad line."""
    with open(path, encoding="utf-8") as stream:
        for line in stream:
            if line.strip():
                yield json.loads(line)


def listed(folder: Path, pattern: str) -> list[Path]:
    """What it has now, in order; nothing of a folder that is moved or removed while it is looked at. Raises OSError."""
    try:
        return sorted(folder.glob(pattern))
    except (FileNotFoundError, NotADirectoryError, ProcessLookupError):  # Path.glob passes on what comes of scandir
        return []


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        while block := stream.read(CHUNK):
            digest.update(block)
    return digest.hexdigest()


def model_files(folder: Path) -> list[Path]:
    """The files of a model folder that are read, by name; hidden ones are not."""
    found = (file for pattern in MODEL_FILES for file in folder.glob(pattern))
    return sorted(file for file in found if file.is_file() and not file.name.startswith("."))


def canonical(value: Any) -> str:
    """JSON with sorted keys and no spaces: equal values, equal text."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)


def digest(value: Any) -> str:
    """SHA-256 (hex) of a JSON-able value."""
    return hashlib.sha256(canonical(value).encode()).hexdigest()


def size_text(count: float) -> str:
    """Bytes for people."""
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"


def require_room(folder: Path, size: float, free: int | None = None) -> None:
    """Raise MachineError unless the disk of an existing folder has room for `size` bytes, and a tenth more. free:
    bytes, where it is more than what is free now."""
    free = shutil.disk_usage(folder).free if free is None else free
    if free < 1.1 * size:
        what = f"{size_text(size)} of weights do not fit: {size_text(free)} free"
        raise MachineError(what, where=str(folder), fix="free some disk, or set store=...")


def cache_home() -> Path:
    """The user cache: $ALIGNMENT_CACHE, else $XDG_CACHE_HOME/alignment, else ~/.cache/alignment."""
    given = os.environ.get("ALIGNMENT_CACHE")
    if given:
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "alignment"


def near(path: Path) -> str:
    """The path as a person standing here would write it: relative if it lies below, else in full."""
    path = path.absolute()
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def program(name: str) -> str:
    """What to type for a program of this environment: its name if the PATH leads to it, else its path, shell-quoted."""
    beside, on_path = Path(sys.executable).with_name(name), shutil.which(name)
    if on_path and Path(on_path).absolute() == beside:
        return name
    return shlex.quote(near(beside)) if beside.is_file() else f"{shlex.quote(sys.executable)} -m {name}"
