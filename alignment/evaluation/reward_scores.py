"""The rewards that a sequence classifier gives to rows of token ids."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForSequenceClassification

from alignment.errors import InputError


def load(folder: Path, precision: str) -> Any:
    """The reward model of a folder, on the GPU where there is one. Raises InputError if it has more than one label."""
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=dtype, local_files_only=True)
    if model.config.num_labels != 1:
        raise InputError(f"has {model.config.num_labels} labels, a reward model one", where=str(folder))
    return model.eval().to("cuda" if torch.cuda.is_available() else "cpu")


@torch.no_grad()
def rewards(
    model: Any, rows: Sequence[Sequence[int]], batch_size: int, progress: Callable[..., None] = lambda *told: None
) -> np.ndarray:
    """float64 [rows], in the order of the rows: each read at its last token. Rows of like length go together, padded on
    the right. progress(step, total): rows computed."""
    order = sorted(range(len(rows)), key=lambda number: len(rows[number]))
    found = np.zeros(len(rows))
    for start in range(0, len(order), batch_size):
        numbers = order[start : start + batch_size]
        ids = [torch.tensor(rows[number]) for number in numbers]
        mask = pad_sequence([torch.ones_like(row) for row in ids], batch_first=True)
        padded = pad_sequence(ids, batch_first=True, padding_value=model.config.get_text_config().pad_token_id)
        logits = model(input_ids=padded.to(model.device), attention_mask=mask.to(model.device)).logits
        found[numbers] = logits.squeeze(-1).double().cpu().numpy()
        progress(start + len(numbers), len(rows))
    return found
