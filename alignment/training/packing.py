"""Rows -> one packed row without padding, in which a prefix that rows share stands once.

A micro-batch is a forest: each group of rows (SFT: one row; a pair: chosen and rejected; a group of answers to one
prompt: all of them) has its common beginning once, and after it a branch a row. Attention lets a branch see the shared
beginning and itself (training/attention.py), positions count from each row's own first token, so every token has the
hidden state that it has when its row is computed alone.

Made where rows are collated, on the CPU, so that the inner loop never waits for the device to learn a shape.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

IGNORED = -100
BUCKET = 256  # tokens: packs for a compiled model are filled up to a multiple of it


@dataclass(frozen=True)
class Segment:
    """Queries start..end of the pack see keys prefix_start..prefix_end, all of them, and their own, causally.

    first: no answer is made of the queries before it, so the last layer need not compute them; -1 stands for start.
    """

    start: int
    end: int
    prefix_start: int
    prefix_end: int
    first: int = -1

    @property
    def prefix(self) -> int:
        return self.prefix_end - self.prefix_start

    @property
    def keys(self) -> int:
        return self.prefix + self.end - self.start

    @property
    def unread(self) -> int:
        """Queries at its beginning of which no answer is made."""
        return self.first - self.start if self.first >= 0 else 0

    def mask(self, window: int | None, dtype: torch.dtype, device: torch.device, skip: int = 0) -> Tensor:
        """[queries, keys], added to the scores: 0 where a query sees a key, -inf elsewhere.

        window: a query sees itself and the window - 1 tokens before it (Mistral, Gemma), or all before it if None.
        skip: so many queries at the beginning are left out.
        """
        query = torch.arange(self.prefix + skip, self.keys, device=device)[:, None]
        distance = query - torch.arange(self.keys, device=device)[None]
        seen = (distance >= 0) if window is None else (distance >= 0) & (distance < window)
        return torch.zeros(seen.shape, dtype=dtype, device=device).masked_fill_(~seen, float("-inf"))


class Indices(NamedTuple):
    """What a GPU's kernels want of S segments of N tokens in all, which see K keys in all.

    queries, keys: [S + 1] int32, firsts of each segment's. seen: [K], which token of the pack a key is. start,
    prefix_start, prefix_end: [N], those of each token's segment.
    """

    queries: Tensor
    keys: Tensor
    seen: Tensor
    start: Tensor
    prefix_start: Tensor
    prefix_end: Tensor

    @classmethod
    def of(cls, segments: Sequence[Segment]) -> Indices:
        counts = [s.end - s.start for s in segments], [s.keys for s in segments]
        firsts = [torch.tensor([0, *each]).cumsum(0).to(torch.int32) for each in counts]
        spans = [span for s in segments for span in ((s.prefix_start, s.prefix_end), (s.start, s.end))]
        columns = zip(*((s.start, s.prefix_start, s.prefix_end) for s in segments), strict=True)
        each = [torch.tensor(column).repeat_interleave(torch.tensor(counts[0])) for column in columns]
        return cls._make([*firsts, torch.cat([torch.arange(*span) for span in spans]), *each])

    def to(self, device: torch.device) -> Indices:
        return Indices._make(part.to(device, non_blocking=True) for part in self)


class Layout:
    """Which token sees which: the segments of a pack, and what kernels want of them, made when first asked for."""

    def __init__(self, segments: Sequence[Segment], read: Tensor | None = None, indices: Indices | None = None):
        """read: [K], the places, each once, of which answers are made; None: any. indices: those of a pack on its way
        to a GPU; a CPU's kernel wants none."""
        self.segments = list(segments)
        self.read = read
        self._indices = indices
        self._made: dict[Any, Any] = {}

    def indices(self, device: torch.device) -> Indices:
        """On this device, where they are if the pack was brought there."""
        if self._indices is None or self._indices.seen.device != device:
            self._indices = (self._indices or Indices.of(self.segments)).to(device)
        return self._indices

    def to(self, device: torch.device) -> Layout:
        if device.type == "cpu":
            return self
        read = None if self.read is None else self.read.to(device, non_blocking=True)
        return Layout(self.segments, read, (self._indices or Indices.of(self.segments)).to(device))

    def pin_memory(self) -> Layout:
        """Where rows are collated: copies from other memory would stop the inner loop at the first layer."""
        read = None if self.read is None else self.read.pin_memory()
        return Layout(self.segments, read, Indices._make(part.pin_memory() for part in Indices.of(self.segments)))

    def made(self, name: Any, make: Callable[[], Any]) -> Any:
        """What `make` makes, once a pack and not once a layer."""
        if name not in self._made:
            self._made[name] = make()
        return self._made[name]

    @cached_property
    def longest(self) -> tuple[int, int]:
        """Most queries and most keys of a segment."""
        return max(s.end - s.start for s in self.segments), max(s.keys for s in self.segments)

    @cached_property
    def shares(self) -> bool:
        """Whether any segment sees keys that are not its own."""
        return any(segment.prefix for segment in self.segments)

    @cached_property
    def pieces(self) -> tuple[list[int], list[tuple[slice, slice]]]:
        """The pack cut wherever a segment or a prefix begins or ends: tokens of each piece; and of each segment which
        pieces are its prefix, and which itself."""
        ends = [(s.start, s.end, s.prefix_start, s.prefix_end) for s in self.segments]
        cuts = sorted({0, *(cut for bounds in ends for cut in bounds)})
        at = {cut: number for number, cut in enumerate(cuts)}
        spans = [(slice(at[p0], at[p1]), slice(at[start], at[end])) for start, end, p0, p1 in ends]
        return [after - before for before, after in pairwise(cuts)], spans

    def mask(self, number: int, window: int | None, like: Tensor, skip: int = 0) -> Tensor:
        """The additive mask of a segment."""
        name = (number, window, like.dtype, like.device, skip)
        return self.made(name, lambda: self.segments[number].mask(window, like.dtype, like.device, skip))

    def lengths(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """What variable-length kernels want: firsts of queries and of keys [segments + 1], int32, and which token of
        the pack each key is [keys]. Queries are the pack itself; a segment's last query lines up with its last key.
        """

        return self.indices(device)[:3]

    def seen(self, device: torch.device) -> Callable[[Tensor, Tensor, int | None], Tensor]:
        """seen(q, k, window): whether token q of the pack sees token k, for flex_attention's masks."""

        *_, start, prefix_start, prefix_end = self.indices(device)

        def seen(q: Tensor, k: Tensor, window: int | None) -> Tensor:
            own = (k >= start[q]) & (k <= q)
            before = (k >= prefix_start[q]) & (k < prefix_end[q])
            if window is not None:
                own = own & (q - k < window)
                before = before & (q - start[q] + prefix_end[q] - k < window)
            return own | before

        return seen


@dataclass(frozen=True)
class Pack:
    """A packed micro-batch of R rows, N packed tokens, M scored tokens; W is the width that the rows have padded.

    ids, positions: [1, N]. scored: [M], the token of the pack whose hidden state predicts targets [M]; cells: [M], the
    place of each in the padded answer [R, W - 1], flattened. last: [R], the pack's place of each row's last token.
    """

    ids: Tensor
    positions: Tensor
    scored: Tensor
    targets: Tensor
    cells: Tensor
    last: Tensor
    shape: tuple[int, int]
    layout: Layout = field(repr=False)

    @property
    def tokens(self) -> int:
        return self.ids.shape[1]

    def to(self, device: torch.device) -> Pack:
        return self._moved(lambda tensor: tensor.to(device, non_blocking=True), self.layout.to(device))

    def pin_memory(self) -> Pack:
        return self._moved(Tensor.pin_memory, self.layout.pin_memory())

    def _moved(self, move: Callable[[Tensor], Tensor], layout: Layout) -> Pack:
        names = ("ids", "positions", "scored", "targets", "cells", "last")
        moved: dict[str, Any] = {name: move(getattr(self, name)) for name in names}
        return replace(self, layout=layout, **moved)

    def spread(self, values: Tensor) -> Tensor:
        """values: [M], one a scored token -> [R, W - 1], 0 (False) elsewhere; gradients flow back."""
        rows, width = self.shape
        return values.new_zeros(rows * width).index_put((self.cells,), values).view(rows, width)


def pack(
    input_ids: Tensor, attention_mask: Tensor, labels: Tensor, branches: int = 1, share: bool = True, bucket: int = 1
) -> Pack:
    """input_ids, attention_mask, labels: [R, W], padded on the right, labels -100 where nothing is scored.

    branches: rows of one prompt. They stand R / branches apart, as TRL's collators put them (all chosen rows, then all
    rejected ones). share: compute the beginning that the rows of a group have in common once. bucket: fill the pack up
    to a multiple of so many tokens, with tokens that nobody sees, so that a compiled model meets few shapes.
    """
    rows, width = input_ids.shape
    lengths = attention_mask.sum(1).tolist()
    groups = [[first + branch * (rows // branches) for branch in range(branches)] for first in range(rows // branches)]
    place = torch.zeros(rows, width, dtype=torch.long)  # the pack's place of each token of the padded rows
    ids, positions, segments, at = [], [], [], 0
    for group in groups:
        shared = _common(input_ids, group, lengths) if share and len(group) > 1 else 0
        root = at
        for number, row in enumerate(group):
            begin = shared if number else 0  # the first row carries the shared beginning
            own = lengths[row] - begin
            ids.append(input_ids[row, begin : lengths[row]])
            positions.append(torch.arange(begin, lengths[row]))
            place[row, :begin] = torch.arange(root, root + begin)
            place[row, begin : lengths[row]] = torch.arange(at, at + own)
            if own:  # a row that begins another one has no branch of its own
                segments.append(Segment(at, at + own, root, root + begin))
            at += own
    filler = -at % bucket
    if filler:
        ids.append(torch.zeros(filler, dtype=input_ids.dtype))
        positions.append(torch.arange(filler))
        segments.append(Segment(at, at + filler, at, at))
    cells = (labels[:, 1:] != IGNORED).flatten().nonzero().flatten()
    scored = place[:, :-1].flatten()[cells]
    last = place[torch.arange(rows), torch.tensor(lengths) - 1]
    read = torch.cat([scored, last]).unique()
    return Pack(
        ids=torch.cat(ids)[None],
        positions=torch.cat(positions)[None],
        scored=scored,
        targets=labels[:, 1:].flatten()[cells],
        cells=cells,
        last=last,
        shape=(rows, width - 1),
        layout=Layout(_first_reads(segments, read), read),
    )


def _first_reads(segments: list[Segment], read: Tensor) -> list[Segment]:
    """read: the places of which answers are made, in order."""
    places = torch.cat([read, torch.tensor([segments[-1].end])])
    after = places[torch.searchsorted(read, torch.tensor([s.start for s in segments]))].tolist()
    return [replace(segment, first=min(first, segment.end)) for segment, first in zip(segments, after, strict=True)]


def _common(ids: Tensor, group: list[int], lengths: list[int]) -> int:
    """Tokens that all rows of the group begin with."""
    shortest = min(lengths[row] for row in group)
    same = (ids[group, :shortest] == ids[group[0], :shortest]).all(0)
    differ = (~same).nonzero()
    return int(differ[0]) if len(differ) else shortest
