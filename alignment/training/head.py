"""log p(target), entropy and top-1 of hidden states through a language model's head, without all logits at once.

Two kernels, one interface. TRL's chunked one (Triton on CUDA; recomputes logits in the backward pass). On the CPU a
tile-wise one of our own: tiles small enough to stay in the cache while softmax, entropy and gather pass over them, and
probabilities kept for the backward pass where they fit KEPT_BYTES, which saves one of four matrix products.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from trl.kernels import ChunkedLogProbFunction
from trl.trainer.utils import maybe_gather_lm_head_ctx

BLOCK_BYTES = 64 << 20  # of logits: what one matrix product makes; smaller ones reread the weight too often
TILE_BYTES = 2 << 20  # of logits: what softmax and its like pass over while it is in the cache
KEPT_BYTES = 512 << 20  # of probabilities: beyond this they are computed again
VOCABULARY_TILE = 32768  # columns of TRL's kernel; its rows are 4096


def score_tokens(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    factor: float = 1.0,
    softcap: float | None = None,
    measure: bool = True,
    trl: bool = False,
    squares: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """hidden: [M, hidden size], weight: [V, hidden size], bias: [V], targets: [M].

    logits = softcap * tanh(factor * (hidden @ weight.T + bias) / softcap), without the cap if softcap is None.
    Returns log-probs of the targets [M] in nats; if `measure`, entropy [M] in nats and whether the target is the most
    probable token [M]; if `squares`, log of sum_v p(v)^2 [M]; None for what is not asked. Only log-probs have a
    gradient. trl: by TRL's kernel, wherever it is.
    """
    if hidden.device.type == "cpu" and softcap is None and bias is None and not trl:
        return _TiledLogProbs.apply(hidden, weight, targets, factor, measure, squares)
    outputs = ("log_probs", *(("entropy", "is_top1") if measure else ()), *(("log_sum_sq_probs",) if squares else ()))
    log_probs, entropy, squared, _, is_top1 = ChunkedLogProbFunction.apply(
        hidden, weight, bias, targets, 1.0, VOCABULARY_TILE, softcap, factor, outputs
    )
    entropy, squared = (None if one is None else one.detach() for one in (entropy, squared))
    return log_probs, entropy, is_top1, squared


class _TiledLogProbs(torch.autograd.Function):
    """d log p(t) / d logits = onehot(t) - softmax(logits), times the factor on the way to the projection."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, factor: float, measure: bool, squares: bool
    ) -> Any:
        count, vocabulary = len(hidden), len(weight)
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else hidden.dtype
        states, rows = hidden.to(dtype), weight.to(dtype).t()
        wanted = any(ctx.needs_input_grad[:2])
        keep = wanted and count * vocabulary * 4 <= KEPT_BYTES
        kept = torch.empty(count if keep else 0, vocabulary)
        log_probs = torch.empty(count)
        entropy = torch.empty(count) if measure else None
        is_top1 = torch.empty(count, dtype=torch.bool) if measure else None
        squared = torch.empty(count) if squares else None
        for block in spans(0, count, vocabulary, BLOCK_BYTES):
            logits = (states[block] @ rows).float()
            logits = logits.mul_(factor) if factor != 1 else logits
            for part in spans(block.start, block.stop, vocabulary, TILE_BYTES):
                tile = logits[part.start - block.start : part.stop - block.start]
                aims = targets[part, None]
                if measure:
                    is_top1[part] = tile.argmax(-1) == aims[:, 0]  # type: ignore[index]
                scores = torch.log_softmax(tile, -1)
                log_probs[part] = scores.gather(1, aims)[:, 0]
                if squares:
                    squared[part] = torch.logsumexp(2 * scores, -1)  # type: ignore[index]
                if measure or keep:
                    probabilities = torch.exp(scores, out=kept[part] if keep else None)
                    if measure:
                        entropy[part] = -torch.linalg.vecdot(probabilities, scores)  # type: ignore[index]
        ctx.factor, ctx.dtype = factor, dtype
        ctx.save_for_backward(hidden, weight, targets, kept if keep else None)
        ctx.mark_non_differentiable(*(one for one in (entropy, is_top1, squared) if one is not None))
        return log_probs, entropy, is_top1, squared

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, *_: Any) -> Any:
        hidden, weight, targets, kept = ctx.saved_tensors
        to_hidden = torch.zeros(hidden.shape) if ctx.needs_input_grad[0] else None
        with maybe_gather_lm_head_ctx(weight, None):  # type: ignore[arg-type] # no bias. ZeRO-3 has put the weight away since the forward
            to_weight = _TiledLogProbs._add_up(ctx, gradient, hidden, weight, targets, kept, to_hidden)
        return (
            None if to_hidden is None else to_hidden.to(hidden.dtype),
            None if to_weight is None else to_weight.to(weight.dtype),
            None,
            None,
            None,
            None,
        )

    @staticmethod
    def _add_up(
        ctx: Any, gradient: Tensor, hidden: Tensor, weight: Tensor, targets: Tensor, kept: Any, to_hidden: Any
    ) -> Any:
        to_weight = None
        states, rows = hidden.to(ctx.dtype), weight.to(ctx.dtype)
        for block in spans(0, len(hidden), len(weight), BLOCK_BYTES):
            if kept is None:
                slopes = torch.softmax((states[block] @ rows.t()).float().mul_(ctx.factor), -1)
            else:
                slopes = kept[block]
            scale = gradient[block, None].float() * ctx.factor
            slopes = torch.mul(slopes, -scale, out=slopes if kept is None else None)
            slopes = slopes.scatter_add_(1, targets[block, None], scale).to(ctx.dtype)
            if to_hidden is not None:
                to_hidden[block] = (slopes @ rows).float()
            if ctx.needs_input_grad[1]:
                given = slopes.t().float(), states[block].float()
                to_weight = torch.mm(*given) if to_weight is None else to_weight.addmm_(*given)
        return torch.zeros(weight.shape) if to_weight is None and ctx.needs_input_grad[1] else to_weight


def spans(first: int, last: int, vocabulary: int, size: int) -> list[slice]:
    """first..last in spans of rows whose float32 logits take about `size` bytes, at least 16 rows each."""
    step = max(16, size // (4 * vocabulary))
    return [slice(start, min(start + step, last)) for start in range(first, last, step)]
