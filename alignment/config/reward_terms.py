"""The kinds of terms that a reward is made of. What each means, its range and how it is hacked: docs/rewards.md."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Annotated, Literal

from pydantic import Field, field_validator
from pydantic_core import PydanticCustomError

from alignment.config.instructions import Check
from alignment.config.patterns import IDENTIFIER, NAME, VISIBLE
from alignment.config.settings import Settings, execution, identity
from alignment.config.sources import PathSource, Source


class Clip(Settings):
    """Values below `low` or above `high` are these."""

    kind: Literal["clip"] = identity()
    low: float = identity()
    high: float = identity()


class Sigmoid(Settings):
    """x -> 1 / (1 + e^-x), in (0, 1)."""

    kind: Literal["sigmoid"] = identity()


class ZScore(Settings):
    """x -> (x - mean) / std, of a mean and a standard deviation that were measured before."""

    kind: Literal["zscore"] = identity()
    mean: float = identity()
    std: float = identity(gt=0)


Normalise = Annotated[Clip | Sigmoid | ZScore, Field(discriminator="kind")]


class Term(Settings):
    """What is common to all kinds. normalise: a fixed transform of its value; null: none."""

    weight: float = identity()
    normalise: Normalise | None = identity(default=None)

    def sources(self) -> list[Source]:
        """Where its models come from, in a fixed order."""
        return []

    def reads(self, roles: Iterable[str]) -> list[str]:
        """The roles, of those that a stage has filled, whose parents' models it takes, in a fixed order."""
        return []

    def idle(self) -> frozenset[str]:
        return frozenset({"normalise"} if self.normalise is None else ())


class Sentiment(Term):
    """The lexicon comes with its package, so there is no source."""

    kind: Literal["sentiment"] = identity()
    source: None = identity(default=None)


class Relevance(Term):
    kind: Literal["relevance"] = identity()
    source: Source | None = identity()

    def sources(self) -> list[Source]:
        return [] if self.source is None else [self.source]


class Length(Term):
    """1 from `low` to `high` units (null: no upper end), falling to 0 over `fall_off` units outside."""

    kind: Literal["length"] = identity()
    unit: Literal["words", "tokens", "characters"] = identity()
    low: int = identity(ge=0)
    high: int | None = identity(ge=0)
    fall_off: int = identity(ge=0)


class Format(Term):
    """The share of those rules that are set which the answer keeps."""

    kind: Literal["format"] = identity()
    starts_with: str | None = identity(pattern=VISIBLE)
    ends_with: str | None = identity(pattern=VISIBLE)
    max_lines: int | None = identity(ge=1)
    is_json: bool = identity()
    whole_sentences: bool = identity()


class Regex(Term):
    """1 where the pattern is found, or is not, as `must` says; else 0."""

    kind: Literal["regex"] = identity()
    pattern: str = identity(min_length=1)
    must: Literal["match", "not_match"] = identity()
    whole: bool = identity()
    ignore_case: bool = identity()


class Repetition(Term):
    """Minus the share of sequences of `words` words that were there before."""

    kind: Literal["repetition"] = identity()
    words: int = identity(ge=1)


Script = Literal[
    "arabic", "armenian", "bengali", "cyrillic", "devanagari", "georgian", "greek", "han", "hangul", "hebrew",
    "hiragana", "katakana", "latin", "tamil", "thai",
]  # fmt: skip


class Language(Term):
    """Minus the share of letters of other scripts than these."""

    kind: Literal["language"] = identity()
    scripts: list[Script] = identity(min_length=1)


class Instructions(Term):
    """The share of checks that the answer meets, of those below and those of its row; strict: 1 for all, else 0."""

    kind: Literal["instructions"] = identity()
    strict: bool = identity()
    checks: list[Check] = identity()


class Answer(Term):
    """1 where the answer says what is expected, else 0."""

    kind: Literal["answer"] = identity()
    find: Literal["auto", "boxed", "marked", "whole"] = identity()
    compare: Literal["number", "text"] = identity()
    tolerance: float = identity(ge=0)

    def idle(self) -> frozenset[str]:
        return super().idle() | ({"tolerance"} if self.compare == "text" else frozenset())


class Model(Term):
    """A trained reward model, or an ensemble. Without members: the parents in the roles that begin with `roles`.

    end: of the text that is scored: where models trained here have it, or where the template leaves it.
    """

    kind: Literal["model"] = identity()
    members: dict[Annotated[str, Field(pattern=NAME)], Source] = identity()
    roles: str = identity(pattern=r"^reward_model[a-z0-9_]*$")
    combine: Literal["mean", "worst"] = identity()
    uncertainty: float = identity(ge=0)
    end: Literal["end_of_turn", "template"] = identity()

    def sources(self) -> list[Source]:
        return list(self.members.values())

    def reads(self, roles: Iterable[str]) -> list[str]:
        return [] if self.members else sorted(role for role in roles if role.startswith(self.roles))

    def idle(self) -> frozenset[str]:
        unread = {"roles"} if self.members else {"members"}
        return super().idle() | unread | ({"uncertainty"} if self.combine == "worst" else frozenset())


class Python(Term):
    """What a function of a file says: for this kind alone a config names code that runs.

    The file's digest is in the key, not those of modules that it imports.
    """

    kind: Literal["python"] = identity()
    source: PathSource = identity()
    function: str = identity(pattern=IDENTIFIER)


LOCAL = ("localhost", "127.0.0.1", "::1")  # hosts that are this machine: a key may go there over http


class ChatEndpoint(Settings):
    """A model behind an OpenAI-compatible chat endpoint, and what it is asked.

    What is asked, and of which model, is in the key. Where it answers, and how patiently it is asked, is not.
    """

    model: str = identity(min_length=1)
    system: str | None = identity()
    prompt: str = identity(min_length=1)
    pattern: str = identity(min_length=1)
    temperature: float = identity(ge=0)
    max_tokens: int = identity(gt=0)
    url: str = execution(min_length=1)
    api_key_env: str | None = execution()
    timeout_s: float = execution(gt=0)
    retries: int = execution(ge=0)
    backoff_s: float = execution(gt=0)
    concurrency: int = execution(ge=1, le=256)
    cache: bool = execution()

    @field_validator("api_key_env")
    @classmethod
    def _is_a_name(cls, value: str | None) -> str | None:
        """A key itself, given by mistake, is not shown."""
        if value is not None and not re.fullmatch(r"[A-Z][A-Z0-9_]{0,63}", value):
            fix = "export the key, and say by which name"
            raise PydanticCustomError("secret", "must be the name of an environment variable", {"fix": fix})
        return value


class Endpoint(Term, ChatEndpoint):
    """The score that such a model gives, from low to high as a number in [0, 1]."""

    kind: Literal["endpoint"] = identity()
    low: float = identity()
    high: float = identity()


class Comparison(ChatEndpoint):
    """Which of two answers such a model prefers. first, second: what the pattern's group is then; else it is a tie."""

    first: str = identity(min_length=1)
    second: str = identity(min_length=1)


AnyTerm = Annotated[
    Sentiment
    | Relevance
    | Length
    | Format
    | Regex
    | Repetition
    | Language
    | Instructions
    | Answer
    | Model
    | Python
    | Endpoint,
    Field(discriminator="kind"),
]
