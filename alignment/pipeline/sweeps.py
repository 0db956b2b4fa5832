"""A sweep: which runs belong to it and what they vary. sweeps/<sweep>/sweep.json in the store."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

from alignment.config.redact import run_command, setting_without_secrets
from alignment.config.varied import varied
from alignment.files import digest, read_json, write_json
from alignment.pipeline import claims
from alignment.pipeline.runner import Run
from alignment.pipeline.store import Lock, Store

FILE = "sweep.json"


class Sweep:
    """Of one command: the same command means the same sweep, and adds to it, also while another process of it works.
    Points come in one go or, from a sweeper that learns, a few at a time."""

    def __init__(self, settings: Sequence[str], arguments: Sequence[str], objective: Sequence[dict[str, str]]):
        """settings: as they were given, with all their values. arguments: those of the whole command. objective:
        {"metric", "direction"} of each metric that is looked at."""
        self.command = run_command(arguments)
        self._settings = list(settings)
        self.id = ""
        self.folder = Path()
        self._points: dict[str, list[str]] = {}  # run -> overrides
        self._pruned: set[str] = set()
        self._told: dict[str, Any] = {"objective": list(objective)}
        self._driver: Lock | None = None  # for as long as this process lives
        self._before: str | None = None

    def add(self, points: Iterable[tuple[Run, Sequence[str]]], write: bool = True) -> None:
        """write: to the file as well; else `write` is to be called once these points are no longer refused.

        Raises OSError, MachineError."""
        first: Run | None = None
        for run, overrides in points:
            first = first or run
            self.id = self.id or name_of(run, self._settings)
            run.belongs_to(self.id)
            self._points[run.id] = [setting_without_secrets(one) for one in overrides]
            for one in self._points[run.id]:
                setting(one)  # takes its time here rather than while others wait for the lock
        if first is None:
            return
        self.folder = first.store.root / "sweeps" / self.id
        self._told = {
            "sweep": self.id,
            "name": first.experiment.name,
            "created": time.time(),
            "command": self.command,
            "launcher": first.experiment.launcher.kind,
            "objective": self._told["objective"],
            "wandb_group": self.id if first.experiment.tracking.kind == "wandb" else None,
        }
        if self._driver is None:
            self._driver, self._before = first.store.driver_lock(self.id), claims.ended(first.store, self.id)
            self._driver.acquire(self.id)
        if write:
            self.write()
        else:
            self._read()

    def write(self) -> None:
        """All points that were added. Raises OSError, MachineError."""
        with self._alone():
            self._write()

    def is_cancelled(self) -> bool:
        """Whether `alignment cancel` has been given for it since this command began."""
        return self._driver is not None and claims.ended(Store(self.folder.parents[1]), self.id) != self._before

    def is_pruned(self, run: Run) -> bool:
        """Whether the point was stopped as hopeless, now or when the same command was given before."""
        return run.id in self._pruned

    def prune(self, run: Run, pruned: bool = True) -> None:
        """Raises OSError, MachineError."""
        with self._alone():
            (self._pruned.add if pruned else self._pruned.discard)(run.id)
            self._write()

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """While no other process of the command writes, and with all that these have written so far."""
        lock = Store(self.folder.parents[1]).sweep_lock(self.id)
        try:
            lock.wait(self.id, lambda holder: None, every=0.05)
            self._read()
            yield
        finally:
            lock.release()

    def _read(self) -> None:
        """Points that are there keep their places. Of those that both know the file knows better which are pruned."""
        with suppress(OSError):
            os.listdir(self.folder)  # NFS may remember the file that was there till it sees the folder anew
        try:
            told = read_json(self.folder / FILE)
        except (OSError, ValueError):
            return
        if not isinstance(told, dict):
            return
        known = _points_of(told)
        self._points = {run: point["overrides"] for run, point in known.items()} | self._points
        self._pruned -= known.keys()
        self._pruned |= {run for run, point in known.items() if point.get("pruned") is True}
        if isinstance(told.get("created"), int | float):
            self._told["created"] = told["created"]

    def _write(self) -> None:
        points: list[dict[str, Any]] = [
            {"run": run, "overrides": overrides, **({"pruned": True} if run in self._pruned else {})}
            for run, overrides in self._points.items()
        ]
        write_json(self.folder / FILE, {**self._told, "points": with_settings(points)}, durable=False)


def _points_of(told: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Run -> its point. What is no point is left out, as readers do: the command writes its own again."""
    points = told.get("points")
    named = (point for point in (points if isinstance(points, list) else []) if isinstance(point, dict))
    return {
        point["run"]: {**point, "overrides": _readable(point.get("overrides"))}
        for point in named
        if isinstance(point.get("run"), str) and point["run"]
    }


def _readable(overrides: Any) -> list[str]:
    """Of what a file calls overrides, those that are some."""
    from hydra.errors import HydraException  # slow to import, and readers need none

    found = []
    for one in overrides if isinstance(overrides, list) else ():
        with suppress(HydraException):
            if isinstance(one, str):
                setting(one)
                found.append(one)
    return found


def name_of(first: Run, settings: Sequence[str]) -> str:
    """Of a sweep, by its first point and the settings that were given."""
    return f"{first.experiment.name}-{digest(sorted(settings))[:8]}"


def with_settings(points: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each point with "settings": its values of those settings that are not the same in all points."""
    given = [
        {"settings": {name: _plain(value) for name, value in map(setting, point["overrides"])}} for point in points
    ]
    different = varied(given)
    return [
        {**point, "settings": {name: one["settings"][name] for name in different if name in one["settings"]}}
        for point, one in zip(points, given, strict=True)
    ]


@cache
def setting(override: str) -> tuple[str, Any]:
    """Key or group, and value, of what Hydra takes for one. Its parser takes milliseconds, and points have most of
    their settings in common."""
    from hydra.core.override_parser.overrides_parser import OverridesParser  # slow to import, and readers need none

    parsed = OverridesParser.create().parse_override(override)
    return parsed.key_or_group, parsed.value()


def _plain(value: Any) -> Any:
    return value if isinstance(value, bool | int | float | str | None) else str(value)
