"""Rows -> checked, split, tokenised rows and a report of what was dropped."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from alignment.data.chat import Chat
from alignment.data.checks import opening
from alignment.data.evaluated import asked
from alignment.data.examples import Reading
from alignment.data.formats import Message
from alignment.data.models import context_window
from alignment.data.named import prompts_of, reading_of, share_of, source_of
from alignment.data.preparation import Source, judge
from alignment.data.sources import Row, read_rows
from alignment.data.splitting import Share, check_dropped, divide
from alignment.data.writing import SOURCE, write
from alignment.errors import ConfigError
from alignment.stages.context import StageContext
from alignment.stages.parts import rows_of


def run(context: StageContext) -> dict[str, Any]:
    context.progress(0, 1, note="reading rows", force=True)
    model = context.inputs["model"] / "model"
    _check_window(context, context_window(model))
    settings, chat = context.settings, Chat.load(model)
    sources = _sources(context, chat)
    heldout, data = _heldout(context), context.experiment.data
    openings = {opening(prompt) for prompt in heldout.values()}
    judged = judge(sources, context.folder, context.progress, settings.workers, openings)
    shares = [share_of(data[name]) for name in settings.datasets] or [Share() for _ in sources]
    elsewhere = [(where, asked(prompt)) for where, prompt in heldout.items()]
    for name in settings.against:
        elsewhere += prompts_of(data[name])
    parts = divide(judged, settings.splits, settings.seed, shares, elsewhere)
    judged.tally.close()
    check_dropped(judged)
    numbers = write(judged, parts, context.folder, chat)
    judged.table.remove()
    return numbers


PARENT = "parent"  # what rows of a judge are called that name no data set
PAIRS = ("pairs.jsonl", "preference", "pairs of the parent stage")
JUDGED = {  # what a judge has made for a task, the first that is there: its file, its format, what it is
    "preference": (PAIRS,),
    "unpaired": (("unpaired.jsonl", "unpaired", "labelled answers of the parent stage"), PAIRS),
    "sft": (("best.jsonl", "prompt_completion", "best answers of the parent stage"),),
}


def _sources(context: StageContext, chat: Chat) -> list[Source]:
    """The data sets of the config that the stage names, or what the parent has judged, by data set."""
    settings, checks = context.settings, context.experiment.checks
    if settings.datasets:
        data = context.experiment.data
        return [source_of(name, data[name], settings, checks, chat) for name in settings.datasets]
    folder, made = context.inputs["data"], JUDGED[settings.task]
    file, form, described = next((one for one in made if (folder / one[0]).is_file()), made[-1])
    return _by_name(folder / file, reading_of(settings, form, {}, checks, chat), described)


def _by_name(file: Path, reading: Reading, described: str) -> list[Source]:
    """The rows of a judge by the data set that their prompts are of, which they name where there are several; else all
    as those of `parent`. Each reads the file anew, and rows keep their numbers in it."""
    names = list(dict.fromkeys(map(_name, read_rows(file))))
    if len(names) == 1:
        return [Source(names[0], read_rows(file), reading, described)]
    return [Source(name, _only(name, file), reading, f"{described}, {name}") for name in names]


def _name(row: Row) -> str:
    return str(row.value.get(SOURCE, PARENT))


def _only(name: str, file: Path) -> Iterator[Row]:
    return (row for row in read_rows(file) if _name(row) == name)


def _heldout(context: StageContext) -> dict[str, list[Message]]:
    """Where each prompt stands that the parent in the role `heldout` keeps for evaluation: none may be trained on."""
    if "heldout" not in context.inputs:
        return {}
    rows = rows_of(context.inputs["heldout"], "heldout.jsonl")
    return {f"heldout.jsonl:{line}": row["prompt"] for line, row in enumerate(rows, start=1)}


def _check_window(context: StageContext, window: int | None) -> None:
    if window is not None and context.settings.max_length > window:
        what = f"max_length {context.settings.max_length} is longer than the model's context window of {window} tokens"
        raise ConfigError(what, where=context.name, fix=f"set it to at most {window}")
