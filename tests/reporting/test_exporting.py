"""`alignment export`: a run's model, or its adapter, copied out of the store."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from alignment import cli
from alignment.files import write_json
from alignment.pipeline.store import Store
from alignment.reporting import targets

KEYS = {name: letter * 64 for name, letter in (("start", "a"), ("sft", "b"), ("dpo", "c"), ("evaluate", "d"))}
KINDS = {"start": "import_model", "sft": "sft", "dpo": "dpo", "evaluate": "evaluate"}


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """A run of four stages; the last one that trains is not finished, and only sft has an adapter."""
    store = Store(tmp_path / "store")
    for name in ("start", "sft"):
        work = store.begin(KEYS[name])
        for file in ("config.json", "model.safetensors", "extra/default.jinja"):
            (work / "model" / file).parent.mkdir(parents=True, exist_ok=True)
            (work / "model" / file).write_text(f"{file} of {name}")
        if name == "sft":
            (work / "adapter").mkdir()
            (work / "adapter" / "adapter_config.json").write_text("of sft")
        (work / "log.txt").write_text("not for export")
        store.commit(KEYS[name], {"key": KEYS[name]})
    parents = {"start": {}, "sft": {"model": "start"}, "dpo": {"model": "sft"}, "evaluate": {"model": "dpo"}}
    nodes = [
        {"name": name, "kind": KINDS[name], "key": key, "state": "done", "inputs": parents[name]}
        for name, key in KEYS.items()
    ]
    write_json(store.run_folder("mine-0123") / "run.json", {"run": "mine-0123", "final": "sft", "nodes": nodes})
    return store.root


def export(store: Path, *arguments: str) -> int:
    return cli.main(["export", *arguments, "--store", str(store)])


def contents(folder: Path) -> dict[str, str]:
    return {str(file.relative_to(folder)): file.read_text() for file in folder.rglob("*") if file.is_file()}


def test_of_several_runs_that_begin_so_none_is_copied(
    store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The newest would be a model of any point of a sweep."""
    shutil.copytree(store / "runs" / "mine-0123", store / "runs" / "mine-01234")
    assert export(store, "mine", str(tmp_path / "new")) == 2 and not (tmp_path / "new").exists()
    assert "'mine' is how 2 runs begin: " in capsys.readouterr().err
    assert export(store, "mine-0123", str(tmp_path / "new")) == 0, "the whole name means one"
    said: list[str] = []
    newest = targets.run_folder("mine", store, said.append).name
    (other,) = {"mine-0123", "mine-01234"} - {newest}
    assert said == [f"{newest}: of 2 runs that begin so, the newest; others: {other}"]


@pytest.mark.parametrize(("more", "name"), [((), "sft"), (("--stage", "start"), "start")])
def test_a_model_is_copied_with_all_its_files_and_no_others(
    more: tuple[str, ...], name: str, store: Path, tmp_path: Path
) -> None:
    target = tmp_path / "new" / "model"
    assert export(store, "mine", str(target), *more) == 0
    assert contents(target) == contents(store / "store" / KEYS[name][:16] / "model")
    assert [path.name for path in target.parent.iterdir()] == ["model"], "nothing is left beside it"


def test_an_adapter_is_copied_and_its_model_is_named(
    store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    assert export(store, "mine", str(tmp_path / "empty"), "--adapter") == 0
    assert contents(tmp_path / "empty") == {"adapter_config.json": "of sft"}
    assert f"an adapter on the model in {store / 'store' / KEYS['start'][:16] / 'model'}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "code", "line"),
    [
        (("nobody", "new"), 2, "no run is called 'nobody'"),
        (("mine", "new", "--stage", "evaluate"), 2, "no stage 'evaluate' that makes a model (known: start, sft, dpo)"),
        (("mine", "new", "--stage", "dpo"), 3, "`dpo` of mine-0123 has no finished model yet"),
        (("mine", "new", "--stage", "start", "--adapter"), 2, "leave it out; stages with one: sft"),
        (("mine", "taken"), 2, "taken: is there already, and not empty (name a new folder)"),
        (("mine", "taken/file"), 2, "file: is there already, and not empty (name a new folder)"),
    ],
)
def test_what_cannot_be_exported_is_one_line_and_leaves_nothing(
    arguments: tuple[str, ...], code: int, line: str, store: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").write_text("of somebody")
    assert export(store, *arguments) == code
    (said,) = capsys.readouterr().err.splitlines()
    assert line in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["store", "taken"]


def test_a_flipped_byte_is_noticed_and_nothing_is_exported(
    store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = store / "store" / KEYS["sft"][:16] / "model" / "model.safetensors"
    weights.write_text(weights.read_text().replace("model", "nodel"))
    assert export(store, "mine", str(tmp_path / "new")) == 3
    assert "its SHA-256 differs from the record's" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["store"]
