"""Packs by hand, and against the padded rows that they stand for."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from alignment.training.packing import Indices, Layout, Pack, Segment, pack

CPU, META = torch.device("cpu"), torch.device("meta")


def padded(rows: Sequence[Sequence[int]], unscored: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """ids, mask and labels of rows; the first `unscored` tokens of each have no label."""
    width = max(map(len, rows))
    ids = torch.tensor([[*row, *[0] * (width - len(row))] for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :unscored] = -100
    return ids, mask, labels


def segments(packed: Pack) -> list[tuple[int, int, int, int]]:
    return [(s.start, s.end, s.prefix_start, s.prefix_end) for s in packed.layout.segments]


def seen(layout: Layout, count: int, window: int | None = None) -> Tensor:
    """[N, N]: whether token q sees token k, as flex_attention is told."""
    q, k = torch.arange(count)[:, None].expand(count, count), torch.arange(count)[None].expand(count, count)
    return layout.seen(CPU)(q, k, window)


def by_masks(layout: Layout, count: int, window: int | None = None) -> Tensor:
    """[N, N], as the segments' masks say."""
    dense = torch.zeros(count, count, dtype=torch.bool)
    for number, s in enumerate(layout.segments):
        keys = [*range(s.prefix_start, s.prefix_end), *range(s.start, s.end)]
        dense[s.start : s.end, keys] = layout.mask(number, window, torch.empty(0)) == 0
    return dense


def by_lengths(layout: Layout, count: int, window: int | None = None) -> Tensor:
    """[N, N], as a variable-length kernel reads lengths: causal, last query beside last key, a window to the left."""
    queries, keys, index = layout.lengths(CPU)
    dense = torch.zeros(count, count, dtype=torch.bool)
    for number in range(len(layout.segments)):
        (q0, q1), (k0, k1) = queries[number : number + 2].tolist(), keys[number : number + 2].tolist()
        for i, j in itertools.product(range(q1 - q0), range(k1 - k0)):
            distance = i + (k1 - k0) - (q1 - q0) - j
            dense[q0 + i, index[k0 + j]] = distance >= 0 and (window is None or distance < window)
    return dense


def by_rows(packed: Pack, rows: Sequence[Sequence[int]], places: Tensor, window: int | None = None) -> Tensor:
    """[N, N], from the padded rows: a token sees those before it in its own row. places: [R, W], as `places_of`."""
    dense = torch.zeros(packed.tokens, packed.tokens, dtype=torch.bool)
    for number, row in enumerate(rows):
        for at in range(len(row)):
            first = 0 if window is None else max(0, at - window + 1)
            dense[places[number, at], places[number, first : at + 1]] = True
    return dense


def places_of(rows: Sequence[Sequence[int]], branches: int, share: bool = True, bucket: int = 1) -> tuple[Pack, Tensor]:
    """The pack, and the pack's place of each token of the rows: read off a pack in which every token is scored."""
    ids, mask, _ = padded(rows)
    width = ids.shape[1]
    wide = [torch.cat([part, torch.zeros(len(rows), 1, dtype=part.dtype)], 1) for part in (ids, mask)]
    labels = torch.full((len(rows), width + 1), 7)  # a label after every token, padding too
    packed = pack(*wide, labels, branches, share, bucket)
    return packed, packed.scored.view(len(rows), width)


