"""Where files lie: paths, globs, data sets on disk and URLs -> files, their bytes, and what tells that one has changed.

URLs are read through fsspec, which is imported where one is met: nothing else here takes time to import.
"""

from __future__ import annotations

import glob
import gzip
import hashlib
import io
import json
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import IO, Any, cast

from alignment.errors import AlignmentError, InputError, MachineError
from alignment.files import CHUNK, digest

URL = re.compile(r"[a-z][a-z0-9+.-]*://")
MAGIC = re.compile(r"[*?\[]")
COMPRESSED = (".gz", ".zst", ".bz2", ".xz")
FED = 1 << 9  # bytes given to zstd at a time: of text that repeats itself thirty thousand times as many come out
SILENT = 60  # seconds without a byte after which a server is given up
OF_CONTENT = (
    "etag",
    "content-md5",
    "digest",
    "md5hash",
    "md5",
    "sha256",
    "checksum",
    "crc32c",
    "content_md5",
    "blob_id",
)
OF_TIME = ("generation", "lastmodified", "last_modified", "mtime", "modified", "updated", "created")


def is_url(path: str | Path) -> bool:
    return URL.match(str(path)) is not None and not str(path).startswith("file://")


def is_web(path: str | Path) -> bool:
    return str(path).startswith(("http://", "https://"))


def kind(path: str | Path) -> tuple[str, str]:
    """(suffix, compression) of a name, lower case, with their dots: ("" where there is none)."""
    name = str(path)
    if is_web(name):
        name = re.split(r"[?#]", name, maxsplit=1)[0]
    pure = PurePosixPath(name.lower())
    if pure.suffix in COMPRESSED:
        return PurePosixPath(pure.stem).suffix, pure.suffix
    return pure.suffix, ""


def expand(path: str | Path) -> list[str]:
    """The files that a path, a glob pattern, a URL or a folder written by datasets' save_to_disk means, sorted by name
    (those of such a folder in its own order).

    Raises InputError where there is none, or a folder of another kind; MachineError where a URL cannot be reached.
    """
    name = str(path).removeprefix("file://")
    if not is_url(name):
        if os.path.isdir(name):
            return _saved(name, lambda inner: Path(inner).read_bytes() if os.path.isfile(inner) else None)
        if os.path.isfile(name):
            return [name]
        if os.path.exists(name):
            raise InputError("is no regular file", where=name)
        if not MAGIC.search(name) or "\0" in name:
            raise InputError("no such file", where=name, fix="check the path")
        return _some(sorted(filter(os.path.isfile, glob.glob(name, recursive=True))), name)
    with _reached(name):
        system, inner = _system(name)
        if "*" in inner if is_web(name) else MAGIC.search(inner):  # a ? begins a query on the web
            found = cast(dict[str, Any], system.glob(inner, detail=True))
            files = [str(system.unstrip_protocol(one)) for one, facts in found.items() if facts["type"] == "file"]
            return _some(sorted(files), name)
        if is_web(name) or system.isfile(
            inner
        ):  # pages of the web have no folders; a missing one is found when it is opened
            return [name]
        if system.isdir(inner):
            return _saved(name, lambda url: _whole(system, url))
    raise InputError("no such file", where=name, fix="check the address")


def _some(files: list[str], pattern: str) -> list[str]:
    if not files:
        raise InputError("no file matches", where=pattern, fix="check the pattern")
    return files


def _whole(system: Any, url: str) -> bytes | None:
    inner = system._strip_protocol(url)
    return cast(bytes, system.cat_file(inner)) if system.isfile(inner) else None


