"""Launchers: where a stage's processes run; chosen by name from this table, never by code in a config."""

from __future__ import annotations

from alignment.allocation import allocation
from alignment.config import schema
from alignment.errors import ConfigError
from alignment.launchers.base import Handle, Job, Launcher
from alignment.launchers.joined import JoinedLauncher
from alignment.launchers.local import LocalLauncher, TorchrunLauncher
from alignment.launchers.srun import SrunLauncher

__all__ = ["Handle", "Job", "Launcher", "launcher_for"]


def launcher_for(settings: schema.Launcher) -> Launcher:
    """Of the processes of one stage. Under SLURM this process is in the stage's job already."""
    if isinstance(settings, schema.SlurmLauncher):
        if allocation() is None:
            raise ConfigError(
                "`launcher.kind` is slurm, and this process is in no job", fix="alignment run queues them"
            )
        return SrunLauncher(settings)
    if isinstance(settings, schema.TorchrunLauncher):
        return JoinedLauncher(settings) if settings.nodes > 1 else TorchrunLauncher()
    return LocalLauncher()
