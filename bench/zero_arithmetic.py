"""The figures of docs/clusters.md, worked out from its assumptions by hand: memory, communication, time. The tables are
zero_tables.py's.

No weights, no GPU, and the standard library alone. Bytes and operations as alignment/training/engine.py makes DeepSpeed
0.19.8 and PyTorch spend them; what of it was checked by a run is said in the page.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

FP32, BF16 = 4, 2  # bytes
GPUS = (1, 8, 16, 32)
TOKENS = (16_384, 8192, 4096, 2048)  # of a micro-batch: what engine.tokens_per_micro_batch=auto tries
RANK = 8  # of the adapters, on all linear layers


@dataclass(frozen=True)
class Cluster:
    """What the page assumes. Bytes, bytes a second in one direction, operations a second."""

    a_node: int = 8  # GPUs
    memory: float = 80e9  # of a GPU
    usable: float = 0.8  # of it: alignment/training/memory.py leaves the rest to buffers and fragments
    peak: float = 989e12  # bf16, dense, of a GPU
    mfu: float = 0.4
    nvlink: float = 450e9  # of a GPU
    adapter: float = 400e9 / 8  # of an InfiniBand adapter
    reached: float = 0.8  # of the links' rate
    pcie: float = 25e9  # of a GPU, reached
    host: float = 200e9  # of a node's memory, reached by the optimiser on the CPU
    host_memory: float = 2e12  # of a node
    disk: float = 5e9  # of the shared file system, all nodes together


CLUSTER = Cluster()


@dataclass(frozen=True)
class Model:
    """A Llama: its configuration's numbers."""

    name: str
    layers: int
    hidden: int
    inner: int
    heads: int
    key_heads: int
    vocabulary: int

    @property
    def head_size(self) -> int:
        return self.hidden // self.heads

    @property
    def key(self) -> int:
        return self.key_heads * self.head_size

    @property
    def layer_weights(self) -> int:
        """Of the linear layers: queries and output, keys and values, the MLP's three."""
        return self.hidden * (2 * self.hidden + 2 * self.key + 3 * self.inner)

    @property
    def parameters(self) -> int:
        """Embedding and head (not tied), the layers with two norms each, the final norm."""
        layers = self.layers * (self.layer_weights + 2 * self.hidden)
        return 2 * self.vocabulary * self.hidden + layers + self.hidden

    @property
    def adapters(self) -> int:
        """rank * (inputs + outputs) of each linear layer."""
        h, k, i = self.hidden, self.key, self.inner
        return self.layers * RANK * (2 * (h + h) + 2 * (h + k) + 3 * (h + i))


MODELS = (
    Model("7B", 32, 4096, 11008, 32, 32, 32_000),
    Model("70B", 80, 8192, 28672, 64, 8, 32_000),
)


# --- memory -----------------------------------------------------------------------------------------------------------
# alignment/training/memory.py counts the same, and nothing of it is used here: these formulas were written down case by
# case, from the papers, DeepSpeed's source and what a layer computes, so that each is a check of the other
# (tests/bench/test_zero_arithmetic.py). Only zero_tables.py asks memory.py what it says: a copy would show no mistake.


@dataclass(frozen=True)
class Strategy:
    """state: Psi (weights), T (trained weights), GPUs -> most bytes of weights, gradients, optimiser on one GPU; as a
    formula for people: `bf16`, and `fp32` where precision=fp32 differs."""

    name: str
    bf16: str
    fp32: str
    state: Callable[[float, float, int], float]
    fp32_state: Callable[[float, float, int], float]
    engine: str
    alone: bool = False  # one process, no other

    @property
    def deepspeed(self) -> bool:
        return "zero" in self.engine


NODE = CLUSTER.a_node
STRATEGIES = (
    Strategy(
        "one GPU", "4Ψ + 12T", "4Ψ + 12T",
        lambda p, t, n: 4 * p + 12 * t, lambda p, t, n: 4 * p + 12 * t, "single", True,
    ),
    Strategy("DDP", "4Ψ + 16T", "4Ψ + 16T", lambda p, t, n: 4 * p + 16 * t, lambda p, t, n: 4 * p + 16 * t, "ddp"),
    Strategy(
        "ZeRO-1", "2Ψ + 8T + 12T/N", "4Ψ + 4T + 12T/N",
        lambda p, t, n: 2 * p + 8 * t + 12 * t / n, lambda p, t, n: 4 * p + 4 * t + 12 * t / n, "zero1",
    ),
    Strategy(
        "ZeRO-2", "2Ψ + 16T/N", "4Ψ + 16T/N",
        lambda p, t, n: 2 * p + 16 * t / n, lambda p, t, n: 4 * p + 16 * t / n, "zero2",
    ),
    Strategy(
        "ZeRO-2, offload=optimizer", "2Ψ + 4T/N", "4Ψ",
        lambda p, t, n: 2 * p + 4 * t / n, lambda p, t, n: 4 * p, "zero2 engine.offload=optimizer",
    ),
    Strategy(
        "ZeRO-3", "2Ψ/N + 16T/N", "4Ψ/N + 16T/N",
        lambda p, t, n: (2 * p + 16 * t) / n, lambda p, t, n: (4 * p + 16 * t) / n, "zero3",
    ),
    Strategy(
        "ZeRO-3, hpZ", "2Ψ/N + 2Ψ/G + 16T/N", "4Ψ/N + 4Ψ/G + 16T/N",
        lambda p, t, n: (2 * p + 16 * t) / n + 2 * p / NODE,
        lambda p, t, n: (4 * p + 16 * t) / n + 4 * p / NODE, f"zero3 engine.hpz={NODE}",
    ),
    Strategy(
        "ZeRO-3, offload=optimizer", "2Ψ/N", "4Ψ/N",
        lambda p, t, n: 2 * p / n, lambda p, t, n: 4 * p / n, "zero3 engine.offload=optimizer",
    ),
    Strategy("ZeRO-3, offload=all", "0", "0", lambda p, t, n: 0.0, lambda p, t, n: 0.0, "zero3 engine.offload=all"),
)  # fmt: skip


