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


def merge(model: Any, folder: Path) -> Any:
    """The model, in fp32, with the adapter's weights in its own. Raises InputError for an adapter of another model."""
    from peft import PeftModel, get_peft_model_state_dict
    from peft.utils import load_peft_weights

    try:
        adapted = PeftModel.from_pretrained(model, folder)
        taken, given = set(get_peft_model_state_dict(adapted)), set(load_peft_weights(str(folder), device="cpu"))
    except Exception as error:  # shapes, names, a damaged file: each has its own class
        first = " ".join(str(error).split())[:200] or type(error).__name__
        raise InputError(f"does not fit the model: {first}", where=str(folder), fix=FIX) from error
    if odd := sorted(taken ^ given):
        what = f"does not fit the model: {len(odd)} weights are on one side only, among them {odd[0]}"
        raise InputError(what, where=str(folder), fix=FIX)
    merged = adapted.merge_and_unload()
    if not all(bool(torch.isfinite(weight).all()) for weight in merged.parameters()):
        raise InputError("makes weights that are NaN or infinite", where=str(folder), fix=FIX)
    return merged
