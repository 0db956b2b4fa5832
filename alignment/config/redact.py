"""Settings and commands without their secrets, fit to be kept, shown and sent elsewhere."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Mapping
from typing import Any

from alignment.config.secret_names import is_secret, secrets_in

REMOVED = "[removed]"
_GIT_NAMES = {"revision", "commit", "sha", "sha1"}  # 40 hex digits there are a commit
_COMMIT = re.compile(r"(?<![\w-])[0-9a-f]{40}(?![\w-])")
_TOKENS = re.compile(
    r"\bhf_[A-Za-z0-9]{16,}|\bwandb_v\d+_\w{16,}|(?<![0-9A-Za-z/@])[0-9a-f]{40}(?![0-9A-Za-z/])"
    r"|\b(?:sk|pk|rk)-[A-Za-z0-9_-]{20,}|\bgh[pousr]_[A-Za-z0-9]{20,}|\bgithub_pat_\w{20,}|\bglpat-[\w-]{20,}"
    r"|\bAKIA[0-9A-Z]{16}\b|\beyJ[\w-]{10,}\.[\w-]{10,}\.[\w-]{10,}|://[^/\s:@]*:[^/\s@]+@"
)


def without_secrets(value: Any, name: str = "") -> Any:
    """A copy of nested settings, fit for JSON, with "[removed]" for each secret: known by its name, or by how it looks.

    By name: `hf_token`, `token`, `api_key`, `client_secret`, `password` ..., whatever non-empty value they have. So too
    in texts of NAME=value, such as a line of a shell, but for values that only name a variable ($X).
    Not: `key` where it holds a digest (our own stage keys), `eos_token` and its like, plurals such as `max_new_tokens`.
    By look: tokens of Hugging Face, W&B, GitHub, GitLab, OpenAI and AWS, JSON web tokens, passwords in URLs.
    """
    if value is None or isinstance(value, bool) or value == "":
        return value
    if is_secret(name, value):
        return REMOVED
    if isinstance(value, Mapping):
        return {str(key): without_secrets(inner, str(key)) for key, inner in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [without_secrets(inner) for inner in value]
    if isinstance(value, int | float):
        return value
    text = str(value)
    if _TOKENS.search(_COMMIT.sub("", text) if name.lower() in _GIT_NAMES else text):
        return REMOVED
    return _without_named(text)


def setting_without_secrets(setting: str) -> str:
    """key=value as it is given to the command. The value goes as a whole, so that Hydra can still read what is left."""
    key, _, value = setting.partition("=")
    name = key.lstrip("+~")
    kept = not is_secret(name, value) and without_secrets(value, name.rpartition(".")[2]) == value
    return setting if kept else f"{key}={REMOVED}"


def run_command(arguments: Iterable[str]) -> str:
    """`alignment run` with these arguments, as it is kept with runs and sweeps and shown to whoever reads of them."""
    return shlex.join(["alignment", "run", *map(setting_without_secrets, arguments)])


def _without_named(text: str) -> str:
    parts, at = [], 0
    for _, first, end in secrets_in(text):
        parts += [text[at:first], REMOVED]
        at = end
    return "".join([*parts, text[at:]])
