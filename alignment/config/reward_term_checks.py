"""Terms of a reward whose settings are impossible together."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

from alignment.config.faults import Fault, Use
from alignment.config.reward_terms import Clip, Format, Length, Model, Regex
from alignment.config.stages.base import REWARD_MODEL


def term_faults(use: Use) -> Iterator[Fault]:
    """Of a stage that judges."""
    yield from _reward_models(use)
    for name, term in use.experiment.reward.terms.items():
        key = f"reward.terms.{name}"
        if isinstance(term.normalise, Clip) and term.normalise.low >= term.normalise.high:
            yield _turned(f"{key}.normalise.low", term.normalise.low, f"{key}.normalise.high", term.normalise.high)
        if look := LOOKS.get(type(term)):
            yield from look(term, key)


def _turned(low: str, least: float, high: str, most: float) -> Fault:
    return Fault(f"`{low}` is {least:g}, and `{high}` {most:g}", (low, high), "the lower end comes first")


def _reward_models(use: Use) -> Iterator[Fault]:
    """Each term has its models, and each reward model that the stage is given has a term."""
    terms, read = use.experiment.reward.terms, set[str]()
    for name, term in terms.items():
        if isinstance(term, Model) and not term.members:
            read |= (mine := set(term.reads(use.inputs)))
            if not mine:
                what = f"`reward.terms.{name}` has no model: it has no members, and `{use.node}` no role `{term.roles}`"
                fix = f"+{use.role(term.roles)}=NODE, or +reward.terms.{name}.members.one={{kind: path, path: FOLDER}}"
                yield Fault(what, (f"reward.terms.{name}.members", f"pipeline.nodes.{use.node}.inputs"), fix)
    for role in use.inputs:
        if role.startswith(REWARD_MODEL) and role not in read:
            what = f"`{use.role(role)}` is filled, and no term of the reward reads it"
            yield Fault(what, (use.role(role),), "reward=model, or leave it out")


def _length(term: Length, key: str) -> Iterator[Fault]:
    if term.high is not None and term.low > term.high:
        yield _turned(f"{key}.low", term.low, f"{key}.high", term.high)


def _format(term: Format, key: str) -> Iterator[Fault]:
    texts = term.starts_with, term.ends_with
    if texts == (None, None) and term.max_lines is None and not (term.is_json or term.whole_sentences):
        yield Fault(f"`{key}` sets no rule", (key,), f"set one, such as {key}.whole_sentences=true")


def _regex(term: Regex, key: str) -> Iterator[Fault]:
    yield from pattern_faults(term.pattern, f"{key}.pattern")


def pattern_faults(pattern: str, key: str) -> Iterator[Fault]:
    try:
        re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        yield Fault(f"`{key}` is no regular expression: {error}", (key,), "Python's re says what one looks like")


LOOKS: dict[type, Callable[[Any, str], Iterator[Fault]]] = {Length: _length, Format: _format, Regex: _regex}
