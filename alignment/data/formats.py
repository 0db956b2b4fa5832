"""The shapes people keep rows in -> the canonical ones.

Canonical: {"messages": [...]}, {"prompt": [...], "chosen": [answer], "rejected": [answer]} or {"prompt": [...],
"completion": [answer]} (with a score), of messages as in turns.py; or {"text": ...}. An unpaired row is a conversation
and a label, whether its last answer is wanted; a list of scored answers becomes pairs, or scored rows (ranking.py).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from difflib import get_close_matches
from typing import Any

from alignment.config.instructions import checks_of
from alignment.config.rewards import LARGEST
from alignment.data.sources import Row, type_name
from alignment.data.turns import Message, dialogue, message, messages, text, turns, with_system
from alignment.errors import ConfigError, InputError

KEYS = {  # a format is recognised by these keys of a row, in this order
    "preference": ("chosen", "rejected"),
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "alpaca": ("instruction", "output"),
    "prompt_completion": ("prompt", "completion"),
    "scored": ("prompt", "completion", "score"),  # also a prompt_completion: only looked for where scores are wanted
    "scored_list": ("completions",),
    "text": ("text",),
}
SAID = ("response", "text", "content", "completion")  # names that an answer of a list goes by
SCORES = ("score", "overall_score", "rating", "reward")  # and its score

NUMBERS = ("score", "margin", "chosen_reward", "rejected_reward")
NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)(e[+-]?[0-9]+)?")

LABEL = "true for an answer that is wanted, false for one that is not"
LABELLED = ("messages", "sharegpt", "prompt_completion")  # an unpaired row is one of these with a label


def detect(row: Row, wanted: Sequence[str] = ()) -> str:
    """The format whose keys the row has, first of the wanted ones. Raises InputError that lists the keys found, and of
    the nearest format what is missing."""
    if "unpaired" in wanted and "label" in row.value and any(KEYS[name][0] in row.value for name in LABELLED):
        return "unpaired"
    for name in (*(name for name in wanted if name in KEYS), *KEYS):
        if all(key in row.value for key in KEYS[name]):
            return name
    what = f"no known format has the keys {', '.join(row.value) or '(none)'}"
    raise InputError(what, where=row.where, fix=_nearest(row, wanted))


def _nearest(row: Row, wanted: Sequence[str]) -> str:
    """The format that lacks least, those that are wanted first; keys that are spelled alike count half."""

    def found(key: str) -> float:
        return 1.0 if key in row.value else 0.5 * bool(get_close_matches(key, row.value, 1, 0.7))

    names = [*(name for name in wanted if name in KEYS), *(name for name in KEYS if name not in wanted)]
    name = max(names, key=lambda name: sum(map(found, KEYS[name])) / len(KEYS[name]))
    if not any(map(found, KEYS[name])):
        return "known: " + "; ".join(f"{name}: {', '.join(keys)}" for name, keys in KEYS.items())
    lacks = ", ".join(key for key in KEYS[name] if key not in row.value)
    return f"nearest is {name} ({', '.join(KEYS[name])}), which lacks {lacks}: the data set's `columns` names yours"


def renamed(row: Row, columns: Mapping[str, str]) -> Row:
    """The row with our names for its columns, and in a row of texts with labels and numbers for those that say one.

    columns: our key -> theirs. Raises InputError if it lacks one."""
    for key, theirs in columns.items():
        if theirs not in row.value:
            near = get_close_matches(theirs, row.value, 1, 0.5)
            fix = f"nearest: {near[0]}" if near else f"columns found: {', '.join(row.value) or 'none'}"
            raise InputError(f"has no column {theirs!r}, which `columns` names for {key!r}", where=row.where, fix=fix)
    if columns:
        left = {key: value for key, value in row.value.items() if key not in columns.values()}
        row = replace(row, value={**left, **{key: row.value[theirs] for key, theirs in columns.items()}})
    if not row.of_texts:
        return row
    return replace(row, value={key: _meant(key, value) for key, value in row.value.items()})


def _meant(key: str, said: str) -> Any:
    """What a text says under a key of labels or numbers; itself if it says no such thing, None if nothing."""
    word = said.strip().lower()
    if key in ("label", *NUMBERS) and not word:
        return None
    if key == "label":
        return {"true": True, "1": True, "false": False, "0": False}.get(word, said)
    return float(word) if key in NUMBERS and NUMBER.fullmatch(word) else said


def canonical(row: Row, form: str) -> dict[str, list[Message]]:
    """One row of the format `form` as a canonical row. Raises InputError (file, line) for a missing or wrong key."""
    return CONVERTERS[form](row)


def _alpaca(row: Row) -> dict[str, list[Message]]:
    instruction, given = text(row, "instruction"), text(row, "input", optional=True)
    said: list[Message] = []
    history = row.value.get("history") or []
    if not isinstance(history, list) or not all(_is_pair(turn) for turn in history):
        raise InputError("'history' must be a list of [question, answer] texts", where=row.where)
    for question, answer in history:
        said += [message("user", question), message("assistant", answer)]
    said.append(message("user", f"{instruction}\n{given}" if given.strip() else instruction))
    return {"messages": with_system(row, [*said, message("assistant", text(row, "output"))])}


def _is_pair(turn: Any) -> bool:
    return isinstance(turn, list) and len(turn) == 2 and all(isinstance(text, str) for text in turn)


def _chat(row: Row) -> dict[str, list[Message]]:
    return {"messages": with_system(row, messages(row, "messages"))}


def _prompt_completion(row: Row) -> dict[str, list[Message]]:
    return {"messages": with_system(row, turns(row, "prompt", "user") + turns(row, "completion", "assistant"))}


def _sharegpt(row: Row) -> dict[str, list[Message]]:
    return {"messages": with_system(row, messages(row, "conversations"))}


def _side(row: Row, key: str) -> list[Message]:
    return dialogue(row, key) or turns(row, key, "assistant")


def _preference(row: Row) -> dict[str, list[Message]]:
    chosen, rejected = (_side(row, side) for side in ("chosen", "rejected"))
    key = next((key for key in ("prompt", "conversations", "messages") if row.value.get(key) is not None), None)
    if len(chosen) == len(rejected) == 1 and key:
        prompt = turns(row, key, "user")
    else:  # both sides are whole conversations: what they share is the prompt, and must be what `prompt` says
        shared = next((i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), len(chosen) - 1)
        prompt, chosen, rejected = chosen[:shared], chosen[shared:], rejected[shared:]
        if not prompt:
            raise InputError("has no 'prompt', and the two sides share no first messages", where=row.where)
        if key and not _agrees(turns(row, key, "user"), prompt):
            raise InputError(f"{key!r} is not the conversation that both sides begin with", where=row.where)
    if not [m["role"] for m in chosen] == [m["role"] for m in rejected] == ["assistant"]:
        raise InputError("'chosen' and 'rejected' must each be one answer to the same prompt", where=row.where)
    return {"prompt": with_system(row, prompt), "chosen": chosen, "rejected": rejected}


def _unpaired(row: Row) -> dict[str, list[Message]]:
    form = next((name for name in LABELLED if KEYS[name][0] in row.value), None)
    if form is None:
        known = "; ".join(", ".join(KEYS[name]) for name in LABELLED)
        raise InputError("has no conversation beside its label", where=row.where, fix=known)
    wanted(row)
    return CONVERTERS[form](row)


def wanted(row: Row) -> bool:
    """The label of an unpaired row. Raises InputError."""
    if "label" not in row.value:
        raise InputError(f"has no 'label' (keys found: {', '.join(row.value)})", where=row.where, fix=LABEL)
    label = row.value["label"]
    if not isinstance(label, bool):
        what = f"'label' must be true or false, is {type_name(label)}"
        raise InputError(what, where=row.where, fix=LABEL)
    return label


def _scored(row: Row) -> dict[str, list[Message]]:
    prompt, answer = turns(row, "prompt", "user"), turns(row, "completion", "assistant")
    if [m["role"] for m in answer] != ["assistant"]:
        raise InputError("'completion' must be one answer", where=row.where)
    if finite(row, "score") is None:
        given = row.value.get("score")
        is_number = isinstance(given, int | float) and not isinstance(given, bool)
        found = given if is_number else type_name(given)
        what = f"'score' must be a number of at most {LARGEST:g} in size, is {found}"
        raise InputError(what, where=row.where)
    return {"prompt": with_system(row, prompt), "completion": answer}


def scored_list(row: Row) -> tuple[list[Message], list[dict[str, Any]]]:
    """The prompt and the answers of a row of UltraFeedback's kind, each {"text", "score"}: `prompt` or `instruction`;
    `completions`, a list of objects, or of texts beside a list `scores`. Raises InputError."""
    key = "prompt" if row.value.get("prompt") is not None else "instruction"
    prompt, answers, scores = (
        with_system(row, turns(row, key, "user")),
        row.value.get("completions"),
        row.value.get("scores"),
    )
    if not isinstance(answers, list) or not answers:
        found = type_name(answers) if answers != [] else "empty"
        raise InputError(f"'completions' must be a list of answers, is {found}", where=row.where)
    if all(isinstance(answer, str) for answer in answers):
        if not isinstance(scores, list) or len(scores) != len(answers):
            raise InputError("'completions' are texts: 'scores' must have one number for each", where=row.where)
        answers = [{"text": answer, "score": score} for answer, score in zip(answers, scores, strict=True)]
    parts = [replace(row, value=answer) for answer in answers if isinstance(answer, dict)]
    if len(parts) < len(answers):
        raise InputError("'completions' must all be objects, or all texts", where=row.where)
    said, score = _key_of_all(parts, SAID, _said_by, "text"), _key_of_all(parts, SCORES, finite, "number as its score")
    return prompt, [{"text": part.value[said], "score": finite(part, score)} for part in parts]


def _said_by(part: Row, key: str) -> str | None:
    return part.value[key] if isinstance(part.value.get(key), str) else None


def _key_of_all(parts: list[Row], keys: Sequence[str], read: Callable[[Row, str], Any], what: str) -> str:
    """The first of the keys under which every answer has something: two keys would be two scales."""
    found = next((key for key in keys if all(read(part, key) is not None for part in parts)), None)
    if found is None:
        key = next((key for key in keys if any(read(part, key) is not None for part in parts)), None)
        number = next(n for n, part in enumerate(parts) if key is None or read(part, key) is None)
        lacks = f"{what} ({key or ', '.join(keys)})"
        fix = f"keys found: {', '.join(parts[number].value)}"
        raise InputError(f"completions[{number}] has no {lacks}", where=parts[number].where, fix=fix)
    return found


def finite(row: Row, key: str) -> float | None:
    """A number of the row that can be trained on, None if it has none."""
    value = row.value.get(key)
    known = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= LARGEST
    return float(value) if known else None  # type: ignore[arg-type]


def margin(row: Row) -> float | None:
    """How much better the chosen answer of a pair is said to be: its `margin`, else the difference of its rewards."""
    if (own := finite(row, "margin")) is not None:
        return own
    chosen, rejected = finite(row, "chosen_reward"), finite(row, "rejected_reward")
    return None if chosen is None or rejected is None else chosen - rejected


def _agrees(named: list[Message], shared: list[Message]) -> bool:
    """Whether the prompt key repeats the shared conversation, or its one question (with or without a system turn)."""
    return named == shared or (len(named) == 1 and named[0] in (m for m in shared if m["role"] == "user"))


CONVERTERS: dict[str, Callable[[Row], dict[str, list[Message]]]] = {
    "alpaca": _alpaca,
    "messages": _chat,
    "prompt_completion": _prompt_completion,
    "sharegpt": _sharegpt,
    "preference": _preference,
    "unpaired": _unpaired,
    "scored": _scored,
}


def kept(row: Row) -> dict[str, Any]:
    """What a row has for rewards to look at (docs/rewards.md): `expected`, what an answer must come to (text or a
    number), and `checks` of it. Raises InputError for what cannot be either."""
    expected, checks = row.value.get("expected"), row.value.get("checks")
    if expected is not None and (isinstance(expected, bool) or not isinstance(expected, str | int | float)):
        raise InputError(f"'expected' must be text or a number, is {type_name(expected)}", where=row.where)
    if isinstance(expected, float) and not math.isfinite(expected):
        raise InputError(f"'expected' is {expected}, to which nothing can come", where=row.where)
    if checks is not None:
        try:
            checks_of(checks)
        except ConfigError as error:
            fix = error.fix or "docs/rewards.md lists them"
            raise InputError(f"{error.where}: {error.what}", where=row.where, fix=fix) from error
    return {name: value for name, value in (("expected", expected), ("checks", checks)) if value is not None}