def test_two_groups_of_two_rows_have_their_beginnings_once() -> None:
    """Group 0: rows 0, 2 = (5 6 7 8), (5 6 9); group 1: rows 1, 3 = (4 3), (4 8 2 1): a group stands R / 2 apart.

    Pack: 5 6 7 8 | 9 | 4 3 | 8 2 1: ten of thirteen tokens. Row 2 sees 5 6 (places 0-2) and its 9 (4); row 3 sees the 4
    at 5 and its own 7-10. Scored are all tokens but each row's first; hidden states that predict them stand at
    row 0: 0 1 2 -> 6 7 8; row 1: 5 -> 3; row 2: 0 1 -> 6 9; row 3: 5 7 8 -> 8 2 1.
    """
    packed = pack(*padded([(5, 6, 7, 8), (4, 3), (5, 6, 9), (4, 8, 2, 1)]), branches=2)
    assert packed.ids.tolist() == [[5, 6, 7, 8, 9, 4, 3, 8, 2, 1]]
    assert packed.positions.tolist() == [[0, 1, 2, 3, 2, 0, 1, 1, 2, 3]]
    assert segments(packed) == [(0, 4, 0, 0), (4, 5, 0, 2), (5, 7, 5, 5), (7, 10, 5, 6)]
    assert packed.scored.tolist() == [0, 1, 2, 5, 0, 1, 5, 7, 8]
    assert packed.targets.tolist() == [6, 7, 8, 3, 6, 9, 8, 2, 1]
    assert packed.cells.tolist() == [0, 1, 2, 3, 6, 7, 9, 10, 11]
    assert packed.last.tolist() == [3, 6, 4, 9]
    assert (packed.shape, packed.tokens) == ((4, 3), 10)
    assert packed.layout.longest == (4, 4) and packed.layout.shares


def test_a_row_that_begins_the_other_has_no_branch_of_its_own() -> None:
    """(5 6) begins (5 6 7): as second row it adds no token; as first row it carries both, and the other its 7."""
    second = pack(*padded([(5, 6, 7), (5, 6)]), branches=2)
    assert second.ids.tolist() == [[5, 6, 7]] and segments(second) == [(0, 3, 0, 0)]
    assert second.last.tolist() == [2, 1] and second.scored.tolist() == [0, 1, 0]
    first = pack(*padded([(5, 6), (5, 6, 7)]), branches=2)
    assert first.ids.tolist() == [[5, 6, 7]] and segments(first) == [(0, 2, 0, 0), (2, 3, 0, 2)]
    assert first.last.tolist() == [1, 2] and first.scored.tolist() == [0, 0, 1]
    assert first.positions.tolist() == [[0, 1, 2]]


def test_identical_rows_are_computed_once_and_scored_twice() -> None:
    packed = pack(*padded([(5, 6, 7), (5, 6, 7)]), branches=2)
    assert packed.ids.tolist() == [[5, 6, 7]] and segments(packed) == [(0, 3, 0, 0)]
    assert packed.scored.tolist() == [0, 1, 0, 1] and packed.cells.tolist() == [0, 1, 2, 3]
    assert packed.last.tolist() == [2, 2] and not packed.layout.shares


def test_without_sharing_rows_stand_one_after_the_other_group_by_group() -> None:
    packed = pack(*padded([(5, 6, 7), (4, 3), (5, 6), (4, 3)]), branches=2, share=False)
    assert packed.ids.tolist() == [[5, 6, 7, 5, 6, 4, 3, 4, 3]]
    assert packed.positions.tolist() == [[0, 1, 2, 0, 1, 0, 1, 0, 1]]
    assert segments(packed) == [(0, 3, 0, 0), (3, 5, 0, 0), (5, 7, 5, 5), (7, 9, 5, 5)]
    assert packed.last.tolist() == [2, 6, 4, 8] and not packed.layout.shares


def test_rows_of_one_branch_share_nothing_though_they_begin_alike() -> None:
    packed = pack(*padded([(5, 6, 7), (5, 6)]))
    assert packed.ids.tolist() == [[5, 6, 7, 5, 6]] and segments(packed) == [(0, 3, 0, 0), (3, 5, 3, 3)]


