"""What points of a sweep were varied in: which settings, which of them are seeds, and what combinations are called."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from alignment.config.redact import REMOVED, setting_without_secrets
from alignment.files import canonical
from alignment.pipeline.sweeps import setting

Row = dict[str, Any]
UNSET = "not set"
LONGEST = 60


def is_seed(key: str) -> bool:
    """Settings that only draw another sample of the same: points that differ in nothing else are one combination."""
    return key == "seed" or key.endswith(".seed")


def mapping_at(value: Any, *names: str) -> dict[str, Any]:
    """The mapping that stands there in what a file says; empty if there is none."""
    for name in names:
        value = value.get(name) if isinstance(value, dict) else None
    return value if isinstance(value, dict) else {}


def short_names(keys: Sequence[str]) -> dict[str, str]:
    """stage.dpo.beta -> beta, or as many of its last parts as tell it from every other key."""
    names = {}
    for key in keys:
        parts = key.split(".")
        tails = (".".join(parts[-count:]) for count in range(1, len(parts) + 1))
        taken = [other for other in keys if other != key]
        names[key] = next((t for t in tails if not any(f".{o}".endswith(f".{t}") for o in taken)), key)
    return names


def numeric(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def shown(value: Any) -> str:
    """A setting's value as people write it, not longer than a table bears."""
    if isinstance(value, float):
        text = f"{value:.6g}".replace("e-0", "e-").replace("e+0", "e")
    else:
        text = value if isinstance(value, str) else canonical(value)
    return text if len(text) <= LONGEST else text[: LONGEST - 1] + "…"


def shown_of(settings: Row, key: str) -> str:
    return shown(settings[key]) if key in settings else UNSET


def own_settings(overrides: Sequence[str], given: Sequence[str]) -> str:
    """beta=0.1, seed=1: what a point was given, and its whole sweep was not. given: to the sweep, in other words
    perhaps: of the point Hydra has written 1e-4 as 0.0001."""
    common = [setting(one) for one in given]
    mine = [one for one in overrides if setting(one) not in common]
    settings = dict(setting(one) if setting_without_secrets(one) == one else (setting(one)[0], REMOVED) for one in mine)
    return called(settings, short_names([*settings]))


def called(settings: Row, names: dict[str, str]) -> str:
    """beta=0.1, loss=ipo: what a combination is called. names: key -> short name, of the keys that tell it apart."""
    return ", ".join(f"{name}={shown_of(settings, key)}" for key, name in names.items())
