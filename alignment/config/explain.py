"""Refusals of pydantic, Hydra and YAML as ours: one line with the key, where it was set, and the nearest right one."""

from __future__ import annotations

import difflib
import os
import re
import shlex
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, get_origin

import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, IntervalSweep, Override, QuotedString, RangeSweep, Sweep
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException
from pydantic import ValidationError

from alignment.config import listed, shape
from alignment.config.launchers import Resources
from alignment.config.losses import PAIR_LOSSES
from alignment.config.nearest import by_words, closest
from alignment.config.paths import CONF, GROUPS
from alignment.config.patterns import IN_WORDS
from alignment.config.preference_checks import beside_a_name
from alignment.config.provenance import COMMAND_LINE, Origin, quoted
from alignment.config.schema import Experiment
from alignment.config.stages.preference import meant_by, weighted
from alignment.errors import ConfigError

MISSING = "???"  # a value that conf/ leaves to the command
ADD = "add {}=... to the command"
REFUSALS = (HydraException, OmegaConfBaseException, yaml.YAMLError)  # what composing raises
Explained = ConfigError | None


# --- the schema's -----------------------------------------------------------------------------------------------------


def first_fault(error: ValidationError, origin: Origin) -> ConfigError:
    """The first wrong key; unknown keys come first, as other faults often follow from them."""
    faults = sorted(error.errors(), key=lambda fault: fault["type"] != "extra_forbidden")
    fault, context = faults[0], faults[0].get("ctx", {})
    key, owner = shape.locate(Experiment, fault["loc"])
    more = f"; {len(faults) - 1} more after this one" if len(faults) > 1 else ""
    where = origin.where(key)
    if fault["type"] == "extra_forbidden":
        return ConfigError(f"unknown key `{key}`{more}", where=where, fix=_nearest(key, shape.keys(owner)))
    if fault["type"] == "missing" and key in GROUPS:
        advice = f"leave it to conf/config.yaml, or choose one of: {', '.join(_choices(key, origin))}"
        return ConfigError(f"nothing is chosen for `{key}`{more}", where=origin.chosen(key, ""), fix=advice)
    if fault["type"] == "missing":
        above, _, last = key.rpartition(".")
        if last == "stage" and ".nodes." in key:
            what = f"`{above}` is set, but the pipeline has no such node{more}"
            return ConfigError(what, where=where, fix="choose another pipeline, or leave it out; a new one has a stage")
        if len(names := _missing_beside(above, faults)) > 1:
            what, left = f"`{above}` lacks {', '.join(names)}", len(faults) - len(names)
            advice = "none has a value of its own: set all of them, as the file in conf/ that is most like it does"
            return ConfigError(f"{what}; {left} more after these" if left else what, where=where, fix=advice)
        advice = f"it has no value of its own: {key}=..., or {last}: beside the others of {above}"
        return ConfigError(f"`{key}` is missing{more}", where=where, fix=advice)
    if fault.get("input") == MISSING:
        return ConfigError(f"`{key}` has no value{more}", where=where, fix=ADD.format(key))
    if fault["type"] == "union_tag_not_found" and key.startswith("stage."):
        by = next((one for one in origin.overrides if where == f"conf/{one.replace('=', '/', 1)}.yaml:1"), None)
        where = COMMAND_LINE if by else where
        what = f"`{key}` is set{f' by {by}' if by else ''}, but the pipeline has no such stage{more}"
        return ConfigError(what, where=where, fix="choose another pipeline, or leave it out")
    if fault["type"] == "union_tag_not_found":
        what = f"`{key}` is set, but nothing that is chosen brings its `kind`{more}"
        without = f": '~{key}'" if where != COMMAND_LINE else ""
        return ConfigError(what, where=where, fix=f"choose what does, or leave it out{without}")
    if fault["type"] == "union_tag_invalid":
        kinds, kind = context["expected_tags"], context["tag"]
        what = f"`{key}.kind` should be one of {kinds}, got {kind!r}{more}"
        return ConfigError(what, where=origin.where(f"{key}.kind"), fix=_allowed(fault))
    if fault["type"] == "string_pattern_mismatch" and context["pattern"] in IN_WORDS:
        what = f"`{key}` is not written as it should be, got {fault['input']!r}{more}"
        return ConfigError(what, where=where, fix=IN_WORDS[context["pattern"]])
    of_its_own = fault["type"] in ("model_type", "model_attributes_type")
    message = "should be settings, {name: value, ...}" if of_its_own else re.sub(r"^(Input|Value) ", "", fault["msg"])
    unsaid = isinstance(fault.get("input"), dict | list) or fault["type"] == "secret"
    given = "" if unsaid else f", got {fault.get('input')!r}"
    fix = str(context["fix"]) if "fix" in context else _allowed(fault)
    return ConfigError(f"`{key}` {message[0].lower()}{message[1:]}{given}{more}", where=where, fix=fix)