def test_four_branches_share_what_all_four_begin_with() -> None:
    """(1 2 3), (1 2 4), (1 5), (1 2 3 6): three of them begin 1 2, all of them 1."""
    packed = pack(*padded([(1, 2, 3), (1, 2, 4), (1, 5), (1, 2, 3, 6)]), branches=4)
    assert packed.ids.tolist() == [[1, 2, 3, 2, 4, 5, 2, 3, 6]]
    assert packed.positions.tolist() == [[0, 1, 2, 1, 2, 1, 1, 2, 3]]
    assert segments(packed) == [(0, 3, 0, 0), (3, 5, 0, 1), (5, 6, 0, 1), (6, 9, 0, 1)]


def test_a_bucket_is_filled_with_tokens_that_nobody_sees_and_nothing_scores() -> None:
    """Five tokens, buckets of four: three more, a segment of their own; a full bucket stays as it is."""
    packed = pack(*padded([(5, 6, 7), (8, 9)]), bucket=4)
    assert packed.ids.tolist() == [[5, 6, 7, 8, 9, 0, 0, 0]] and packed.positions[0, 5:].tolist() == [0, 1, 2]
    assert segments(packed)[-1] == (5, 8, 5, 5)
    assert max(packed.scored.tolist()) < 5
    visible = seen(packed.layout, 8)
    assert not visible[:5, 5:].any() and not visible[5:, :5].any()
    assert pack(*padded([(5, 6, 7, 8), (8, 9, 5, 6)]), bucket=4).tokens == 8


def test_answers_spread_to_where_the_padded_rows_have_them_and_gradients_flow_back() -> None:
    """Rows (5 6 7), (8 9) without labels on their first tokens: cells 0 1 and 2 of [2, 2]."""
    packed = pack(*padded([(5, 6, 7), (8, 9)]))
    values = torch.tensor([1.0, 2.0, 3.0], requires_grad=True)
    spread = packed.spread(values)
    assert spread.tolist() == [[1, 2], [3, 0]]
    (spread * torch.tensor([[1.0, 10.0], [100.0, 1000.0]])).sum().backward()
    assert values.grad is not None and values.grad.tolist() == [1, 10, 100]
    assert packed.spread(torch.tensor([True, False, True])).tolist() == [[True, False], [True, False]]


def test_nothing_labelled_is_nothing_scored() -> None:
    ids, mask, labels = padded([(5, 6, 7), (8, 9)])
    packed = pack(ids, mask, torch.full_like(labels, -100))
    assert packed.scored.numel() == packed.targets.numel() == 0
    assert packed.spread(torch.zeros(0)).tolist() == [[0, 0], [0, 0]] and packed.last.tolist() == [2, 4]


def test_a_segments_mask_by_hand() -> None:
    """Two keys before, three queries: query 0 stands at distance 2 1 0 of keys 0 1 2. Through a window of 2 tokens each
    sees itself and the one before it."""
    segment = Segment(7, 10, 2, 4)
    assert (segment.end - segment.start, segment.prefix, segment.keys) == (3, 2, 5)
    no = float("-inf")
    whole = segment.mask(None, torch.float32, CPU)
    assert whole.tolist() == [[0, 0, 0, no, no], [0, 0, 0, 0, no], [0, 0, 0, 0, 0]]
    narrow = segment.mask(2, torch.float32, CPU)
    assert narrow.tolist() == [[no, 0, 0, no, no], [no, no, 0, 0, no], [no, no, no, 0, 0]]


def test_lengths_for_variable_length_kernels_by_hand() -> None:
    """(5 6 7 8), (5 6 9): queries 0-4 and 4-5; keys 0-4, and 5 6 with 9: places 0 1 4."""
    packed = pack(*padded([(5, 6, 7, 8), (5, 6, 9)]), branches=2)
    queries, keys, index = packed.layout.lengths(CPU)
    assert queries.tolist() == [0, 4, 5] and keys.tolist() == [0, 4, 7]
    assert index.tolist() == [0, 1, 2, 3, 0, 1, 4]
    assert queries.dtype == keys.dtype == torch.int32


