"""The points of a sweep, hundreds of them, composed and validated in a few milliseconds each.

Hydra composes those that choose the same files once, as their *template*. Of each point only the values are set, by
Hydra's own code in a copy of the template, and only what they touch is resolved anew.

This is for speed alone, so it never says no: whatever is unusual or wrong is left to the slow way, which does it right
or says what is wrong. A template is good for one working directory and one environment.
"""

from __future__ import annotations

import os
import re
from collections import OrderedDict, defaultdict
from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import compress, takewhile
from typing import Any

from hydra._internal.config_loader_impl import ConfigLoaderImpl, get_overrides_dirname
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.types import RunMode
from omegaconf import AnyNode, Container, DictConfig, ListConfig, Node, OmegaConf
from omegaconf._utils import split_key

from alignment.config import checks, compose
from alignment.config.guard import refuse_code
from alignment.config.listed import refuse_overlaps
from alignment.config.provenance import Origin
from alignment.config.schema import Experiment

Path = tuple[str, ...]
Lines = tuple[str, ...]

TEMPLATES = 64  # kept; each is some hundred kilobytes
EXPERIMENTS = 10_000  # remembered
# Interpolations that mean the same now and when the job runs: of another key, seen from the top or from near by, and of
# a variable of the environment. Not ${hydra:job.num} or ${now:...}; and what is validated is without Hydra's part.
FROM_TOP = re.compile(r"\$\{(?!hydra\b)\w+(?:\.(?!hydra\b)\w+)*\}")
FROM_NEAR = re.compile(r"\$\{\.+(?!hydra\b)\w+(?:\.(?!hydra\b)\w+)*\}")
VARIABLE = re.compile(r"\$\{oc\.env:")
KEYS_ONLY = re.compile(r"\$\{([a-zA-Z_]\w*(?:\.[a-zA-Z_]\w*)*)\}")


class Unusual(Exception):
    """Only the slow way is sure to do this right."""


@dataclass(frozen=True)
class Point:
    """experiment: None if it may turn out differently when the job runs."""

    config: DictConfig
    experiment: Experiment | None


@dataclass(frozen=True)
class Link:
    """A place with an interpolation. text: of one that means the same wherever it stands. target: where it leads to,
    if that is all that it says."""

    path: Path
    text: str | None = None
    target: Path | None = None


@dataclass(frozen=True)
class Stem:
    """A config with the first of a point's overrides. odd: some interpolation may mean another thing later.

    touched: places below which it may differ from its template.
    """

    lines: Lines
    config: DictConfig
    touched: frozenset[Path]
    odd: bool


@dataclass
class Template:
    """plain: the part of root.config that is not Hydra's, unresolved; links: where it has interpolations.

    dirname: how hydra.job.override_dirname is written. constant: values of interpolations of the environment alone, as
    they become known. last: the point before. stem: of what points in a row have in common.
    """

    root: Stem
    plain: dict[str, Any]
    links: list[Link]
    name: str
    dirname: dict[str, Any]
    constant: dict[str, Any] = field(default_factory=dict)
    last: Lines = ()
    stem: Stem | None = None


