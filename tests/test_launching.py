"""What is looked at by itself before a launch: a run that would fail is refused before anything starts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from alignment import checking, launching
from alignment.config.compose import compose
from alignment.pipeline.runner import Run
from alignment.pipeline.store import Store
from tests.conftest import Command

SMALL = ("stage.prepare_sft.splits.heldout=4", "stage.prepare_sft.splits.prompts=4")
LOOKS = "before anything starts"


@pytest.fixture
def broken(tmp_path: Path) -> str:
    """A data set whose last row has no known format."""
    rows = [
        {"messages": [{"role": "user", "content": f"q{i}"}, {"role": "assistant", "content": "a"}]} for i in range(30)
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in [*rows, {"question": "q"}]))
    return f"data.instructions.source.path={path}"


POINTS = {  # a change -> whether it is looked at anew
    "stage.sft.learning_rate=3e-4": False,
    "stage.dpo.beta=0.3": False,
    "reward.terms.relevance.weight=2.5": False,
    "stage.dpo.max_steps=7": True,
    "stage.prepare_preference.max_length=150": True,
    "checks.max_dropped=0.4": True,
}


@pytest.mark.parametrize("pipeline", ["sft_dpo", "sft_sample_dpo"])
def test_points_of_a_sweep_that_are_alike_to_a_look_have_one(
    pipeline: str, tmp_path: Path, tiny_settings: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though rows that are prepared for the trained model have another key at each learning rate."""
    monkeypatch.setenv("ALIGNMENT_CHECK", "true")
    monkeypatch.setenv("ALIGNMENT_CACHE", str(tmp_path / "cache"))
    looked: list[list[str]] = []
    monkeypatch.setattr(checking, "findings", lambda run, only: looked.append(only) or iter(()))

    def looks(*change: str) -> int:
        before = len(looked)
        run = Run(compose([f"pipeline={pipeline}", *tiny_settings, f"store={tmp_path / 'store'}", *change]), "")
        launching.look(run, False, {}, lambda text: None)
        return len(looked) - before

    assert looks() == 1 and "pairs" in looked[0]
    assert {change: bool(looks(change)) for change in POINTS} == POINTS
    monkeypatch.setattr(Store, "record", lambda self, key: {} if key == rows else None)
    rows = Run(compose([f"pipeline={pipeline}", *tiny_settings]), "").node("rows").key
    assert looks() == 0, "what is left to be made was looked at with the rest"


@pytest.mark.slow
def test_a_doomed_run_is_refused_before_it_starts_and_force_starts_it(
    tmp_path: Path, tiny_settings: list[str], broken: str, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ALIGNMENT_CHECK", "true")
    settings = ["pipeline=sft", *tiny_settings, *SMALL]
    done = command(tmp_path / "store", "run", *settings, broken, code=3)
    assert LOOKS in done.stderr + done.stdout and "rows.jsonl:31: data rows: no known format" in done.stderr
    assert "--force starts it all the same" in done.stderr
    assert not list((tmp_path / "store").glob("store/*")), "no stage was begun"
    done = command(tmp_path / "store", "run", *settings, broken, "--force", code=3)
    assert "rows.jsonl:31: prepare_sft" in done.stderr or "no known format" in done.stderr
    assert list((tmp_path / "store").glob("store/*")), "it began, and failed where it was told"


@pytest.mark.slow
def test_of_a_sweep_the_doomed_point_is_refused_and_the_same_look_is_not_had_twice(
    tmp_path: Path, tiny_settings: list[str], command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ALIGNMENT_CHECK", "true")
    settings = ["pipeline=sft", *tiny_settings, *SMALL, "stage.sft.max_steps=1"]
    swept = ["stage.prepare_sft.max_length=96,100000"]  # beyond the window of the model
    done = command(tmp_path / "store", "run", "-m", *settings, *swept, code=2)
    assert (done.stdout + done.stderr).count(LOOKS) == 2 and "more than the model's window" in done.stdout + done.stderr
    assert "1 of 2 points failed" in done.stderr
    other = [*settings, "stage.prepare_sft.max_length=96", "stage.sft.learning_rate=1e-3"]
    done = command(tmp_path / "store", "run", *other)
    assert LOOKS not in done.stdout + done.stderr, "another learning rate changes nothing that is looked at"


@pytest.mark.slow
def test_a_stage_that_was_not_looked_at_names_itself_where_its_adapters_have_no_modules(
    tmp_path: Path, short_settings: list[str], command: Command
) -> None:
    done = command(tmp_path / "store", "run", *short_settings, "stage.sft.lora.target_modules=[q_porj]", code=2)
    assert "stage.sft.lora.target_modules: the model has no linear layer `q_porj`" in done.stderr


@pytest.mark.slow
def test_what_the_store_has_is_looked_at_no_more_but_its_rows_are_known(
    tmp_path: Path, short_settings: list[str], command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = ["stage.sft.max_steps=1", "stage.sft.global_batch_size=2"]
    command(tmp_path / "store", "run", *short_settings, *few)
    at, folder = short_settings.index("--config-dir"), short_settings[short_settings.index("--config-dir") + 1]
    settings = [*short_settings[:at], *short_settings[at + 2 :], *few, f"store={tmp_path / 'store'}"]
    run = Run(compose([*settings, "stage.sft.learning_rate=1e-3"], (Path(folder),)), "")
    found = {}
    for only in (["sft"], [node.name for node in run.nodes]):
        found[len(only)] = {one["check"]: one for one in checking.findings(run, only=only)}
    again, first = found[1], found[3]
    assert {"template", "vocabulary", "data rows"} == first.keys() - again.keys() - {"window"}
    known, read = again["memory sft"], first["memory sft"]
    assert known["facts"]["scored"] == read["facts"]["scored"] and known["facts"]["total"] == read["facts"]["total"]
    assert "not there yet" not in known["what"]