def _missing_beside(above: str, faults: Iterable[Any]) -> list[str]:
    """Keys that are missing right below this one."""
    keys = [shape.locate(Experiment, fault["loc"])[0] for fault in faults if fault["type"] == "missing"]
    return [last for place, _, last in (key.rpartition(".") for key in keys) if place == above]


def _allowed(fault: Any) -> str | None:
    expected = str(fault.get("ctx", {}).get("expected") or fault.get("ctx", {}).get("expected_tags") or "")
    given = fault.get("ctx", {}).get("tag", fault.get("input"))
    near = difflib.get_close_matches(str(given), re.findall(r"'([^']+)'", expected), 1, 0.5)
    return f"did you mean {near[0]!r}?" if near else None


def _nearest(key: str, known: Iterable[str]) -> str:
    above, _, last = key.rpartition(".")
    if not above:  # groups are chosen in the same way
        known = sorted({*known, *GROUPS})
    return closest(last, known, f"{above}." if above else "", "known keys here: ")


# --- Hydra's ----------------------------------------------------------------------------------------------------------


def refusal(error: Exception, origin: Origin) -> ConfigError:
    """What composing raised (REFUSALS), explained."""
    if isinstance(error, yaml.YAMLError):
        return _bad_yaml(error, origin)
    cause = error.__cause__ if "Error merging override" in str(error) else None
    text = re.sub(r"\s+full_key:.*", "", str(cause or error), flags=re.S).strip()
    rules: tuple[Callable[[str, Exception, Origin], Explained], ...]
    rules = (
        _unreadable,
        _several_values,
        _unknown_group,
        _unknown_choice,
        _unknown_key,
        _there_already,
        _only_searched,
        _dangling,
    )
    for rule in rules:
        if found := rule(text, error, origin):
            return found
    first = " ".join(line.strip() for line in text.splitlines()[:2])
    if given := re.match(r"Error merging override '?\+*([\w./@-]+)=", str(error)):
        return ConfigError(f"`{given[1]}`: {first}", where=COMMAND_LINE)
    file = origin.file_of(within[1]) if (within := re.match(r"In '([^']+)'", text)) else None
    fix = "alignment run --help shows how settings are given"
    return ConfigError(first, where=origin.show(file) if file else None, fix=fix)


def _bad_yaml(error: yaml.YAMLError, origin: Origin) -> ConfigError:
    mark = getattr(error, "problem_mark", None)
    where = f"{mark.name}:{mark.line + 1}" if mark else None
    return ConfigError(f"this is not YAML: {getattr(error, 'problem', None) or error}", where=where)


def _unreadable(text: str, error: Exception, origin: Origin) -> Explained:
    """Hydra's grammar has meanings of its own for ( ) ' # = and the like, and knows no letters but ASCII's."""
    override = next((override for override in origin.overrides if not _parse(override)), None)
    if override is None:
        return None
    key, sign, value = override.partition("=")
    if not sign:
        return ConfigError(f"`{override}` is no setting", where=COMMAND_LINE, fix="settings are written key=value")
    listed = re.fullmatch(r"\[([^][\"'\\{}]*)\]", value)
    if listed and _parse(apart := f"{key}=[{','.join(_quoted_item(item) for item in listed[1].split(','))}]"):
        what = f"`{key}` has a value in its list that cannot be read as it stands"
        return ConfigError(what, where=COMMAND_LINE, fix=f"write {shlex.quote(apart)}")
    value = os.path.expanduser(value)  # a path, if it begins with ~, which neither the shell nor Hydra expands here
    if not _is_read_as(f"{key}={quoted(value)}", value):  # then it is not the value
        return ConfigError(f"`{override}` cannot be read", where=COMMAND_LINE, fix="settings are written key=value")
    what = f"`{key}` has a value that cannot be read as it stands"
    return ConfigError(what, where=COMMAND_LINE, fix=f"write {as_typed(key, value)}")


