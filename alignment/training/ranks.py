"""The processes that train together: what each has, told to all of them. Every process must enter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.distributed as dist


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def all_gather(mine: Any) -> list[Any]:
    """What each process has, in the order of their ranks, on every process."""
    if world_size() == 1:
        return [mine]
    parts: list[Any] = [None] * world_size()
    dist.all_gather_object(parts, mine)
    return parts


def broadcast(answer: Callable[[], Any]) -> Any:
    """What the main process answers, on every process."""
    if world_size() == 1:
        return answer()
    told = [answer() if rank() == 0 else None]
    dist.broadcast_object_list(told, src=0)
    return told[0]
