"""What training needs of a device's memory, estimated from the model's shape, to decide on gradient checkpointing.

The method is that of Korthikanti et al. 2022, Reducing Activation Recomputation in Large Transformer Models
(arXiv:2205.05198): count, operation by operation, the tensors that autograd keeps for the backward pass. The counts
are those of transformers' Llama and GPT-2; other decoders are taken for the one that their configuration resembles.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from alignment.files import size_text
from alignment.training.head import BLOCK_BYTES, KEPT_BYTES

FP32, BF16 = 4, 2  # bytes
USABLE = 0.8  # of what is free; the rest for gradients of activations, fragments, buffers of communication
TOKEN_TILE, VOCABULARY_TILE = 4096, 32768  # of TRL's chunked head, on CUDA
# kept inputs of activations that transformers writes out in Python; those of torch keep one, the input
KEPT_BY_ACTIVATION = {"gelu_new": 4, "gelu_fast": 4, "gelu_python": 4, "quick_gelu": 2}
CGROUPS = (  # of a group: its limit, its use, and the line of memory.stat with the file cache it would give back
    ("memory.max", "memory.current", "inactive_file"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)


class _Shape(NamedTuple):
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


def _shape(config: Any) -> _Shape:
    text = config.get_text_config()
    hidden, heads = text.hidden_size, text.num_attention_heads
    head_size = getattr(text, "head_dim", None) or hidden // heads
    inner = next((size for name in ("intermediate_size", "n_inner", "ffn_dim") if (size := getattr(text, name, 0))), 0)
    # GPT-2, GPT-J, GPT-Neo and OPT call it activation_function, and have no gate. Of the others some have none either:
    # they are estimated too high.
    plain = getattr(text, "activation_function", None)
    return _Shape(
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


def activation_bytes(config: Any, tokens: int, scored: int, precision: Literal["fp32", "bf16"]) -> int:
    """Bytes that autograd keeps for a forward without checkpointing, and those of the head's buffers.

    config: a transformers configuration. tokens: of the micro-batch, padding included. scored: those with a label.
    Per token and layer, h the hidden size, i that of the MLP, a heads times their size, e the bytes of the precision:

    two norms       fp32: 3h each for RMSNorm (input, normalised, output), 2h for LayerNorm (input, output).
                    bf16, by autocast: input and normalised in fp32, and the output once per projection that casts it
    attention       4ae: queries, keys, values, output. Keys and values count as repeated to all heads, which is what
                    SDPA does under a mask. No scores, but their logarithmic sums: one fp32 per head
    MLP             4ie with a gate (gate, activation, up, product), 2ie without; more for a GELU written in Python

    Under bf16 every layer also keeps its weights as autocast has cast them. Once, not per layer: the final norm, and
    the rotations' cosines and sines. Not counted: masks of tokens^2, which padded rows have, and on the CPU those
    segments of a pack that share a beginning, slide or cap (on CUDA packs have none: flex_attention's is of blocks of
    tokens, and is made without the other); further norms inside a layer (Qwen3 keeps a tenth more than this says,
    Gemma 3 a third), experts beyond one MLP; masks of at most MOST_MASKED numbers in the last layer (attention.py).
    """
    shape = _shape(config)
    layers = shape.layers * (tokens * _layer(shape, precision) + _cast_weights(shape, precision))
    return layers + tokens * _around(shape) + _head(shape, scored, precision)


def checkpointed_bytes(config: Any, tokens: int, scored: int, precision: Literal["fp32", "bf16"]) -> int:
    """As activation_bytes, with each layer's input kept in fp32 and one layer computed again at a time.

    Under bf16 either all cast weights are there (autocast keeps them to the end of the forward), or that one layer.
    """
    shape = _shape(config)
    weights = _cast_weights(shape, precision)
    once = max(shape.layers * weights, tokens * _layer(shape, precision) + weights)
    inputs = shape.layers * tokens * shape.hidden * FP32
    return inputs + once + tokens * _around(shape) + _head(shape, scored, precision)


def _layer(shape: _Shape, precision: str) -> int:
    """Bytes kept per token of one layer; see activation_bytes."""
    size, fp32 = (FP32, True) if precision == "fp32" else (BF16, False)
    normed = 2 if shape.rms else 1  # RMSNorm is in Python, and keeps what it normalised too
    casts = 5 if shape.gated else 2  # of the norms' outputs: q, k, v, gate and up, or c_attn and c_fc
    norms = 2 * normed * shape.hidden * FP32 + (2 if fp32 else casts) * shape.hidden * size
    statistics = (2 * (3 - normed) + shape.heads) * FP32
    attention = 4 * shape.query * size
    inner = shape.kept + (3 if shape.gated else 1)
    return norms + statistics + attention + inner * shape.inner * size


def _cast_weights(shape: _Shape, precision: str) -> int:
    """Bytes of one layer's weights in bf16, which autograd keeps beside the fp32 ones."""
    if precision == "fp32":
        return 0
    attention = shape.hidden * (2 * shape.query + 2 * shape.key)
    return BF16 * (attention + (3 if shape.gated else 2) * shape.hidden * shape.inner)


