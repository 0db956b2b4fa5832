"""All that training carries from step to step, taken out of an engine and put into another one.

Weights and moments are kept as *fragments*: a range of one flattened parameter in fp32, as it lies on one process.
Every engine holds fragments (ZeRO its partitions, the others whole parameters), so what two processes of ZeRO-3 wrote,
one process of another engine reads: it takes of each file the ranges that it holds itself. Nothing is gathered to save,
and nothing is converted to resume.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from alignment.errors import TrainingError
from alignment.training import ranks
from alignment.training.tensors import facts as facts_of

MOMENTS = ("exp_avg", "exp_avg_sq")  # of AdamW


@dataclass
class Fragment:
    """The range [start, start + numel) of the flattened parameter `name`.

    values: "weight" and MOMENTS -> fp32 [numel], views of what the engine holds; "reference" too, where the trainer has
    a reference that moves (trainer.anchor: key of the weight -> fp32 [numel]). updates: how often the optimiser has
    moved it; may be shared with others. owned: this process saves it.
    """

    name: str
    start: int
    numel: int
    values: dict[str, Tensor]
    updates: Tensor
    owned: bool = True

    def key(self, kind: str) -> str:
        return f"{kind}:{self.start}:{self.name}"


def fragments(trainer: Any) -> list[Fragment]:
    """All that this process holds of what is trained."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    named = {parameter: name for name, parameter in model.named_parameters() if parameter.requires_grad}
    if not trainer.is_deepspeed_enabled:
        held = list(_whole(trainer.optimizer.optimizer, named))
    else:
        zero = trainer.model_wrapped.optimizer
        held = list(_zero3(zero, named) if hasattr(zero, "fp32_partitioned_groups_flat") else _zero12(zero, named))
    for fragment in held:
        if (anchor := getattr(trainer, "anchor", {}).get(fragment.key("weight"))) is not None:
            fragment.values["reference"] = anchor
    return held


def _whole(optimizer: Any, named: Mapping[Tensor, str]) -> Iterator[Fragment]:
    """Every process holds all; each saves parameters of about equal size."""
    shares = [0] * ranks.world_size()
    for parameter, name in sorted(named.items(), key=lambda item: (-item[0].numel(), item[1])):
        state = _adam(optimizer, parameter)
        values = {"weight": parameter.detach(), **{kind: state[kind] for kind in MOMENTS}}
        owner = shares.index(min(shares))
        shares[owner] += parameter.numel()
        flat = {kind: value.view(-1) for kind, value in values.items()}
        yield Fragment(name, 0, parameter.numel(), flat, state["step"], owner == ranks.rank())


def _zero12(zero: Any, named: Mapping[Any, str]) -> Iterator[Fragment]:
    """The parameters of a group lie flat behind each other, and each process holds one stretch of that."""
    for number, group in enumerate(zero.bit16_groups):
        flat = zero.single_partition_of_fp32_groups[number]
        state = _adam(zero.optimizer, flat)
        for parameter in group:
            if (place := parameter._hp_mapping) is not None:
                inside, numel = place.hp_fragment_address.start, place.hp_fragment_address.numel
                values = {"weight": flat.detach(), **{kind: state[kind] for kind in MOMENTS}}
                mine = {kind: value.narrow(0, inside, numel) for kind, value in values.items()}
                yield Fragment(named[parameter], place.lp_fragment_address.start, numel, mine, state["step"])


def _zero3(zero: Any, named: Mapping[Any, str]) -> Iterator[Fragment]:
    """Each process holds an equal part of every parameter; the last part may end in padding, which is not kept."""
    for parameter, name in named.items():
        group, inside, part = zero.grad_position[zero.get_param_id(parameter)]
        flat = zero.fp32_partitioned_groups_flat[group]
        state = _adam(zero.optimizer, flat)
        start = int(zero._get_param_partition_rank(parameter) * part)
        numel = min(int(part), int(parameter.ds_numel) - start)
        if numel > 0:
            values = {"weight": flat.detach(), **{kind: state[kind] for kind in MOMENTS}}
            mine = {kind: value.narrow(0, inside, numel) for kind, value in values.items()}
            yield Fragment(name, start, numel, mine, state["step"])


def _adam(optimizer: Any, parameter: Tensor) -> dict[str, Tensor]:
    """AdamW's state of a parameter; before its first update as torch.optim.AdamW will make it."""
    state: dict[str, Tensor] = optimizer.state[parameter]
    if not state:
        like = parameter.detach()
        device = like.device if optimizer.defaults.get("fused") else torch.device("cpu")
        state["step"] = torch.zeros((), dtype=torch.float32, device=device)
        for kind in MOMENTS:
            state[kind] = torch.zeros_like(like, memory_format=torch.preserve_format)
    return state


def size(trainer: Any) -> int:
    """Bytes of what this process saves of them."""
    held = (fragment for fragment in fragments(trainer) if fragment.owned)
    return sum(4 * fragment.numel * len(fragment.values) for fragment in held)


# --- out --------------------------------------------------------------------------------------------------------------


def state_dict(trainer: Any) -> dict[str, Tensor]:
    """This process's part of a checkpoint: views of what the engine holds, good until the next update."""
    tensors: dict[str, Tensor] = {"rng:torch": torch.get_rng_state()}
    if trainer.args.device.type == "cuda":
        tensors["rng:cuda"] = torch.cuda.get_rng_state(trainer.args.device)
    for fragment in fragments(trainer):
        if fragment.owned:
            for kind, value in fragment.values.items():
                tensors[fragment.key(kind)] = value.detach().to(torch.float32)
            tensors[fragment.key("updates")] = fragment.updates.detach().to(torch.int64).reshape(1)
    return tensors


