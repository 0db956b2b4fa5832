"""What a row of the data says beside its messages goes through prepare, sample, judge and evaluate to the reward."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from alignment.config.rewards import Reward
from alignment.config.stages.preparing import Prepare, Splits
from alignment.data import preparation
from alignment.data.chat import Chat
from alignment.data.named import reading_of
from alignment.data.preparation import Source
from alignment.data.sources import Row
from alignment.data.splitting import Share, divide
from alignment.data.writing import write
from alignment.errors import InputError
from alignment.files import read_jsonl, write_jsonl
from alignment.stages import evaluate, judge, sample
from alignment.stages.context import StageContext
from tests.conftest import default_checks
from tests.stages.conftest import MakeContext, make_context, models  # noqa: F401

CHECKS = [{"kind": "words", "relation": "at_most", "count": 100}]
ROWS: list[dict[str, Any]] = [
    {"prompt": "One and one?", "completion": "It is 2.", "expected": 2, "checks": CHECKS},
    {"prompt": "A colour?", "completion": "Blue."},
    {"prompt": "Two and two?", "completion": "It is 4.", "checks": None},
]
TERMS: dict[str, Any] = {
    "right": {"kind": "answer", "weight": 1.0, "find": "auto", "compare": "number", "tolerance": 0.0},
    "obeys": {"kind": "instructions", "weight": 1.0, "strict": False, "checks": []},
}


def prepared(folder: Path, model: Path, rows: list[dict[str, Any]], **splits: Any) -> None:
    settings = Prepare(
        kind="prepare", task="sft", dataset="mine", against=[], max_length=64, max_prompt_length=48, over_long="error",
        splits=Splits(**{"heldout": 0, "prompts": 0, "train": None, **splits}), seed=0, workers=None,
    )  # fmt: skip
    given = [Row(value, "rows.jsonl", number, number) for number, value in enumerate(rows, start=1)]
    chat = Chat.load(model)
    reading = reading_of(settings, "auto", {}, default_checks(), chat)
    judged = preparation.judge([Source("mine", given, reading, "rows.jsonl")], folder, lambda *a, **k: None, None)
    write(judged, divide(judged, settings.splits, settings.seed, [Share()]), folder, chat)


def rewarded(context: StageContext, limit: float, *terms: str) -> StageContext:
    reward = Reward.model_validate({"terms": {name: TERMS[name] for name in terms}, "max_failed_share": limit})
    context.experiment = context.experiment.model_copy(update={"reward": reward})
    return context


def test_prompts_and_heldout_rows_keep_what_rewards_look_at(tiny_model: Path, tmp_path: Path) -> None:
    prepared(tmp_path, tiny_model, [*ROWS, {"prompt": "Left?", "completion": "Yes."}], prompts=3, train=1)
    first = {"reference": "It is 2.", "expected": 2, "checks": CHECKS}
    others = {
        "A colour?": {"reference": "Blue."},
        "Two and two?": {"reference": "It is 4."},
        "Left?": {"reference": "Yes."},
    }
    expected = {"One and one?": first, **others}
    rows = list(read_jsonl(tmp_path / "prompts.jsonl"))
    assert len(rows) == 3
    for row in rows:
        del row["id"]
        assert row == {"prompt": row["prompt"], **expected[row["prompt"][0]["content"]]}


def test_checks_that_cannot_be_are_told_with_file_and_line(tiny_model: Path, tmp_path: Path) -> None:
    for check, what in (
        ({"kind": "wrods"}, r"unknown kind 'wrods' \(did you mean `words`\?\)"),
        ({"knid": "words"}, "has no `kind`"),
    ):
        odd = {"prompt": "Short?", "completion": "Yes.", "checks": [check]}
        with pytest.raises(InputError, match=rf"rows\.jsonl:4: checks\[0\]: {what}"):
            prepared(tmp_path, tiny_model, [*ROWS, odd], heldout=3, train=1)
    never = {"prompt": "Short?", "completion": "Yes.", "expected": math.nan}
    with pytest.raises(InputError, match=r"rows\.jsonl:4: 'expected' is nan, to which nothing can come"):
        prepared(tmp_path, tiny_model, [*ROWS, never], heldout=3, train=1)


def test_samples_are_judged_by_what_their_row_says(
    make_context: MakeContext, models: dict[str, Path], tiny_model: Path, tmp_path: Path  # noqa: F811
) -> None:  # fmt: skip
    """The row of the colour expects no number and has no checks; the third has no checks."""
    prepared(tmp_path, tiny_model, [*ROWS, {"prompt": "Left?", "completion": "Yes."}], prompts=3, train=1)
    asked = [row["prompt"][0]["content"] for row in read_jsonl(tmp_path / "prompts.jsonl")]
    sampled = make_context(
        "sample", {"model": models["sft"], "data": tmp_path}, completions_per_prompt=2, max_new_tokens=4
    )
    sample.run(sampled)
    rows = list(read_jsonl(sampled.folder / "samples.jsonl"))
    said = {"One and one?": ["It is 2", "or 3"], "Two and two?": ["4", "5"]}
    for row in rows:
        texts = said.get(row["prompt"][0]["content"], ["a", "b"])
        row["completions"] = [{"text": text, "tokens": 2, "finished": True} for text in texts]
    write_jsonl(sampled.folder / "samples.jsonl", rows)
    without_checks = [question for question in asked if question not in said]
    context = rewarded(make_context("judge", {"data": sampled.folder}, min_margin=0.0), 0.9, "right")
    metrics = judge.run(context)
    assert metrics["reward_failed"] == 2 * len(without_checks)
    chosen = {p["prompt"][0]["content"]: p["chosen"][0]["content"] for p in read_jsonl(context.folder / "pairs.jsonl")}
    assert chosen == {question: texts[0] for question, texts in said.items() if question in asked}
    assert metrics["right_mean"] == 0.5


def test_an_evaluation_leaves_failed_rewards_out_and_counts_them(
    make_context: MakeContext, models: dict[str, Path], tiny_model: Path, tmp_path: Path  # noqa: F811
) -> None:  # fmt: skip
    prepared(tmp_path, tiny_model, [*ROWS, {"prompt": "Left?", "completion": "Yes."}], heldout=3, train=1)
    inputs = {"model": models["start"], "data": tmp_path, "reference": models["start"]}
    heldout = list(read_jsonl(tmp_path / "heldout.jsonl"))
    checked = sum("checks" in row for row in heldout)
    assert checked == 1
    context = rewarded(make_context("evaluate", inputs, max_new_tokens=4), 0.7, "obeys")
    metrics = evaluate.run(context)
    assert (metrics["reward"], metrics["obeys"], metrics["reward_failed"]) == (1.0, 1.0, 2.0)
    written = list(read_jsonl(context.folder / "answers.jsonl"))
    assert sorted(row["reward"] is None for row in written) == [False, True, True]
    strict = rewarded(make_context("evaluate", inputs, "strict", max_new_tokens=4), 0.6, "obeys")
    with pytest.raises(InputError, match=r"2 of 3 answers have no reward: its row has no checks \(2 times\)"):
        evaluate.run(strict)
