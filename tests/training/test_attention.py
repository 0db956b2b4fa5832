"""Attention over packs against attention written out. Without a GPU the CUDA kernels themselves are not run, only what
is handed to them, read by the rules that their documentation states."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

from alignment.training import attention
from alignment.training.attention import (
    PACKED,
    Call,
    NotPackable,
    Scores,
    _by_segment,
    _flex_kernel,
    calls_seen,
    cuda_backend,
    packed_attention,
    unpadded,
)
from alignment.training.packing import Layout, Segment

# Rows of 6 and 5 tokens that share 4; one of 7 alone; three rows that share 3; one token that sees the first row's 4.
SEGMENTS = [
    Segment(0, 6, 0, 0), Segment(6, 7, 0, 4), Segment(7, 14, 7, 7), Segment(14, 18, 14, 14), Segment(18, 23, 14, 17),
    Segment(23, 25, 14, 17), Segment(25, 26, 0, 4),
]  # fmt: skip
TOKENS, DIM = 26, 8
HOW = [
    pytest.param(Scores(None, None, None), id="plain"),
    pytest.param(Scores(0.3, None, None), id="scale"),
    pytest.param(Scores(None, 3, None), id="window"),
    pytest.param(Scores(None, 100, None), id="wide window"),
    pytest.param(Scores(None, None, 1.5), id="softcap"),
    pytest.param(Scores(0.5, 4, 0.7), id="all"),
]
HEADS = pytest.mark.parametrize("heads", [(4, 4), (4, 2), (4, 1)], ids=["mha", "gqa", "mqa"])


def inputs(heads: tuple[int, int], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)

    def made(count: int) -> Tensor:
        return torch.randn(1, count, TOKENS, DIM, generator=generator, dtype=dtype).requires_grad_()

    return made(heads[0]), made(heads[1]), made(heads[1])


def written_out(query: Tensor, key: Tensor, value: Tensor, visible: Tensor, how: Scores) -> Tensor:
    """softmax(cap * tanh(q k / cap)) v over the visible keys, [1, N, heads, dim]. visible: [N, N]."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = query @ key.transpose(2, 3) * (DIM**-0.5 if how.scale is None else how.scale)
    if how.softcap is not None:
        scores = how.softcap * torch.tanh(scores / how.softcap)
    return (torch.softmax(scores.masked_fill(~visible, float("-inf")), -1) @ value).transpose(1, 2)


def visible(window: int | None) -> Tensor:
    """[N, N]: a query sees the keys that stand, prefix first, up to window - 1 places before it in its own row."""
    dense = torch.zeros(TOKENS, TOKENS, dtype=torch.bool)
    for s in SEGMENTS:
        row = [*range(s.prefix_start, s.prefix_end), *range(s.start, s.end)]
        for at in range(s.prefix, len(row)):
            dense[row[at], row[0 if window is None else max(0, at - window + 1) : at + 1]] = True
    return dense


def gradients(out: Tensor, *of: Tensor) -> tuple[Tensor, ...]:
    """Of a loss in which every number of the answer has another weight."""
    weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)
    return torch.autograd.grad((out * weights).sum(), of)


@HEADS
@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_segment_by_segment_is_dense_masked_attention(how: Scores, heads: tuple[int, int], dtype: torch.dtype) -> None:
    """Values and gradients; soft-capped scores take their softmax in float32 whatever the precision."""
    given = inputs(heads, dtype)
    got, wanted = _by_segment(*given, Layout(SEGMENTS), how), written_out(*given, visible(how.window), how)
    within = 1e-5 if dtype == torch.float32 or how.softcap else 1e-12
    torch.testing.assert_close(got, wanted, rtol=0, atol=within)
    for mine, dense in zip(gradients(got, *given), gradients(wanted, *given), strict=True):
        torch.testing.assert_close(mine, dense, rtol=0, atol=within)


def variable_length(
    q: Tensor, k: Tensor, v: Tensor, queries: Tensor, keys: Tensor, longest: tuple[int, int], left: int, how: Scores
) -> Tensor:
    """What flash_attn_varlen_func and varlen_attn promise: sequence i has queries[i]..queries[i + 1] and keys[i]..
    keys[i + 1]; causal with the last query beside the last key; query at p sees keys p - left..p (left -1: all)."""
    out, widest = [], (0, 0)
    for number in range(len(queries) - 1):
        mine = q[queries[number] : queries[number + 1]]
        theirs, values = k[keys[number] : keys[number + 1]], v[keys[number] : keys[number + 1]]
        widest = max(widest[0], len(mine)), max(widest[1], len(theirs))
        groups = mine.shape[1] // theirs.shape[1]
        theirs, values = theirs.repeat_interleave(groups, 1), values.repeat_interleave(groups, 1)
        distance = torch.arange(len(theirs) - len(mine), len(theirs))[:, None] - torch.arange(len(theirs))[None]
        hidden = (distance < 0) | ((distance > left) if left >= 0 else False)
        scores = torch.einsum("qhd,khd->hqk", mine, theirs) * (DIM**-0.5 if how.scale is None else how.scale)
        if how.softcap is not None:
            scores = how.softcap * torch.tanh(scores / how.softcap)
        weights = torch.softmax(scores.masked_fill(hidden, float("-inf")), -1)
        out.append(torch.einsum("hqk,khd->qhd", weights, values))
    assert widest == longest, "the kernel is told the most queries and keys of a sequence"
    return torch.cat(out)[None]


