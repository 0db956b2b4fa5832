"""What the commands have in common: how arguments are read, the store is named, and values are printed."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from alignment.errors import EXIT_CODES, ConfigError


def parser_of(name: str, usage: str, command: Callable[..., Any]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"alignment {name}", usage=usage, description=command.__doc__, epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
    )  # fmt: skip
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def add_store(parser: argparse.ArgumentParser) -> None:
    default = os.environ.get("ALIGNMENT_STORE", "outputs")
    parser.add_argument(
        "--store",
        type=_named_store,
        default=_store(default),
        help="the store (default: $ALIGNMENT_STORE, else outputs)",
    )


def _named_store(text: str) -> Path:
    """Of --store: it is there. The usual one may be still to come, with the first run."""
    if not Path(text).exists():
        raise ConfigError("there is no such folder", where=f"--store {text}", fix="name the one that holds the runs")
    return _store(text)


def _store(text: str) -> Path:
    if Path(text).exists() and not Path(text).is_dir():
        raise ConfigError(
            "the store is no folder", where=text, fix="--store names the folder that holds store/ and runs/"
        )
    return Path(text)


def print_json(value: Any) -> None:
    import json

    print(json.dumps(value, indent=1))