def _several_values(text: str, error: Exception, origin: Origin) -> Explained:
    if not (found := re.match(r"Ambiguous value for argument '([^=]*)=(.*)'", text)):
        return None
    key, value = found.groups()
    one, several, names = f"one value with commas: {as_typed(key, value)}", f"a list: {key}=[{value}]", value.split(",")
    types = shape.types(Experiment, key)
    if key in GROUPS:
        differ = listed.overlap([(file, "") for name in names if (file := origin.file_of(f"{key}/{name}"))])
        ways = [] if differ else [several]
        if differ and key == "loss":
            ways = [listed.instead(key, names, differ[2])]
    elif dict[str, float] in types and {*names} & PAIR_LOSSES.keys():
        ways = [f"several losses have weights: {weighted(key, names)}"]
    else:
        listable = any(get_origin(member) is list for member in types)
        ways = [several] if listable else [one] if str in types else [] if types else [one, several]
    fix = "; ".join([*ways, "a sweep: add -m"])
    return ConfigError(f"`{key}` is given several values", where=COMMAND_LINE, fix=fix)


def _unknown_group(text: str, error: Exception, origin: Origin) -> Explained:
    found = re.search(r"Could not override '([^']+)'\.?\s*No match in the defaults list", text)
    if not found:
        return None
    return ConfigError(f"unknown group `{found[1]}`", where=origin.chosen(found[1], ""), fix=_nearest(found[1], GROUPS))


def _unknown_choice(text: str, error: Exception, origin: Origin) -> Explained:
    if not (found := re.search(r"Could not (?:find|load) '([^']+)'", text)):  # the second: of a list
        return None
    group, _, choice = found[1].rpartition("/")
    found = re.search(r"Available options in '[^']+':\s*(.*?)(?:Config search path|$)", text, re.S)
    if not (options := found[1].split() if found else _choices(group, origin)):
        return ConfigError(f"unknown group `{group}`", where=origin.chosen(group, choice), fix=_nearest(group, GROUPS))
    fix = _other_choice(group, choice, options)
    if (group, choice) == ("hydra/sweeper", "optuna"):
        fix = "pip install 'alignment[optuna]'"
    return ConfigError(f"no {group} is called {choice!r}", where=origin.chosen(group, choice), fix=fix)


def _choices(group: str, origin: Origin) -> list[str]:
    return sorted({file.stem for folder in (CONF, *origin.folders) for file in (folder / group).glob("*.yaml")})


def no_choice(overrides: Iterable[str], origin: Origin) -> Explained:
    """Of what Hydra takes for no choice: null and numbers, also in a list or in a sweep."""
    for one in filter(None, map(_parse, overrides)):
        value: Any = one.value()
        values = value.list if isinstance(value, ChoiceSweep) else [value]
        items = [item for value in values for item in (value if isinstance(value, list) else [value])]
        odd = [item for item in items if not isinstance(item, str | QuotedString | dict | Sweep)]
        if one.key_or_group in GROUPS and odd and not one.is_delete():
            names = ", ".join(_choices(one.key_or_group, origin))
            fix = f"to choose nothing leave it out; else one of: {names}"
            return ConfigError(f"`{one.input_line}` chooses no file", where=COMMAND_LINE, fix=fix)
    return next((found for folder in origin.folders for found in _odd_defaults(folder)), None)


def _odd_defaults(folder: Path) -> Iterator[ConfigError]:
    """Of files whose `defaults` have a list of something else than names; Hydra tells neither file nor line."""
    for file in sorted(folder.rglob("*.yaml")):
        try:
            text = file.read_text(encoding="utf-8")
            content = yaml.safe_load(text)
        except (OSError, UnicodeDecodeError, yaml.YAMLError):
            continue  # another's, or it is told itself
        defaults = content.get("defaults") if isinstance(content, dict) else None
        entries = [one for one in defaults if isinstance(one, dict)] if isinstance(defaults, list) else []
        for group, names in (pair for entry in entries for pair in entry.items()):
            odd = [item for item in names if not isinstance(item, str)] if isinstance(names, list) else []
            if odd:
                line = next((n for n, one in enumerate(text.splitlines(), start=1) if str(group) in one), 1)
                what = f"`{group}` lists {odd[0]!r}, which is no file's name"
                yield ConfigError(what, where=f"{file}:{line}", fix="names alone: [length, format]")


