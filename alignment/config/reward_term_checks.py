"""Terms of a reward whose settings are impossible together."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult, urlsplit

from alignment.config.faults import Fault, Use
from alignment.config.nearest import closest
from alignment.config.reward_terms import LOCAL, ChatEndpoint, Clip, Endpoint, Format, Length, Model, Python, Regex
from alignment.config.schema import Experiment
from alignment.config.stages.answering import Judge
from alignment.config.stages.base import REWARD_MODEL


def term_faults(use: Use) -> Iterator[Fault]:
    """Of a stage that judges."""
    yield from _reward_models(use)
    yield from _weightless(use)
    if (comparison := use.experiment.reward.comparison) is not None:
        yield from _chat(comparison, "reward.comparison", ("first", "second"))
        if comparison.first == comparison.second:
            keys = "reward.comparison.first", "reward.comparison.second"
            what = f"`{keys[0]}` and `{keys[1]}` are both {comparison.first!r}: each comparison would be a tie"
            yield Fault(what, keys, "what the group of the pattern is, for each of the two")
        yield from _unasked(use.experiment)
    for name, term in use.experiment.reward.terms.items():
        key = f"reward.terms.{name}"
        if isinstance(term.normalise, Clip) and term.normalise.low >= term.normalise.high:
            yield _turned(f"{key}.normalise.low", term.normalise.low, f"{key}.normalise.high", term.normalise.high)
        if look := LOOKS.get(type(term)):
            yield from look(term, key)


def _weightless(use: Use) -> Iterator[Fault]:
    """Terms of weight 0 are there to be watched, beside one that counts."""
    terms = use.experiment.reward.read(use.settings.compares).terms
    if terms and not any(term.weight for term in terms.values()):
        keys = tuple(f"reward.terms.{name}.weight" for name in terms)
        what = f"`{keys[0]}` is 0{', and so are the others' * (len(keys) > 1)}: every answer would have the reward 0"
        yield Fault(what, keys, "give one of them a weight")


def _unasked(experiment: Experiment) -> Iterator[Fault]:
    """A comparison that no stage of the pipeline asks."""
    uses = [Use(experiment, node) for node in experiment.pipeline.nodes]
    if any(use.settings.compares for use in uses):
        return
    if judge := next((use for use in uses if isinstance(use.settings, Judge)), None):
        key = f"{judge.key}.judging"
        what = f"`reward.comparison` is set, and `{key}` is pointwise"
        yield Fault(what, (key, "reward.comparison"), f"{key}=pairwise")
    else:
        what = "`reward.comparison` is set, and no stage of the pipeline asks which of two answers is better"
        yield Fault(what, ("reward.comparison",), "choose a reward without one, such as reward=endpoint")


def _turned(low: str, least: float, high: str, most: float) -> Fault:
    return Fault(f"`{low}` is {least:g}, and `{high}` {most:g}", (low, high), "the lower end comes first")


def _reward_models(use: Use) -> Iterator[Fault]:
    """Each term has its models, and each reward model that the stage is given has a term."""
    terms, read = use.experiment.reward.read(use.settings.compares).terms, dict[str, tuple[str, str]]()
    for name, term in terms.items():
        if isinstance(term, Model) and not term.members:
            mine = term.reads(use.inputs)
            yield from _read_twice(use, name, term, {role: read[role] for role in mine if role in read})
            read |= dict.fromkeys(mine, (name, term.roles))
            if not mine:
                what = f"`reward.terms.{name}` has no model: it has no members, and `{use.node}` no role `{term.roles}`"
                fix = f"+{use.role(term.roles)}=NODE, or +reward.terms.{name}.members.one={{kind: path, path: FOLDER}}"
                yield Fault(what, (f"reward.terms.{name}.members", f"pipeline.nodes.{use.node}.inputs"), fix)
    for role in use.inputs:
        if role.startswith(REWARD_MODEL) and role not in read:
            what = f"`{use.role(role)}` is filled, and no term of the reward reads it"
            yield Fault(what, (use.role(role),), "reward=model, or leave it out")


def _read_twice(use: Use, name: str, term: Model, others: dict[str, tuple[str, str]]) -> Iterator[Fault]:
    """others: role -> the term that reads it already, and what its roles begin with. With equal `roles` it is meant."""
    for role, (other, roles) in others.items():
        if roles != term.roles:
            keys = f"reward.terms.{other}.roles", f"reward.terms.{name}.roles"
            what = (
                f"`{use.role(role)}` is read by `{other}` and by `{name}`: its name begins as the `roles` of both say"
            )
            yield Fault(what, keys, "name the roles so that none begins as another, such as reward_model_a and _b")


def _length(term: Length, key: str) -> Iterator[Fault]:
    if term.high is not None and term.low > term.high:
        yield _turned(f"{key}.low", term.low, f"{key}.high", term.high)


def _format(term: Format, key: str) -> Iterator[Fault]:
    texts = term.starts_with, term.ends_with
    if texts == (None, None) and term.max_lines is None and not (term.is_json or term.whole_sentences):
        yield Fault(f"`{key}` sets no rule", (key,), f"set one, such as {key}.whole_sentences=true")


def _regex(term: Regex, key: str) -> Iterator[Fault]:
    yield from pattern_faults(term.pattern, f"{key}.pattern")


def _python(term: Python, key: str) -> Iterator[Fault]:
    """The file is there, can be read, and defines the function; it is parsed, not run."""
    path, at = term.source.path, f"{key}.source.path"
    try:
        tree = ast.parse(Path(path).read_bytes(), path)
    except OSError as error:
        yield Fault(f"`{at}` is {path}, which cannot be read: {error.strerror}", (at,), "name a file of Python")
    except (SyntaxError, ValueError) as error:
        where = f", line {error.lineno}" if isinstance(error, SyntaxError) and error.lineno else ""
        yield Fault(f"`{at}` is {path}, which is no Python{where}: {error.args[0]}", (at,), "mend the file")
    else:
        found = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
        if term.function not in found:
            what = f"`{key}.function` is {term.function}, which {path} does not define"
            yield Fault(what, (f"{key}.function", at), closest(term.function, found))
        elif not found[term.function].decorator_list and not _takes_three(found[term.function].args):
            what = f"`{key}.function` is {term.function}, which does not take three arguments ({path}, line"
            fix = f"def {term.function}(prompts, answers, rows)"
            yield Fault(f"{what} {found[term.function].lineno})", (f"{key}.function", at), fix)


def _takes_three(given: ast.arguments) -> bool:
    """By place, and none by name alone."""
    most = len(given.posonlyargs) + len(given.args)
    needed = any(default is None for default in given.kw_defaults)
    return most - len(given.defaults) <= 3 and (most >= 3 or given.vararg is not None) and not needed


def _endpoint(term: Endpoint, key: str) -> Iterator[Fault]:
    if term.low >= term.high:
        yield _turned(f"{key}.low", term.low, f"{key}.high", term.high)
    yield from _chat(term, key, ("answer",))


def _chat(term: ChatEndpoint, key: str, answers: tuple[str, ...]) -> Iterator[Fault]:
    """answers: the placeholders that its prompt must have."""
    yield from pattern_faults(term.pattern, f"{key}.pattern", groups=1)
    at, known = f"{key}.prompt", (*answers, "prompt", "reference", "expected")
    for name in re.findall(r"\{([a-z_]+)\}", term.prompt):
        if name not in known:
            yield Fault(f"`{at}` has the placeholder {{{name}}}, which is none", (at,), closest(name, known))
    for name in answers:
        if f"{{{name}}}" not in term.prompt:
            yield Fault(f"`{at}` lacks {{{name}}}", (at,), "the judge must see what it judges")
    where = _address(term.url)
    if where is None:
        yield Fault(f"`{key}.url` is no address", (f"{key}.url",), "such as http://localhost:8000/v1, in ASCII")
        return
    local = where.hostname in LOCAL
    if where.scheme == "http" and term.api_key_env is not None and not local:
        what = f"`{key}.url` is http, and `{key}.api_key_env` sends a key: anybody on the way could read it"
        yield Fault(what, (f"{key}.url", f"{key}.api_key_env"), f"https, or {key}.api_key_env=null")
    if where.username or where.password or where.query:
        what = f"`{key}.url` has more than an address in it"
        yield Fault(what, (f"{key}.url",), f"export the key, and name the variable: {key}.api_key_env=NAME")


def _address(url: str) -> SplitResult | None:
    """Its parts, None if HTTP could not send anything there."""
    try:
        where = urlsplit(url)
        is_one = where.scheme in ("http", "https") and where.hostname and where.port != 0
    except ValueError:  # brackets or a port that are none
        return None
    return where if is_one and url.isascii() and url.isprintable() and " " not in url else None


def pattern_faults(pattern: str, key: str, groups: int = 0) -> Iterator[Fault]:
    """groups: how many the pattern must have."""
    try:
        compiled = re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        yield Fault(f"`{key}` is no regular expression: {error}", (key,), "Python's re says what one looks like")
    else:
        if compiled.groups < groups:
            yield Fault(f"`{key}` has no group", (key,), "put ( ) around the part that is the number")


LOOKS: dict[type, Callable[[Any, str], Iterator[Fault]]] = {
    Length: _length,
    Format: _format,
    Regex: _regex,
    Python: _python,
    Endpoint: _endpoint,
}
