"""What a policy answered while it was trained online, as far as its stage wrote it down, for the report."""

from __future__ import annotations

from typing import Any

from alignment.pipeline.store import ROLLOUTS
from alignment.reporting.gather import Row, Stage, read_rows
from alignment.reporting.settings import mapping_at
from alignment.reporting.words import finite

SHOWN = 3  # rollouts: the first, the last, and what lies between them
ANSWERS = 4  # to its prompt, in the order in which they were sampled


def rollouts(stage: Stage) -> list[Row]:
    """{"step", "number", "prompt": messages, "answers": [{"text", "reward", "terms", "tokens", "finished"}], "more":
    answers that are not shown}."""
    rows = read_rows(stage.folder / ROLLOUTS) if stage.folder else []
    places = sorted({round(i * (len(rows) - 1) / (SHOWN - 1)) for i in range(SHOWN)}) if rows else []
    return [_shown(rows[place]) for place in places]


def _shown(row: Row) -> Row:
    told = {"step": finite(row.get("step")), "number": finite(row.get("rollout"))}
    answers = [_answer(one) for one in _each(row.get("completions"))]
    return {**told, "prompt": _each(row.get("prompt")), "answers": answers[:ANSWERS], "more": len(answers[ANSWERS:])}


def _each(rows: Any) -> list[Row]:
    return [mapping_at(row) for row in rows] if isinstance(rows, list) else []


def _answer(row: Row) -> dict[str, Any]:
    known = {name: row.get(name) for name in ("tokens", "finished")}
    return {**known, "text": str(row.get("completion") or ""), "reward": finite(row.get("reward")),
            "terms": mapping_at(row, "terms")}  # fmt: skip
