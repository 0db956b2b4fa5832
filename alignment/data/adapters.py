"""A start checkpoint that is a base model and an adapter: the two become one model as it is imported.

So whatever begins with it, its reference too, begins with the very same plain weights: an adapter that is trained on
top of them may be switched off, and what is left is the pair. Two adapters at once would have to be told apart by all
that switches adapters off, saves or merges them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from alignment.errors import InputError
from alignment.files import read_json

FIX = "an adapter of the base in model.source, as PEFT's save_pretrained writes it"


def check_adapter(folder: Path) -> None:
    """That a folder can be an adapter that is merged. Raises InputError."""
    name = str(folder)
    try:
        config = read_json(folder / "adapter_config.json")
        kind = config["peft_type"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError("has no adapter_config.json that can be read", where=name, fix=FIX) from error
    if kind != "LORA":
        raise InputError(f"is an adapter of the type {kind}, which has no weights to merge", where=name, fix="LORA")
    if not (folder / "adapter_model.safetensors").is_file():
        fix = "save it as safetensors: pickles can run code and are never loaded"
        raise InputError("has no adapter_model.safetensors", where=name, fix=fix)


def check_fits(model: Any, folder: Path) -> None:
    """That the adapter has the tensors which PEFT puts beside this model, by the header of its file: what `merge` would
    find, of a model that may be without storage, and is given up. Raises InputError."""
    from peft import PeftConfig, get_peft_model, get_peft_model_state_dict
    from safetensors import SafetensorError, safe_open

    config = PeftConfig.from_pretrained(str(folder))
    config.init_lora_weights = False  # of some kinds it looks at weights
    try:
        taken = get_peft_model_state_dict(get_peft_model(model, config, low_cpu_mem_usage=True))
        with safe_open(folder / "adapter_model.safetensors", "pt") as weights:
            given = {name: tuple(weights.get_slice(name).get_shape()) for name in weights.keys()}  # noqa: SIM118
    except (ValueError, SafetensorError) as error:  # no such modules, a damaged file
        raise _unfit(error, folder) from error
    _check_names(set(taken), set(given), folder)
    for name, shape in given.items():
        if (wanted := tuple(taken[name].shape)) != shape:
            what = f"does not fit the model: {name} has the shape {list(shape)}, the model takes {list(wanted)}"
            raise InputError(what, where=str(folder), fix=FIX)


def _unfit(error: Exception, folder: Path) -> InputError:
    first = " ".join(str(error).split())[:200] or type(error).__name__
    return InputError(f"does not fit the model: {first}", where=str(folder), fix=FIX)


def _check_names(taken: set[str], given: set[str], folder: Path) -> None:
    if odd := sorted(taken ^ given):
        what = f"does not fit the model: {len(odd)} weights are on one side only, among them {odd[0]}"
        raise InputError(what, where=str(folder), fix=FIX)


def merge(model: Any, folder: Path) -> Any:
    """The model, in fp32, with the adapter's weights in its own. Raises InputError for an adapter of another model."""
    from peft import PeftModel, get_peft_model_state_dict
    from peft.utils import load_peft_weights

    try:
        adapted = PeftModel.from_pretrained(model, folder)
        taken, given = set(get_peft_model_state_dict(adapted)), set(load_peft_weights(str(folder), device="cpu"))
    except Exception as error:  # shapes, names, a damaged file: each has its own class
        raise _unfit(error, folder) from error
    _check_names(taken, given, folder)
    merged = adapted.merge_and_unload()
    if not all(bool(torch.isfinite(weight).all()) for weight in merged.parameters()):
        raise InputError("makes weights that are NaN or infinite", where=str(folder), fix=FIX)
    return merged