def _there_already(text: str, error: Exception, origin: Origin) -> Explained:
    if not (found := re.search(r"An item is already at '([^']+)'.*: '\+*([^']+)'", text, re.S)):
        return None
    return ConfigError(f"`{found[1]}` is there already", where=COMMAND_LINE, fix=f"write {found[2]}")


METHODS = ("loss", "pipeline", "experiment")  # where a method has its name: one may look for it in another of these


def _other_choice(group: str, choice: str, options: list[str]) -> str:
    """The fix for a choice that the group lacks: a method of that very name in another group; choices that have the
    name as a part, in the group or another; the nearest; else all."""
    if group == "loss" and (fix := meant_by(choice)):
        return fix
    others = [other for other in METHODS if group in METHODS and other != group]
    known = {group: options, **{other: sorted(file.stem for file in (CONF / other).glob("*.yaml")) for other in others}}
    found = [f"{other}={choice}" for other in others if choice in known[other]][:1]
    parts = ([f"{one}={name}" for name in by_words(choice, names)] for one, names in known.items())
    found = found or next((few for few in parts if few), [])
    found = found or [f"{group}={near}" for near in difflib.get_close_matches(choice, options, 1, 0.5)]
    return f"did you mean {' or '.join(found)}?" if found else f"choose one of: {', '.join(options)}"


def _unknown_key(text: str, error: Exception, origin: Origin) -> Explained:
    found = re.search(r"Could not override '([^']+)'", str(error)) or re.search(r"Key '([^']+)' is not in", text)
    if not found:
        return None
    keys = [override.split("=")[0].lstrip("+~") for override in origin.overrides]
    key = next((key for key in keys if key.endswith(found[1])), found[1])
    within = str(getattr(error.__cause__, "full_key", None) or key)  # of a value that is a mapping: which of its keys
    lacks = within
    if within.startswith(f"{key}.") and shape.known_near(Experiment, within)[1]:
        key = within
    key, known = shape.known_near(Experiment, key)
    above, there = key.rpartition(".")[0], getattr(error.__cause__, "parent_node", None)
    if key.startswith("hydra.sweeper."):
        return ConfigError(f"the sweeper has no `{key}`", where=COMMAND_LINE, fix="hydra/sweeper=optuna has more keys")
    if key.split(".")[-1] in known and within == key and there == {}:
        what = f"`{key}` is set, and `{above}` is null"
        return ConfigError(what, where=COMMAND_LINE, fix=f"write +{key}=...")
    if within == key and there == {} and str in shape.types(Experiment, above) and shape.is_open(Experiment, above):
        return beside_a_name(key)
    if fresh := _new_in_an_open_mapping(key, known, origin):
        return fresh
    if key.split(".")[-1] not in known:
        return ConfigError(f"unknown key `{key}`", where=COMMAND_LINE, fix=_nearest(key, known))
    if choices := _who_has(key, lacks):
        return ConfigError(f"`{key}` is not among the settings chosen", where=COMMAND_LINE, fix=choices)
    return ConfigError(f"unknown key `{lacks}`", where=COMMAND_LINE, fix=_nearest(lacks, map(str, there or ())))


def _new_in_an_open_mapping(key: str, known: list[str], origin: Origin) -> Explained:
    """Such as launcher.stages, whose keys are anybody's: Hydra wants a + before new ones."""
    override = next((o for o in origin.overrides if o.split("=")[0].lstrip("+~") == key), "")
    value = override.partition("=")[2]
    if (of_stage := re.fullmatch(r"launcher\.stages\.\w+\.(\w+)", key)) and of_stage[1] not in Resources.model_fields:
        return ConfigError(f"unknown key `{key}`", where=COMMAND_LINE, fix=_nearest(key, Resources.model_fields))
    if not known and shape.is_open(Experiment, key.rpartition(".")[0]):
        return ConfigError(f"`{key}` is new there", where=COMMAND_LINE, fix=f"write +{override}")
    if value.startswith("{") and shape.is_open(Experiment, key):
        return ConfigError(f"`{key}` takes new keys one by one", where=COMMAND_LINE, fix=f"write +{key}.NAME=...")
    return None


def _only_searched(text: str, error: Exception, origin: Origin) -> Explained:
    """An interval, which has no values to go through."""
    if not re.search(r"does not support sweep type", text):
        return None
    key = next((one.key_or_group for one in map(_parse, origin.overrides) if one and one.is_interval_sweep()), None)
    what = f"`{key}` is given an interval" if key else "`hydra.sweeper.params` has an interval"
    fix = "hydra/sweeper=optuna searches in it; a plain sweep takes values: 0.1,0.2 or range(1,9)"
    return ConfigError(f"{what}, which has no values to go through", where=COMMAND_LINE, fix=fix)


