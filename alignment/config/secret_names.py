"""Which names are those of secrets, in settings and in texts such as `export DB_PASSWORD=...`."""

from __future__ import annotations

import re
from collections.abc import Iterator

_WORDS = {"secret", "secrets", "password", "passwd", "passphrase", "credential", "credentials", "apikey", "pgpassword"}
_ENDINGS = {"token", "key"}
_TEXTS = {"bos", "eos", "pad", "unk", "sep", "cls", "mask", "image"}  # eos_token and its like are text, no secrets
_DIGEST = re.compile(r"[0-9a-f]{16}|[0-9a-f]{64}")
_NAME = re.compile(r"(?<![\w.-])([\w.-]+)\+?=")
# What a shell takes for a value: quoted in parts, as a whole, or not. A quote that has no end ends with the text.
_VALUE = re.compile(r"""(?:\\.|"(?:\\.|[^"\\])*(?:"|\Z)|'[^']*(?:'|\Z)|[^\s"'\\])+""", re.S)
_REFERENCE = re.compile(r"""(["']?)\$(\w+|\{\w+\})\1""")


def is_secret(name: str, value: object) -> bool:
    """By the name. Not a `key` that holds a digest: our own stage keys."""
    words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower().replace("-", "_").replace(".", "_").split("_")
    if words == ["key"] and isinstance(value, str) and _DIGEST.fullmatch(value):
        return False
    if _WORDS & set(words):
        return True
    return words[-1] in _ENDINGS and not (words[-1] == "token" and len(words) > 1 and words[-2] in _TEXTS)


def secrets_in(text: str) -> Iterator[tuple[str, int, int]]:
    """Those that a text gives as NAME=value: name, and where the value begins and ends. A value that only names a
    variable ($X) is none; nor is `key=...`, as texts have it about anything."""
    end = 0
    for found in _NAME.finditer(text):
        name, value = found[1], _VALUE.match(text, found.end())
        if found.start() < end or value is None or name.lower() == "key" or not is_secret(name, value[0]):
            continue
        end = value.end()
        if not _REFERENCE.fullmatch(value[0]):
            yield name, value.start(), end
