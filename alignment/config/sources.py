"""Where models and data come from: a package, a folder, a hub."""

from __future__ import annotations

import os.path
import re
from typing import Annotated, Literal

from pydantic import AfterValidator, Field
from pydantic_core import PydanticCustomError

from alignment.config.patterns import COMMIT, SHA256
from alignment.config.redact import without_secrets
from alignment.config.settings import Settings, execution, identity


def _no_secret(path: str) -> str:
    if without_secrets(path) != path or SIGNED.search(path):
        what, fix = "holds a password or a signature", "leave it to the driver's settings: records keep the address"
        raise PydanticCustomError("secret", what, {"fix": fix})
    return path


SIGNED = re.compile(
    r"[?&](X-(Amz|Goog)-Signature|signature|sig|sas|\w*token|\w*key|auth\w*|secret|password|credential)="
    r"|^(?!abfss?:|wasbs?:)[a-z][a-z0-9+.-]*://[^/?#]*@",  # of Azure a container stands before the @
    re.IGNORECASE,
)
LocalPath = Annotated[str, AfterValidator(os.path.expanduser)]  # ~ means the same wherever the path is used


class PackageSource(Settings):
    """A file or folder inside an archive of a package index, pinned; fetched once into the user cache."""

    kind: Literal["package"] = execution()
    package: str = execution()
    version: str = execution()
    archive: Literal["wheel", "sdist"] = execution()
    archive_sha256: str = identity(pattern=SHA256)
    member: str = identity()


class PathSource(Settings):
    """A local file or folder; of a data set also a pattern or an address (docs/data.md). Its content, not its path, is
    part of the key."""

    kind: Literal["path"] = execution()
    path: Annotated[LocalPath, AfterValidator(_no_secret)] = execution(min_length=1)


class HubSource(Settings):
    """A repository of the Hugging Face hub, at one revision."""

    kind: Literal["hub"] = execution()
    id: str = identity(min_length=1)
    revision: str = identity(pattern=COMMIT)
    subset: str | None = identity()
    split: str = identity()


Source = Annotated[PackageSource | PathSource | HubSource, Field(discriminator="kind")]


class Model(Settings):
    """The start checkpoint, and the one chat template of the whole run. adapter: of PEFT, merged into it."""

    source: Source = identity()
    adapter: Source | None = identity()
    chat_template: LocalPath = identity(min_length=1)
    eos_token: str | None = identity()
    pad_token: str | None = identity()
    storage_precision: Literal["fp32", "bf16"] = identity()

    def idle(self) -> frozenset[str]:
        return frozenset({"adapter"} if self.adapter is None else ())


class Lists(Settings):
    """Which answers of a list become pairs (data/ranking.py). min_margin: of their scores. max_pairs: of one list."""

    pairs: Literal["best_worst", "best_random", "all_margin"] = identity()
    min_margin: float = identity(ge=0)
    max_pairs: int = identity(gt=0)


class Dataset(Settings):
    """columns: our key -> the rows' own column that stands for it. auto: each row's format by its keys. limit: rows of
    the source, the first; cap: of those that fit; epochs, weight: of a mixture (data/splitting.py). lists: how
    such of scored answers become pairs."""

    source: Source = identity()
    format: Literal[
        "auto",
        "alpaca",
        "messages",
        "prompt_completion",
        "sharegpt",
        "text",
        "preference",
        "unpaired",
        "scored",
        "scored_list",
    ] = identity()
    columns: dict[str, str] = identity()
    lists: Lists = identity()
    limit: int | None = identity(gt=0)
    cap: int | None = identity(gt=0)
    epochs: float = identity(gt=0)
    weight: float | None = identity(gt=0)
