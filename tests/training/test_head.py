"""The head's kernels: against the plain log_softmax of all logits, and against TRL's kernel."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from trl.kernels import ChunkedLogProbFunction

from alignment.training import head
from alignment.training.head import score_tokens, spans

COUNT, SIZE, VOCABULARY = 70, 24, 97
# Bytes of float32 logits of 16 rows, the least that a block or a tile may have: 70 rows are five blocks.
SIXTEEN_ROWS = 16 * VOCABULARY * 4


pytestmark = pytest.mark.usefixtures("one_thread")


def inputs(count: int = COUNT, vocabulary: int = VOCABULARY) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, a weight and targets, every third of which is the most probable token."""
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(count, SIZE, generator=generator)
    weight = torch.randn(vocabulary, SIZE, generator=generator)
    targets = torch.randint(0, vocabulary, (count,), generator=generator)
    targets[::3] = (hidden @ weight.t()).argmax(-1)[::3]
    return hidden.requires_grad_(), weight.requires_grad_(), targets


def plain(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, factor: float, softcap: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    logits = factor * (hidden @ weight.t() + (0 if bias is None else bias))
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    scores = torch.log_softmax(logits, -1)
    return scores.gather(1, targets[:, None])[:, 0], -(scores.exp() * scores).sum(-1), logits.argmax(-1) == targets


def by_trl(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, factor: float, softcap: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    outputs = ("log_probs", "entropy", "is_top1")
    answer = ChunkedLogProbFunction.apply(hidden, weight, bias, targets, 1.0, 32, softcap, factor, outputs)
    return answer[0], answer[1], answer[4]


def gradients(log_probs: Tensor, *of: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad((log_probs * torch.linspace(-1, 2, len(log_probs))).sum(), of)


def near(got: Tensor, wanted: Tensor, within: float = 1e-5) -> None:
    """As a part of the largest entry."""
    assert float((got - wanted).abs().max() / wanted.abs().max()) <= within


BLOCKS = {
    "one block": {},
    "blocks": {"BLOCK_BYTES": SIXTEEN_ROWS},
    "tiles": {"TILE_BYTES": SIXTEEN_ROWS},
    "tiles that do not fill blocks": {"BLOCK_BYTES": 3 * SIXTEEN_ROWS, "TILE_BYTES": 2 * SIXTEEN_ROWS},
    "nothing kept": {"KEPT_BYTES": 0},
    "nothing kept, blocks": {"KEPT_BYTES": COUNT * VOCABULARY * 4 - 1, "BLOCK_BYTES": SIXTEEN_ROWS},
    "just kept": {"KEPT_BYTES": COUNT * VOCABULARY * 4, "BLOCK_BYTES": SIXTEEN_ROWS},
}


@pytest.mark.parametrize("stock", [plain, by_trl])
@pytest.mark.parametrize("factor", [1.0, 0.25])
@pytest.mark.parametrize("sizes", list(BLOCKS.values()), ids=list(BLOCKS))
def test_the_tiled_kernel_is_log_softmax(
    sizes: dict[str, int], factor: float, stock: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, size in sizes.items():
        monkeypatch.setattr(head, name, size)
    hidden, weight, targets = inputs()
    log_probs, entropy, is_top1, _ = score_tokens(hidden, weight, None, targets, factor)
    wanted = stock(hidden, weight, None, targets, factor, None)
    torch.testing.assert_close(log_probs, wanted[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(entropy, wanted[1], rtol=0, atol=1e-5)
    assert is_top1 is not None and torch.equal(is_top1, wanted[2]) and 0 < int(is_top1.sum()) < COUNT
    assert entropy is not None and not entropy.requires_grad
    for got, of_stock in zip(gradients(log_probs, hidden, weight), gradients(wanted[0], hidden, weight), strict=True):
        near(got, of_stock)


def test_spans_cover_all_rows_in_steps_of_at_least_sixteen() -> None:
    """100 tokens of 4 bytes a row: 8000 bytes are 20 rows; 1 byte is 16, the least."""
    assert spans(0, 50, 100, 8000) == [slice(0, 20), slice(20, 40), slice(40, 50)]
    assert spans(10, 40, 100, 1) == [slice(10, 26), slice(26, 40)]
    assert spans(0, 0, 100, 1) == []


@pytest.mark.parametrize("measure", [True, False])
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_no_token_is_no_answer_and_a_gradient_of_zero(measure: bool, softcap: float | None) -> None:
    hidden, weight, targets = inputs(count=0) if softcap is None else inputs(count=1)
    hidden, targets = hidden[:0], targets[:0]
    log_probs, entropy, is_top1, _ = score_tokens(hidden, weight, None, targets, 1.0, softcap, measure)
    assert log_probs.shape == (0,)
    assert [entropy is None, is_top1 is None] == [not measure] * 2
    to_hidden, to_weight = torch.autograd.grad(log_probs.sum(), (hidden, weight))
    assert to_hidden.shape == (0, SIZE) and not to_weight.any()


def test_log_probs_alone_are_the_same() -> None:
    hidden, weight, targets = inputs()
    whole, *_ = score_tokens(hidden, weight, None, targets)
    alone, entropy, is_top1, _ = score_tokens(hidden, weight, None, targets, measure=False)
    assert entropy is None and is_top1 is None and torch.equal(whole, alone)
    for got, wanted in zip(gradients(alone, hidden, weight), gradients(whole, hidden, weight), strict=True):
        assert torch.equal(got, wanted)


def test_backward_may_run_twice() -> None:
    """What was kept of the forward is not consumed by the backward pass."""
    hidden, weight, targets = inputs()
    log_probs, *_ = score_tokens(hidden, weight, None, targets)
    first = torch.autograd.grad(log_probs.sum(), (hidden, weight), retain_graph=True)
    again = torch.autograd.grad(log_probs.sum(), (hidden, weight))
    for got, wanted in zip(again, first, strict=True):
        assert torch.equal(got, wanted)


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_what_is_frozen_has_no_gradient(frozen: str) -> None:
    """With adapters the weight is frozen; the other's gradient is as before."""
    hidden, weight, targets = inputs()
    wanted = torch.autograd.grad(
        score_tokens(hidden, weight, None, targets)[0].sum(), hidden if frozen == "weight" else weight
    )[0]
    (hidden if frozen == "hidden" else weight).requires_grad_(False)
    score_tokens(hidden, weight, None, targets)[0].sum().backward()
    assert (hidden.grad is None) == (frozen == "hidden") and (weight.grad is None) == (frozen == "weight")
    near(weight.grad if frozen == "hidden" else hidden.grad, wanted)  # type: ignore[arg-type]


def test_nothing_is_kept_where_nothing_wants_a_gradient() -> None:
    hidden, weight, targets = inputs()
    with torch.no_grad():
        log_probs, *_ = score_tokens(hidden, weight, None, targets)
    assert not log_probs.requires_grad
    torch.testing.assert_close(log_probs, plain(hidden, weight, None, targets, 1.0, None)[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("kept", [0, 1 << 30])
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_bf16_rounds_products_and_keeps_sums_in_float32(
    softcap: float | None, kept: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """8 bits of logits of about 5 = sqrt(24): errors of a few hundredths."""
    monkeypatch.setattr(head, "KEPT_BYTES", kept)
    hidden, weight, targets = inputs()
    with torch.autocast("cpu", torch.bfloat16):
        log_probs, entropy, *_ = score_tokens(hidden, weight, None, targets, 1.0, softcap)
    wanted = plain(hidden, weight, None, targets, 1.0, softcap)
    assert log_probs.dtype == torch.float32
    assert (log_probs - wanted[0]).abs().mean().item() <= 2e-2
    assert entropy is not None and float((entropy - wanted[1]).abs().mean()) <= 2e-2
    for got, exact in zip(gradients(log_probs, hidden, weight), gradients(wanted[0], hidden, weight), strict=True):
        assert got.dtype == torch.float32
        near(got, exact, within=3e-2)


@pytest.mark.parametrize(("bias", "softcap"), [(True, None), (False, 5.0), (True, 5.0)])
def test_a_cap_and_a_bias_go_to_trls_kernel(bias: bool, softcap: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*given: Any) -> Any:
        raise AssertionError("the tiled kernel knows neither")

    monkeypatch.setattr(head._TiledLogProbs, "apply", never)
    hidden, weight, targets = inputs()
    offset = torch.linspace(-2, 2, VOCABULARY).requires_grad_() if bias else None
    log_probs, entropy, is_top1, _ = score_tokens(hidden, weight, offset, targets, 0.5, softcap)
    wanted = plain(hidden, weight, offset, targets, 0.5, softcap)
    torch.testing.assert_close(log_probs, wanted[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(entropy, wanted[1], rtol=0, atol=1e-5)
    assert is_top1 is not None and torch.equal(is_top1, wanted[2])
    of = (hidden, weight) if offset is None else (hidden, weight, offset)
    for got, exact in zip(gradients(log_probs, *of), gradients(wanted[0], *of), strict=True):
        near(got, exact)


@pytest.mark.parametrize("kept", [0, 1 << 30])
def test_gradients_are_slopes(kept: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Central differences: a step of 0.01 in float32 leaves errors of about 1e-4 in slopes of about 1."""
    monkeypatch.setattr(head, "KEPT_BYTES", kept)
    hidden, weight, targets = inputs(count=3, vocabulary=5)
    for name, tensor in (("hidden", hidden), ("weight", weight)):
        (slopes,) = torch.autograd.grad(score_tokens(hidden, weight, None, targets, 0.5)[0].sum(), tensor)
        for place in range(0, tensor.numel(), 7):
            values = []
            for step in (0.01, -0.01):
                moved = tensor.detach().clone()
                moved.view(-1)[place] += step
                given = (moved, weight) if name == "hidden" else (hidden, moved)
                with torch.no_grad():
                    values.append(float(score_tokens(*given, None, targets, 0.5)[0].double().sum()))
            assert (values[0] - values[1]) / 0.02 == pytest.approx(float(slopes.view(-1)[place]), abs=1e-3)


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_the_sum_of_squared_probabilities_is_that_of_a_full_softmax(softcap: float | None) -> None:
    """WPO's weights need it; to 1e-5."""
    hidden, weight, targets = inputs()
    logits = hidden @ weight.t()
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    wanted = (2 * torch.log_softmax(logits, -1)).logsumexp(-1)
    *_, squared = score_tokens(hidden, weight, None, targets, 1.0, softcap, measure=False, squares=True)
    torch.testing.assert_close(squared, wanted.detach(), rtol=1e-5, atol=1e-5)