def _saved(folder: str, read: Callable[[str], bytes | None]) -> list[str]:
    """Files of a folder written by save_to_disk. read: the bytes of a file, None if missing. Raises InputError."""
    folder = folder.rstrip("/")
    try:
        if (several := read(f"{folder}/dataset_dict.json")) is not None:
            splits = [str(split) for split in json.loads(several)["splits"]]
            what = f"is a data set of several splits: {', '.join(splits)}"
            raise InputError(what, where=folder, fix=f"name the folder of one, {folder}/{splits[0]}")
        if (state := read(f"{folder}/state.json")) is None:
            raise InputError("is a folder", where=folder, fix=f"give one file, or a pattern: {folder}/*.jsonl")
        names = [str(file["filename"]) for file in json.loads(state)["_data_files"]]
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise InputError("is no whole folder of datasets' save_to_disk", where=folder, fix="write it again") from error
    if not names or any(PurePosixPath(name).name != name for name in names):
        raise InputError("state.json names no files of the folder", where=folder, fix="write it again")
    return [f"{folder}/{name}" for name in names]


def fingerprint(path: str | Path) -> str:
    """What tells one content of a URL's file from the next: SHA-256 (hex) of its size and its checksum or ETag, else
    its time, as the server has them; of its bytes where the server has neither. Local files are for files.sha256.

    Raises InputError (no such file) or MachineError.
    """
    name = str(path)
    with _reached(name):
        system, inner = _system(name)
        system.invalidate_cache()
        facts = {key.lower(): value for key, value in system.info(inner).items() if value not in (None, "")}
    for keys in (OF_CONTENT, OF_TIME):
        if known := {key: str(facts[key]) for key in keys if key in facts}:
            return digest({"size": facts.get("size"), **known})
    whole = hashlib.sha256()
    with stream(name) as opened:
        while block := opened.read(CHUNK):
            whole.update(block)
    return whole.hexdigest()


def stream(path: str | Path, compression: str = "") -> io.BufferedReader[Any]:
    """A file's bytes, decompressed. compression: as kind() gives it, "" for none.

    Raises InputError (no such file; cut or broken, which is found while it is read) or MachineError (no access, no
    connection, a driver is missing), also from read().
    """
    name = str(path).removeprefix("file://")
    with _reached(name):
        if is_url(name):
            system, inner = _system(name)
            whole = {"block_size": 0} if is_web(name) else {}  # not every server knows parts of a file
            raw = system.open(inner, "rb", **whole)
        else:
            raw = open(name, "rb", buffering=0)  # noqa: SIM115 - the caller closes it
    reader: io.BufferedReader[Any] = io.BufferedReader(
        _Guarded(raw, lambda error: _unreachable(name, error), not is_web(name)), CHUNK >> 3
    )
    if not compression:
        return reader
    openers: dict[str, Callable[[], Any]] = {
        ".gz": lambda: gzip.GzipFile(fileobj=reader),
        ".bz2": lambda: _bz2(reader),
        ".xz": lambda: _xz(reader),
        ".zst": lambda: _Zstandard(reader),
    }
    try:
        opened = openers[compression]()
    except ImportError as error:
        reader.close()
        raise _missing(name, compression, error) from error
    plain = _Guarded(opened, lambda error: _cut(name, compression, error), False, reader)
    return io.BufferedReader(plain, CHUNK >> 3)


def _bz2(reader: IO[bytes]) -> Any:
    import bz2

    return bz2.BZ2File(reader)


def _xz(reader: IO[bytes]) -> Any:
    import lzma

    return lzma.LZMAFile(reader)


class _Guarded(io.RawIOBase):
    """A stream whose errors while reading are said as those of this program. below: what it reads from, if it does not
    close that itself."""

    def __init__(self, inner: Any, say: Callable[[Exception], AlignmentError], seeks: bool, below: Any = None):
        self.inner, self.say, self.seeks, self.below = inner, say, seeks, below
        self.failed: AlignmentError | None = None
        self.take = (
            inner.read1 if hasattr(inner, "read1") else inner.read
        )  # read() of a decompressor loses what came before a cut

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return self.seeks

    def readinto(self, buffer: Any) -> int:
        block = self._try(self.take, len(buffer))
        buffer[: len(block)] = block
        return len(block)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        return int(self._try(self.inner.seek, offset, whence)) if self.seeks else super().seek(offset, whence)

    def tell(self) -> int:
        return int(self._try(self.inner.tell)) if self.seeks else super().tell()

    def close(self) -> None:
        if not self.closed:
            for stream in filter(None, (self.inner, self.below)):
                with suppress(Exception):  # what was read has been read
                    stream.close()
        super().close()

    def _try(self, call: Callable[..., Any], *arguments: int) -> Any:
        if self.failed:  # what a decompressor would say after that is not to be trusted
            raise self.failed
        try:
            return call(*arguments)
        except AlignmentError as error:
            self.failed = error
            raise
        except Exception as error:  # drivers and decompressors each have their own
            self.failed = self.say(error)
            raise self.failed from error


