"""A sweep: which runs belong to it and what they vary. sweeps/<sweep>/sweep.json in the store."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from alignment.config.redact import run_command, setting_without_secrets
from alignment.config.varied import varied
from alignment.files import digest, read_json, write_json
from alignment.pipeline.runner import Run

FILE = "sweep.json"


class Sweep:
    """Of one command: the same command means the same sweep, and adds to it. Points come in one go or, from a sweeper
    that learns, a few at a time."""

    def __init__(self, settings: Sequence[str], arguments: Sequence[str], objective: Sequence[dict[str, str]]):
        """settings: as they were given, with all their values. arguments: those of the whole command. objective:
        {"metric", "direction"} of each metric that is looked at."""
        self.command = run_command(arguments)
        self._settings = list(settings)
        self.id = ""
        self.folder = Path()
        self._points: dict[str, dict[str, Any]] = {}
        self._told: dict[str, Any] = {"objective": list(objective)}

    def add(self, points: Iterable[tuple[Run, Sequence[str]]]) -> None:
        """Raises OSError."""
        first: Run | None = None
        for run, overrides in points:
            first = first or run
            self.id = self.id or name_of(run, self._settings)
            run.belongs_to(self.id)
            self._points[run.id] = {"run": run.id, "overrides": [setting_without_secrets(one) for one in overrides]}
        if first is None:
            return
        self.folder = first.store.root / "sweeps" / self.id
        known = self._known()
        for point in known.get("points", []):
            mine = self._points.setdefault(point["run"], {"run": point["run"], "overrides": point["overrides"]})
            if point.get("pruned") is True:
                mine["pruned"] = True
        self._told = {
            "sweep": self.id,
            "name": first.experiment.name,
            "created": known.get("created") or time.time(),
            "command": self.command,
            "launcher": first.experiment.launcher.kind,
            "objective": self._told["objective"],
            "wandb_group": self.id if first.experiment.tracking.kind == "wandb" else None,
        }
        self._write()

    def is_pruned(self, run: Run) -> bool:
        """Whether the point was stopped as hopeless, now or when the same command was given before."""
        return bool(self._points[run.id].get("pruned"))

    def prune(self, run: Run, pruned: bool = True) -> None:
        """Raises OSError."""
        self._points[run.id].pop("pruned", None)
        if pruned:
            self._points[run.id]["pruned"] = True
        self._write()

    def _write(self) -> None:
        write_json(
            self.folder / FILE, {**self._told, "points": with_settings(list(self._points.values()))}, durable=False
        )

    def _known(self) -> dict[str, Any]:
        try:
            told = read_json(self.folder / FILE)
        except (OSError, ValueError):
            return {}
        return told if isinstance(told, dict) else {}


def name_of(first: Run, settings: Sequence[str]) -> str:
    """Of a sweep, by its first point and the settings that were given."""
    return f"{first.experiment.name}-{digest(sorted(settings))[:8]}"


def with_settings(points: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each point with "settings": its values of those settings that are not the same in all points."""
    given = [
        {"settings": {name: _plain(value) for name, value in map(_setting, point["overrides"])}} for point in points
    ]
    different = varied(given)
    return [
        {**point, "settings": {name: one["settings"][name] for name in different if name in one["settings"]}}
        for point, one in zip(points, given, strict=True)
    ]


@cache
def _setting(override: str) -> tuple[str, Any]:
    """Key or group, and value. Hydra's parser takes milliseconds, and points have most of their settings in common."""
    from hydra.core.override_parser.overrides_parser import OverridesParser  # slow to import, and readers need none

    parsed = OverridesParser.create().parse_override(override)
    return parsed.key_or_group, parsed.value()


def _plain(value: Any) -> Any:
    return value if isinstance(value, bool | int | float | str | None) else str(value)
