"""Data sets of the config -> what `judge` reads, and how much of each is used."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import islice

from alignment.config.data_checks import Checks
from alignment.config.sources import Dataset, Lists, PathSource
from alignment.config.stages.preparing import Prepare
from alignment.data.chat import Chat
from alignment.data.counting import in_source
from alignment.data.evaluated import asked
from alignment.data.examples import Reading
from alignment.data.fetch import fetch
from alignment.data.formats import canonical, detect, renamed, scored_list
from alignment.data.preparation import Source
from alignment.data.sources import Row, Unreadable, read
from alignment.data.splitting import Share
from alignment.data.turns import Message, message, text
from alignment.data.writing import describe
from alignment.errors import InputError


def source_of(
    name: str, dataset: Dataset, settings: Prepare, checks: Checks, chat: Chat, most: int | None = None
) -> Source:
    """most: rows at most, beside the data set's own limit. Raises InputError or MachineError where it is not there."""
    path = path_of(dataset)
    limit = min((one for one in (dataset.limit, most) if one is not None), default=None)
    rows = in_source(path)
    reading = reading_of(settings, dataset.format, dataset.columns, checks, chat, dataset.lists)
    guess = rows if limit is None or rows is None else min(rows, limit)
    return Source(name, islice(read(path), limit), reading, describe(dataset.source), guess)


def reading_of(
    settings: Prepare, form: str, columns: Mapping[str, str], checks: Checks, chat: Chat, lists: Lists | None = None
) -> Reading:
    lengths = settings.max_length, settings.max_prompt_length
    return Reading(form, columns, settings.task, checks, chat, *lengths, settings.over_long, lists, settings.seed)


def prompts_of(dataset: Dataset) -> Iterator[tuple[str, str]]:
    """Where each row of a data set for evaluation stands, and what it asks: its `prompt`, which needs nothing beside
    it, else what its format says. Raises InputError for one that has neither, and where the data set has no rows."""
    path, count = path_of(dataset), 0
    for row in islice(read(path), dataset.limit):
        if isinstance(row, Unreadable):
            raise row.error
        count += 1
        yield row.where, asked(_questions(renamed(row, dataset.columns), dataset.format))
    if not count:
        raise InputError("has no rows", where=describe(dataset.source))


def _questions(row: Row, form: str) -> list[Message]:
    """The turns in which something is asked; a text is all of it a question."""
    if row.value.get("prompt") is not None:
        return canonical(replace(row, value={"prompt": row.value["prompt"], "completion": ""}), "prompt_completion")[
            "messages"
        ]
    form = detect(row) if form == "auto" else form
    if form == "text":
        return [message("user", text(row, "text"))]
    if form == "scored_list":
        return scored_list(row)[0]
    made = canonical(row, form)
    return made.get("messages") or made["prompt"]


def path_of(dataset: Dataset) -> str:
    source = dataset.source
    return source.path if isinstance(source, PathSource) else str(fetch(source, what="data"))


def share_of(dataset: Dataset) -> Share:
    return Share(dataset.cap, dataset.epochs, dataset.weight)
