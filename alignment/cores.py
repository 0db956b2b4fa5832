"""Cores that this process may use: those that it is bound to, and no more than its control groups pay for."""

from __future__ import annotations

import os
from pathlib import Path

from alignment.cgroups import groups


def usable(proc: Path = Path("/proc"), cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Of the affinity, and at most what the CPU quotas (v2 or v1) of this control group and those above allow, rounded
    down; at least one."""
    return max(1, int(min([len(os.sched_getaffinity(0)), *map(_quota, groups("cpu", proc, cgroup))])))


def _quota(group: Path) -> float:
    """Cores' worth of time that a control group gets; infinite where it has no limit."""
    for names in (("cpu.max",), ("cpu.cfs_quota_us", "cpu.cfs_period_us")):
        try:
            quota, period = map(int, " ".join((group / name).read_text() for name in names).split())
        except (OSError, ValueError):  # no such group, or its quota is `max`
            continue
        if quota > 0:  # -1: none
            return quota / period
    return float("inf")