class _Zstandard(io.IOBase):
    """Decompressed frames, one after the other; those readers that `zstandard` has end at a cut without a word."""

    def __init__(self, source: IO[bytes]):
        import zstandard

        self.source, self.decompressor = source, zstandard.ZstdDecompressor(max_window_size=1 << 31)  # of --long=31
        self.frame: Any = None
        self.rest, self.made = b"", memoryview(b"")

    def read1(self, size: int) -> memoryview:
        while not self.made:
            block = self.rest or self.source.read(FED)
            if not block:
                if self.frame is not None:
                    raise EOFError("the last frame has no end")
                return self.made
            self.frame = self.frame or self.decompressor.decompressobj()
            self.made, self.rest = memoryview(self.frame.decompress(block)), b""
            if self.frame.eof:
                self.rest, self.frame = self.frame.unused_data, None
        made, self.made = self.made[:size], self.made[size:]
        return made


def _missing(name: str, compression: str, error: ImportError) -> MachineError:
    module = (error.name or "").lstrip("_")
    fix = f"pip install {module}" if compression == ".zst" else f"take a Python that was built with {module}"
    return MachineError(f"{compression} needs the module {module}, which is missing", where=name, fix=fix)


def _cut(name: str, compression: str, error: Exception) -> AlignmentError:
    return InputError(f"the {compression} is cut or broken: {_line(error)}", where=name, fix="copy or write it again")


def _system(url: str) -> tuple[Any, str]:
    """fsspec's file system of a URL, and the path in it."""
    import fsspec

    options: dict[str, Any] = {}
    if is_web(url):
        import aiohttp

        timeout = aiohttp.ClientTimeout(total=None, sock_connect=SILENT, sock_read=SILENT)  # 5 minutes in all otherwise
        options = {"client_kwargs": {"timeout": timeout}}
    system, inner = fsspec.core.url_to_fs(url, **options)
    return system, str(inner)


@contextmanager
def _reached(name: str) -> Iterator[None]:
    try:
        yield
    except AlignmentError:
        raise
    except Exception as error:  # each driver has its own
        raise _unreachable(name, error) from error


def _unreachable(name: str, error: Exception) -> AlignmentError:
    """In words for people: what an error of the system, of fsspec or of a driver means."""
    if isinstance(error, ImportError):
        cause = error.__cause__ if isinstance(error.__cause__, ImportError) else error
        package = (cause.name or "").partition(".")[0]
        what = f"{name.partition('://')[0]}:// needs a package that is not installed"
        return MachineError(what, where=name, fix=f"pip install {package}" if package else _line(error))
    if isinstance(error, FileNotFoundError) and isinstance(error.__cause__, Exception):
        return _unreachable(name, error.__cause__)  # fsspec says so of whatever happens on the web
    if isinstance(error, FileNotFoundError | NotADirectoryError) or getattr(error, "status", None) in (404, 410):
        return InputError("no such file", where=name, fix="check the path")
    if isinstance(error, ValueError) and "Protocol not known" in str(error):
        return InputError(f"no kind of address begins with {name.partition('://')[0]}://", where=name, fix="check it")
    fix = "check credentials and network" if is_url(name) else "check its permissions"
    return MachineError(f"cannot be read: {_line(error)}", where=name, fix=fix)


def _line(error: Exception) -> str:
    """What an error says, in one line of at most 200 characters."""
    text = getattr(error, "strerror", None) or str(error)
    told = re.sub(r"(://[^\s?'\"]+)\?[^\s'\"]*", r"\1", str(text))  # a query may hold a signature
    return (" ".join(told.split()) or type(error).__name__)[:200]