class Points:
    """What one loader has composed so far. A copy of it, or what another process gets of it, is empty."""

    def __init__(self) -> None:
        self._templates: OrderedDict[Any, Template | None] = OrderedDict()
        self._groups: tuple[Any, Any, dict[str, bool]] = (None, None, {})
        self._known: OrderedDict[tuple[Lines, Lines], tuple[Any, Experiment]] = OrderedDict()

    def __reduce__(self) -> tuple[type[Points], tuple[()]]:
        return Points, ()

    def known(self, hydra: Any, lines: Sequence[str]) -> Experiment | None:
        """The experiment of the point with these overrides, if it is known. hydra: Hydra's part of a config."""
        found = self._known.get((as_given(hydra.overrides.hydra), tuple(lines)))
        return found[1] if found else None

    def compose(self, loader: ConfigLoaderImpl, master: DictConfig, lines: Sequence[str]) -> Point | None:
        """As loader.load_sweep_config, and validated. None: the slow way has to do it."""
        try:
            return self._compose(loader, master, tuple(lines))
        except Exception:  # Unusual, or what is wrong: the slow way comes upon it too, and there it is explained
            self._known.pop((as_given(master.hydra.overrides.hydra), tuple(lines)), None)
            return None

    def _compose(self, loader: ConfigLoaderImpl, master: DictConfig, lines: Lines) -> Point:
        situation = (os.getcwd(), frozenset(os.environ.items()))
        prefix = as_given(master.hydra.overrides.hydra)
        base = (situation, master.hydra.job.config_name, prefix)
        overrides = [_parsed(line) for line in lines]
        if any(override.is_sweep_override() or _is_hydras(override) for override in overrides):
            raise Unusual
        chooses = [self._chooses(loader, base, override) for override in overrides]
        template = self._template(loader, base, tuple(compress(lines, chooses)))
        steps = [
            (line, None if chosen else value) for line, value, chosen in zip(lines, overrides, chooses, strict=True)
        ]
        grown = _grown(loader, _stem(loader, template, steps), steps)
        config = grown.config
        config.hydra.job.override_dirname = get_overrides_dirname(overrides=overrides, **template.dirname)
        if any("${" in line for line in (*prefix, *lines)):  # these lists resolve what they hold
            Origin.of(config.hydra)
        OmegaConf.copy_cache(from_config=master, to_config=config)
        if grown.odd:
            self._known.pop((prefix, lines), None)
            return Point(config, None)
        return Point(config, self._validated(grown, template, prefix, situation))

    def _validated(self, grown: Stem, template: Template, prefix: Lines, situation: Any) -> Experiment:
        point = prefix, grown.lines
        at, experiment = self._known.get(point, (None, None))
        if experiment is None or at != situation:
            experiment = compose.typed(_resolved(grown.config, template, grown.touched), template.name)
            if checks.is_faulty(experiment):
                raise Unusual
            self._known[point] = situation, experiment
            if len(self._known) > EXPERIMENTS:
                self._known.popitem(last=False)
        return experiment

    def _chooses(self, loader: ConfigLoaderImpl, base: Any, override: Override) -> bool:
        """Whether it chooses a group's file; as Hydra decides it."""
        if self._groups[0] != base:
            _, name, prefix = base
            self._groups = base, loader._parse_overrides_and_create_caching_repo(name, list(prefix))[1], {}
        _, repository, groups = self._groups
        key = override.key_or_group
        if key not in groups:
            groups[key] = repository.group_exists(key)
        return groups[key] and not isinstance(override.value(), dict)

    def _template(self, loader: ConfigLoaderImpl, base: Any, choices: Lines) -> Template:
        key = (base, choices)
        if key not in self._templates:
            self._templates[key] = None  # and so it stays if none can be made
            if len(self._templates) > TEMPLATES:
                self._templates.popitem(last=False)
            self._templates[key] = _made(loader, base, choices)
        self._templates.move_to_end(key)
        if (template := self._templates[key]) is None:
            raise Unusual
        return template


def as_given(overrides: ListConfig) -> Lines:
    """Overrides as they were typed: a list of Hydra's would resolve them."""
    lines: Any = OmegaConf.to_container(overrides, resolve=False)
    return tuple(lines)


@lru_cache(4096)
def _parsed(line: str) -> Override:
    return OverridesParser.create().parse_override(line)


def _is_hydras(override: Override) -> bool:
    return re.split(r"[./\[]", override.key_or_group, maxsplit=1)[0] == "hydra"


# --- a template -------------------------------------------------------------------------------------------------------


