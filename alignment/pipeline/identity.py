"""Identity: what can change a stage's result, as one JSON value; its digest is the stage's key.

In: identity-side settings, digests of sources, the parents' keys, versions of the packages that do the maths.
Out: paths, launcher, process count, ZeRO stage, micro-batches, tracking (docs/architecture.md, Identity).
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache, partial
from importlib import metadata
from pathlib import Path
from typing import Any

from alignment import places
from alignment.config import shape
from alignment.config.paths import template_path
from alignment.config.schema import Experiment
from alignment.config.settings import Settings
from alignment.config.sources import Dataset, Model, PathSource
from alignment.config.stages.base import Stage
from alignment.config.stages.preparing import ImportModel, Prepare
from alignment.config.stages.training import Train
from alignment.errors import InputError, MachineError
from alignment.files import MODEL_FILES, cache_home, canonical, digest, model_files, read_json, sha256, write_json

OPTIONAL = {  # package -> the extra that installs it, and what for
    "gguf": ("gguf", ", which GGUF files need"),
    "vaderSentiment": ("sentiment", ", which the reward's sentiment needs"),
    "bitsandbytes": ("qlora", ", which lora.quantize needs, on a CUDA GPU"),
}
FORMAT = 11  # raised when a key comes to mean something else, or a result to hold something else


def stage_identity(experiment: Experiment, settings: Stage, parents: dict[str, str]) -> dict[str, Any]:
    """The identity of one node. parents: role -> key; roles that only order stages are left out. Raises InputError when
    a file it needs is not there."""
    return {
        "format": FORMAT,
        "kind": settings.kind,  # type: ignore[attr-defined]
        "settings": identity_side(settings),
        "groups": {group: _group(experiment, settings, group) for group in settings.groups},
        "parents": {role: key for role, key in sorted(parents.items()) if role not in settings.ordering},
        "packages": {name: version(name) for name in settings.packages if _used(name, experiment, settings)},
    }


def difference(one: Any, other: Any, at: str = "") -> tuple[str, Any, Any]:
    """Where two identities first differ, and what each has there."""
    if isinstance(one, dict) and isinstance(other, dict):
        for key in {**one, **other}:
            if one.get(key) != other.get(key):
                return difference(one.get(key), other.get(key), f"{at}.{key}" if at else key)
    return at, one, other


def identity_side(value: Any) -> Any:
    """The identity half of a settings object, recursively, without what is idle; sources become digests of their
    content."""
    if isinstance(value, PathSource):
        return {"sha256": content_digest(Path(value.path))}
    if isinstance(value, Dataset) and isinstance(value.source, PathSource):
        return {**_fields(value, without=("source",)), "source": data_digest(value.source.path)}
    if isinstance(value, Model):
        return {**_fields(value), "chat_template": template_digest(value.chat_template)}
    if isinstance(value, Settings):
        return _fields(value)
    if isinstance(value, dict):
        return {name: identity_side(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [identity_side(item) for item in value]
    return value


def _fields(value: Settings, without: Sequence[str] = ()) -> dict[str, Any]:
    idle = {*value.idle(), *without}
    return {name: identity_side(getattr(value, name)) for name in _identity_keys(type(value)) if name not in idle}


_identity_keys = cache(partial(shape.of_side, "identity"))


def _group(experiment: Experiment, settings: Stage, group: str) -> Any:
    if group == "data" and isinstance(settings, Prepare):
        return {name: identity_side(experiment.data[name]) for name in settings.read}
    if group == "reward":
        return identity_side(experiment.reward.read(settings.compares))
    return identity_side(getattr(experiment, group))


def _used(package: str, experiment: Experiment, settings: Stage) -> bool:
    """Optional packages count only where they do something."""
    if package == "vllm":
        return getattr(settings, "backend", None) == "vllm"
    if package == "peft" and isinstance(settings, ImportModel):
        return experiment.model.adapter is not None
    if package == "bitsandbytes" and isinstance(settings, Train):
        return settings.lora is not None and settings.lora.quantize is not None
    if package == "gguf":
        source = experiment.model.source
        return str(getattr(source, "member", getattr(source, "path", ""))).endswith(".gguf")
    if package == "vaderSentiment":
        return any(term.kind == "sentiment" for term in experiment.reward.read(settings.compares).terms.values())
    return True


@cache
def version(package: str) -> str:
    """Installed version without its local part: a CPU and a CUDA build of one release share results."""
    try:
        return metadata.version(package).split("+")[0]
    except metadata.PackageNotFoundError:
        extra, needs = OPTIONAL.get(package, (None, ""))
        fix = f"pip install 'alignment[{extra}]'" if extra else f"pip install {package}"
        raise MachineError(f"the package {package} is not installed{needs}", fix=fix) from None


@cache
def template_digest(chat_template: str) -> str:
    """`keep`, or the digest of the template's text."""
    if chat_template == "keep":
        return "keep"
    return hashlib.sha256(template_path(chat_template).read_bytes()).hexdigest()


