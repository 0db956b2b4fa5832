"""What makes a row unfit for training, and what becomes of it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alignment.config.data_checks import FAULTS, Checks
from alignment.data.sources import Row
from alignment.data.turns import Message, said
from alignment.errors import InputError

Counts = dict[str, dict[str, int]]  # data set -> fault, or format -> rows
EXAMPLES = 5  # rows named per fault in the report


class Drop(Exception):
    """This row cannot be trained on; the others can. fault: of FAULTS. why: what of this row, if it says more."""

    def __init__(self, fault: str, why: str = ""):
        super().__init__(fault, why)
        self.fault, self.why = fault, why


class Policy:
    """What the settings say of each fault; kept: faults that the row at hand has and is trained on with -> why."""

    def __init__(self, checks: Checks):
        self.checks, self.kept = checks, dict[str, str]()

    def meet(self, fault: str, row: Row, why: str = "") -> None:
        """The row has the fault. Raises Drop or InputError unless it is kept."""
        action = getattr(self.checks, fault, "drop")
        if action == "error":
            what = f"{fault}: {why or FAULTS[fault]}"
            raise InputError(what, where=row.where, fix=f"mend the row, or set checks.{fault}=drop")
        if action == "drop":
            raise Drop(fault, why)
        self.kept.setdefault(fault, why)  # keep, or neutralise

    def keeps(self, fault: str) -> bool:
        return getattr(self.checks, fault, "drop") not in ("error", "drop")

    def passed(self) -> dict[str, str]:
        """What was kept since the last call, each once, and why."""
        kept, self.kept = self.kept, {}
        return kept


@dataclass(frozen=True)
class Dropped:
    """A row that was left out, and why; or, in a tally's first_kept, one that was kept all the same."""

    row: Row
    fault: str
    why: str = ""

    def told(self) -> dict[str, Any]:
        why = self.why or FAULTS[self.fault]
        place = {"file": self.row.file, "row": self.row.number, "line": self.row.line}
        return {"fault": self.fault, "why": why, **place, "value": self.row.value}


Firsts = dict[str, list[Dropped]]  # fault -> the first EXAMPLES rows


class Tally:
    """Rows that have a fault, by data set: each that is dropped is written to a file, and those kept are counted.

    dropped, kept: data set -> fault -> rows. first, first_kept: fault -> the first rows dropped for it, kept with it.
    """

    def __init__(self, path: Path):
        self.path = path
        self.dropped: Counts = {}
        self.kept: Counts = {}
        self.first: Firsts = {}
        self.first_kept: Firsts = {}
        # By the line: what was dropped before an error is there to be read after it.
        self._stream = open(path, "w", encoding="utf-8", buffering=1)  # noqa: SIM115 - closed by close()

    def drop(self, source: str, one: Dropped) -> None:
        count(self.dropped, source, one.fault)
        note(self.first, one)
        self._stream.write(json.dumps({"source": source, **one.told()}, ensure_ascii=False, default=str) + "\n")

    def keep(self, source: str, kept: Mapping[str, int], first: Iterable[Dropped]) -> None:
        """kept: fault -> rows; first: of them the first, by their places alone."""
        for fault, rows in kept.items():
            count(self.kept, source, fault, rows)
        for one in first:
            note(self.first_kept, one)

    def close(self) -> None:
        self._stream.close()

    def of(self, source: str) -> int:
        """Rows of a data set that were dropped."""
        return sum(self.dropped.get(source, {}).values())

    @property
    def counts(self) -> dict[str, int]:
        """fault -> rows dropped for it, of all data sets."""
        return summed(self.dropped)

    @property
    def examples(self) -> list[dict[str, Any]]:
        """The first rows dropped for each fault, by their places."""
        return _places(self.first)

    @property
    def examples_kept(self) -> list[dict[str, Any]]:
        """The first rows kept with each fault, by their places."""
        return _places(self.first_kept)

    def __str__(self) -> str:
        by_count = sorted(self.counts.items(), key=lambda item: (-item[1], item[0]))
        return ", ".join(f"{rows} {fault}" for fault, rows in by_count) or "none dropped"


def note(first: Firsts, one: Dropped) -> None:
    if len(known := first.setdefault(one.fault, [])) < EXAMPLES:
        known.append(one)


def _places(first: Firsts) -> list[dict[str, Any]]:
    return [
        {"reason": one.fault, "file": one.row.file, "row": one.row.number, "line": one.row.line}
        for known in first.values()
        for one in known
    ]


def count(counts: Counts, source: str, name: str, rows: int = 1) -> None:
    of_source = counts.setdefault(source, {})
    of_source[name] = of_source.get(name, 0) + rows


def summed(counts: Counts) -> dict[str, int]:
    """Of all data sets."""
    found: Counts = {}
    for names in counts.values():
        for name, rows in names.items():
            count(found, "", name, rows)
    return found.get("", {})


def turn_faults(messages: list[Message]) -> Iterator[str]:
    """Of what should be an optional system turn, then user and assistant in turn, an answer last, nothing empty."""
    turns = messages[1:] if messages[0]["role"] == "system" else messages
    if len(messages) < 2 or messages[-1]["role"] != "assistant":
        yield "no_answer"
    if not _alternate(turns):
        yield "turn_order"
    if any(not turn["content"].strip() for turn in turns if turn["role"] == "assistant" and "tool_calls" not in turn):
        yield "empty_answer"
    if any(not turn["content"].strip() for turn in turns if turn["role"] == "user"):
        yield "empty_prompt"


def _alternate(turns: list[Message]) -> bool:
    """Whether each turn is of who may speak then: tools after an assistant that calls, it or the user after them."""
    may = ["user"]
    for turn in turns:
        if turn["role"] not in may:
            return False
        may = ["assistant"] if turn["role"] == "user" else ["tool"] if "tool_calls" in turn else ["user"]
        may = ["tool", "assistant"] if turn["role"] == "tool" else may
    return turns[-1:] == [] or turns[-1]["role"] == "assistant"


def prompt_key(messages: list[Message]) -> str:
    """Equal for prompts that differ in case and white space only."""
    return "\n".join(f"{m['role']}: {' '.join(said(m).split()).casefold()}" for m in messages)


def opening(prompt: list[Message]) -> str:
    """The key of what is asked before the first answer: conversations that share it count as the same prompt.

    prompt: the turns before the last answer. What the assistant says before anything is asked belongs to the opening.
    """
    asked = next((number for number, turn in enumerate(prompt) if turn["role"] == "user"), len(prompt))
    answered = (number for number in range(asked, len(prompt)) if prompt[number]["role"] == "assistant")
    return prompt_key(prompt[: next(answered, len(prompt))])
