"""What every kind of term is made of: the answers it is given, the values it gives back, failures among them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

Row = dict[str, Any]
LONGEST = 200  # characters of a reason


@dataclass(frozen=True)
class Answer:
    """row: of the prompt that it answers: id, prompt (messages), and what else prompts.jsonl has (reference, checks).

    tokens: its length with the end-of-turn token, where it is known.
    """

    row: Row
    text: str
    tokens: int | None = None

    @property
    def asked(self) -> str:
        """The last user turn."""
        turns = reversed(self.row["prompt"])
        return next((str(message["content"]) for message in turns if message["role"] == "user"), "")

    @property
    def is_blank(self) -> bool:
        return not self.text.strip()


class Failed(Exception):
    """A term has no value for an answer. As a value of a term, or raised by what looks at one answer."""

    def __str__(self) -> str:
        said = super().__str__().encode("utf-8", "backslashreplace").decode()  # half a character could not be written
        text = " ".join(said.split()) or type(self).__name__
        return text if len(text) <= LONGEST else f"{text[: LONGEST - 1]}…"


Value = float | Failed
Term = Callable[[Sequence[Answer]], list[Value]]  # one value an answer, in their order


def each(function: Callable[[Answer], float]) -> Term:
    """A term that looks at one answer at a time."""

    def one(answer: Answer) -> Value:
        try:
            return function(answer)
        except Failed as failed:
            return failed

    return lambda answers: [one(answer) for answer in answers]


def worded(term: Term) -> Term:
    """An answer of white space alone is worth 0: neither liked nor disliked, and about nothing."""

    def values(answers: Sequence[Answer]) -> list[Value]:
        found = iter(term([answer for answer in answers if not answer.is_blank]))
        return [0.0 if answer.is_blank else next(found) for answer in answers]

    return values
