"""Two models of one architecture -> one between them, tensor by tensor: at no time are two whole models in memory."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open
from torch import Tensor

from alignment.errors import InputError
from alignment.files import read_json, require_room, write_json
from alignment.training import tensors

PIECE = 1 << 24  # weights that are computed in fp64 at a time
# Radians between two tensors, or between one and the other turned round: below, both ways are the same to fp32's
# rounding (they differ by less than the square of the angle), and the arc between opposite ones is not defined.
PARALLEL = 1e-4
TOLD = {"dtype", "torch_dtype", "_name_or_path", "transformers_version", "use_cache"}  # of a config, not of a model
Method = Literal["linear", "slerp"]


def shares(one: Tensor, other: Tensor, method: Method, t: float) -> tuple[float, float, bool]:
    """How much of each tensor the merged one has, and whether slerp fell back to linear.

    linear: 1 - t and t. slerp: sin((1 - t) w) / sin w and sin(t w) / sin w, with w the angle between the two, taken as
    vectors (Shoemake 1985, "Animating rotation with quaternion curves", there in four dimensions).
    """
    if method == "linear":
        return 1 - t, t, False
    dot = squares = other_squares = 0.0
    for a, b in zip(one.reshape(-1).split(PIECE), other.reshape(-1).split(PIECE), strict=True):
        a, b = a.double(), b.double()
        dot, squares, other_squares = dot + float(a @ b), squares + float(a @ a), other_squares + float(b @ b)
    if not squares or not other_squares:
        return 1 - t, t, True
    angle = math.acos(max(-1.0, min(1.0, dot / math.sqrt(squares * other_squares))))
    if min(angle, math.pi - angle) < PARALLEL:
        return 1 - t, t, True
    return math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle), False


def merged(one: Tensor, other: Tensor, method: Method, t: float) -> tuple[Tensor, bool]:
    """The tensor between them, in the wider of their types; at 0 and 1 the one or the other, bit for bit. And whether
    slerp fell back to linear."""
    dtype = torch.promote_types(one.dtype, other.dtype)
    if t in (0, 1) or not dtype.is_floating_point:
        return (other if t == 1 else one).to(dtype), False
    mine, its, fell_back = shares(one, other, method, t)
    made = torch.empty(one.shape, dtype=dtype)
    parts = (tensor.reshape(-1).split(PIECE) for tensor in (made, one, other))
    for target, a, b in zip(*parts, strict=True):
        target.copy_(mine * a.double() + its * b.double())
    return made, fell_back


def merge(
    one: Path, other: Path, target: Path, method: Method, t: float, progress: Callable[[int, int], None]
) -> dict[str, float]:
    """Write the model folder `target`: shards, configuration, tokenizer and template as `one` has them.

    progress(step, total): tensors written. Raises InputError where the two are not of one architecture with one
    tokenizer; MachineError where there is no room.
    """
    check_alike(one, other)
    mine, its = _places(one), _places(other)
    _check_tensors(one, other, mine, its)
    types = {name: torch.promote_types(_header(mine, name)[1], _header(its, name)[1]) for name in mine}
    target.mkdir(parents=True, exist_ok=True)
    require_room(target, sum(math.prod(_header(mine, name)[0]) * dtype.itemsize for name, dtype in types.items()))
    fallen: list[str] = []
    count = 0

    def make(name: str) -> Tensor:
        nonlocal count
        made, fell_back = merged(_read(mine, name), _read(its, name), method, t)
        fallen.extend([name] * fell_back)
        count += 1
        progress(count, len(types))
        return made

    for file in sorted(set(mine.values())):
        names = [name for name, place in mine.items() if place == file]
        later = {name: tensors.Later(_header(mine, name)[0], types[name], partial(make, name)) for name in names}
        tensors.write(target / file.name, later, {"method": method, "t": t})
    _copy_rest(one, target, types)
    return {"tensors": float(len(types)), "linear_fallbacks": float(len(fallen)), "parameters": float(_count(mine))}


def check_alike(one: Path, other: Path) -> None:
    """Same architecture, same configuration, same tokens and template. Raises InputError that names what differs."""
    from transformers import AutoTokenizer

    configs = [{k: v for k, v in read_json(folder / "config.json").items() if k not in TOLD} for folder in (one, other)]
    differ = sorted(key for key in {**configs[0], **configs[1]} if configs[0].get(key) != configs[1].get(key))
    fix = "merge models that come from one start model"
    if differ:
        said = ", ".join(f"{key} ({configs[0].get(key)} and {configs[1].get(key)})" for key in differ[:3])
        raise InputError(f"the two models have other configurations: {said}", where=str(other), fix=fix)
    mine, its = (AutoTokenizer.from_pretrained(folder, local_files_only=True) for folder in (one, other))
    if mine.get_vocab() != its.get_vocab():
        raise InputError("the two models do not share a tokenizer", where=str(other), fix=fix)
    for name in ("chat_template", "bos_token", "eos_token", "pad_token"):
        if getattr(mine, name) != getattr(its, name):
            raise InputError(f"the two models' tokenizers have another {name}", where=str(other), fix=fix)


def _places(folder: Path) -> dict[str, Path]:
    """Name of each tensor -> the file that holds it."""
    found: dict[str, Path] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as stream:
            found |= dict.fromkeys(stream.keys(), file)
    return found


def _check_tensors(one: Path, other: Path, mine: dict[str, Path], its: dict[str, Path]) -> None:
    fix = "merge models of one architecture, saved alike"
    if alone := sorted(mine.keys() ^ its.keys()):
        holder = one if alone[0] in mine else other
        raise InputError(f"{alone[0]} is a tensor of one of the two models only", where=str(holder), fix=fix)
    for name in mine:
        (shape, dtype), (its_shape, its_dtype) = _header(mine, name), _header(its, name)
        if shape != its_shape:
            raise InputError(f"{name} has the shapes {shape} and {its_shape}", where=str(other), fix=fix)
        whole = not (dtype.is_floating_point and its_dtype.is_floating_point)
        if whole and not torch.equal(_read(mine, name), _read(its, name)):
            raise InputError(f"{name} has other whole numbers, which have nothing between them", where=str(other))


def _header(places: dict[str, Path], name: str) -> tuple[list[int], torch.dtype]:
    with safe_open(places[name], "pt") as stream:
        part = stream.get_slice(name)
        dtype = next(dtype for dtype, text in tensors.NAMES.items() if text == part.get_dtype())
        return list(part.get_shape()), dtype


def _read(places: dict[str, Path], name: str) -> Tensor:
    with safe_open(places[name], "pt") as stream:
        return stream.get_tensor(name)


def _count(places: dict[str, Path]) -> int:
    return sum(math.prod(_header(places, name)[0]) for name in places)


def _copy_rest(one: Path, target: Path, types: dict[str, torch.dtype]) -> None:
    """All that is no weights; where their type became a wider one, configuration and index say so."""
    for file in one.iterdir():
        if file.is_file() and file.suffix != ".safetensors":
            shutil.copyfile(file, target / file.name)
    config: dict[str, Any] = read_json(target / "config.json")
    widest = {dtype for dtype in types.values() if dtype.is_floating_point}
    key = "dtype" if "dtype" in config else "torch_dtype"
    if len(widest) == 1 and config.get(key) not in (None, said := str(widest.pop()).removeprefix("torch.")):
        write_json(target / "config.json", {**config, key: said})
    index = target / "model.safetensors.index.json"
    if index.exists():
        told, places = read_json(index), _places(target)
        size = sum(math.prod(_header(places, name)[0]) * types[name].itemsize for name in places)
        write_json(index, {**told, "metadata": {**told.get("metadata", {}), "total_size": size}})
