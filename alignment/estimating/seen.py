"""What a look at model and data has found that estimates are made from. Imports nothing heavy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from alignment.errors import InputError


@dataclass(frozen=True)
class Lengths:
    """Of rows that were looked at: [rows] tokens of the prompt, of the whole row (of a pair the longer side), and those
    that carry a gradient. task: of the stage that prepared them. some: a few of the rows themselves, as token ids."""

    task: str
    prompt: np.ndarray
    tokens: np.ndarray
    trained: np.ndarray
    some: Sequence[Mapping[str, Any]] = ()


def config_of(start: Path) -> Any:
    """The transformers configuration of a start model's folder or GGUF file; None if a folder has none. No code of it
    is run. Raises InputError."""
    from transformers import AutoConfig  # a second, which not every look needs

    if start.is_dir():
        if not (start / "config.json").is_file():
            return None
        try:
            return AutoConfig.from_pretrained(start, local_files_only=True, trust_remote_code=False)
        except (ValueError, KeyError, TypeError, OSError) as error:  # an architecture that is not known, odd numbers
            first = (str(error).strip().splitlines() or [type(error).__name__])[0]
            where, fix = str(start / "config.json"), "a newer transformers, or another model"
            raise InputError(f"transformers cannot read it: {first}", where=where, fix=fix) from error
    config = AutoConfig.from_pretrained(start.parent, gguf_file=start.name, trust_remote_code=False)
    if hasattr(config, "quantization_config"):  # the weights are trained dequantised
        del config.quantization_config
    return config
