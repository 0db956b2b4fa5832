"""What makes a row unfit for training, counted by reason; and splits that share no prompt."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from alignment.config.stages.preparing import Splits
from alignment.data.formats import Message
from alignment.data.sources import Row
from alignment.errors import InputError

EXAMPLES = 5  # rows named per reason in the report


class Drop(Exception):
    """This row cannot be trained on; the others can. reason: a short phrase, the same for every row it fits."""

    def __init__(self, reason: str):
        super().__init__(reason)
        self.reason = reason


@dataclass
class Tally:
    """Dropped rows, by reason."""

    counts: dict[str, int] = field(default_factory=dict)
    examples: list[dict[str, Any]] = field(default_factory=list)

    def add(self, reason: str, row: Row) -> None:
        self.counts[reason] = self.counts.get(reason, 0) + 1
        if self.counts[reason] <= EXAMPLES:
            self.examples.append({"reason": reason, "row": row.number, "line": row.line})

    def __str__(self) -> str:
        by_count = sorted(self.counts.items(), key=lambda item: -item[1])
        return ", ".join(f"{count} {reason}" for reason, count in by_count) or "none dropped"


def check_turns(messages: list[Message]) -> None:
    """An optional system turn, then user and assistant in turn, an answer last, nothing empty. Raises Drop."""
    turns = messages[1:] if messages[0]["role"] == "system" else messages
    if not turns or turns[-1]["role"] != "assistant":
        raise Drop("no answer at the end")
    if [turn["role"] for turn in turns] != ["user", "assistant"] * (len(turns) // 2):
        raise Drop("turns do not alternate user, assistant")
    if any(not turn["content"].strip() for turn in turns if turn["role"] == "assistant"):
        raise Drop("empty answer")
    if any(not turn["content"].strip() for turn in turns):
        raise Drop("empty prompt")


def prompt_key(messages: list[Message]) -> str:
    """Equal for prompts that differ in case and white space only."""
    return "\n".join(f"{m['role']}: {' '.join(m['content'].split()).casefold()}" for m in messages)


def opening(messages: list[Message]) -> str:
    """The key of what is asked before the first answer: conversations that share it count as the same prompt."""
    first = next((i for i, m in enumerate(messages) if m["role"] == "assistant"), len(messages))
    return prompt_key(messages[:first])


class HasOpening(Protocol):
    opening: str


T = TypeVar("T", bound=HasOpening)
LEAK = "shares its first prompt with another split"


def split(rows: Sequence[T], sizes: Splits, seed: int, drop: Callable[[str, T], None]) -> dict[str, list[T]]:
    """Rows of each split, by one seeded shuffle: held-out first, then prompts, then train; what is over is "unused".

    No opening lies in two splits: a row whose opening another split already has goes to `drop`. The same rows, sizes
    and seed give the same splits. Raises InputError if there are too few rows.
    """
    order = list(rows)
    random.Random(seed).shuffle(order)
    least = {"heldout": sizes.heldout, "prompts": sizes.prompts, "train": sizes.train or 1}
    room = {**least, "train": sizes.train or len(order), "unused": len(order)}
    parts: dict[str, list[T]] = {name: [] for name in room}
    owner: dict[str, str] = {}
    for row in order:
        name = next(name for name, size in room.items() if len(parts[name]) < size)
        if name != "unused" and owner.setdefault(row.opening, name) != name:
            drop(LEAK, row)
        else:
            parts[name].append(row)
    if any(len(parts[name]) < size for name, size in least.items()):
        asked = f"{sizes.heldout} held-out + {sizes.prompts} prompts + {sizes.train or 'at least 1'} train"
        raise InputError(f"{len(rows)} rows are fit to use, the splits ask for {asked}")
    return parts
