"""The one interface of every launcher: submit a stage's job, ask how it is."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from alignment.life import Beat


@dataclass(frozen=True)
class Job:
    """One attempt at a stage.

    folder: its work folder, with stage.json. nodes, processes: so many processes on each of so many machines.
    lock: descriptor of the open lock file; the job keeps it open, so the key stays locked while anything works on it.
    """

    name: str
    folder: Path
    nodes: int
    processes: int
    attempt: int
    threads: int | None
    lock: int

    @property
    def world_size(self) -> int:
        return self.nodes * self.processes


class Handle(Protocol):
    def status(self) -> int | None:
        """None while the job runs, then its exit code (negative: the signal that ended it)."""

    def ranks(self) -> dict[int, Beat]:
        """Those of the job's ranks that live as processes of this host, whether they have beaten or not. Empty where it
        cannot know, or has but one process: that one's death is the job's end."""

    def kill(self) -> None:
        """End the job at once. (Who wants it to end in order asks its processes: they say who they are in beats/.)"""


class Launcher(Protocol):
    def submit(self, job: Job) -> Handle: ...


# Set by torchrun for the processes of a group. In our own environment they speak of somebody else's group.
GROUP = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE", "ROLE_RANK"}
GROUP |= {"ROLE_WORLD_SIZE", "ROLE_NAME", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID"}


def environment(job: Job) -> dict[str, str]:
    """The variables of a stage's processes: threads shared out before torch is imported, no silent network."""
    cores = len(os.sched_getaffinity(0))
    threads = job.threads or max(1, cores // job.processes)
    given = {
        "OMP_NUM_THREADS": str(threads),
        "TOKENIZERS_PARALLELISM": "false",
        "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "PYTHONUNBUFFERED": "1",
        "TORCH_FORCE_WEIGHTS_ONLY_LOAD": "1",  # whichever library calls torch.load: no pickle runs code
    }
    refused = {*GROUP, "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"}
    kept = {name: value for name, value in os.environ.items() if name not in refused}
    if "OMP_WAIT_POLICY" not in kept:  # threads that wait give way, or a second busy program slows training ninefold
        kept.setdefault("GOMP_SPINCOUNT", "1000")
    return {**kept, **given}
