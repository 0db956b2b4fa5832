"""Checks that a program can make of an answer, after IFEval (Zhou et al. 2023, arXiv:2311.07911), by kind.

They stand in the rows of a data set, `checks: [{kind: words, relation: exactly, count: 20}, ...]`, or in the settings
of a term of the kind `instructions`. What each means is in alignment/rewards/instructions.py.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, get_args

from pydantic import Field, TypeAdapter, ValidationError

from alignment.config.nearest import closest
from alignment.config.patterns import VISIBLE
from alignment.config.settings import Settings, identity
from alignment.errors import ConfigError

Relation = Literal["exactly", "at_least", "at_most"]


class Counted(Settings):
    """How many of something the answer has."""

    kind: Literal[
        "words", "sentences", "paragraphs", "lines", "bullets", "numbered_items", "placeholders", "highlights",
        "capital_words",
    ] = identity()  # fmt: skip
    relation: Relation = identity()
    count: int = identity(ge=0)


class Frequency(Settings):
    """How often the answer has a word or phrase, or a letter."""

    kind: Literal["word_frequency", "letter_frequency"] = identity()
    text: str = identity(min_length=1)
    relation: Relation = identity()
    count: int = identity(ge=0)


class Words(Settings):
    """Words or phrases that are all there, or none of them."""

    kind: Literal["include", "forbid"] = identity()
    words: list[str] = identity(min_length=1)


class Edge(Settings):
    """Text that the answer begins or ends with, white space before or after it left out of both; for a postscript, what
    it is marked by."""

    kind: Literal["starts_with", "ends_with", "postscript"] = identity()
    text: str = identity(min_length=1, pattern=VISIBLE)


class OneOf(Settings):
    """The answer is one of these, but for case, white space around it and an end mark."""

    kind: Literal["one_of"] = identity()
    options: list[str] = identity(min_length=1)


class Whole(Settings):
    """What the answer is as a whole."""

    kind: Literal["lowercase", "uppercase", "json", "title", "quotation", "no_commas", "repeat_prompt"] = identity()


Check = Annotated[Counted | Frequency | Words | Edge | OneOf | Whole, Field(discriminator="kind")]
CHECKS: TypeAdapter[list[Check]] = TypeAdapter(list[Check])
KINDS = [
    kind
    for one in (Counted, Frequency, Words, Edge, OneOf, Whole)
    for kind in get_args(one.model_fields["kind"].annotation)
]


def checks_of(value: Any) -> list[Check]:
    """The checks of a row. Keys that are null are taken for absent: tables have every key in every row.

    Raises ConfigError with what is wrong first.
    """
    if not isinstance(value, list) or not all(isinstance(check, dict) for check in value):
        raise ConfigError("must be a list of objects with a `kind`", where="checks")
    plain = [{key: inner for key, inner in check.items() if inner is not None} for check in value]
    try:
        return CHECKS.validate_python(plain)
    except ValidationError as error:
        # A key that is unknown often is the one that is missing, misspelt.
        fault = min(error.errors(), key=lambda fault: fault["type"] != "extra_forbidden")
        number, *path = fault["loc"]
        at = ".".join([f"checks[{number}]", *map(str, path[1:])])  # path[0] is the kind
        if fault["type"] == "union_tag_invalid":
            kind = str(fault["ctx"]["tag"])
            raise ConfigError(f"unknown kind {kind!r}", where=at, fix=closest(kind, KINDS)) from error
        if fault["type"] == "union_tag_not_found":
            raise ConfigError("has no `kind`", where=at) from error
        raise ConfigError(fault["msg"][0].lower() + fault["msg"][1:], where=at) from error
