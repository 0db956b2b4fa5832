"""What training needs of a device's memory, estimated from the model's shape, to decide on gradient checkpointing.

The method is that of Korthikanti et al. 2022, Reducing Activation Recomputation in Large Transformer Models
(arXiv:2205.05198): count, operation by operation, the tensors that autograd keeps for the backward pass. The counts
are those of transformers' Llama and GPT-2; other decoders are taken for the one that their configuration resembles.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

from alignment.files import size_text
from alignment.training.head import BLOCK_BYTES, KEPT_BYTES
from alignment.training.shape import Shape, shape_of

FP32, BF16 = 4, 2  # bytes
Device = Literal["cpu", "cuda"]
Arithmetic = Literal["fp32", "bf16-autocast", "bf16-weights"]  # see arithmetic(); also the names in reference.py
USABLE = 0.8  # of what is free; the rest for gradients of activations, fragments, buffers of communication
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
    layers = shape.layers * (tokens * _layer(shape, dtype) + _cast_weights(shape, dtype))
    return layers + tokens * _around(shape, dtype) + _head(shape, scored, dtype, device)


def checkpointed_bytes(config: Any, tokens: int, scored: int, dtype: Arithmetic, device: Device = "cpu") -> int:
    """As activation_bytes, with each layer's input kept, in fp32 or with bf16 weights in bf16, and one layer computed
    again at a time.

    Under autocast either all cast weights are there (it keeps them to the end of the forward), or that one layer.
    """
    shape = shape_of(config)
    weights = _cast_weights(shape, dtype)
    once = max(shape.layers * weights, tokens * _layer(shape, dtype) + weights)
    inputs = shape.layers * tokens * shape.hidden * (BF16 if dtype == "bf16-weights" else FP32)
    return inputs + once + tokens * _around(shape, dtype) + _head(shape, scored, dtype, device)


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


def _cast_weights(shape: Shape, dtype: Arithmetic) -> int:
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


def _head(shape: Shape, scored: int, dtype: Arithmetic, device: Device) -> int:
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


class Load(NamedTuple):
    """What a process has to hold.

    tokens: of a micro-batch. precision: of the stage. parameters: of the model; trainable: those of
    them with gradients. strategy: single, ddp, zero1, zero2 or zero3. offload: none, optimizer or all; it is not on the
    device then. hpz: of engine.hpz; more than one process share out a second copy of the weights. moving: a reference
    that follows the policy is kept (moving_reference.py). frozen: parameters of a model of its own that is the
    reference. decoding: answers that are sampled together, and tokens of the longest with its prompt. scored: tokens of
    the micro-batch that go through the head; None: all of them. device: where it is held.
    """

    tokens: int
    precision: Literal["fp32", "bf16"]
    parameters: int
    trainable: int
    strategy: str = "single"
    world_size: int = 1
    offload: str = "none"
    hpz: int = 1
    moving: bool = False
    frozen: int = 0
    decoding: tuple[int, int] = (0, 0)
    scored: int | None = None
    device: Device = "cpu"

    @property
    def dtype(self) -> Arithmetic:
        return arithmetic(self.precision, self.strategy)


class State(NamedTuple):
    """Bytes of what stays between micro-batches, on one process's device."""

    weights: int
    gradients: int
    optimiser: int
    reference: int


def state_of(load: Load) -> State:
    """Bytes of weights, gradients and Adam's two moments on one process's device, at most at one time of a step.

    Without ZeRO all is fp32: autocast's copies count with the activations. DDP keeps its buckets beside the gradients.
    Under ZeRO the weights have the dtype of the arithmetic. Its optimiser moves an fp32 copy of its own, 12 bytes a
    trained weight with the moments, of which each process has a part. Not counted: what is in `buffer_bytes`. With
    those of a reference; reward models are not counted: they are there before the room is measured.
    """
    whole = FP32 * load.trainable  # gradients, or one moment, or the optimiser's copy of the weights
    if not load.strategy.startswith("zero"):
        gradients = (2 if load.strategy == "ddp" else 1) * whole
        return State(FP32 * load.parameters, gradients, 2 * whole, FP32 * load.frozen + load.moving * whole)
    stage = int(load.strategy.removeprefix("zero"))
    copy = (BF16 if load.dtype == "bf16-weights" else FP32) * load.parameters
    weights = copy // load.world_size if stage >= 3 else copy
    weights += copy // load.hpz if load.hpz > 1 else 0
    reference = _frozen_copy(load, stage)
    if load.offload == "all":
        weights = reference = 0
    own = whole // load.world_size if load.offload == "none" else 0
    return State(weights, _sharded_gradients(load, stage), 3 * own, reference + load.moving * own)


