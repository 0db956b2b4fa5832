"""What can be wrong with a row, in words for people."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

JSON_TYPES = {"str": "text", "int": "a number", "float": "a number", "bool": "true/false", "list": "a list"}
JSON_TYPES |= {"dict": "an object", "NoneType": "null"}
NO_BYTE = re.compile("[\udc80-\udcff]")  # what Python's surrogateescape makes of a byte that is not UTF-8


@dataclass(frozen=True)
class Fault:
    """In the place of a row's value: what is wrong with it."""

    what: str
    fix: str | None = None


def type_name(value: Any) -> str:
    return JSON_TYPES.get(type(value).__name__, type(value).__name__)


def not_utf8(byte: int) -> Fault:
    return Fault(f"is not UTF-8 (byte 0x{byte:02x})", "save the file as UTF-8")


def escaped(text: str) -> Fault | None:
    """Whether a text that was decoded with surrogateescape has a byte that is not UTF-8."""
    found = None if text.isascii() else NO_BYTE.search(text)
    return not_utf8(ord(found[0]) - 0xDC00) if found else None
