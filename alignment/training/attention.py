"""Attention over a pack: every branch sees the beginning it shares with others, and itself.

One function under the name PACKED in transformers' table of attention functions; the layout of the pack reaches every
layer through the forward's keyword arguments, so it is there again when gradient checkpointing computes a layer anew.
Which kernel does the work is decided by device, precision and what is installed:

cpu     one scaled_dot_product_attention a segment
flash   flash-attn's variable-length kernel (CUDA, bf16/fp16)
varlen  PyTorch's own variable-length kernel (CUDA, bf16/fp16, no soft-capping)
flex    flex_attention under torch.compile (CUDA, any precision)

Soft-capping is Gemma-2's (arXiv:2408.00118, section 2): cap * tanh(scores / cap) before the mask.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface

from alignment.training import sequence
from alignment.training.packing import Layout, Segment

PACKED = "packed"
WORDS = {
    "cpu": "one scaled_dot_product_attention a record (CPU)",
    "flash": "flash-attn's variable-length kernel",
    "varlen": "PyTorch's variable-length kernel",
    "flex": "flex_attention",
}
HALF = (torch.bfloat16, torch.float16)
MOST_MASKED = 2048 * 2048  # numbers of a mask that is made to leave queries out


class NotPackable(Exception):
    """The model asks of attention what a pack does not give."""


@dataclass(frozen=True)
class Scores:
    """What becomes of query @ key: times scale (None: dim ** -0.5), capped, seen through a window of so many tokens.

    narrow: answers of the queries before each segment's `first` are not read; a kernel may leave them out.
    """

    scale: float | None
    window: int | None
    softcap: float | None
    narrow: bool = False


@torch.compiler.disable  # the layout differs from pack to pack: a compiled one would be compiled for each
def packed_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    layout: Layout | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    narrow: bool = False,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """query: [1, heads, N, dim]; key, value: [1, key heads, N, dim]. Returns [1, N, heads, dim] and no weights."""
    shape = query.shape[2], query.shape[1]
    try:
        layout = _packable(layout, dropout, kwargs)
        _require_heads(query.shape[1], key.shape[1])
        if torch.is_autocast_enabled(query.device.type):  # rotary embeddings have left queries and keys in fp32
            dtype = torch.get_autocast_dtype(query.device.type)
            query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
        kernel = backend(query, softcap)
        query, key, value = (sequence.to_heads(part) for part in (query, key, value))
        out = KERNELS[kernel](query, key, value, layout, Scores(scaling, sliding_window, softcap, narrow))
        out = sequence.to_tokens(out)
    except Exception as error:
        if _seen is None:
            raise
        _seen.errors.append(error)
        return value.new_zeros(1, *shape, value.shape[3]), None
    if _seen is not None:
        _seen.calls.append(Call(sliding_window, kernel))
    return out, None


def _packable(layout: Layout | None, dropout: float, asked: dict[str, Any]) -> Layout:
    if layout is None:
        raise NotPackable("the model does not hand the layout of a pack to its attention layers")
    wanted = {name for name in ("position_bias", "s_aux", "head_mask") if asked.get(name) is not None}
    if dropout or wanted:
        raise NotPackable(f"its attention uses {', '.join(sorted(wanted)) or 'dropout'}")
    return layout


def _require_heads(heads: int, key_heads: int) -> None:
    if key_heads % sequence.size() or heads % sequence.size():
        raise NotPackable(f"{sequence.size()} processes cannot share {heads} heads and {key_heads} of keys equally")


class Call(NamedTuple):
    """What one layer asked for, and which kernel computed it."""

    window: int | None
    kernel: str


@dataclass
class Seen:
    """The calls of a time, in their order, and what those that failed would have raised."""

    calls: list[Call] = field(default_factory=list)
    errors: list[Exception] = field(default_factory=list)


_seen: Seen | None = None  # while `calls_seen` looks on


@contextmanager
def calls_seen() -> Iterator[Seen]:
    """Meanwhile calls are noted, and one that fails is noted and answered by zeros: an exception in the middle of a
    forward would leave the parameters that ZeRO-3 has gathered for the layer where they are."""
    global _seen
    _seen = seen = Seen()
    try:
        yield seen
    finally:
        _seen = None


# Without a mask function of the same name transformers makes no mask - the layout is the mask - and does not look at
# the positions for packed rows, for which it would wait for the device.
AttentionInterface.register(PACKED, packed_attention)


def backend(query: Tensor, softcap: float | None = None) -> str:
    """The kernel for queries like these: cpu | flash | varlen | flex."""
    if query.device.type != "cuda":
        return "cpu"
    return cuda_backend(query.dtype, softcap is not None, _has_flash(), _has_varlen())


def cuda_backend(dtype: torch.dtype, softcap: bool, has_flash: bool, has_varlen: bool) -> str:
    if dtype in HALF and has_flash:
        return "flash"
    if dtype in HALF and has_varlen and not softcap:
        return "varlen"
    return "flex"


@cache
def _has_flash() -> bool:
    try:
        from flash_attn import flash_attn_varlen_func  # noqa: F401
    except Exception:  # absent, or built for another PyTorch
        return False
    return True


@cache
def _has_varlen() -> bool:
    there = importlib.util.find_spec("torch.nn.attention.varlen") is not None
    return there and torch.cuda.get_device_capability() >= (8, 0)


# --- cpu --------------------------------------------------------------------------------------------------------------


def _by_segment(query: Tensor, key: Tensor, value: Tensor, layout: Layout, scores: Scores) -> Tensor:
    """Cut once, for the backward pass of a cut is one cat, that of many slices fills many tensors with zeros."""
    sizes, spans = layout.pieces
    keys, values = key.split(sizes, 2), value.split(sizes, 2)
    skipped = [_left_out(segment, scores) for segment in layout.segments]
    bounds = [(skip, s.end - s.start - skip) for s, skip in zip(layout.segments, skipped, strict=True)]
    queries = query.split([size for pair in bounds for size in pair], 2)
    out = []
    for number, (prefix, own) in enumerate(spans):
        if skipped[number]:
            out.append(value.new_zeros(*query.shape[:2], skipped[number], value.shape[3]))
        q = queries[2 * number + 1]
        if q.shape[2]:
            k, v = (_joined(parts[prefix] + parts[own]) for parts in (keys, values))
            out.append(_segment(q, k, v, layout, number, skipped[number], scores))
    return torch.cat(out, 2).transpose(1, 2)


def _joined(parts: tuple[Tensor, ...]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, 2)


def _left_out(segment: Segment, scores: Scores) -> int:
    """Queries at a segment's beginning that are not computed. Without them the kernel's own causal mask will not do, so
    a segment that needs no other keeps them, unless they are many; and a mask is no larger than MOST_MASKED."""
    skip = segment.unread if scores.narrow else 0
    left = segment.end - segment.start - skip
    if not left or segment.prefix or scores.softcap is not None or _window(segment, scores) is not None:
        return skip
    return skip if 3 * skip >= segment.keys and left * segment.keys <= MOST_MASKED else 0


def _window(segment: Segment, scores: Scores) -> int | None:
    return scores.window if scores.window is not None and scores.window < segment.keys else None


def _segment(q: Tensor, k: Tensor, v: Tensor, layout: Layout, number: int, skip: int, scores: Scores) -> Tensor:
    window = _window(layout.segments[number], scores)
    if scores.softcap is not None:
        return _capped(q, k, v, layout.mask(number, window, q, skip), scores)
    square = q.shape[2] == k.shape[2] and window is None  # the kernel's own causal mask will do
    mask = None if square else layout.mask(number, window, q, skip)
    grouped = k.shape[1] != q.shape[1]
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=square, scale=scores.scale, enable_gqa=grouped
    )


def _capped(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, how: Scores) -> Tensor:
    """Attention with soft-capped scores, written out: no fused kernel of the CPU has them."""
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    assert how.softcap is not None
    scores = q @ k.transpose(2, 3) * (q.shape[-1] ** -0.5 if how.scale is None else how.scale)
    scores = how.softcap * torch.tanh(scores / how.softcap) + mask
    return torch.softmax(scores, -1, dtype=torch.float32).to(v.dtype) @ v


# --- cuda: without a GPU, tests reach only what is computed here of lengths and masks, not the kernels ----------------


def unpadded(query: Tensor, key: Tensor, value: Tensor, layout: Layout) -> tuple[Tensor, ...]:
    """-> query [N, heads, dim]; key, value [keys, key heads, dim], a branch's shared beginning before its own; firsts
    of queries and of keys [segments + 1]."""
    query, key, value = (part[0].transpose(0, 1) for part in (query, key, value))
    queries, keys, index = layout.lengths(query.device)
    if layout.shares:
        key, value = key.index_select(0, index), value.index_select(0, index)
    return query, key, value, queries, keys


def _flash(query: Tensor, key: Tensor, value: Tensor, layout: Layout, scores: Scores) -> Tensor:
    from flash_attn import flash_attn_varlen_func

    q, k, v, queries, keys = unpadded(query, key, value, layout)
    window = (-1, -1) if scores.window is None else (scores.window - 1, 0)
    out = flash_attn_varlen_func(
        q, k, v, queries, keys, *layout.longest,
        softmax_scale=scores.scale, causal=True, window_size=window, softcap=scores.softcap or 0.0,
    )  # fmt: skip
    return out[None]


def _varlen(query: Tensor, key: Tensor, value: Tensor, layout: Layout, scores: Scores) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    q, k, v, queries, keys = unpadded(query, key, value, layout)
    window = (-1, 0) if scores.window is None else (scores.window - 1, 0)
    grouped = k.shape[1] != q.shape[1]
    out = varlen_attn(
        q, k, v, queries, keys, *layout.longest, scale=scores.scale, window_size=window, enable_gqa=grouped
    )
    return out[None]  # type: ignore[call-overload] # no aux was asked for


def _flex(query: Tensor, key: Tensor, value: Tensor, layout: Layout, scores: Scores) -> Tensor:
    return _flex_kernel(_compiled_flex(), query, key, value, layout, scores)


def _flex_kernel(
    attend: Callable[..., Tensor], query: Tensor, key: Tensor, value: Tensor, layout: Layout, scores: Scores
) -> Tensor:
    from torch.nn.attention.flex_attention import create_block_mask

    count, window = query.shape[2], scores.window
    seen = layout.seen(query.device)
    make = _compiled_block_mask() if query.device.type == "cuda" else create_block_mask
    block_mask = layout.made(
        ("block mask", window, query.device),
        lambda: make(lambda batch, head, q, k: seen(q, k, window), None, None, count, count, device=query.device.type),
    )
    cap = scores.softcap

    def capped(score: Tensor, batch: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return cap * torch.tanh(score / cap)  # type: ignore[operator] # only called where there is one

    grouped = key.shape[1] != query.shape[1]
    out = attend(
        query, key, value, score_mod=capped if cap else None, block_mask=block_mask, scale=scores.scale,
        enable_gqa=grouped,
    )  # fmt: skip
    return out.transpose(1, 2)


@cache
def _compiled_flex() -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=True)


@cache
def _compiled_block_mask() -> Callable[..., Any]:
    """Compiled, it is found block by block; as it stands, from a mask of all tokens by all tokens."""
    from torch.nn.attention.flex_attention import create_block_mask

    return torch.compile(create_block_mask, dynamic=True)


KERNELS = {"cpu": _by_segment, "flash": _flash, "varlen": _varlen, "flex": _flex}
