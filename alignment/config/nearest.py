"""The nearest right name."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def by_words(name: str, known: Iterable[str]) -> list[str]:
    """The known that have it as a part between underscores."""
    return [one for one in known if f"_{name}_" in f"_{one}_"]


def closest(name: str, known: Iterable[str], prefix: str = "", otherwise: str = "known: ") -> str:
    """The fix for a name that is none of the known: the one that has it as a part, or the nearest of them, else all."""
    parts = by_words(name, known := list(known))
    near = parts if len(parts) == 1 else difflib.get_close_matches(name, known, 1, 0.5)
    return f"did you mean `{prefix}{near[0]}`?" if near else otherwise + (", ".join(known) or "none")