@HEADS
@pytest.mark.parametrize("how", HOW)
def test_what_variable_length_kernels_are_handed_is_the_same_attention(how: Scores, heads: tuple[int, int]) -> None:
    """Read by an emulation of such a kernel; flash-attn's and PyTorch's own are not run."""
    given, layout = inputs(heads, torch.float32), Layout(SEGMENTS)
    q, k, v, queries, keys = unpadded(*given, layout)
    left = -1 if how.window is None else how.window - 1
    got = variable_length(q, k, v, queries, keys, layout.longest, left, how)
    wanted = _by_segment(*given, layout, how)
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-5)
    for mine, theirs in zip(gradients(got, *given), gradients(wanted, *given), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-5)


def test_keys_are_gathered_only_where_a_beginning_is_shared() -> None:
    given = inputs((4, 2), torch.float32)
    alone = Layout([Segment(0, 10, 0, 0), Segment(10, TOKENS, 10, 10)])
    _, k, _, queries, keys = unpadded(*given, alone)
    assert k.data_ptr() == given[1].data_ptr() and torch.equal(queries, keys)
    assert len(unpadded(*given, Layout(SEGMENTS))[1]) == 6 + 5 + 7 + 4 + 8 + 5 + 5


def record_call(monkeypatch: pytest.MonkeyPatch, module: str, name: str) -> dict[str, Any]:
    """Put a function of this name where the kernel is imported from; what it was called with is in the answer."""
    import sys
    import types

    call: dict[str, Any] = {}

    def kernel(*given: Any, **named: Any) -> Tensor:
        call.update(named, given=given)
        return given[0]

    stand_in = types.ModuleType(module)
    setattr(stand_in, name, kernel)
    monkeypatch.setitem(sys.modules, module, stand_in)
    return call


@pytest.mark.parametrize("how", HOW)
def test_kernels_are_told_scale_window_and_cap(how: Scores, monkeypatch: pytest.MonkeyPatch) -> None:
    """A window of w tokens is w - 1 to the left and none to the right; flash-attn takes 0 for no cap."""
    from alignment.training.attention import KERNELS

    given, layout = inputs((4, 2), torch.float32), Layout(SEGMENTS)
    flash = record_call(monkeypatch, "flash_attn", "flash_attn_varlen_func")
    varlen = record_call(monkeypatch, "torch.nn.attention.varlen", "varlen_attn")
    left = None if how.window is None else how.window - 1
    assert KERNELS["flash"](*given, layout, how).shape == (1, TOKENS, 4, DIM)
    assert flash["causal"] and flash["softmax_scale"] == how.scale and flash["softcap"] == (how.softcap or 0.0)
    assert flash["window_size"] == ((-1, -1) if left is None else (left, 0))
    assert flash["given"][5:] == layout.longest
    if how.softcap is None:
        assert KERNELS["varlen"](*given, layout, how).shape == (1, TOKENS, 4, DIM)
        assert varlen["scale"] == how.scale and varlen["enable_gqa"]
        assert varlen["window_size"] == ((-1, 0) if left is None else (left, 0))
        assert varlen["given"][5:] == layout.longest


@pytest.mark.parametrize("how", HOW)
def test_flex_attention_is_the_same_attention(how: Scores) -> None:
    """Eager, forward only: flex_attention has no backward on the CPU."""
    given, layout = [part.detach() for part in inputs((4, 2), torch.float32)], Layout(SEGMENTS)
    with torch.no_grad():
        got = _flex_kernel(flex_attention, *given, layout, how)
        torch.testing.assert_close(got, _by_segment(*given, layout, how), rtol=0, atol=1e-5)


needs_cuda = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a GPU: the CUDA kernels themselves were never run where there is none"
)


