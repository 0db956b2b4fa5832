"""A decoder in numbers, of which memory and time are estimated."""

from __future__ import annotations

from typing import Any, NamedTuple

# kept inputs of activations that transformers writes out in Python; those of torch keep one, the input
KEPT_BY_ACTIVATION = {"gelu_new": 4, "gelu_fast": 4, "gelu_python": 4, "quick_gelu": 2}


class Shape(NamedTuple):
    """Numbers of a decoder layer, and of the head."""

    layers: int
    hidden: int
    inner: int  # of the MLP
    query: int  # heads times their size
    key: int  # the same of keys, or of values
    heads: int
    head_size: int
    vocabulary: int
    gated: bool  # the MLP multiplies an activation with a second projection
    rms: bool  # the norms are RMSNorm
    kept: int  # tensors of `inner` that the activation keeps


def shape_of(config: Any) -> Shape:
    """Of a transformers configuration of a decoder."""
    text = config.get_text_config()
    hidden, heads = text.hidden_size, text.num_attention_heads
    head_size = getattr(text, "head_dim", None) or hidden // heads
    inner = next((size for name in ("intermediate_size", "n_inner", "ffn_dim") if (size := getattr(text, name, 0))), 0)
    # GPT-2, GPT-J, GPT-Neo and OPT call it activation_function, and have no gate. Of the others some have none either:
    # they are estimated too high.
    plain = getattr(text, "activation_function", None)
    return Shape(
        layers=text.num_hidden_layers,
        hidden=hidden,
        inner=inner or 4 * hidden,
        query=heads * head_size,
        key=(getattr(text, "num_key_value_heads", None) or heads) * head_size,
        heads=heads,
        head_size=head_size,
        vocabulary=text.vocab_size,
        gated=plain is None,
        rms=hasattr(text, "rms_norm_eps"),
        kept=KEPT_BY_ACTIVATION.get(str(plain or getattr(text, "hidden_act", "silu")), 1),
    )


def attention_share(config: Any) -> float:
    """b / a of the time a*L + b*L^2 of a row of L tokens, in 1 / tokens, from operations per token: 2 for each weight
    of the layers, against 4 * (heads times their size) for each token seen, of which causally there are L / 2."""
    shape = shape_of(config)
    weights = shape.hidden * (2 * shape.query + 2 * shape.key) + (3 if shape.gated else 2) * shape.hidden * shape.inner
    return shape.query / weights


def adapter_parameters(config: Any, rank: int, targets: str | list[str], dora: bool = False) -> int:
    """Weights of adapters of this rank, rank * (inputs + outputs) each, on these linear layers of all decoder layers;
    with dora the length of each row too: outputs. What DoRA computes with, copies of one layer's weights at a time, is
    not counted.

    targets: "all-linear", or names. The names are those of Llama; with another among them, all linear layers are
    counted, which are no fewer.
    """
    shape = shape_of(config)
    h, q, k, i = shape.hidden, shape.query, shape.key, shape.inner
    sizes = {
        "q_proj": (h, q),
        "k_proj": (h, k),
        "v_proj": (h, k),
        "o_proj": (q, h),
        "up_proj": (h, i),
        "down_proj": (i, h),
    }
    if shape.gated:
        sizes["gate_proj"] = (h, i)
    names = {targets} if isinstance(targets, str) else set(targets)
    adapted = [sizes[name] for name in (names if names <= sizes.keys() else sizes)]
    return shape.layers * sum(rank * (inputs + outputs) + dora * outputs for inputs, outputs in adapted)