def _made(loader: ConfigLoaderImpl, base: Any, choices: Lines) -> Template:
    _, name, prefix = base
    config = ConfigLoaderImpl.load_configuration(loader, name, [*prefix, *choices], RunMode.RUN)
    refuse_code(config)
    refuse_overlaps(config)
    plain: Any = OmegaConf.to_container(config, resolve=False)
    hydra = plain.pop("hydra")
    # What Hydra or guard.py makes of these must not depend on a point's values.
    fixed = [hydra["sweeper"], hydra["launcher"], hydra["job"]["config"], hydra["job"]["env_copy"]]
    if any(_interpolations(fixed)) or hydra["overrides"] != {"hydra": [*prefix], "task": [*choices]}:
        raise Unusual
    if not all(isinstance(key, str) for key in plain):  # these are left out when a config is validated
        raise Unusual
    task = config.hydra.overrides.task
    while len(task):
        task.pop()
    links = [link for key in plain for link in _links(config._get_node(key), (key,))]
    root = Stem((), config, frozenset(), any(map(_is_odd, _interpolations(plain))))
    dirname = hydra["job"]["config"]["override_dirname"]
    return Template(root, plain, links, compose.default_name(config.hydra), dirname)


def _links(node: Any, path: Path) -> Iterator[Link]:
    """Every place with an interpolation; of a list that has some, the list."""
    if node._is_interpolation():
        if type(node) is AnyNode and not FROM_NEAR.search(text := node._value()):
            sole = KEYS_ONLY.fullmatch(text)
            yield Link(path, text, tuple(sole[1].split(".")) if sole else None)
        else:
            yield Link(path)
    elif isinstance(node, DictConfig) and not (node._is_none() or node._is_missing()):
        for key in node:
            if not isinstance(key, str):
                raise Unusual
            yield from _links(node._get_node(key), (*path, key))
    elif isinstance(node, ListConfig) and any(_interpolations(OmegaConf.to_container(node, resolve=False))):
        yield Link(path)


def _interpolations(value: Any) -> Iterator[str]:
    """Every text with an interpolation in a plain value."""
    if isinstance(value, str) and "${" in value:
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _interpolations(item)
    elif isinstance(value, list):
        for item in value:
            yield from _interpolations(item)


def _is_odd(text: str) -> bool:
    return text.count("${") != sum(len(known.findall(text)) for known in (FROM_TOP, FROM_NEAR, VARIABLE))


def clone(node: Any, parent: Node | None = None) -> Any:
    """A deep copy of a config, which is what OmegaConf's own gives, ten times as fast: values themselves are shared.

    So is what is known of a value of a dict, where nothing can change it: its key stays, and flags are a container's.
    """
    new, kept = object.__new__(type(node)), node._metadata
    facts = new.__dict__
    facts.update(node.__dict__)
    if type(node) is AnyNode and type(parent) is DictConfig and not kept.flags and not kept.resolver_cache:
        facts["_parent"], facts["_flags_cache"] = parent, None
        return new
    metadata = object.__new__(type(kept))
    about = metadata.__dict__
    about.update(kept.__dict__)
    about["flags"] = {**about["flags"]} if about["flags"] else {}
    about["resolver_cache"] = deepcopy(about["resolver_cache"]) if about["resolver_cache"] else defaultdict(dict)
    facts["_metadata"], facts["_parent"], facts["_flags_cache"] = metadata, parent, None
    content = facts.get("_content")
    if type(content) is dict:
        facts["_content"] = {key: clone(value, new) for key, value in content.items()}
    elif type(content) is list:
        facts["_content"] = [clone(value, new) for value in content]
    elif content is not None and isinstance(content, Node):
        facts["_content"] = clone(content, new)
    return new


# --- a point ----------------------------------------------------------------------------------------------------------


Steps = list[tuple[str, Override | None]]  # each line, and what it sets unless it chooses a file


