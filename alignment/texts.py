"""What can be counted in a text without a model, for whoever measures answers or rewards them."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Collection
from functools import lru_cache

SPACED, UNSPACED = ".!?…", "。！？"  # end marks of sentences, with white space after them or not
ENDS = SPACED + UNSPACED
CLOSERS = "\"'”’»)]*_`」』）"  # what may follow the end mark of a sentence
_SENTENCE = re.compile(rf"[{SPACED}]+[{re.escape(CLOSERS)}]*(?=\s|$)|[{UNSPACED}]+[{re.escape(CLOSERS)}]*")
SCRIPTS = {  # script -> the word that stands in the Unicode name of each of its letters
    **{name: name.upper() for name in ("arabic", "armenian", "bengali", "cyrillic", "devanagari", "georgian")},
    **{name: name.upper() for name in ("greek", "hangul", "hebrew", "hiragana", "katakana", "latin", "tamil", "thai")},
    "han": "CJK",
}
ALSO = {"々": "CJK", "〇": "CJK", "ª": "LATIN", "º": "LATIN"}  # whose names do not say so
OF_NO_SCRIPT = frozenset("µ")  # of units, in any language


def words(text: str) -> int:
    """How many: what stands between white space and has a letter or a digit. A dash by itself is none."""
    return sum(any(letter.isalnum() for letter in piece) for piece in text.split())


def repetition(text: str, words: int = 3) -> float:
    """Share of sequences of `words` words that were there before: 1 - distinct / all.

    All that stands between white space is one here, or a row of dashes would repeat nothing; without regard to case; 0
    for a text of fewer.
    """
    said = text.casefold().split()
    runs = list(zip(*(said[i:] for i in range(words)), strict=False))
    return 1 - len(set(runs)) / len(runs) if runs else 0.0


def sentences(text: str) -> int:
    """How many: end marks that white space or the end follows; words after the last one are one more. No grammar is
    known here: an abbreviation with its full stop ends one, too."""
    ends = [found.end() for found in _SENTENCE.finditer(text)]
    return len(ends) + bool(text[ends[-1] if ends else 0 :].strip())


def ends_whole(text: str) -> bool:
    """Whether the last sentence has its end mark, if need be before closing quotes, brackets and emphasis."""
    return text.rstrip().rstrip(CLOSERS).endswith(tuple(ENDS))


def foreign_share(text: str, scripts: Collection[str]) -> float:
    """Share of letters that belong to none of these scripts; 0 for a text without letters."""
    letters = [letter for letter in text if letter.isalpha() and letter not in OF_NO_SCRIPT]
    wanted = frozenset(SCRIPTS[name] for name in scripts)
    return sum(not _is_of(letter, wanted) for letter in letters) / len(letters) if letters else 0.0


@lru_cache(1 << 14)
def _is_of(letter: str, wanted: frozenset[str]) -> bool:
    if letter in ALSO:
        return ALSO[letter] in wanted
    return not wanted.isdisjoint(unicodedata.name(letter, "").replace("-", " ").split())