def _around(shape: _Shape) -> int:
    """Bytes kept per token outside the layers: the final norm, cosines and sines, the token's number."""
    return (3 * shape.hidden + 2 * shape.head_size) * FP32 + 8


def _head(shape: _Shape, scored: int, precision: str) -> int:
    """Most bytes of the head at once, which is in its backward: logits, and the gradients it adds up in fp32.

    CUDA: TRL's kernel, whose tile is in the precision of the computation. CPU: training/head.py, which keeps the
    probabilities, and has a block of logits in three forms or, if it rounds, four.
    """
    if not scored:
        return 0
    gradients = (shape.vocabulary + scored) * shape.hidden * FP32
    if torch.cuda.is_available():
        tile = min(scored, TOKEN_TILE) * VOCABULARY_TILE
        cast = 0 if precision == "fp32" else min(shape.vocabulary, VOCABULARY_TILE) * shape.hidden * BF16
        return tile * (FP32 if precision == "fp32" else BF16) + cast + gradients
    logits = scored * shape.vocabulary * FP32
    copies, cast = (3, 0) if precision == "fp32" else (4, gradients // 2)
    return (logits if logits <= KEPT_BYTES else 0) + copies * min(logits, BLOCK_BYTES) + cast + gradients


def attention_share(config: Any) -> float:
    """b / a of the time a*L + b*L^2 of a row of L tokens, in 1 / tokens, from operations per token: 2 for each weight
    of the layers, against 4 * (heads times their size) for each token seen, of which causally there are L / 2."""
    shape = _shape(config)
    weights = shape.hidden * (2 * shape.query + 2 * shape.key) + (3 if shape.gated else 2) * shape.hidden * shape.inner
    return shape.query / weights


def adapter_parameters(config: Any, rank: int, targets: str | list[str]) -> int:
    """Weights of adapters of this rank, rank * (inputs + outputs) each, on these linear layers of all decoder layers.

    targets: "all-linear", or names. The names are those of Llama; with another among them, all linear layers are
    counted, which are no fewer.
    """
    shape = _shape(config)
    queries, keys, up = shape.hidden + shape.query, shape.hidden + shape.key, shape.hidden + shape.inner
    sizes = {"q_proj": queries, "k_proj": keys, "v_proj": keys, "o_proj": queries, "up_proj": up, "down_proj": up}
    if shape.gated:
        sizes["gate_proj"] = up
    names = {targets} if isinstance(targets, str) else set(targets)
    return shape.layers * rank * sum(sizes[name] for name in (names if names <= sizes.keys() else sizes))


def state_bytes(parameters: int, trainable: int, strategy: str, world_size: int, offload: str, hpz: int = 1) -> int:
    """Bytes of weights, gradients and Adam's two moments on one process's device, all fp32.

    parameters: of the model; trainable: those of them with gradients. strategy: single, ddp, zero1, zero2 or zero3.
    offload: none, optimizer or all; what is offloaded is not on the device. DDP keeps its buckets beside the
    gradients; DeepSpeed's optimiser has its own copy of the weights that it moves. hpz: of engine.hpz; more than one
    process share out a second copy of the weights.
    """
    weights, gradients, optimiser = FP32 * parameters, FP32 * trainable, 2 * FP32 * trainable
    if strategy == "ddp":
        gradients *= 2
    if strategy.startswith("zero"):
        stage = int(strategy.removeprefix("zero"))
        optimiser = 3 * FP32 * trainable // world_size
        gradients //= world_size if stage >= 2 else 1
        weights //= world_size if stage >= 3 else 1
        if offload != "none":
            optimiser = 0
            gradients = 0 if stage >= 2 else gradients
        weights += FP32 * parameters // hpz if hpz > 1 else 0
        weights = 0 if offload == "all" else weights
    return weights + gradients + optimiser


def available_bytes() -> int:
    """Bytes free on this process's device: the GPU, or its share of this machine's (or container's) memory.

    To be asked before weights are loaded: what the process holds is not free.
    """
    return int(torch.cuda.mem_get_info()[0]) if torch.cuda.is_available() else host_share()


def host_share() -> int:
    """Bytes free for this process in the memory of its machine or container, shared out equally among processes."""
    return host_bytes(Path("/proc"), Path("/sys/fs/cgroup")) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def host_bytes(proc: Path, cgroup: Path) -> int:
    """Bytes that processes may still take: MemAvailable, or less if a control group (v2 or v1) above this one says so.

    File cache that a group would give back does not count as used, as it does not in MemAvailable.
    """
    lines = (proc / "meminfo").read_text().splitlines()
    available = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    return int(max(0, min([available, *(_room(group) for group in _groups(proc, cgroup))])))


def _groups(proc: Path, cgroup: Path) -> list[Path]:
    """Folders of this process's control groups and those above them; a container sees its own group as the root."""
    try:
        lines = (proc / "self" / "cgroup").read_text().splitlines()
    except OSError:
        lines = []
    found = []
    for line in ["0::/", ":memory:/", *lines]:
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        root = cgroup / "memory" if controllers else cgroup
        inside = Path(path.lstrip("/"))
        found += [root / part for part in (inside, *inside.parents)]
    return list(dict.fromkeys(found))


def _room(group: Path) -> float:
    """Bytes left in a control group; infinite where it has no limit."""
    for limit, usage, cache in CGROUPS:
        try:
            most, used = int((group / limit).read_text()), int((group / usage).read_text())
            lines = (group / "memory.stat").read_text().splitlines()
        except (OSError, ValueError):  # no such group, or its limit is `max`
            continue
        return most - used + next((int(line.split()[1]) for line in lines if line.split()[0] == cache), 0)
    return float("inf")


class Load(NamedTuple):
    """What a process has to hold. tokens: of a micro-batch, all of them scored; the others: see state_bytes."""

    tokens: int
    precision: Literal["fp32", "bf16"]
    parameters: int
    trainable: int
    strategy: str = "single"
    world_size: int = 1
    offload: str = "none"
    hpz: int = 1


def needs_checkpointing(
    setting: bool | Literal["auto"], config: Any, load: Load, available: int
) -> tuple[bool, str, bool]:
    """Whether to compute activations again in the backward pass, a line for the log that says why, and whether it fits.

    setting: True and False are obeyed; "auto" is on if state and activations exceed 0.8 of `available` bytes, which
    available_bytes tells. Processes may see different room: let one decide for all.
    """
    offload = load.offload if torch.cuda.is_available() else "none"  # from the host's memory to the host's memory
    state = state_bytes(load.parameters, load.trainable, load.strategy, load.world_size, offload, load.hpz)
    kept = activation_bytes(config, load.tokens, load.tokens, load.precision)
    few = checkpointed_bytes(config, load.tokens, load.tokens, load.precision)
    room = USABLE * available
    on = state + kept > room if setting == "auto" else setting
    figures = (
        f"about {size_text(state)} of weights, gradients and optimiser and {size_text(kept)} of activations "
        f"({size_text(few)} checkpointed), {size_text(available)} free"
    )
    who = "by itself" if setting == "auto" else "as set"
    line = f"gradient checkpointing {'on' if on else 'off'} ({who}): {figures}"
    fits = state + (few if on else kept) <= room
    return on, line if fits else f"{line}; memory may not suffice", fits
