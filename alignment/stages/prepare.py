"""Rows -> checked, split, tokenised rows and a report of what was dropped."""

from __future__ import annotations

from itertools import islice
from typing import Any

from alignment.data.chat import Chat
from alignment.data.checks import opening
from alignment.data.examples import Reading
from alignment.data.fetch import fetch
from alignment.data.models import context_window
from alignment.data.preparation import divide, judge
from alignment.data.sources import Row, read_rows
from alignment.data.writing import describe, write
from alignment.errors import ConfigError
from alignment.stages.context import StageContext
from alignment.stages.parts import rows_of


def run(context: StageContext) -> dict[str, Any]:
    context.progress(0, 1, note="reading rows", force=True)
    model = context.inputs["model"] / "model"
    _check_window(context, context_window(model))
    rows, form, columns, source = _rows(context)
    chat, heldout = Chat.load(model), _heldout(context)
    reading = Reading(form, columns, context.settings.task, context.experiment.checks, chat)
    judged = judge(rows, reading, context.settings, context.progress, heldout)
    return write(divide(judged, context.settings, rows[0].file), context.folder, source, chat)


PAIRS = ("pairs.jsonl", "preference", "pairs of the parent stage")
JUDGED = {  # what a judge has made for a task, the first that is there: its file, its format, what it is
    "preference": (PAIRS,),
    "unpaired": (("unpaired.jsonl", "unpaired", "labelled answers of the parent stage"), PAIRS),
    "sft": (("best.jsonl", "prompt_completion", "best answers of the parent stage"),),
}


def _rows(context: StageContext) -> tuple[list[Row], str, dict[str, str], str]:
    """The rows, their format and columns, and where they come from: a data set, or what the parent has judged."""
    name = context.settings.dataset
    if name is None:
        folder, made = context.inputs["data"], JUDGED[context.settings.task]
        file, form, source = next((one for one in made if (folder / one[0]).is_file()), made[-1])
        return list(read_rows(folder / file)), form, {}, source
    dataset = context.experiment.data[name]
    rows = islice(read_rows(fetch(dataset.source, what="data")), dataset.limit)
    return list(rows), dataset.format, dataset.columns, describe(dataset.source)


def _heldout(context: StageContext) -> set[str]:
    """Openings of the prompts that the parent in the role `heldout` keeps for evaluation: none may be trained on."""
    if "heldout" not in context.inputs:
        return set()
    return {opening(row["prompt"]) for row in rows_of(context.inputs["heldout"], "heldout.jsonl")}


def _check_window(context: StageContext, window: int | None) -> None:
    if window is not None and context.settings.max_length > window:
        what = f"max_length {context.settings.max_length} is longer than the model's context window of {window} tokens"
        raise ConfigError(what, where=context.name, fix=f"set it to at most {window}")
