"""Sequence parallelism: processes that share a pack, each with a stretch of its tokens.

As in DeepSpeed-Ulysses (Jacobs et al. 2023, arXiv:2309.14509), but of packs, and under any engine: all that works token
by token is done by each process on its own stretch; attention, which does not, gets all tokens of some of the heads, by
one exchange before it and one after. Log-probs are brought together at the end, so each of the sharers computes the
whole loss; backwards each goes on with its own tokens alone, and the sum of their gradients is that of the pack. Data
parallelism makes that sum anyway: engines know nothing of it.

Sharers are neighbours: ranks 0 .. size - 1, and so on. Which ones is decided once a stage, by `form`.
"""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from alignment.training.packing import Layout, Pack


class _Sharers:
    """size: of the group of this process; group: of torch.distributed, None where nobody shares."""

    size: int = 1
    group: Any = None


def form(size: int, patience: timedelta) -> None:
    """Every process of the run must call it, once the process group is there. patience: with those that are silent."""
    _Sharers.size, _Sharers.group = size, _groups(size, patience) if size > 1 else None


@cache
def _groups(size: int, patience: timedelta) -> Any:
    """The group of this process; all are made by all."""
    firsts = range(0, dist.get_world_size(), size)
    groups = {first: dist.new_group(list(range(first, first + size)), timeout=patience) for first in firsts}
    return groups[dist.get_rank() // size * size]


def size() -> int:
    return _Sharers.size


def place() -> int:
    """Of this process among the sharers."""
    return dist.get_rank(_Sharers.group) if size() > 1 else 0


def cut(pack: Pack) -> Pack:
    """This process's stretch of a pack, whose tokens the sharers divide equally. Its scored tokens are those inside;
    its layout says what the whole pack's did, but that no answer may be left out of the last layer."""
    if size() == 1:
        return pack
    length = pack.tokens // size()
    first = place() * length
    mine = (pack.scored >= first) & (pack.scored < first + length)
    return replace(
        pack,
        ids=pack.ids[:, first : first + length],
        positions=pack.positions[:, first : first + length],
        scored=pack.scored[mine] - first,
        targets=pack.targets[mine],
        cells=pack.cells[mine],
        layout=Layout(pack.layout.segments),
    )


def whole(values: Tensor) -> Tensor:
    """The sum over the sharers, of whom one alone has a number other than 0 in each place."""
    if size() == 1:
        return values
    total: Tensor = _Sum.apply(values.int()) if values.dtype == torch.bool else _Sum.apply(values)
    return total.to(values.dtype)


class _Sum(torch.autograd.Function):
    """Backwards each keeps its own: all sharers have computed the same gradient."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        total = values.detach().clone()
        dist.all_reduce(total, group=_Sharers.group)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


def to_heads(values: Tensor) -> Tensor:
    """[1, heads, own tokens, dim] -> [1, own heads, all tokens, dim]; own heads are neighbours."""
    return values if size() == 1 else _ToHeads.apply(values)


def to_tokens(values: Tensor) -> Tensor:
    """[1, all tokens, own heads, dim] -> [1, own tokens, all heads, dim]."""
    return values if size() == 1 else _ToTokens.apply(values.transpose(1, 2)).transpose(1, 2)


class _ToHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        return _tokens_to_heads(values)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return _heads_to_tokens(gradient)


class _ToTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        return _heads_to_tokens(values)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return _tokens_to_heads(gradient)


def _tokens_to_heads(values: Tensor) -> Tensor:
    """[1, k h, n, d] -> [1, h, k n, d], k the number of sharers."""
    _, heads, tokens, dim = values.shape
    come = _exchanged(values.reshape(size(), heads // size(), tokens, dim))
    return come.transpose(0, 1).reshape(1, heads // size(), size() * tokens, dim)


def _heads_to_tokens(values: Tensor) -> Tensor:
    """[1, h, k n, d] -> [1, k h, n, d]."""
    _, heads, tokens, dim = values.shape
    come = _exchanged(values.reshape(heads, size(), tokens // size(), dim).transpose(0, 1))
    return come.reshape(1, size() * heads, tokens // size(), dim)


def _exchanged(parts: Tensor) -> Tensor:
    """parts[i] goes to sharer i; what comes of it has its number."""
    parts = parts.contiguous()
    come = torch.empty_like(parts)
    dist.all_to_all_single(come, parts, group=_Sharers.group)
    return come
