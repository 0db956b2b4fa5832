"""Rows that the store has already, as a look at their sources would find them: how long they are, and their prompts."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from datasets import load_from_disk

from alignment.data.tokens import IGNORED
from alignment.estimating.seen import Lengths
from alignment.estimating.windows import Prompts
from alignment.files import read_jsonl
from alignment.generation import encode_prompt

SPLITS = ("heldout", "prompts")


def lengths_of(folder: Path, task: str, most: int, some: int) -> Lengths:
    """Of the first rows that are trained on, in the result of a stage that prepared them; `some` of them whole."""
    rows = load_from_disk(str(folder / "train"))
    rows = rows.select(range(min(most, len(rows))))
    prompt, tokens, trained = np.array([_row(row) for row in rows], np.int64).reshape(-1, 3).T
    return Lengths(task, prompt, tokens, trained, rows.select(range(min(some, len(rows)))).to_list())


def _row(row: dict[str, Any]) -> tuple[int, int, int]:
    """Tokens before the last answer, of the row, and with a gradient."""
    if "labels" in row:
        trained = np.array(row["labels"]) != IGNORED
        before = np.flatnonzero(~trained[: np.flatnonzero(trained)[-1]])  # templates may end a turn with more
        return int(before[-1]) + 1 if len(before) else 0, len(trained), int(trained.sum())
    answers = [len(row[name]) for name in ("completion_ids", "chosen_ids", "rejected_ids") if name in row]
    prompt = len(row["prompt_ids"])
    return prompt, prompt + max(answers), sum(answers)


def prompts_of(folder: Path, tokenizer: Any, most: int) -> Prompts:
    """What its models will be asked: rows of the splits that are not trained on, of each the first ones."""
    tokens: list[int] = []
    places: list[str] = []
    splits: dict[str, np.ndarray] = {}
    for split in SPLITS:
        path = folder / f"{split}.jsonl"
        first = len(tokens)
        for line, row in enumerate(islice(read_jsonl(path), most + 1), start=1):
            tokens.append(len(encode_prompt(tokenizer, row["prompt"])))
            places.append(f"{path}:{line}")
        splits[split] = np.arange(first, len(tokens))
    whole = all(len(rows) <= most for rows in splits.values())
    return Prompts(np.array(tokens, np.int64), np.arange(len(tokens)), splits if whole else None, places.__getitem__)
