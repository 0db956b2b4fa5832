"""Bytes that a process sends in an optimiser step, and what of the time they take computing hides.

By Rajbhandari et al. 2020, ZeRO (arXiv:1910.02054), section 7, and Wang et al. 2023, ZeRO++ (arXiv:2306.10209), as
DeepSpeed 0.19.8 and PyTorch really send them: docs/clusters.md says where they differ, and which of it was counted in
runs. In fp32 the same collectives are taken to move 4 bytes a number.
"""

from __future__ import annotations

from typing import NamedTuple

from alignment.estimating.hardware import Processor
from alignment.training.activations import BF16, FP32
from alignment.training.memory import Load

REACHED = 0.8  # of a link's rate
PCIE = 25e9  # bytes a second between a GPU and its host, in one direction: reached by Gen4 x16
HOST = 200e9  # bytes a second of a node's memory that an optimiser on the CPU reaches
ADAM_ON_HOST = 30  # bytes read and written a weight: weight, gradient, moments; weight, moments, a bf16 copy
ADAM = 40  # on the device: the same in fp32, without the copy, and clipping reads gradients twice and writes them once


class Traffic(NamedTuple):
    """Bytes of one process in a step. across: in collectives of all; inside: in those of its node alone; after: of
    `across` what no backward pass hides."""

    across: float = 0.0
    inside: float = 0.0
    after: float = 0.0


def traffic(load: Load, micro: int, node: int) -> Traffic:
    """micro: micro-batches of a step; node: processes of one. A collective of S bytes has each of N processes send
    S (N - 1) / N, an all-reduce twice that."""
    size, psi, t = load.world_size, load.parameters, load.trainable
    share, own = (size - 1) / size, (node - 1) / node
    number = BF16 if load.dtype == "bf16-weights" else FP32
    match load.strategy:
        case "single":
            return Traffic()
        case "ddp":  # buckets of fp32 gradients, at the last micro-batch
            return Traffic(2 * FP32 * t * share)
        case "zero1":
            return Traffic(3 * number * t * share, after=3 * number * t * share)
        case "zero2":
            return Traffic((2 * micro + 1) * number * t * share, after=number * t * share)
    if load.hpz > 1 and t < psi:  # frozen weights never change: their second copy stays good
        return Traffic((2 + micro) * number * t * share, 2 * number * psi * micro * own)
    if load.hpz > 1:
        return Traffic((number * psi + number * t * micro) * share, (2 * micro - 1) * number * psi * own)
    return Traffic((2 * psi + t) * number * micro * share)


def seconds(sent: Traffic, device: Processor, nodes: int, node: int) -> tuple[float, float] | None:
    """What computing may hide, and what it can not; None where a rate is not known. A ring of several nodes is as fast
    as a node's way out, which its processes share; node: their number."""
    if not sent.across and not sent.inside:
        return 0.0, 0.0
    if device.link is None or (nodes > 1 and device.network is None):
        return None
    inside = REACHED * device.link
    across = inside if nodes == 1 else min(inside, REACHED * node * (device.network or 0.0))
    return (sent.across - sent.after) / across + sent.inside / inside, sent.after / across


def optimiser(load: Load, micro: int, device: Processor, nodes: int) -> float | None:
    """Seconds of AdamW and of what goes to the host and back, which nothing hides. Its reads and writes decide: no
    operation but the products of matrices is dear. None where the memory's rate is not known."""
    own = load.trainable / (load.world_size if load.strategy.startswith("zero") else 1)
    if load.offload == "none" or not device.on_gpu:
        return None if device.memory is None else ADAM * own / device.memory
    number = BF16 if load.dtype == "bf16-weights" else FP32
    moved = (FP32 + number) * own + (2 * FP32 * own * (micro - 1) if load.strategy == "zero3" else 0.0)
    if load.offload == "all":
        moved += 2 * micro * number * load.parameters / load.world_size
    return moved / PCIE + ADAM_ON_HOST * load.trainable / nodes / HOST
