"""The job of a SLURM cluster that this process is in, as its environment tells it."""

from __future__ import annotations

import os
from dataclasses import dataclass


@dataclass(frozen=True)
class Allocation:
    """job: as SLURM's commands take it. restarts: times it was queued again before. nodes: in SLURM's short form."""

    job: str
    restarts: int
    nodes: str


def allocation() -> Allocation | None:
    """None outside of a job."""
    given = os.environ
    if "SLURM_JOB_ID" not in given:
        return None
    array = given.get("SLURM_ARRAY_JOB_ID")
    # The last element of an array has the array's own number as its job's: that would name all of them.
    job = f"{array}_{given.get('SLURM_ARRAY_TASK_ID', 0)}" if array else given["SLURM_JOB_ID"]
    restarts = given.get("SLURM_RESTART_COUNT", "0")
    return Allocation(job, int(restarts) if restarts.isdecimal() else 0, given.get("SLURM_JOB_NODELIST", ""))
