"""Which settings differ between the points of a sweep."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from alignment.files import canonical

Row = dict[str, Any]


def level(value: Any) -> str:
    """Equal values, equal text, whatever type carried the number: 1 and 1.0 are one value, 1 and "1" are not."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return repr(float(value))
    return canonical(value)


def level_of(settings: Row, key: str) -> str:
    """As `level`; "" where the point does not have the setting."""
    return level(settings[key]) if key in settings else ""


def varied(points: Iterable[Row]) -> list[str]:
    """Keys of "settings" that not all points have with the same value, in the order in which they first stand."""
    settings = [point["settings"] for point in points]
    keys = dict.fromkeys(key for one in settings for key in one)
    return [key for key in keys if len({level_of(one, key) for one in settings}) > 1]
