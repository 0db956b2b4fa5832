"""Several data sets, named by one stage, through a run: prepared together, trained on, and told apart to the end."""

from __future__ import annotations

from pathlib import Path

import datasets
import pytest

from alignment.files import read_json, read_jsonl
from tests.conftest import Command

LISTS = "lists={pairs: best_worst, min_margin: 0.0, max_pairs: 1}"
ALL = ("stage.prepare_sft.dataset=[instructions,theirs]", "stage.prepare_sft.splits.train=null")


@pytest.mark.slow
def test_a_mixture_is_trained_on_and_says_whose_each_row_is(
    tmp_path: Path, short_settings: list[str], instruction_rows: Path, forked: Command
) -> None:
    """40 rows each, of which some are held out; theirs are trained on twice."""
    theirs = tmp_path / "theirs.jsonl"
    theirs.write_text(instruction_rows.read_text().replace("What is", "What was"))
    source = f"+data.theirs.source={{kind: path, path: '{tmp_path}/their*.jsonl'}}"
    keys = ("format=auto", "columns={}", LISTS, "limit=null", "cap=null", "epochs=2.0", "weight=null")
    mixture = [source, *(f"+data.theirs.{key}" for key in keys)]
    forked(tmp_path / "store", "run", *short_settings, *mixture, *ALL)
    (folder,) = (path.parent for path in (tmp_path / "store" / "store").glob("*/data_report.json"))
    rows = list(read_jsonl(folder / "train.jsonl"))
    told = {name: [row for row in rows if row["source"] == name] for name in ("instructions", "theirs")}
    assert all(("What was" in str(row)) == (name == "theirs") for name, mine in told.items() for row in mine)
    assert len({row["id"] for row in told["theirs"]}) * 2 == len(told["theirs"]) > len(told["instructions"])
    numbers = datasets.load_from_disk(str(folder / "train"))["source"][:]
    assert numbers == [int(row["source"] == "theirs") for row in rows]
    assert list((tmp_path / "store" / "store").glob("*/model/model.safetensors")), "and a model was trained"
    for evaluation in (tmp_path / "store" / "store").glob("*/evaluation.json"):
        told, answers = read_json(evaluation)["sources"], list(read_jsonl(evaluation.parent / "answers.jsonl"))
        for name, one in told.items():
            rewards = [row["reward"] for row in answers if row["source"] == name]
            assert one["metrics"]["reward"] == pytest.approx(sum(rewards) / len(rewards))
        assert list(told) == ["instructions", "theirs"]
