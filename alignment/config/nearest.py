"""The nearest right name."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def closest(name: str, known: Iterable[str], prefix: str = "", otherwise: str = "known: ") -> str:
    """The fix for a name that is none of the known: the nearest of them, else all of them."""
    near = difflib.get_close_matches(name, known := list(known), 1, 0.5)
    return f"did you mean `{prefix}{near[0]}`?" if near else otherwise + (", ".join(known) or "none")
