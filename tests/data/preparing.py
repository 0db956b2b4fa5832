"""Rows of tests through preparation, as the stage does it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from alignment.config.stages.preparing import Prepare, Splits
from alignment.data import writing
from alignment.data.chat import Chat
from alignment.data.named import reading_of
from alignment.data.preparation import Judged, Source, judge
from alignment.data.sources import Row, Unreadable
from alignment.data.splitting import Share, check_dropped, divide
from tests.conftest import default_checks

_folders: list[TemporaryDirectory[str]] = []  # gone with the process


def _aside() -> Path:
    _folders.append(TemporaryDirectory())
    return Path(_folders[-1].name)


def settings(task: str = "sft", **changes: Any) -> Prepare:
    splits = Splits(
        heldout=changes.pop("heldout", 0), prompts=changes.pop("prompts", 0), train=changes.pop("train", None)
    )
    values = {
        "dataset": "x",
        "against": [],
        "max_length": 40,
        "max_prompt_length": 30,
        "over_long": "drop",
        "seed": 0,
        "workers": None,
        **changes,
    }
    return Prepare(kind="prepare", task=task, splits=splits, **values)


@dataclass
class Made:
    """What became of rows: the stage's tables, read back."""

    judged: Judged
    rows: dict[str, list[dict[str, Any]]]  # split -> rows of the table

    @property
    def counts(self) -> dict[str, int]:
        return self.judged.tally.counts

    @property
    def fit(self) -> int:
        return len(self.judged.fit)


def run(chat: Chat, values: list[Any], form: str = "auto", **changes: Any) -> Made:
    return mix(chat, {"mine": values}, form, **changes)[0]


def mix(
    chat: Chat, data: dict[str, list[Any]], form: str = "auto", shares: Sequence[Share] = (), **changes: Any
) -> tuple[Made, Path]:
    """Several data sets, and where they were written."""
    elsewhere, against = changes.pop("elsewhere", frozenset()), changes.pop("prompts_elsewhere", ())
    checks, lists = default_checks(**changes.pop("checks", {})), changes.pop("lists", None)
    columns, folder = changes.pop("columns", {}), changes.pop("folder", None) or _aside()
    stage = settings(**changes)
    reading = reading_of(stage, form, columns, checks, chat, lists)
    sources = [
        Source(name, [_row(value, n) for n, value in enumerate(values, start=1)], reading, "rows.jsonl")
        for name, values in data.items()
    ]
    judged = judge(sources, folder, lambda *a, **k: None, stage.workers, elsewhere)
    parts = divide(judged, stage.splits, stage.seed, shares or [Share() for _ in sources], against)
    judged.tally.close()
    check_dropped(judged)
    writing.write(judged, parts, folder, chat)
    return Made(judged, {name: list(judged.table.take(part)) for name, part in parts.items()}), folder


def _row(value: Any, number: int) -> Row | Unreadable:
    return value if isinstance(value, Row | Unreadable) else Row(value, "rows.jsonl", number, number)


def qa(question: str, answer: str) -> dict[str, str]:
    return {"prompt": question, "completion": answer}