def no_range(overrides: Iterable[str]) -> Explained:
    """Which of the settings that vary has ends or steps that cannot be; Python and Optuna tell no key."""
    for one in filter(None, map(_parse, overrides)):
        value: Any = one.value()
        if isinstance(value, RangeSweep) and value.step == 0:
            return ConfigError(
                f"`{one.key_or_group}` has a range in steps of 0", where=COMMAND_LINE, fix="another step"
            )
        if isinstance(value, RangeSweep | IntervalSweep):
            low, high = value.start, value.stop if isinstance(value, RangeSweep) else value.end
            falls = isinstance(value, RangeSweep) and value.step < 0
            if low is not None and high is not None and (low < high if falls else low > high):
                what = f"`{one.key_or_group}` goes from {low} to {high}"
                return ConfigError(
                    what, where=COMMAND_LINE, fix="the lower end comes first, but for a range in negative steps"
                )
    return None


def no_points(overrides: Iterable[str], loader: Any) -> ConfigError:
    """Of a sweep in which some setting has not one value."""
    parser = OverridesParser.create(config_loader=loader)
    given = [one for one in parser.parse_overrides(list(overrides)) if one.is_discrete_sweep()]
    empty = [one for one in given if not list(one.sweep_iterator())]
    where = f"`{empty[0].input_line}` has no value" if empty else "some setting has no value"
    return ConfigError(f"the sweep has no points: {where}", where=COMMAND_LINE, fix="alignment plan -m shows points")


def _who_has(key: str, lacks: str) -> str:
    """Which choice brings a key that is right, but not in this composition; empty if none does.

    lacks: the first part of the key that the composition has not.
    """
    group, _, rest = key.partition(".")
    if group == "stage":  # a pipeline chooses its stages
        stage = rest.split(".")[0]
        wanted = f"/stage@stage.{stage}:" if lacks == f"stage.{stage}" else "\0"
        group, files = "pipeline", sorted((CONF / "pipeline").glob("*.yaml"))
        files = [file for file in files if wanted in file.read_text(encoding="utf-8")]
    else:
        files = [file for file in sorted((CONF / group).glob("*.yaml")) if _sets(file, rest)]
    choices = ", ".join(f"{group}={file.stem}" for file in files)
    return f"it comes with {choices}" if choices else ""


def _sets(file: Path, key: str) -> bool:
    """Whether the file sets the key, or a part below it."""
    settings = yaml.safe_load(file.read_text(encoding="utf-8"))
    return any(f"{leaf}.".startswith(f".{key}.") for leaf, _ in shape.leaves(settings, ""))


def _dangling(text: str, error: Exception, origin: Origin) -> Explained:
    """An interpolation that leads nowhere, or to what has no value."""
    if missing := re.search(r"Missing mandatory value: ([\w.]+)", text):
        key = missing[1]
        return ConfigError(f"`{key}` has no value", where=origin.where(key), fix=ADD.format(key))
    if flat := re.search(r"node `([\w.]+)` is not a container and thus cannot contain `(\w+)`", text):
        key, known = shape.known_near(Experiment, f"{flat[1]}.{flat[2]}")
        fix = f"set what is in it: {', '.join(f'{flat[1]}.{name}' for name in known)}"
        return ConfigError(f"`{flat[1]}` is several settings, not one value", where=origin.where(flat[1]), fix=fix)
    key = getattr(error, "full_key", None)
    return ConfigError(f"`{key}`: {text}", where=origin.where(key)) if key else None


def as_typed(key: str, value: str) -> str:
    """key=value as one types it into a shell so that Hydra reads this very value."""
    text = value if _is_read_as(f"{key}={value}", value) else quoted(value)
    if re.fullmatch(r"[\w@%+=:./-]*", text, re.ASCII):
        return f"{key}={text}"
    return shlex.quote(f"{key}={text}") if set(text) & set('"$`\\!') else f'{key}="{text}"'


def _quoted_item(item: str) -> str:
    return f'"{item.strip()}"'


def _is_read_as(override: str, value: str) -> bool:
    parsed = _parse(override)
    return parsed is not None and str(parsed.value()) == value


def _parse(override: str) -> Override | None:
    try:
        return OverridesParser.create().parse_override(override)
    except HydraException:
        return None
