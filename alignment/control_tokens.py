"""Control tokens that people's text spells out, such as <|im_end|>: how they stay text.

Before a template is rendered, each in a message's content is replaced by a marker of Unicode noncharacters, which
neither the template nor the tokenizer takes for anything. Text with markers is then encoded by a twin of the tokenizer,
in which the control tokens themselves are spelled with such characters, so that their usual spelling is text like any
other: in its place, in one piece with what stands around it. (transformers' `split_special_tokens` would split those of
the template, too, or else need the text in pieces, and tokenizers in the manner of SentencePiece put a space before
every piece.)
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from alignment.errors import InputError

OPEN, CLOSE = "\ufdd0", "\ufdd1"  # around a marker's number
OPENERS = OPEN + "".join(chr(0x10000 * plane + 0xFFFE) for plane in range(1, 17))  # for a twin: one not in the text
DIGITS = "".join(map(chr, range(0xFDD2, 0xFDF0)))  # noncharacters, too: no template cuts, strips or changes them
MARKER = re.compile(f"{OPEN}[{DIGITS}]+{CLOSE}")


class ControlTokens:
    """Those of one tokenizer of transformers, which must not change any more."""

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        special = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
        self.texts = sorted(special | set(tokenizer.all_special_tokens), key=lambda text: (-len(text), text))
        unknown = tokenizer.unk_token  # which characters that are in no word become, too
        known = [text for text in self.texts if text != unknown]
        self.numbers: dict[str, int] = dict(zip(known, tokenizer.convert_tokens_to_ids(known), strict=True))
        self.ids = frozenset(self.numbers.values())
        self.pattern = re.compile("|".join(map(re.escape, self.texts)) or r"(?!)")
        # OPEN itself has a marker, the last: text that holds one is never taken for ours.
        self._markers = {text: _marker(number) for number, text in enumerate([*self.texts, OPEN])}
        self._spelled = {marker: text for text, marker in self._markers.items()}
        self._hidden = re.compile(f"{self.pattern.pattern}|{OPEN}")
        self._twins: dict[str, Any] = {}  # by the character that opens its spellings
        self._any = re.compile(f"{self.pattern.pattern}|{MARKER.pattern}")

    def find(self, text: str) -> str | None:
        """The first one spelled out in `text`, as people write it."""
        found = self.pattern.search(text)
        return found[0] if found else None

    def real(self, text: str) -> list[re.Match[str]]:
        """Those that encoded text has, in order, but the unknown token: where they stand in rendered text."""
        return [found for found in self.pattern.finditer(text) if found[0] in self.numbers]

    def hide(self, text: str) -> str:
        """People's text with markers for the control tokens in it."""
        return self._hidden.sub(lambda found: self._markers[found[0]], text)

    def hidden(self, messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Messages with markers in all of their texts, those of tools and calls too."""
        return [self._deep(dict(message)) for message in messages]

    def _deep(self, value: Any) -> Any:
        if isinstance(value, str):
            return self.hide(value)
        if isinstance(value, dict):
            return {self._deep(key): self._deep(inner) for key, inner in value.items()}
        return [self._deep(inner) for inner in value] if isinstance(value, list) else value

    def plain(self, text: str) -> str:
        """Text with markers as people read it."""
        return MARKER.sub(lambda found: self._spelled.get(found[0], found[0]), text) if OPEN in text else text

    def encode(self, text: str) -> list[int]:
        """Token ids of rendered text: control tokens are real, markers are text. Raises InputError if they cannot be.

        Text without markers has the ids that the tokenizer gives it.
        """
        markers = {found[0] for found in MARKER.finditer(text)} & self._spelled.keys()
        if markers <= {self._markers[OPEN]}:
            return list(self.tokenizer(self.plain(text), add_special_tokens=False)["input_ids"])
        plain = self.plain(text)
        opener = next((one for one in OPENERS if one not in plain), None)
        if opener is None:
            raise self._refusal("control tokens beside every noncharacter")
        turned = self._any.sub(lambda found: self._turned(found[0], opener), text)
        ids = list(self._twin(opener).encode(turned, add_special_tokens=False).ids)
        if sum(i in self.ids for i in ids) != len(self.real(text)):
            raise self._refusal("the control tokens " + ", ".join(sorted(self._spelled[one] for one in markers)))
        return ids

    def _turned(self, found: str, opener: str) -> str:
        """What a control token, or a marker, is for the twin."""
        return self._private(found, opener) if found in self._markers else self._spelled.get(found, found)

    def _private(self, word: str, opener: str) -> str:
        """How the twin spells a word of the vocabulary."""
        return self._markers[word].replace(OPEN, opener) if word in self._markers and word != OPEN else word

    def _refusal(self, what: str) -> InputError:
        where = getattr(self.tokenizer, "name_or_path", None) or "the tokenizer"
        return InputError(f"the tokenizer cannot take for text {what}", where=where, fix="leave such rows out")

    def _twin(self, opener: str) -> Any:
        """The tokenizer with the same ids, in which each control token is spelled with noncharacters."""
        if opener not in self._twins:
            self._twins[opener] = self._made(opener)
        return self._twins[opener]

    def _made(self, opener: str) -> Any:
        from tokenizers import Tokenizer

        if not getattr(self.tokenizer, "is_fast", False):
            raise self._refusal("control tokens: it is no fast one (tokenizer.json)")
        told = json.loads(self.tokenizer.backend_tokenizer.to_str())
        told |= {"truncation": None, "padding": None, "post_processor": None}
        for token in told["added_tokens"]:
            token["content"] = self._private(token["content"], opener)
        model = told["model"]
        if isinstance(model["vocab"], dict):
            model["vocab"] = {self._private(word, opener): i for word, i in model["vocab"].items()}
        else:  # Unigram's list of pieces and their scores
            model["vocab"] = [[self._private(word, opener), *rest] for word, *rest in model["vocab"]]
        if model.get("unk_token") is not None:
            model["unk_token"] = self._private(model["unk_token"], opener)
        try:
            twin = Tokenizer.from_str(json.dumps(told))
        except Exception as error:  # tokenizers has no class of its own for it
            raise self._refusal(f"control tokens: {error}") from error
        if twin.get_vocab() != {self._private(word, opener): i for word, i in self.tokenizer.get_vocab().items()}:
            raise self._refusal("control tokens: other words would have other numbers")
        return twin


@lru_cache(maxsize=8)
def of(tokenizer: Any) -> ControlTokens:
    """Those of a tokenizer that is asked for many texts."""
    return ControlTokens(tokenizer)


def _marker(number: int) -> str:
    digits = DIGITS[number % len(DIGITS)]
    while number := number // len(DIGITS):
        digits = DIGITS[number % len(DIGITS)] + digits
    return OPEN + digits + CLOSE
