"""What makes a row unfit for training, and what becomes of it; and splits that share no prompt."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from alignment.config.data_checks import FAULTS, Checks
from alignment.config.stages.preparing import Splits
from alignment.data.formats import Message
from alignment.data.sources import Row
from alignment.errors import InputError

EXAMPLES = 5  # rows named per fault in the report


class Drop(Exception):
    """This row cannot be trained on; the others can. fault: of FAULTS. why: what of this row, if it says more."""

    def __init__(self, fault: str, why: str = ""):
        super().__init__(fault, why)
        self.fault, self.why = fault, why


class Policy:
    """What the settings say of each fault; kept: faults that the row at hand has and is trained on with."""

    def __init__(self, checks: Checks):
        self.checks, self.kept = checks, list[str]()

    def meet(self, fault: str, row: Row, why: str = "") -> None:
        """The row has the fault. Raises Drop or InputError unless it is kept."""
        action = getattr(self.checks, fault, "drop")
        if action == "error":
            what = f"{fault}: {why or FAULTS[fault]}"
            raise InputError(what, where=row.where, fix=f"mend the row, or set checks.{fault}=drop")
        if action == "drop":
            raise Drop(fault, why)
        self.kept.append(fault)

    def passed(self) -> list[str]:
        """What was kept since the last call."""
        kept, self.kept = self.kept, []
        return kept


@dataclass(frozen=True)
class Dropped:
    """A row that was left out, and why."""

    row: Row
    fault: str
    why: str = ""

    def told(self) -> dict[str, Any]:
        why = self.why or FAULTS[self.fault]
        place = {"file": self.row.file, "row": self.row.number, "line": self.row.line}
        return {"fault": self.fault, "why": why, **place, "value": self.row.value}


@dataclass
class Tally:
    """Rows that have a fault: those dropped, and how many were kept with it."""

    dropped: list[Dropped] = field(default_factory=list)
    kept: dict[str, int] = field(default_factory=dict)

    def drop(self, row: Row, drop: Drop) -> None:
        self.dropped.append(Dropped(row, drop.fault, drop.why))

    def keep(self, faults: Sequence[str]) -> None:
        for fault in faults:
            self.kept[fault] = self.kept.get(fault, 0) + 1

    @property
    def counts(self) -> dict[str, int]:
        """fault -> rows dropped for it."""
        found: dict[str, int] = {}
        for one in self.dropped:
            found[one.fault] = found.get(one.fault, 0) + 1
        return found

    @property
    def examples(self) -> list[dict[str, Any]]:
        """The first rows of each fault."""
        found: dict[str, list[dict[str, Any]]] = {}
        for one in self.dropped:
            found.setdefault(one.fault, [])
            if len(found[one.fault]) < EXAMPLES:
                found[one.fault].append({"reason": one.fault, "row": one.row.number, "line": one.row.line})
        return [example for examples in found.values() for example in examples]

    def __str__(self) -> str:
        by_count = sorted(self.counts.items(), key=lambda item: -item[1])
        return ", ".join(f"{count} {fault}" for fault, count in by_count) or "none dropped"


def turn_faults(messages: list[Message]) -> Iterator[str]:
    """Of what should be an optional system turn, then user and assistant in turn, an answer last, nothing empty."""
    turns = messages[1:] if messages[0]["role"] == "system" else messages
    if not turns or turns[-1]["role"] != "assistant":
        yield "no_answer"
    if [turn["role"] for turn in turns] != ["user", "assistant"] * (len(turns) // 2):
        yield "turn_order"
    if any(not turn["content"].strip() for turn in turns if turn["role"] == "assistant"):
        yield "empty_answer"
    if any(not turn["content"].strip() for turn in turns if turn["role"] != "assistant"):
        yield "empty_prompt"


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


def split(rows: Sequence[T], sizes: Splits, seed: int, leaks: Callable[[T], bool]) -> dict[str, list[T]]:
    """Rows of each split, by one seeded shuffle: held-out first, then prompts, then train; what is over is "unused".

    leaks(row): its opening lies in another split; whether it is dropped for it. The same rows, sizes and seed give the
    same splits. Raises InputError if there are too few rows.
    """
    order = list(rows)
    random.Random(seed).shuffle(order)
    least = {"heldout": sizes.heldout, "prompts": sizes.prompts, "train": sizes.train or 1}
    room = {**least, "train": sizes.train or len(order), "unused": len(order)}
    parts: dict[str, list[T]] = {name: [] for name in room}
    owner: dict[str, str] = {}
    for row in order:
        name = next(name for name, size in room.items() if len(parts[name]) < size)
        if name == "unused" or owner.setdefault(row.opening, name) == name or not leaks(row):
            parts[name].append(row)
    if any(len(parts[name]) < size for name, size in least.items()):
        asked = f"{sizes.heldout} held-out + {sizes.prompts} prompts + {sizes.train or 'at least 1'} train"
        raise InputError(f"{len(rows)} rows are fit to use, the splits ask for {asked}")
    return parts