@needs_cuda
@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize(
    ("kernel", "dtype"),
    [
        ("flash", torch.bfloat16),
        ("varlen", torch.bfloat16),
        ("flex", torch.bfloat16),
        ("flex", torch.float32),
    ],
)
def test_a_cuda_kernel_over_a_pack_is_dense_masked_attention(kernel: str, dtype: torch.dtype, how: Scores) -> None:
    """Values and gradients, against attention written out in float64; four heads of 64 to two of keys."""
    if kernel == "flash" and not attention._has_flash():
        pytest.skip("flash-attn is not installed")
    if kernel == "varlen" and (how.softcap is not None or not attention._has_varlen()):
        pytest.skip("PyTorch's variable-length kernel has no soft-capping, or does not know this GPU")
    cuda, dim = torch.device("cuda"), 64
    how = Scores(dim**-0.5 if how.scale is None else how.scale, how.window, how.softcap)
    given = [torch.randn(1, n, TOKENS, dim, device=cuda, dtype=dtype, requires_grad=True) for n in (4, 2, 2)]
    exact = [part.detach().double().requires_grad_() for part in given]
    got = attention.KERNELS[kernel](*given, Layout(SEGMENTS).to(cuda), how)
    wanted = written_out(*exact, visible(how.window).to(cuda), how)
    within = {"rtol": 0.03, "atol": 0.03} if dtype == torch.bfloat16 else {"rtol": 1e-3, "atol": 1e-4}
    torch.testing.assert_close(got.double(), wanted, **within)
    weights = torch.linspace(-1, 1, wanted.numel(), dtype=torch.float64, device=cuda).view(wanted.shape)
    mine = torch.autograd.grad((got.double() * weights).sum(), given)
    for own, dense in zip(mine, torch.autograd.grad((wanted * weights).sum(), exact), strict=True):
        torch.testing.assert_close(own.double(), dense, **within)


@pytest.mark.parametrize(
    ("dtype", "softcap", "flash", "varlen", "choice"),
    [
        (torch.bfloat16, False, True, True, "flash"),
        (torch.float16, True, True, False, "flash"),
        (torch.bfloat16, False, False, True, "varlen"),
        (torch.float16, False, False, True, "varlen"),
        (torch.bfloat16, True, False, True, "flex"),
        (torch.bfloat16, False, False, False, "flex"),
        (torch.float32, False, True, True, "flex"),
    ],
)
def test_the_kernel_is_chosen_by_precision_and_by_what_is_there(
    dtype: torch.dtype, softcap: bool, flash: bool, varlen: bool, choice: str
) -> None:
    assert cuda_backend(dtype, softcap, flash, varlen) == choice


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"dropout": 0.1}, "its attention uses dropout"),
        ({"position_bias": torch.zeros(1)}, "its attention uses position_bias"),
        ({"s_aux": torch.zeros(4)}, "its attention uses s_aux"),
        ({"layout": None}, "does not hand the layout of a pack"),
    ],
)
def test_what_a_pack_does_not_give_is_refused(asked: dict[str, Any], said: str) -> None:
    named = {"layout": Layout(SEGMENTS), **asked}
    with pytest.raises(NotPackable, match=said):
        packed_attention(None, *inputs((4, 4), torch.float32), None, **named)


def test_calls_are_those_made_meanwhile() -> None:
    given, layout = inputs((4, 4), torch.float32), Layout(SEGMENTS)
    packed_attention(None, *given, None, layout=layout, sliding_window=9)
    with calls_seen() as seen:
        for window in (None, 3):
            packed_attention(None, *given, None, layout=layout, sliding_window=window)
    packed_attention(None, *given, None, layout=layout, sliding_window=9)
    assert seen.calls == [Call(None, "cpu"), Call(3, "cpu")] and not seen.errors


def test_meanwhile_a_call_that_fails_is_noted_and_answered_by_zeros() -> None:
    query, key, value = inputs((4, 2), torch.float32)
    with calls_seen() as seen:
        answer, _ = packed_attention(None, query, key, value[..., :5], None, layout=None)
    assert answer.shape == (1, TOKENS, 4, 5) and not answer.any()
    assert [type(error) for error in seen.errors] == [NotPackable] and not seen.calls
    with pytest.raises(NotPackable):
        packed_attention(None, query, key, value, None, layout=None)


def test_transformers_knows_the_function_by_its_name() -> None:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    assert ALL_ATTENTION_FUNCTIONS[PACKED] is packed_attention


def test_under_autocast_the_kernel_gets_one_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """As rotary embeddings leave them: queries and keys in fp32, values in bf16."""
    given: list[torch.dtype] = []

    def kernel(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *rest: Any) -> torch.Tensor:
        given.extend((query.dtype, key.dtype, value.dtype))
        return query

    monkeypatch.setitem(attention.KERNELS, "cpu", kernel)
    query, layout = torch.zeros(1, 2, 4, 8), Layout([Segment(0, 4, 0, 0)])
    with torch.autocast("cpu", torch.bfloat16):
        attention.packed_attention(None, query, query, query.bfloat16(), None, layout=layout)
    assert given == [torch.bfloat16] * 3
