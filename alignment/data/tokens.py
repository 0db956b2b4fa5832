"""Rendered conversations -> token ids and labels.

A conversation is tokenised once, whole. An answer begins where tokenising the prompt alone, which is what generation
does, ends, and that must be a prefix of the whole: an answer whose first letters merge with the prompt's last token has
no honest cut, so the row is dropped and counted.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from alignment.data.chat import Chat, adds_bos, check_bos
from alignment.data.checks import Drop
from alignment.data.turns import Message, answers_of
from alignment.errors import InputError

IGNORED = -100  # the label that cross-entropy leaves out
BATCH = 1000  # rows at once
TRAINED = ("labels", "chosen_ids", "rejected_ids", "completion_ids")  # columns of what a model is to say, or to judge


@dataclass(frozen=True)
class Conversation:
    """ids and labels: one per token, labels -100 off the assistant's turns. prompt: tokens before the last answer."""

    ids: list[int]
    labels: list[int]
    prompt: int


@dataclass(frozen=True)
class Pair:
    """Token ids; both answers end with the end-of-turn token and follow the same prompt."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]


def conversation(chat: Chat, messages: list[Message], where: str) -> Conversation:
    """Every answer labelled, but of weight 0, through its end-of-turn token and no further. Raises InputError, Drop."""
    text, answers = chat.answers(messages, where)
    ids = chat.encode(text)
    check_bos(ids, chat.tokenizer.bos_token_id, where)
    labels, first = [IGNORED] * len(ids), 0
    said = [messages[number] for number in answers_of(messages)]
    for message, prompt in zip(said, chat.prompts(text, ids, answers), strict=True):
        if prompt is None:
            raise Drop("merged_prompt")
        first = prompt
        try:
            end = ids.index(chat.eos_id, first) + 1
        except ValueError:
            raise InputError(f"{chat.eos!r} does not become the end-of-turn token", where=where) from None
        if message.get("weight") != 0:
            labels[first:end] = ids[first:end]
    return Conversation(ids, labels, first)


def plain(chat: Chat, text: str) -> Conversation:
    """A text without turns, all of it labelled, and ended."""
    begin = [chat.tokenizer.bos_token_id] if adds_bos(chat.tokenizer) else []
    ids = [*begin, *chat.encode(chat.control.hide(text)), chat.eos_id]
    return Conversation(ids, list(ids), 0)


def pair(chat: Chat, prompt: list[Message], chosen: list[Message], rejected: list[Message], where: str) -> Pair:
    """Both sides cut at the same prompt, each tokenised with it and once. Raises InputError, Drop."""
    (asked, good), (asked_too, bad) = (answered(chat, prompt + side, where) for side in (chosen, rejected))
    if asked != asked_too:
        raise InputError("the chat template renders the prompt differently for the two answers", where=where)
    return Pair(asked, good, bad)


def answered(chat: Chat, messages: list[Message], where: str) -> tuple[list[int], list[int]]:
    """Token ids of the prompt, and of the last answer through its end-of-turn token. Raises InputError, Drop."""
    whole = conversation(chat, messages, where)
    end = whole.ids.index(chat.eos_id, whole.prompt) + 1
    return whole.ids[: whole.prompt], whole.ids[whole.prompt : end]


def check_end_of_turn(dataset: Any, eos_id: int) -> None:
    """Fatal unless every row teaches the model to stop: its last trained token is the end-of-turn token.

    dataset: a datasets.Dataset with columns input_ids, labels, or prompt_ids and those of answers.
    Raises InputError that names the first bad row.
    """
    columns = [column for column in TRAINED if column in dataset.column_names]
    if not columns or not len(dataset):
        raise InputError("the tokenised data has no rows to train on")
    for column in columns:
        counts, last = _trained(dataset, column)
        for number in np.flatnonzero((last != eos_id) | (counts == 1))[:1]:
            where = f"row {number}, column {column}"
            if last[number] != eos_id:
                what = f"the end-of-turn token (id {eos_id}) is not trained: the model would never learn to stop"
                raise InputError(what, where=where, fix="prepare the data with this model's tokenizer")
            raise InputError("nothing but the end-of-turn token is trained", where=where)


def _trained(dataset: Any, column: str) -> tuple[np.ndarray, np.ndarray]:
    """Of each row how many tokens of a column are trained, and the last of them, -1 where none is: [rows] each."""
    counts, last = [], []
    for batch in dataset.select_columns([column]).with_format("arrow").iter(BATCH):
        for part in batch.column(column).chunks:
            tokens, lengths = part.flatten().to_numpy(), part.value_lengths().to_numpy(zero_copy_only=False)
            places, ends = np.flatnonzero(tokens != IGNORED), np.cumsum(lengths)
            before = np.searchsorted(places, ends)  # trained tokens up to each row's end
            many = np.diff(before, prepend=0)
            found = tokens[places[before - 1]] if len(places) else np.full(len(many), -1)
            counts.append(many)
            last.append(np.where(many > 0, found, -1))
    return np.concatenate(counts), np.concatenate(last)
