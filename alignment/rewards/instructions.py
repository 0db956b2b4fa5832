"""instructions: checks that a program can make, after IFEval (Zhou et al. 2023, arXiv:2311.07911)."""

from __future__ import annotations

import re
from collections.abc import Callable

from alignment.config.instructions import Check, Counted, Edge, Frequency, OneOf, Relation, Whole, Words, checks_of
from alignment.config.reward_terms import Instructions
from alignment.errors import ConfigError
from alignment.rewards.rules import is_json
from alignment.rewards.term import Answer, Failed, Term, each
from alignment.texts import ENDS, sentences, words

LETTERS = r"[^\W\d_]"


def instructions(settings: Instructions) -> Term:
    """Share of checks met, of those of the settings and those of the row; strict: whether all are."""

    def value(answer: Answer) -> float:
        checks = [*settings.checks, *_own(answer)]
        if not checks:
            raise Failed("its row has no checks")
        met = [is_met(check, answer.text, answer.asked) for check in checks]
        return float(all(met)) if settings.strict else sum(met) / len(met)

    return each(value)


def _own(answer: Answer) -> list[Check]:
    given = answer.row.get("checks")
    try:
        return [] if given is None else checks_of(given)
    except ConfigError as error:
        raise Failed(str(error)) from error


def is_met(check: Check, text: str, asked: str) -> bool:
    """Whether an answer meets a check. asked: what it answers."""
    if isinstance(check, Counted):
        return holds(COUNTS[check.kind](text), check.relation, check.count)
    if isinstance(check, Frequency):
        count = occurrences if check.kind == "word_frequency" else letters
        return holds(count(check.text, text), check.relation, check.count)
    if isinstance(check, Words):
        wanted = check.kind == "include"
        return all((occurrences(word, text) > 0) == wanted for word in check.words)
    if isinstance(check, Edge):
        return EDGES[check.kind](text, check.text)
    if isinstance(check, OneOf):
        return _plain(text) in {_plain(option) for option in check.options}
    assert isinstance(check, Whole)
    return WHOLES[check.kind](text, asked)


def holds(found: int, relation: Relation, count: int) -> bool:
    return {"exactly": found == count, "at_least": found >= count, "at_most": found <= count}[relation]


def occurrences(phrase: str, text: str) -> int:
    """How often a word or phrase stands by itself, without regard to case and to how much white space is in it."""
    words = r"\s+".join(map(re.escape, phrase.split()))
    return len(re.findall(rf"(?<!\w){words}(?!\w)", text, re.I)) if words else 0


def letters(letter: str, text: str) -> int:
    return text.casefold().count(letter.casefold())


def _lines(pattern: str) -> Callable[[str], int]:
    """How many lines begin so."""
    compiled = re.compile(pattern, re.M)
    return lambda text: len(compiled.findall(text))


def _paragraphs(text: str) -> int:
    """What empty lines part."""
    return sum(bool(part.strip()) for part in re.split(r"\n\s*\n", text))


def _capitals(text: str) -> int:
    """Words of capitals alone, of two letters or more: I and A are words like any other."""
    return sum(len(word) > 1 and word.isupper() for word in re.findall(rf"{LETTERS}+", text))


COUNTS: dict[str, Callable[[str], int]] = {
    "words": words,
    "sentences": sentences,
    "paragraphs": _paragraphs,
    "lines": lambda text: sum(bool(line.strip()) for line in text.splitlines()),
    "bullets": _lines(r"^[ \t]*[-*•][ \t]+\S"),
    "numbered_items": _lines(r"^[ \t]*\d+[.)][ \t]+\S"),
    "placeholders": lambda text: len(re.findall(r"\[[^\[\]\n]+\]", text)),  # [address]
    "highlights": lambda text: len(re.findall(r"(?<!\*)\*{1,2}(?![\s*])[^*\n]+(?<![\s*])\*{1,2}(?!\*)", text)),
    "capital_words": _capitals,
}
EDGES: dict[str, Callable[[str, str], bool]] = {
    "starts_with": lambda text, edge: text.lstrip().startswith(edge.lstrip()),
    "ends_with": lambda text, edge: text.rstrip().endswith(edge.rstrip()),
    # A line that begins with the mark and goes on, such as "P.S. I love you"; not the first one.
    "postscript": lambda text, mark: bool(re.search(rf"\n\s*{re.escape(mark.strip())}[ \t]*\S", text.strip())),
}
WHOLES: dict[str, Callable[[str, str], bool]] = {
    "lowercase": lambda text, asked: text.islower(),  # it has letters, and none of them is a capital
    "uppercase": lambda text, asked: text.isupper(),
    "json": lambda text, asked: is_json(text),
    "title": lambda text, asked: bool(re.search(r"<<[^<>\n]*[^<>\s][^<>\n]*>>", text)),
    "quotation": lambda text, asked: len(text.strip()) > 2 and text.strip()[0] in '"“' and text.strip()[-1] in '"”',
    "no_commas": lambda text, asked: bool(text.strip()) and not set(text) & set(",，、"),
    "repeat_prompt": lambda text, asked: _goes_on(_plain(text), _plain(asked)),
}


def _goes_on(said: str, asked: str) -> bool:
    """Whether it begins with what was asked, whole words of it, and has more."""
    rest = said.removeprefix(asked)
    return rest not in ("", said) and not (asked[-1:].isalnum() and rest[0].isalnum())


def _plain(text: str) -> str:
    return " ".join(text.split()).casefold().rstrip(ENDS)
