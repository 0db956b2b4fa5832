"""Data sets of the config -> what `judge` reads, and how much of each is used."""

from __future__ import annotations

import os
from collections.abc import Mapping
from itertools import islice

from alignment.config.data_checks import Checks
from alignment.config.sources import Dataset, Lists, PathSource
from alignment.config.stages.preparing import Prepare
from alignment.data.chat import Chat
from alignment.data.examples import Reading
from alignment.data.fetch import fetch
from alignment.data.preparation import Source
from alignment.data.sources import read
from alignment.data.splitting import Share
from alignment.data.writing import describe
from alignment.places import expand, is_url, kind

LOOK = 1 << 20  # bytes by which it is guessed how many rows a file has


def source_of(
    name: str, dataset: Dataset, settings: Prepare, checks: Checks, chat: Chat, most: int | None = None
) -> Source:
    """most: rows at most, beside the data set's own limit. Raises InputError or MachineError where it is not there."""
    source = dataset.source
    path = source.path if isinstance(source, PathSource) else str(fetch(source, what="data"))
    limit = min((one for one in (dataset.limit, most) if one is not None), default=None)
    rows = _guess(path)
    reading = reading_of(settings, dataset.format, dataset.columns, checks, chat, dataset.lists)
    guess = rows if limit is None or rows is None else min(rows, limit)
    return Source(name, islice(read(path), limit), reading, describe(source), guess)


def reading_of(
    settings: Prepare, form: str, columns: Mapping[str, str], checks: Checks, chat: Chat, lists: Lists | None = None
) -> Reading:
    lengths = settings.max_length, settings.max_prompt_length
    return Reading(form, columns, settings.task, checks, chat, *lengths, settings.over_long, lists, settings.seed)


def share_of(dataset: Dataset) -> Share:
    return Share(dataset.cap, dataset.epochs, dataset.weight)


def _guess(path: str) -> int | None:
    """Rows of local files of lines, by the lines of the first one's beginning."""
    files = expand(path)
    if any(is_url(file) or kind(file) != (".jsonl", "") for file in files):
        return None
    with open(files[0], "rb") as stream:
        begin = stream.read(LOOK)
    return round(begin.count(b"\n") * sum(map(os.path.getsize, files)) / len(begin)) if begin else None
