"""The stage that computes reference log-probs before DPO: DPO finds what it would have computed itself, bit for bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

import alignment.stages.dpo as dpo_stage
import alignment.stages.reference as reference_stage
from alignment.errors import InputError, PreemptedError
from alignment.stages.context import StageContext
from alignment.training.preference import Referenced
from alignment.training.scoring import Scorer
from tests.training import tiny

ROWS = 40


def context(folder: Path, name: str, settings: Any, shared: str, **engine: Any) -> StageContext:
    inputs = tiny.write_inputs(folder, "dpo", ROWS)
    made = tiny.context(folder / name, inputs, settings, tiny.engine(**engine))
    made.shared = folder / shared
    return made


def weights(folder: Path) -> bytes:
    return (folder / "model" / "model.safetensors").read_bytes()


def losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("changes", "engine"),
    [
        ({}, {}),
        ({"lora": tiny.LORA}, {"tokens_per_micro_batch": "auto", "gradient_checkpointing": "auto"}),
        ({"precision": "bf16"}, {"gradient_checkpointing": True}),
    ],
    ids=["full", "lora", "bf16"],
)
def test_dpo_after_it_is_dpo_without_it_bit_for_bit(
    changes: dict[str, Any], engine: dict[str, Any], tmp_path: Path
) -> None:
    settings = {name: value for name, value in changes.items() if name == "precision"}
    before = context(tmp_path, "before", tiny.reference(max_steps=None, **settings), "one", **engine)
    told = reference_stage.run(before)
    assert {name: told[name] for name in ("rows", "found", "computed", "dtype")} == {
        "rows": ROWS, "found": 0, "computed": ROWS, "dtype": "bf16-autocast" if "precision" in changes else "fp32",
    }  # fmt: skip
    assert told["tokens"] == sum(sum(map(len, row.values())) for row in tiny.pair_rows(ROWS))
    assert json.loads((before.folder / "reference.json").read_text()) == told
    assert len(list((tmp_path / "one" / told["folder"]).glob("*.safetensors"))) == 1

    after = context(tmp_path, "after", tiny.dpo(**changes), "one", **engine)
    alone = context(tmp_path, "alone", tiny.dpo(**changes), "other", **engine)
    assert dpo_stage.run(after)["reference_computed"] == 0
    assert dpo_stage.run(alone)["reference_computed"] == ROWS
    assert losses(after.folder) == losses(alone.folder)
    assert weights(after.folder) == weights(alone.folder)


def test_it_computes_what_such_a_dpo_will_see_and_no_more(tmp_path: Path) -> None:
    assert reference_stage.run(context(tmp_path, "few", tiny.reference(max_steps=2), ""))["computed"] == 12
    assert dpo_stage.run(context(tmp_path, "short", tiny.dpo(max_steps=2), ""))["reference_computed"] == 0
    rest = reference_stage.run(context(tmp_path, "all", tiny.reference(max_steps=None, epochs=3.0), ""))
    assert [rest[name] for name in ("rows", "found", "computed")] == [ROWS, 12, ROWS - 12]


def test_dpo_computes_what_is_not_there(tmp_path: Path) -> None:
    """Of another dtype, which is that of another engine, or cleared by somebody."""
    reference_stage.run(context(tmp_path, "before", tiny.reference(max_steps=2), ""))
    assert dpo_stage.run(context(tmp_path, "dpo", tiny.dpo(precision="bf16"), ""))["reference_computed"] == ROWS


def test_where_all_is_there_no_model_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = reference_stage.run(context(tmp_path, "first", tiny.reference(), ""))
    monkeypatch.setattr(reference_stage, "load", lambda folder: pytest.fail("it is loaded"))
    again = reference_stage.run(context(tmp_path, "again", tiny.reference(), ""))
    assert again == {**first, "found": ROWS, "computed": 0, "tokens": 0, "pass_seconds": 0.0}


def test_nothing_is_trained_or_allocated_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, seen = Scorer._start, {}

    def start(trainer: Any) -> None:
        seen["trained"] = sum(one.numel() for one in trainer.model.parameters() if one.requires_grad)
        seen["state"] = len(trainer.optimizer.state)
        real(trainer)

    monkeypatch.setattr(Scorer, "_start", start)
    made = context(tmp_path, "before", tiny.reference(), "")
    reference_stage.run(made)
    assert seen == {"trained": 32, "state": 0}, "one norm's weight, for engines refuse a model without any"
    assert [path.name for path in made.folder.iterdir() if path.suffix not in (".json", ".txt")] == []


def test_one_that_is_asked_to_stop_keeps_what_it_has_and_goes_on_from_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("alignment.training.reference_pass.BLOCK", 8)
    real, scored = Referenced.score, []
    monkeypatch.setattr(Referenced, "score", lambda trainer, given: scored.extend(given) or real(trainer, given))
    made = context(tmp_path, "before", tiny.reference(), "")
    told, shown = made.progress, []

    def progress(step: int, total: int, **facts: Any) -> None:
        made.stop.asked = "SIGTERM" if step >= 12 else None
        shown.append((step, total, facts.get("note")))
        told(step, total, **facts)

    monkeypatch.setattr(made, "progress", progress)
    with pytest.raises(PreemptedError, match=r"SIGTERM: .*what was computed is kept") as stopped:
        reference_stage.run(made)
    assert stopped.value.kept is True and len(scored) == 16
    assert shown[-1] == (16, ROWS, "reference log-probs"), "from which the time left is reckoned"
    again = reference_stage.run(context(tmp_path, "again", tiny.reference(), ""))
    assert (again["found"], again["computed"]) == (16, 24)
    assert sorted(scored) == list(range(ROWS))


def test_no_rows_are_refused(tmp_path: Path) -> None:
    made = context(tmp_path, "before", tiny.reference(), "")
    empty = Dataset.from_list(tiny.pair_rows(1)).select([])
    empty.save_to_disk(tmp_path / "empty" / "train", num_shards=1)
    made.inputs = {**made.inputs, "data": tmp_path / "empty"}
    with pytest.raises(InputError, match="there are no rows to train on"):
        reference_stage.run(made)
