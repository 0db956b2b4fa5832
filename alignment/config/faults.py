"""What is wrong with settings that are right one by one."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Fault:
    """keys: those that contradict each other, first the one to look at."""

    what: str
    keys: tuple[str, ...]
    fix: str
