"""What computes: figures of the config, of the catalogue in conf/hardware by a GPU's name, or of a CPU as measured."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
import yaml

from alignment.config.hardware import AUTO, Hardware
from alignment.config.paths import CONF
from alignment.cores import usable

# Of what its matrix products reach a CPU reaches so much in training (docs/estimate.md), a GPU of its peak by
# assumption
ON_CPU, ON_GPU = 0.6, 0.4
SIDE = 512  # of the matrices that are multiplied: some milliseconds, in which others rarely get in between
COPIED = 32 << 20  # bytes


class Processor(NamedTuple):
    """What one process has. peak: operations a second; utilisation: the share of it that training reaches; memory,
    link, network: bytes a second, the latter two in one direction; room: bytes of memory; None: not known. told: by
    whom."""

    name: str
    peak: float | None
    utilisation: float
    memory: float | None
    link: float | None
    network: float | None
    watts: float | None
    room: float | None
    on_gpu: bool
    told: str

    @property
    def rate(self) -> float | None:
        """Operations a second that training reaches."""
        return None if self.peak is None else self.peak * self.utilisation


def device(hardware: Hardware, precision: Literal["fp32", "bf16"], here: bool, threads: int = 1) -> Processor | None:
    """What a process of a stage has; None where that is not known. here: whether it runs on this machine, so that
    `auto` is what there is. threads: CPU threads of the process."""
    if hardware.name != AUTO:
        return _of(hardware, precision, f"figures of {hardware.name}")
    if here and not torch.cuda.is_available():
        return _with(_measured(precision, threads), hardware, precision)
    known = catalogue().get(torch.cuda.get_device_name()) if here else None
    if known is not None:
        return _with(_of(known, precision, f"figures of {known.name}"), hardware, precision)
    given = _of(hardware, precision, "the figures of `hardware`")
    return None if given.peak is None else given


def catalogue() -> dict[str, Hardware]:
    """By the name that the driver gives them."""
    files = sorted((CONF / "hardware").glob("*.yaml"))
    read = [Hardware(**yaml.safe_load(file.read_text(encoding="utf-8"))) for file in files]
    return {one.name: one for one in read if one.name != AUTO}


def _of(known: Hardware, precision: str, told: str) -> Processor:
    tflops = known.tflops_bf16 if precision == "bf16" else known.tflops_fp32
    giga = (known.memory_bandwidth_gb_s, known.link_gb_s, known.network_gb_s)
    memory, link, network = (None if one is None else one * 1e9 for one in giga)
    peak, room = (None if one is None else one * by for one, by in ((tflops, 1e12), (known.memory_gb, 1e9)))
    share = known.utilisation or ON_GPU
    return Processor(known.name, peak, share, memory, link, network, known.watts, room, True, told)


def _with(found: Processor, given: Hardware, precision: str) -> Processor:
    """What is given wins over what was found."""
    own = _of(given, precision, "")
    changes = {name: getattr(own, name) for name in ("peak", "memory", "link", "network", "watts", "room")}
    if given.utilisation is not None:
        changes["utilisation"] = given.utilisation
    return found._replace(**{name: value for name, value in changes.items() if value is not None})


def _measured(precision: str, threads: int) -> Processor:
    """A CPU: its best of several, for others may be at work on it; half a second for each of the two."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        left, right, out = (torch.ones(SIDE, SIDE, dtype=dtype) for _ in range(3))
        product = _best(lambda: torch.mm(left, right, out=out))
        source, target = torch.ones(COPIED // 4), torch.empty(COPIED // 4)
        copy = _best(lambda: target.copy_(source))
    finally:
        torch.set_num_threads(before)
    peak, memory = 2 * SIDE**3 / product, 2 * COPIED / copy
    told = f"{threads} thread{'s' * (threads > 1)} of this CPU, measured: {peak / 1e9:.0f} GFLOP/s"
    return Processor("CPU", peak, ON_CPU, memory, None, None, None, None, False, told)


def _best(work: Callable[[], object], seconds: float = 0.5) -> float:
    """Seconds of the fastest call."""
    work()
    best, end = float("inf"), time.perf_counter() + seconds
    while (began := time.perf_counter()) < end:
        work()
        best = min(best, time.perf_counter() - began)
    return best


def threads_of(setting: int | None, processes: int) -> int:
    """Of one of the processes on this machine, as engine.start sets them."""
    return setting or max(1, usable() // processes)
