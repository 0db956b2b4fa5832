"""What the processes of a stage will run on: this machine, a cluster's, or one that `hardware` names."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from alignment.config.hardware import AUTO
from alignment.config.schema import Experiment
from alignment.training.activations import Device
from alignment.training.room import host_bytes

UNLIMITED = 2**62  # bytes, where nobody knows the room


@dataclass(frozen=True)
class Machine:
    """What the processes of the stages that train run on. room: bytes of a process; None: nobody knows."""

    device: Device
    room: int | None


def processes(experiment: Experiment, name: str) -> tuple[int, int]:
    """Machines of a stage, and its processes on each."""
    return experiment.launcher.layout(experiment.pipeline.nodes[name].stage, name, distributed=True)


def machine_of(experiment: Experiment, name: str) -> Machine:
    """For one node. Its room is what the settings say of its hardware; else of a cluster's machine it is not known, and
    of this one it is what is free now."""
    gigabytes, named = experiment.hardware.memory_gb, experiment.hardware.name != AUTO
    told = None if gigabytes is None else int(gigabytes * 1e9)
    if experiment.launcher.kind == "slurm":
        asked = experiment.launcher.resources(experiment.pipeline.nodes[name].stage, name, distributed=True)
        return Machine("cuda" if asked.gpus_per_node or named else "cpu", told)
    if torch.cuda.is_available():
        return Machine("cuda", told or int(torch.cuda.mem_get_info()[0]))
    if named:  # the estimate is of another machine
        return Machine("cuda", told)
    each = processes(experiment, name)[1]
    return Machine("cpu", told or host_bytes(Path("/proc"), Path("/sys/fs/cgroup")) // each)