def layer_activations(model: Model, autocast: bool) -> int:
    """Bytes kept per token of one layer. autocast (no ZeRO): norms keep their input and what they normalised in fp32,
    and their output once for each of the five projections that casts it. Else weights are bf16: norms keep their input
    in fp32, what they normalised and their output in bf16. Attention keeps queries, keys, values and output, the MLP
    gate, activation, up and product, all in bf16."""
    h, i = model.hidden, model.inner
    norms = 2 * 2 * h * FP32 + 5 * h * BF16 if autocast else 2 * (h * FP32 + 2 * h * BF16)
    return norms + (2 + model.heads) * FP32 + 4 * h * BF16 + 4 * i * BF16


def around(model: Model, autocast: bool) -> int:
    """Per token, outside the layers: the final norm, cosines and sines, the token's number. autocast: all in fp32; else
    the norm as in a layer, and the rotations in bf16."""
    if autocast:
        return 3 * model.hidden * FP32 + 2 * model.head_size * FP32 + 8
    return model.hidden * (FP32 + 2 * BF16) + 2 * model.head_size * BF16 + 8


def head(model: Model, tokens: int, autocast: bool) -> int:
    """TRL's chunked head on CUDA: a tile of logits, and the gradients it adds up in fp32. autocast: the weights of a
    tile are cast; else the gradients, once they are whole."""
    tile = min(tokens, 4096) * 32_768 * BF16
    gradients = (model.vocabulary + tokens) * model.hidden
    cast = min(model.vocabulary, 32_768) * model.hidden if autocast else gradients
    return tile + gradients * FP32 + cast * BF16


def activations(model: Model, tokens: int, checkpointing: bool, autocast: bool) -> float:
    """Bytes of a micro-batch, all its tokens scored. Under autocast each layer's weights are kept cast, too."""
    layer, cast = layer_activations(model, autocast), BF16 * model.layer_weights if autocast else 0
    if checkpointing:
        inputs = model.layers * tokens * model.hidden * (FP32 if autocast else BF16)
        layers = inputs + max(model.layers * cast, tokens * layer + cast)
    else:
        layers = model.layers * (tokens * layer + cast)
    return layers + tokens * around(model, autocast) + head(model, tokens, autocast)


def trained(model: Model, lora: bool) -> tuple[int, int]:
    """Psi, T."""
    return model.parameters + (model.adapters if lora else 0), model.adapters if lora else model.parameters


def largest(model: Model, strategy: Strategy, gpus: int, lora: bool) -> tuple[int, bool] | None:
    """Tokens of a micro-batch and whether with checkpointing, in the order in which `auto` prefers them."""
    room = CLUSTER.usable * CLUSTER.memory - strategy.state(*trained(model, lora), gpus)
    for checkpointing in (False, True):
        for tokens in TOKENS:
            if activations(model, tokens, checkpointing, not strategy.deepspeed) <= room:
                return tokens, checkpointing
    return None


# --- communication and time -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Traffic:
    """Bytes that one GPU sends in a step: `across` in collectives of all GPUs, `inside` in those of its node alone;
    of `across`, `after` can not hide behind the backward pass."""

    across: float
    inside: float = 0.0
    after: float = 0.0


def traffic(name: str, psi: float, t: float, micro: int, gpus: int) -> Traffic:
    """micro: micro-batches a step. A collective of S bytes sends S * (n - 1) / n a GPU, an all-reduce twice that."""
    share, own = (gpus - 1) / gpus, (NODE - 1) / NODE
    if name == "DDP":
        return Traffic(2 * FP32 * t * share)
    if name == "ZeRO-1":
        return Traffic((2 * BF16 * t + BF16 * t) * share, after=3 * BF16 * t * share)
    if name.startswith("ZeRO-2"):
        return Traffic((2 * BF16 * t * micro + BF16 * t) * share, after=BF16 * t * share)
    if name == "ZeRO-3, hpZ":
        if t < psi:  # frozen weights never change: their second copy stays good
            return Traffic((2 * BF16 * t + BF16 * t * micro) * share, 2 * BF16 * psi * micro * own)
        return Traffic((BF16 * psi + BF16 * t * micro) * share, (2 * micro - 1) * BF16 * psi * own)
    return Traffic((2 * BF16 * psi * micro + BF16 * t * micro) * share)


def rates(adapters: int, gpus: int) -> tuple[float, float]:
    """Bytes a second at which all GPUs, and those of a node, send; a ring of all is as fast as a node's way out."""
    inside = CLUSTER.reached * CLUSTER.nvlink
    return (min(inside, CLUSTER.reached * adapters * CLUSTER.adapter) if gpus > NODE else inside), inside


def compute_seconds(psi: float, tokens: float, lora: bool, checkpointing: bool = False) -> float:
    """Of one GPU. Forward 2 operations a weight and token, backward 4, of frozen weights 2; a second forward 2."""
    operations = (4 if lora else 6) + (2 if checkpointing else 0)
    return operations * psi * tokens / (CLUSTER.mfu * CLUSTER.peak)
