"""What autograd keeps for the backward pass, in bytes, counted from the model's shape.

The method is that of Korthikanti et al. 2022, Reducing Activation Recomputation in Large Transformer Models
(arXiv:2205.05198): count, operation by operation, the tensors that are kept. The counts are those of transformers'
Llama and GPT-2; other decoders are taken for the one that their configuration resembles.
"""

from __future__ import annotations

from typing import Any, Literal

from alignment.training.head import BLOCK_BYTES, KEPT_BYTES
from alignment.training.shape import Shape, shape_of

FP32, BF16 = 4, 2  # bytes
Device = Literal["cpu", "cuda"]
Arithmetic = Literal["fp32", "bf16-autocast", "bf16-weights"]  # see arithmetic(); also the names in reference.py
TOKEN_TILE, VOCABULARY_TILE = 4096, 32768  # of TRL's chunked head, on CUDA


def arithmetic(precision: Literal["fp32", "bf16"], strategy: str) -> Arithmetic:
    """What the weights are, and what computes with them. precision: the setting of the stage; strategy: of the engine.

    bf16 under ZeRO: DeepSpeed makes the whole model bf16, its residual stream too. Without ZeRO the weights stay fp32,
    and autocast copies to bf16 what each matrix product reads.
    """
    if precision == "fp32":
        return "fp32"
    return "bf16-weights" if strategy.startswith("zero") else "bf16-autocast"


def activation_bytes(config: Any, tokens: int, scored: int, dtype: Arithmetic, device: Device = "cpu") -> int:
    """Bytes that autograd keeps for a forward without checkpointing, and those of the head's buffers.

    config: a transformers configuration. tokens: of the micro-batch, padding included. scored: those with a label.
    Per token and layer, h the hidden size, i that of the MLP, a heads times their size, e the bytes of fp32 or bf16:

    two norms       fp32: 3h each for RMSNorm (input, normalised, output), 2h for LayerNorm (input, output).
                    autocast: input and normalised in fp32, and the output once per projection that casts it
                    bf16 weights: the same as fp32 in bf16, but that RMSNorm copies its input to fp32
    attention       4ae: queries, keys, values, output. Keys and values count as repeated to all heads, which is what
                    SDPA does under a mask. No scores, but their logarithmic sums: one fp32 per head
    MLP             4ie with a gate (gate, activation, up, product), 2ie without; more for a GELU written in Python

    Under autocast every layer also keeps its weights as they have been cast. Once, not per layer: the final norm, and
    the rotations' cosines and sines. Not counted: masks of tokens^2, which padded rows have, and on the CPU those
    segments of a pack that share a beginning, slide or cap (on CUDA packs have none: flex_attention's is of blocks of
    tokens, and is made without the other); further norms inside a layer (Qwen3 keeps a tenth more than this says,
    Gemma 3 a third), experts beyond one MLP; masks of at most MOST_MASKED numbers in the last layer (attention.py).
    """
    shape = shape_of(config)
    layers = shape.layers * (tokens * _layer(shape, dtype) + cast_weights(shape, dtype))
    return layers + tokens * _around(shape, dtype) + head_bytes(shape, scored, dtype, device)


def checkpointed_bytes(config: Any, tokens: int, scored: int, dtype: Arithmetic, device: Device = "cpu") -> int:
    """As activation_bytes, with each layer's input kept, in fp32 or with bf16 weights in bf16, and one layer computed
    again at a time.

    Under autocast either all cast weights are there (it keeps them to the end of the forward), or that one layer.
    """
    shape = shape_of(config)
    weights = cast_weights(shape, dtype)
    once = max(shape.layers * weights, tokens * _layer(shape, dtype) + weights)
    inputs = shape.layers * tokens * shape.hidden * (BF16 if dtype == "bf16-weights" else FP32)
    return inputs + once + tokens * _around(shape, dtype) + head_bytes(shape, scored, dtype, device)


def _layer(shape: Shape, dtype: Arithmetic) -> int:
    """Bytes kept per token of one layer; see activation_bytes."""
    size = FP32 if dtype == "fp32" else BF16
    normed = 2 if shape.rms else 1  # RMSNorm is in Python, and keeps what it normalised too
    casts = 5 if shape.gated else 2  # of the norms' outputs: q, k, v, gate and up, or c_attn and c_fc
    norms = {
        "fp32": 2 * (normed + 1) * FP32,
        "bf16-autocast": 2 * normed * FP32 + casts * BF16,
        "bf16-weights": 2 * (FP32 + 2 * BF16 if shape.rms else 2 * BF16),
    }
    statistics = (2 * (3 - normed) + shape.heads) * FP32
    attention = 4 * shape.query * size
    inner = shape.kept + (3 if shape.gated else 1)
    return norms[dtype] * shape.hidden + statistics + attention + inner * shape.inner * size


def cast_weights(shape: Shape, dtype: Arithmetic) -> int:
    """Bytes of one layer's weights in bf16, which autograd keeps beside the fp32 ones under autocast."""
    if dtype != "bf16-autocast":
        return 0
    attention = shape.hidden * (2 * shape.query + 2 * shape.key)
    return BF16 * (attention + (3 if shape.gated else 2) * shape.hidden * shape.inner)


def _around(shape: Shape, dtype: Arithmetic) -> int:
    """Bytes kept per token outside the layers: the final norm, cosines and sines, the token's number."""
    if dtype == "bf16-weights":
        return (FP32 + 2 * BF16) * shape.hidden + 2 * shape.head_size * BF16 + 8
    return (3 * shape.hidden + 2 * shape.head_size) * FP32 + 8


def head_bytes(shape: Shape, scored: int, dtype: Arithmetic, device: Device) -> int:
    """Most bytes of the head at once, which is in its backward: logits, and the gradients it adds up in fp32.

    CUDA: TRL's kernel, whose tile is in the precision of the computation. CPU: training/head.py, which keeps the
    probabilities, and has a block of logits in three forms or, if it rounds, four. Autocast copies to bf16 what the
    head reads (on CUDA a tile of its weights); where the weights are bf16, the gradients are copied at the end.
    """
    if not scored:
        return 0
    gradients = (shape.vocabulary + scored) * shape.hidden * FP32
    rounded = gradients // 2 if dtype == "bf16-weights" else 0
    if device == "cuda":
        tile = min(scored, TOKEN_TILE) * VOCABULARY_TILE
        cast = min(shape.vocabulary, VOCABULARY_TILE) * shape.hidden * BF16 if dtype == "bf16-autocast" else 0
        return tile * (FP32 if dtype == "fp32" else BF16) + cast + gradients + rounded
    logits = scored * shape.vocabulary * FP32
    copies, cast = (3 if dtype == "fp32" else 4), (gradients // 2 if dtype == "bf16-autocast" else 0)
    blocks = max(copies * min(logits, BLOCK_BYTES), rounded)  # the blocks are gone at the end
    return (logits if logits <= KEPT_BYTES else 0) + blocks + cast + gradients
