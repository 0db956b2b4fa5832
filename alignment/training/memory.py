"""What training needs of a device's memory, estimated from the model's shape, to decide on micro-batches and gradient
checkpointing: what stays (weights, gradients, optimiser, reference), and what a micro-batch takes (activations.py)."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

from alignment.files import size_text
from alignment.training.activations import (
    BF16,
    FP32,
    TOKEN_TILE,
    VOCABULARY_TILE,
    Arithmetic,
    Device,
    activation_bytes,
    arithmetic,
    cast_weights,
    checkpointed_bytes,
    head_bytes,
)
from alignment.training.head import BLOCK_BYTES
from alignment.training.shape import Shape, shape_of

USABLE = 0.8  # of what is free; the rest for gradients of activations, fragments, buffers of communication
BUDGET = 2  # what a pass without gradients takes of the tokens of a micro-batch
# Numbers, of DeepSpeed: in a bucket of gradients; gathered by ZeRO-3, and gathered together.
BUCKET, LIVE, PREFETCH = 500_000_000, 1_000_000_000, 50_000_000
# Bytes of a process that holds no model yet, and more with DeepSpeed. CPU: measured (bench/memory.py). CUDA: of its
# context and kernels, a guess.
RUNTIME: dict[Device, int] = {"cpu": 550_000_000, "cuda": 600_000_000}
DEEPSPEED = 60_000_000
MAPPED = 32 << 20  # bytes, from which on glibc's malloc never reuses what was freed
HOLES = 0.3  # of what comes and goes: glibc's malloc leaves so much between tensors (bench/memory.py)


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
    cast = shape.layers * cast_weights(shape, load.dtype)
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
    head = head_bytes(shape_of(config), scored, load.dtype, load.device)
    return count(config, load.tokens, 0, load.dtype, load.device), head


def scoring_bytes(config: Any, load: Load) -> tuple[int, int]:
    """Most bytes of a pass without gradients over BUDGET times the tokens, as of `forward_bytes`: what one layer has at
    once, of an MLP its input, residual and inner tensors; and a block of logits in its forms."""
    shape, tokens = shape_of(config), BUDGET * load.tokens
    size = FP32 if load.dtype == "fp32" else BF16
    inner = (3 if shape.gated else 2) * shape.inner * size
    layer = tokens * (inner + 2 * shape.hidden * FP32) + cast_weights(shape, load.dtype)
    scored = tokens if load.scored is None else BUDGET * load.scored
    logits = min(
        scored * shape.vocabulary * FP32, BLOCK_BYTES if load.device == "cpu" else TOKEN_TILE * VOCABULARY_TILE * size
    )
    return layer, (3 if load.dtype == "fp32" else 4) * logits


class Parts(NamedTuple):
    """Bytes that a process has at most at one time, by what they are for.

    Either activations and logits or decoding: they are not there together. allocator: what it holds between tensors
    and gives to nobody else. runtime: Python, libraries, the context of a GPU. writing: of the main process of a stage
    that trains, as its result is written. rewards: of online training, the reward models that it asks.
    """

    weights: int
    gradients: int
    optimiser: int
    reference: int
    activations: int
    logits: int
    decoding: int
    buffers: int
    allocator: int
    runtime: int
    writing: int
    rewards: int = 0

    @property
    def total(self) -> int:
        return sum(self)


def parts_of(config: Any, load: Load, checkpointing: bool) -> Parts:
    """The most memory that a process takes on its device from its start to its end: of a CPU its resident set.

    On a CPU the model is written, as a fresh copy of it that is mapped from its files, into the same memory, of which
    glibc has not given back by then what small activations took. On a GPU the host has it.
    """
    state = state_of(_without_host(load))
    activations, logits = forward_bytes(config, load, checkpointing) if load.trainable else scoring_bytes(config, load)
    if (decoding := decoding_bytes(config, load)) > activations + logits:
        activations = logits = 0
    else:
        decoding = 0
    passing = activations + logits + decoding
    buffers = buffer_bytes(load) + max(0, _in_step(load) - passing)
    runtime = RUNTIME[load.device] + (DEEPSPEED if load.strategy.startswith("zero") else 0)
    if load.device == "cuda":
        return Parts(*state, activations, logits, decoding, buffers, 0, runtime, 0)
    mapped = _mapped(shape_of(config), load, activations, logits)
    written = max(0, FP32 * load.parameters - mapped) if load.trainable else 0
    return Parts(*state, activations, logits, decoding, buffers, int(HOLES * (passing - mapped)), runtime, written)


def _mapped(shape: Shape, load: Load, activations: int, logits: int) -> int:
    """Of these bytes those in tensors that glibc's malloc maps each for itself, and gives back as soon as it is freed;
    of others it keeps what they leave. Activations are taken for as large as the MLP's, the largest."""
    size = FP32 if load.dtype == "fp32" else BF16
    scored = load.tokens if load.scored is None else load.scored
    large = activations if load.tokens * shape.inner * size >= MAPPED else 0
    return large + (logits if scored * shape.vocabulary * FP32 >= MAPPED else 0)


def buffer_bytes(load: Load) -> int:
    """What DeepSpeed keeps beside the state: buckets of gradients that are sent together, and what ZeRO-3 has gathered
    (by its defaults: buckets of BUCKET numbers, at most LIVE gathered ones, PREFETCH of them at a time).

    CUDA takes a bucket whole, and two where sending overlaps with computing; of a CPU's only what is used is there.
    """
    if not load.strategy.startswith("zero"):
        return 0
    size = BF16 if load.dtype == "bf16-weights" else FP32
    if load.strategy == "zero1" and load.dtype == "bf16-weights":
        buckets = 0  # its gradients are sent as they are
    elif load.device == "cuda":
        buckets = BUCKET * size * (1 if load.strategy == "zero3" else 2)
    else:
        buckets = min(BUCKET, load.trainable) * size
    if load.strategy != "zero3":
        return buckets
    together = min(PREFETCH, load.parameters)  # is copied out of one buffer
    return buckets + (min(LIVE, load.parameters) + together) * size


def _in_step(load: Load) -> int:
    """Bytes of a second copy of the own gradients, which is there in the optimiser's step, without activations."""
    if not load.strategy.startswith("zero") or load.offload != "none":
        return 0
    return FP32 * load.trainable // load.world_size


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