def _stem(loader: ConfigLoaderImpl, template: Template, steps: Steps) -> Stem:
    """What to go on from: most overrides of a sweep are the same in all its points, or in many in a row."""
    stem, lines = template.stem or template.root, tuple(line for line, _ in steps)
    same = tuple(
        line for line, _ in takewhile(lambda pair: pair[0] == pair[1], zip(lines, template.last, strict=False))
    )
    if lines[: len(stem.lines)] != stem.lines or len(same) > len(stem.lines) + 2:
        stem = template.stem = _grown(loader, template.root, steps[: len(same)])
    template.last = lines
    return stem


def _grown(loader: ConfigLoaderImpl, stem: Stem, steps: Steps) -> Stem:
    config, touched, odd = clone(stem.config), set(stem.touched), stem.odd
    task = config.hydra.overrides.task
    for line, override in steps[len(stem.lines) :]:
        if override is not None:
            odd = odd or any(map(_is_odd, _interpolations(override.value())))
            touched.add(_touched(config, override, odd))
            loader._apply_overrides_to_config([override], config)
        task.append(line)
    return Stem(tuple(line for line, _ in steps), config, frozenset(touched), odd)


def _touched(config: DictConfig, override: Override, odd: bool) -> Path:
    """The place below which the override, about to be applied, may change something. Raises Unusual."""
    key, removes = override.key_or_group, override.is_delete()
    parts = tuple(split_key(key))
    if override.package is not None or "[" in key or not all(parts):
        raise Unusual
    node: Any = config
    for depth, part in enumerate(parts):
        if node is not None and node._is_interpolation():  # it would change what that leads to
            raise Unusual
        if isinstance(node, AnyNode) and isinstance(node._value(), str):  # see refuse_replaced_names
            raise Unusual
        if isinstance(node, ListConfig) and not removes and depth == len(parts) - 1:
            return parts[:depth]
        if not isinstance(node, DictConfig) or node._is_none() or node._is_missing():  # replaced by a dict
            return parts[: depth - 1]
        node = node._get_node(part, validate_access=False)
    if node is None:
        return parts[:-1]
    # What Hydra looks at in these cases is resolved when it has not yet written its own part.
    if (removes or override.is_add()) and node._is_interpolation():
        raise Unusual
    if isinstance(node, Container) and (override.value() is not None if removes else odd):
        raise Unusual
    return parts[:-1] if removes else parts


def _resolved(config: DictConfig, template: Template, touched: frozenset[Path]) -> dict[str, Any]:
    """What OmegaConf.to_container(resolve=True) gives for the part of the config that is not Hydra's."""
    if () in touched:
        return {key: _value(config, (key,)) for key in config if isinstance(key, str) and key != "hydra"}
    raw = dict(template.plain)
    own: dict[Path, dict[str, Any]] = {(): raw}  # dicts that are no longer the template's

    def put(path: Path, value: Any) -> None:
        for depth in range(1, len(path)):
            if path[:depth] not in own:
                above = own[path[: depth - 1]]
                above[path[depth - 1]] = own[path[:depth]] = dict(above[path[depth - 1]])
        own[path[:-1]][path[-1]] = value

    for path in touched:
        if not any(path[:depth] in touched for depth in range(len(path))):
            put(path, _value(config, path))
    shared = dict(template.constant)
    for link in template.links:
        if any(link.path[:depth] in touched for depth in range(len(link.path) + 1)):
            continue
        value = shared[link.text] if link.text in shared else _followed(config, link)
        put(link.path, value)
        if link.text is not None:
            shared[link.text] = value
            if link.text.count("${") == len(VARIABLE.findall(link.text)):
                template.constant[link.text] = value
    return raw


def _followed(config: DictConfig, link: Link) -> Any:
    """Most links are a key alone, and OmegaConf would parse each of them for every point."""
    value = _value(config, link.target or link.path)
    if value == "???":  # an error where it is led to, not where it stands
        raise Unusual
    return value


def _value(config: DictConfig, path: Path) -> Any:
    """As OmegaConf.to_container finds it."""
    node: Any = config
    for part in path:
        node = node._get_child(part)
    node = node._dereference_node()
    return OmegaConf.to_container(node, resolve=True) if isinstance(node, Container) else node._value()
