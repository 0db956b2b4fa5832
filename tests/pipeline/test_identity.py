"""Identity and execution: every setting is declared on one side, and perturbing it shows that the key agrees."""

from __future__ import annotations

import copy
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from alignment.config import schema, shape
from alignment.config.compose import compose
from alignment.config.schema import Experiment
from alignment.pipeline import graph
from alignment.pipeline.identity import content_digest

CLASSES = [c for c in vars(schema).values() if isinstance(c, type) and issubclass(c, schema.Settings)]


@pytest.mark.parametrize("settings", CLASSES, ids=lambda c: c.__name__)
def test_every_key_declares_its_side(settings: type[BaseModel]) -> None:
    assert {name: shape.side(f) for name, f in settings.model_fields.items() if shape.side(f) is None} == {}


def keys(experiment: Experiment) -> dict[str, str]:
    return {node.name: node.key for node in graph.build(experiment)}


def leaves(value: Any, sides: tuple[str, ...] = (), path: tuple[Any, ...] = ()) -> Iterator[Any]:
    """(path, annotation, value, sides of every key on the way) of each leaf of a validated experiment."""
    for name, field in type(value).model_fields.items():
        item, here = getattr(value, name), (*sides, str(shape.side(field)))
        if isinstance(item, BaseModel):
            yield from leaves(item, here, (*path, name))
        elif isinstance(item, dict):
            for key, below in item.items():
                if isinstance(below, BaseModel):
                    yield from leaves(below, here, (*path, name, key))
        else:
            yield (*path, name), field, item, here


# names must be names of something
NAMES = {"instruction": ["chatml"], "instructions": ["preferences"]}


def other(field: Any, value: Any) -> list[Any]:
    """Other values of a leaf that the schema might allow, best first."""
    options = [o for a in (field.annotation, *typing.get_args(field.annotation)) for o in typing.get_args(a)]
    found: list[Any] = [o for o in options if isinstance(o, str) and o != value]
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int):
        return [*found, value + 1]
    if isinstance(value, float):
        return [*found, value * 0.5 + 0.01, value * 0.9]
    if isinstance(value, str):
        return [*found, *NAMES.get(value, []), "f" * 64, value + "x"]
    return [
        *found,
        7,
        0.5,
        "preferences",
        {"kind": "hub", "id": "a/b", "revision": "c" * 40, "subset": None, "split": "train"},
    ]


def perturbed(experiment: Experiment, path: tuple[Any, ...], values: list[Any]) -> Experiment | None:
    for value in values:
        raw = copy.deepcopy(experiment.model_dump())
        place = raw
        for part in path[:-1]:
            place = place[part]
        place[path[-1]] = value
        try:
            return Experiment.model_validate(raw)
        except ValueError:
            continue
    return None


BASE = compose(["experiment=quickstart"])
# Left out: the graph itself, which changes keys by wiring, and data sets the quickstart does not read.
SKIPPED = ("pipeline",)
LEAVES = [
    leaf
    for leaf in leaves(BASE)
    if leaf[0][0] not in SKIPPED and leaf[0][-1] != "kind" and leaf[0][:2] != ("data", "preferences")
]


@pytest.mark.parametrize("leaf", LEAVES, ids=lambda leaf: ".".join(map(str, leaf[0])))
def test_a_perturbed_setting_changes_keys_exactly_if_it_is_identity(leaf: Any) -> None:
    path, field, value, sides = leaf
    changed = perturbed(BASE, path, other(field, value))
    assert changed is not None, f"no other value of {path} is allowed"
    if path == ("seed",):  # stages take it by interpolation, which a validated experiment has behind it
        changed = compose(["experiment=quickstart", "seed=1"])
    if all(side == "identity" for side in sides):
        assert keys(changed) != keys(BASE)
    else:
        assert keys(changed) == keys(BASE)


def test_beta_changes_dpo_and_what_follows_only() -> None:
    before, after = keys(BASE), keys(compose(["experiment=quickstart", "stage.dpo.beta=0.3"]))
    assert {name for name in before if before[name] != after[name]} == {"dpo", "evaluate_dpo", "verdict"}


def test_engine_launcher_and_tracking_change_no_key() -> None:
    elsewhere = compose(
        ["experiment=quickstart", "engine=zero3", "launcher=torchrun", "tracking=none", "store=elsewhere"]
    )
    assert keys(elsewhere) == keys(BASE)


def test_stages_with_equal_identity_share_one_key_whatever_they_are_called() -> None:
    nodes = BASE.pipeline.model_dump()
    nodes["nodes"]["twin"] = nodes["nodes"]["evaluate_sft"]
    twin = Experiment.model_validate({**BASE.model_dump(), "pipeline": nodes})
    assert keys(twin)["twin"] == keys(twin)["evaluate_sft"]


def test_a_files_content_and_not_its_path_is_its_identity(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALIGNMENT_CACHE", str(tmp_path / "cache"))
    (tmp_path / "a.jsonl").write_text('{"x": 1}\n')
    (tmp_path / "b.jsonl").write_text('{"x": 1}\n')
    (tmp_path / "c.jsonl").write_text('{"x": 2}\n')
    a, b, c = (content_digest(tmp_path / f"{name}.jsonl") for name in "abc")
    assert a == b != c
    (tmp_path / "a.jsonl").write_text('{"x": 22}\n')
    assert content_digest(tmp_path / "a.jsonl") != a


@pytest.mark.parametrize("left", ["", '{"sha256": "ab', "{}", "[]", "null"])
def test_a_damaged_note_of_a_digest_is_no_note(left: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALIGNMENT_CACHE", str(tmp_path / "cache"))
    (tmp_path / "a.jsonl").write_text('{"x": 1}\n')
    whole = content_digest(tmp_path / "a.jsonl")
    (note,) = (tmp_path / "cache" / "digests").iterdir()
    good = note.read_bytes()
    note.write_text(left)
    assert content_digest(tmp_path / "a.jsonl") == whole
    assert note.read_bytes() == good


def test_optional_packages_count_only_where_they_do_something(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    plain = graph.build(compose(["experiment=quickstart", "model=path", f"model.source.path={tmp_path}"]))
    packages = {node.name: set(node.identity["packages"]) for node in plain}
    assert "gguf" not in packages["start"]
    assert "gguf" in {node.name: node for node in graph.build(BASE)}["start"].identity["packages"]
    assert "vaderSentiment" in packages["judged"]


def test_tokenizers_is_in_the_key_of_every_stage_that_makes_token_ids_or_text() -> None:
    packages = {node.name: set(node.identity["packages"]) for node in graph.build(BASE)}
    assert {name for name in packages if "tokenizers" in packages[name]} == {
        "start", "rows", "samples", "judged", "pairs", "evaluate_start", "evaluate_sft", "evaluate_dpo",
    }  # fmt: skip
