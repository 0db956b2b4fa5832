"""Terms that need nothing but the text of the answer: length, format, regex, repetition, language."""

from __future__ import annotations

import json
import re
from collections.abc import Callable

from alignment.config.reward_terms import Format, Language, Length, Regex, Repetition
from alignment.rewards.patterns import find
from alignment.rewards.term import Answer, Failed, Term, each
from alignment.texts import ends_whole, foreign_share, words
from alignment.texts import repetition as repeated


def length(settings: Length) -> Term:
    """1 inside [low, high], 1 - d / fall_off at d units outside of it, never below 0; a step without a fall-off."""

    def value(answer: Answer) -> float:
        size = _size(answer, settings.unit)
        over = 0 if settings.high is None else size - settings.high
        outside = max(settings.low - size, over, 0)
        return max(0.0, 1 - outside / settings.fall_off) if settings.fall_off else float(outside == 0)

    return each(value)


def _size(answer: Answer, unit: str) -> int:
    if unit == "characters":
        return len(answer.text)
    if unit == "words":
        return words(answer.text)
    if answer.tokens is None:
        raise Failed("its length in tokens is not known here")
    return answer.tokens


def form(settings: Format) -> Term:
    """Share of the rules that are kept."""
    rules: list[Callable[[str], bool]] = []
    if settings.starts_with is not None:
        rules.append(lambda text: text.lstrip().startswith(str(settings.starts_with).lstrip()))
    if settings.ends_with is not None:
        rules.append(lambda text: text.rstrip().endswith(str(settings.ends_with).rstrip()))
    if (most := settings.max_lines) is not None:
        rules.append(lambda text: len(text.strip().splitlines()) <= most)
    if settings.is_json:
        rules.append(is_json)
    if settings.whole_sentences:
        rules.append(ends_whole)
    return each(lambda answer: sum(rule(answer.text) for rule in rules) / len(rules))


def is_json(text: str) -> bool:
    """Whether it is one JSON value, alone or in a fenced code block."""
    fenced = re.fullmatch(r"```(?:json)?\n(.*)\n```", text.strip(), re.S)
    try:
        json.loads(fenced[1] if fenced else text, parse_constant=_no_json)
    except (ValueError, RecursionError):
        return False
    return True


def _no_json(name: str) -> None:
    """NaN and Infinity, which Python's reader takes for JSON, are none."""
    raise ValueError(name)


def regex(settings: Regex) -> Term:
    """1 where it is as `must` says, else 0. A dot matches line breaks, too."""
    pattern = re.compile(settings.pattern, re.S | (re.I if settings.ignore_case else 0))
    wanted = settings.must == "match"
    return each(lambda answer: float((find(pattern, answer.text, whole=settings.whole) is not None) == wanted))


def repetition(settings: Repetition) -> Term:
    return each(lambda answer: -repeated(answer.text, settings.words))


def language(settings: Language) -> Term:
    return each(lambda answer: -foreign_share(answer.text, settings.scripts))
