"""Models of local folders that are asked, not trained: nothing is unpickled, and no code from the folder is run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoTokenizer
from transformers.utils import logging

from alignment.errors import InputError

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}
ONLY_HERE: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}


def load(auto: Any, folder: Path, what: str, precision: str | None = None) -> tuple[Any, Any, list[str]]:
    """(model, tokenizer, names of tensors that the weights lack: transformers has filled them with random numbers).

    auto: the class of transformers that reads it. what: it is called in errors. precision: fp32 | bf16; None: as
    transformers takes it. Raises InputError.
    """
    how = ONLY_HERE if precision is None else {**ONLY_HERE, "dtype": PRECISIONS[precision]}
    logging.disable_progress_bar()
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, **ONLY_HERE)
        model, info = auto.from_pretrained(folder, use_safetensors=True, output_loading_info=True, **how)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        cause = str(error).strip().splitlines()[0]
        raise InputError(f"the {what} does not load: {cause}", where=str(folder)) from error
    return model, tokenizer, sorted(info["missing_keys"])