def cpu_copy(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """On the CPU and nobody else's: training may go on."""
    return {name: tensor.to("cpu", copy=True) for name, tensor in tensors.items()}


def random_state() -> dict[str, Any]:
    """Python's and numpy's generators, as JSON; torch's are tensors of `state_dict`."""
    kind, keys, position, has_gauss, gauss = np.random.get_state()
    version, internal, next_gauss = random.getstate()
    return {
        "numpy": [kind, np.asarray(keys).tolist(), position, has_gauss, gauss],
        "python": [version, list(internal), next_gauss],
    }


# --- in ---------------------------------------------------------------------------------------------------------------


class Saved:
    """The files of one checkpoint, whoever wrote them."""

    def __init__(self, folder: Path):
        self.files = sorted(folder.glob("rank-*.safetensors"))
        self._where: dict[tuple[str, str], list[tuple[int, int, Any]]] = {}  # kind, parameter -> start, numel, file
        for file in self.files:
            stream = safe_open(file, "pt").__enter__()  # mapped into memory until this object goes
            for key in stream.keys():  # noqa: SIM118 - not a dict
                kind, _, rest = key.partition(":")
                if kind != "rng":
                    start, _, name = rest.partition(":")
                    numel = stream.get_slice(key).get_shape()[0]
                    self._where.setdefault((kind, name), []).append((int(start), numel, stream))

    def names(self) -> set[str]:
        """Of the parameters that are here."""
        return {name for _, name in self._where}

    def read(self, kind: str, name: str, into: Tensor, start: int) -> None:
        """Fill `into` with the range that begins at `start` of the flattened parameter."""
        end, filled = start + into.numel(), 0
        for first, numel, stream in self._where.get((kind, name), ()):
            low, high = max(start, first), min(end, first + numel)
            if low < high:
                piece = stream.get_slice(f"{kind}:{first}:{name}")[low - first : high - first]
                into[low - start : high - start].copy_(piece)
                filled += high - low
        if filled != end - start:
            raise TrainingError(f"the checkpoint has {filled} of {end - start} values of {name} ({kind})")

    def updates(self, name: str) -> int:
        """How often the optimiser has moved the parameter."""
        found = self._where.get(("updates", name), ())
        return max(int(stream.get_tensor(f"updates:{start}:{name}")) for start, _, stream in found)

    def generators(self, rank: int) -> tuple[dict[str, Tensor], Any] | None:
        """What the process of this rank left of its own: tensors "rng:..." and its facts. None: there was none."""
        mine = next((file for file in self.files if file.name.startswith(f"rank-{rank:05d}-")), None)
        if mine is None:
            return None
        with safe_open(mine, "pt") as stream:
            tensors = {key: stream.get_tensor(key) for key in stream.keys() if key.startswith("rng:")}  # noqa: SIM118
        return tensors, facts_of(mine)


@torch.no_grad()
def load_state_dict(trainer: Any, saved: Saved, tick: Callable[[], None] = lambda: None) -> None:
    """Weights and the optimiser's state into the engine. tick: called as it gets on. A collective: every process
    enters."""
    held = fragments(trainer)
    _require_same(trainer, saved)
    updates: dict[int, int] = {}
    with rewriting(trainer):
        for fragment in held:
            tick()
            for kind, value in fragment.values.items():
                saved.read(kind, fragment.name, value, fragment.start)
            known = updates.get(id(fragment.updates), 0)  # those who share a counter were moved together
            updates[id(fragment.updates)] = max(known, saved.updates(fragment.name))
            fragment.updates.fill_(updates[id(fragment.updates)])


@contextmanager
def rewriting(trainer: Any) -> Iterator[None]:
    """Fragments are written inside: afterwards the model computes with them. A collective."""
    zero: Any = trainer.model_wrapped.optimizer if trainer.is_deepspeed_enabled else None
    if hasattr(zero, "checkpoint_event_prologue"):
        zero.checkpoint_event_prologue()  # ZeRO-3 may hold small parameters gathered
    yield
    if hasattr(zero, "checkpoint_event_epilogue"):
        for number in range(len(zero.fp16_groups)):
            zero._reassign_or_swap_out_partitioned_parameters(number)
        zero.checkpoint_event_epilogue()
    elif zero is not None:
        zero.update_lp_params()


def _require_same(trainer: Any, saved: Saved) -> None:
    model = trainer.accelerator.unwrap_model(trainer.model)
    wanted = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    if wanted != saved.names():
        raise TrainingError(f"the checkpoint is of other parameters: {sorted(wanted ^ saved.names())[:3]}")


def set_generators(tensors: Mapping[str, Tensor], states: Mapping[str, Any], device: torch.device) -> None:
    torch.set_rng_state(tensors["rng:torch"])
    if "rng:cuda" in tensors and device.type == "cuda":
        torch.cuda.set_rng_state(tensors["rng:cuda"], device)
    kind, keys, *rest = states["numpy"]
    np.random.set_state((kind, np.array(keys, np.uint32), *rest))
    version, internal, next_gauss = states["python"]
    random.setstate((version, tuple(internal), next_gauss))