def test_what_kernels_on_a_gpu_want_travels_with_the_pack(monkeypatch: pytest.MonkeyPatch) -> None:
    """Made where rows are collated, pinned, and brought over with the pack; the first layer copies nothing."""
    pinned: list[Tensor] = []
    monkeypatch.setattr(Tensor, "pin_memory", lambda self: pinned.append(self.clone()) or pinned[-1])
    made = pack(*padded([(5, 6, 7, 8), (5, 6, 9)]), branches=2)
    there = made.pin_memory().to(META)
    assert (
        len(pinned) == 7 + len(Indices._fields) and there.ids.device == there.layout.indices(META).seen.device == META
    )
    monkeypatch.setattr(Tensor, "to", None)  # a copy now would fail
    assert there.layout.lengths(META) == there.layout.indices(META)[:3]
    there.layout.seen(META)


def test_a_pack_that_stays_on_the_cpu_makes_none_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Indices, "of", None)
    made = pack(*padded([(5, 6, 7, 8), (5, 6, 9)]), branches=2)
    assert made.to(CPU).layout is made.layout


def test_a_pack_that_was_not_pinned_takes_it_along_too() -> None:
    moved = pack(*padded([(5, 6, 7, 8), (5, 6, 9)]), branches=2).to(META).layout
    assert moved.indices(META) is moved.indices(META) and moved.indices(META).start.device == META


def forest(seed: int, branches: int) -> list[list[int]]:
    """Three groups of rows over few tokens, so that they share beginnings of all lengths; some begin others."""
    generator = torch.Generator().manual_seed(seed)

    def some(low: int, high: int, kinds: int) -> list[int]:
        count = int(torch.randint(low, high, (), generator=generator))
        return torch.randint(1, kinds, (count,), generator=generator).tolist()

    groups = []
    for _ in range(3):
        shared = some(1, 7, 9)
        groups.append([shared + some(0, 6, 3) for _ in range(branches)])
    return [groups[group][branch] for branch in range(branches) for group in range(3)]


@pytest.mark.parametrize("window", [None, 1, 3])
@pytest.mark.parametrize("branches", [1, 2, 4])
@pytest.mark.parametrize("seed", range(4))
def test_a_token_sees_exactly_the_tokens_before_it_in_its_own_row(seed: int, branches: int, window: int | None) -> None:
    """Said in four ways: by the padded rows, the segments' masks, flex_attention's function, the kernels' lengths."""
    rows = forest(seed, branches)
    packed, places = places_of(rows, branches)
    wanted = by_rows(packed, rows, places, window)
    for said in (by_masks, seen, by_lengths):
        assert torch.equal(said(packed.layout, packed.tokens, window), wanted), said.__name__


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("branches", [1, 2, 4])
@pytest.mark.parametrize("seed", range(4))
def test_every_row_is_found_again_in_the_pack(seed: int, branches: int, share: bool) -> None:
    """At its places stand its tokens and positions 0, 1, ...; scored places, targets and cells are those of the labels;
    no token is in the pack that is in no row."""
    rows = forest(seed, branches)
    packed, places = places_of(rows, branches, share)
    for number, row in enumerate(rows):
        at = places[number, : len(row)]
        assert packed.ids[0, at].tolist() == row and packed.positions[0, at].tolist() == list(range(len(row)))
        assert packed.last[number] == at[-1]
    used = {int(place) for number, row in enumerate(rows) for place in places[number, : len(row)]}
    assert used == set(range(packed.tokens))
    ids, mask, labels = padded(rows, unscored=2)
    packed = pack(ids, mask, labels, branches, share)
    width = ids.shape[1] - 1
    for scored, target, cell in zip(packed.scored, packed.targets, packed.cells, strict=True):
        row, column = divmod(int(cell), width)
        assert scored == places[row, column] and target == labels[row, column + 1]
    assert len(packed.cells) == int((labels[:, 1:] != -100).sum())
