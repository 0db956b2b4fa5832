"""Memory that is free for a process: on its GPU, or in its machine or container."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from alignment.cgroups import groups

CGROUPS = (  # of a group: its limit, its use, and the line of memory.stat with the file cache it would give back
    ("memory.max", "memory.current", "inactive_file"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)


def available_bytes() -> int:
    """Bytes free on this process's device: the GPU, or its share of this machine's (or container's) memory.

    To be asked before weights are loaded: what the process holds is not free.
    """
    return int(torch.cuda.mem_get_info()[0]) if torch.cuda.is_available() else host_share()


def host_share() -> int:
    """Bytes free for this process in the memory of its machine or container, shared out equally among processes."""
    return host_bytes(Path("/proc"), Path("/sys/fs/cgroup")) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def host_bytes(proc: Path, cgroup: Path) -> int:
    """Bytes that processes may still take: MemAvailable, or less if a control group (v2 or v1) above this one says so.

    File cache that a group would give back does not count as used, as it does not in MemAvailable.
    """
    lines = (proc / "meminfo").read_text().splitlines()
    available = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    return int(max(0, min([available, *(_room(group) for group in groups("memory", proc, cgroup))])))


def _room(group: Path) -> float:
    """Bytes left in a control group; infinite where it has no limit."""
    for limit, usage, cache in CGROUPS:
        try:
            most, used = int((group / limit).read_text()), int((group / usage).read_text())
            lines = (group / "memory.stat").read_text().splitlines()
        except (OSError, ValueError):  # no such group, or its limit is `max`
            continue
        return most - used + next((int(line.split()[1]) for line in lines if line.split()[0] == cache), 0)
    return float("inf")
