"""Words of a text in any script, for whoever compares texts by their n-grams."""

from __future__ import annotations

import re
import unicodedata

import regex

# Scripts that write no spaces between words: each of their letters counts as a word, with the marks that belong to it.
# Marks (\p{M}) are letters here, for vowels are marks in Indic scripts; `re` knows no such class.
_UNSPACED = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}"
_WORD = regex.compile(rf"[[{_UNSPACED}]&&[\p{{L}}\p{{N}}]]\p{{M}}*|[\p{{L}}\p{{N}}\p{{M}}--[{_UNSPACED}]]+", regex.V1)
_ASCII = re.compile("[a-z0-9]+")  # the same of such a text, ten times as fast


def words(text: str) -> list[str]:
    """Runs of letters, digits and marks, without regard to case and to forms of letters that look alike (NFKC).

    What stands between them, punctuation and symbols, is left out: "Don't stop!" is don, t, stop.
    """
    if text.isascii():
        return _ASCII.findall(text.lower())
    found: list[str] = _WORD.findall(unicodedata.normalize("NFKC", text).casefold())
    return found