_seen: ContextVar[dict[Path | str, str] | None] = ContextVar("seen", default=None)


@contextmanager
def one_look(seen: Mapping[Path, str] | None = None) -> Iterator[None]:
    """In here a source is looked at once, and all who ask are told what was seen: a graph is of one moment, and so may
    be all graphs of a sweep. Nothing is remembered after it. seen: digests of what was looked at before."""
    known: dict[Path | str, str] = {path: value for path, value in (seen or {}).items()}  # noqa: C416 - wider keys
    token = _seen.set(known) if _seen.get() is None else None
    try:
        yield
    finally:
        if token is not None:
            _seen.reset(token)


def content_digest(path: Path) -> str:
    """SHA-256 of a file, or of a model folder: its files that are read and their names in it.

    Cached by size and modification time. Raises InputError if there is nothing to read.
    """
    seen = _seen.get()
    if seen is None:
        return _content_digest(path)
    if path not in seen:
        seen[path] = _content_digest(path)
    return seen[path]


def data_digest(path: str) -> str:
    """SHA-256 over what a data set's path, pattern or address means: of each file, in order, how it is read and its
    content, as `content_digest` or, of an address, as its server tells it. Raises InputError, MachineError."""
    seen = _seen.get()
    if seen is not None and path in seen:  # as text: what a file is by itself is known by its Path
        return seen[path]
    files = [(*places.kind(file), _one_digest(file)) for file in places.expand(path)]
    made = digest(files)
    if seen is not None:
        seen[path] = made
    return made


def _one_digest(file: str) -> str:
    return places.fingerprint(file) if places.is_url(file) else content_digest(Path(file))


def _content_digest(path: Path) -> str:
    if path.is_file():
        return _file_digest(path)
    if path.is_dir():
        files = model_files(path)
        if not files:
            fix = f"name one file, or a model folder: {', '.join(MODEL_FILES[:2])}"
            raise InputError("is a folder without a model's files", where=str(path), fix=fix)
        return digest([[str(file.relative_to(path)), _file_digest(file)] for file in files])
    raise InputError("no such file or folder", where=str(path))


def _file_digest(path: Path) -> str:
    try:
        stat = path.stat()
        facts = [str(path.resolve()), stat.st_size, stat.st_mtime_ns, stat.st_ino]
        note = cache_home() / "digests" / f"{digest(facts)}.json"
        if known := _noted(note):
            return known
        value = sha256(path)
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror}", where=str(path)) from error
    try:
        write_json(note, {"sha256": value}, durable=False)
    except OSError:
        pass  # an unwritable cache costs time, not the run
    return value


def _noted(note: Path) -> str | None:
    """The digest that a note holds; None if there is no note, or one that a full disk or a crash has cut short."""
    try:
        return str(read_json(note)["sha256"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


SOURCES = (".py", ".yaml", ".jinja", ".css", ".js")  # what the package is made of


def package_root() -> Path:
    return Path(__file__).resolve().parent.parent


@cache
def code_digest() -> str:
    """SHA-256 over the package's own source: a fingerprint for the record, not part of any key."""
    return source_digest(package_root())


def source_digest(root: Path) -> str:
    files = sorted(
        Path(folder) / name
        for folder, _, names in os.walk(root, followlinks=True)
        for name in names
        if name.endswith(SOURCES)
    )
    return hashlib.sha256(
        canonical([[str(file.relative_to(root)), sha256(file)] for file in files]).encode()
    ).hexdigest()