def state_bytes(load: Load) -> int:
    """All of `state_of`."""
    return sum(state_of(load))


def _frozen_copy(load: Load, stage: int) -> int:
    """Bytes of the reference's weights under ZeRO: in the dtype of the arithmetic, whole but in ZeRO-3."""
    whole = (BF16 if load.dtype == "bf16-weights" else FP32) * load.frozen
    return whole // load.world_size if stage >= 3 else whole


def decoding_bytes(config: Any, load: Load) -> int:
    """Most bytes that answering takes beside the state: keys and values of each token and layer, the logits of one step
    with what a token is drawn by (probabilities, their running sums, which of these are passed: about four times as
    many), and under ZeRO-3 whole weights. Under autocast rotated keys are fp32, and the weights are kept as they have
    been cast. Layers with a sliding window keep less than this says."""
    shape, (answers, tokens) = shape_of(config), load.decoding
    both = {"fp32": 2 * FP32, "bf16-autocast": FP32 + BF16, "bf16-weights": 2 * BF16}[load.dtype]  # a key and a value
    cache = shape.layers * shape.key * answers * tokens * both
    gathered = (BF16 if load.dtype == "bf16-weights" else FP32) * load.parameters if load.strategy == "zero3" else 0
    cast = shape.layers * _cast_weights(shape, load.dtype)
    cast += BF16 * shape.vocabulary * shape.hidden if load.dtype == "bf16-autocast" else 0
    return cache + 4 * FP32 * answers * shape.vocabulary + (gathered + cast if answers else 0)


def _sharded_gradients(load: Load, stage: int) -> int:
    """Bytes of gradients on the device under ZeRO. They are added up in fp32 (`data_types.grad_accum_dtype`)."""
    whole, rounded, offloaded = FP32 * load.trainable, load.dtype == "bf16-weights", load.offload != "none"
    part = whole // load.world_size
    if stage == 1 and rounded:
        # BF16_Optimizer: beside the whole the bf16 ones that were added to it, and a bf16 copy of it while it is sent.
        # It cannot offload: DeepSpeed then takes the optimiser of ZeRO-2, which has the whole, and the own part of it.
        return whole + (part if offloaded else whole)
    if stage == 1:
        return whole
    if stage == 2 and rounded:
        return part  # added up on the device, offloaded or not
    return 0 if offloaded else part


def forward_bytes(config: Any, load: Load, checkpointing: bool) -> tuple[int, int]:
    """Most bytes of a micro-batch: activations, and the head's logits and gradients."""
    count = checkpointed_bytes if checkpointing else activation_bytes
    scored = load.tokens if load.scored is None else load.scored
    head = _head(shape_of(config), scored, load.dtype, load.device)
    return count(config, load.tokens, 0, load.dtype, load.device), head


def _without_host(load: Load) -> Load:
    """On a CPU nothing is offloaded: it would be from the host's memory to the host's memory."""
    return load if load.device == "cuda" else load._replace(offload="none")


def needs_checkpointing(
    setting: bool | Literal["auto"], config: Any, load: Load, available: int
) -> tuple[bool, str, bool]:
    """Whether to compute activations again in the backward pass, a line for the log that says why, and whether it fits.

    setting: True and False are obeyed; "auto" is on if state and activations exceed 0.8 of `available` bytes, which
    available_bytes tells. Processes may see different room: let one decide for all.
    """
    state = state_bytes(_without_host(load))
    kept, few = (sum(forward_bytes(config, load, on)) for on in (False, True))
    room = USABLE * available
    on = state + kept > room if setting == "auto" else setting
    figures = (
        f"about {size_text(state)} of weights, gradients and optimiser and {size_text(kept)} of activations "
        f"({size_text(few)} checkpointed), {size_text(available)} free"
    )
    who = "by itself" if setting == "auto" else "as set"
    line = f"gradient checkpointing {'on' if on else 'off'} ({who}): {figures}"
    fits = state + (few if on else kept) <= room
    if fits and state + (decoding := decoding_bytes(config, load)) > room:  # a smaller micro-batch is no help
        answers = f"{load.decoding[0]} answers at once, about {size_text(decoding)}"
        return on, f"{line}; memory may not suffice to decode {answers}: lower sampling_batch_size", fits
    return on, line if fits else f"{line}; memory may not suffice", fits
