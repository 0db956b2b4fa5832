"""Launchers: where a stage's processes run; chosen by name from this table, never by code in a config."""

from __future__ import annotations

from alignment.config import schema
from alignment.launchers.base import Handle, Job, Launcher
from alignment.launchers.local import LocalLauncher, TorchrunLauncher

__all__ = ["Handle", "Job", "Launcher", "launcher_for"]


def launcher_for(settings: schema.Launcher) -> Launcher:
    if isinstance(settings, schema.TorchrunLauncher):
        return TorchrunLauncher(settings.processes)
    return LocalLauncher()
