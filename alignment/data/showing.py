"""Prepared rows as the model sees them: token by token, and which of them are trained on."""

from __future__ import annotations

from typing import Any

import numpy as np

from alignment.data.batches import TOKENS
from alignment.data.chat import Chat
from alignment.data.preparation import Judged
from alignment.data.tokens import IGNORED, TRAINED

BINS = 30


def shown(judged: Judged, number: int, chat: Chat) -> dict[str, Any]:
    """A row of the table: where it comes from, and its parts, each a list of [text, id, whether it is trained on]."""
    row = judged.table.row(number)
    name, place = judged.place(number)
    said = {key: row[key] for key in ("label", "score", "margin") if row.get(key) is not None}
    if judged.task == "sft":
        mask = [label != IGNORED for label in row["labels"]]
        parts = {"conversation": _pieces(chat, row["input_ids"], mask)}
    else:
        names = [key for key in TOKENS[judged.task] if key.endswith("_ids")]
        parts = {key.removesuffix("_ids"): _pieces(chat, row[key], [key in TRAINED] * len(row[key])) for key in names}
    trained, tokens = row["trained"], row["tokens"]
    return {"source": name, "where": place.where, "tokens": tokens, "trained": trained, "said": said, "parts": parts}


def _pieces(chat: Chat, ids: list[int], trained: list[bool]) -> list[list[Any]]:
    decode = chat.tokenizer.decode
    return [[decode([one]), one, mask] for one, mask in zip(ids, trained, strict=True)]


def histogram(lengths: np.ndarray) -> list[list[int]]:
    """[first length of a bin, last, rows], of bins of equal width from 1 to the longest."""
    if not len(lengths):
        return []
    width = -(-int(lengths.max()) // BINS)
    counts = np.bincount((lengths - 1).clip(0) // width)
    return [[number * width + 1, (number + 1) * width, int(count)] for number, count in enumerate(counts)]
