from __future__ import annotations

from pathlib import Path

import pytest

from alignment.errors import InputError
from alignment.files import read_json, read_jsonl
from alignment.stages import sample
from tests.stages.conftest import QUESTIONS, MakeContext


def test_every_prompt_gets_its_completions_and_two_runs_the_same(
    make_context: MakeContext, models: dict[str, Path], rows: Path
) -> None:
    inputs = {"model": models["sft"], "data": rows}
    first, again = (
        make_context("sample", inputs, name=name, completions_per_prompt=3, max_new_tokens=8)
        for name in ("first", "again")
    )
    metrics = sample.run(first)
    assert sample.run(again) == metrics
    written = list(read_jsonl(first.folder / "samples.jsonl"))
    assert written == list(read_jsonl(again.folder / "samples.jsonl"))
    assert [row["id"] for row in written] == [f"row-{i}" for i in range(5)]
    assert [row["prompt"][0]["content"] for row in written] == QUESTIONS
    every = [completion for row in written for completion in row["completions"]]
    assert len(every) == 15
    assert all(set(completion) == {"text", "tokens", "finished"} for completion in every)
    assert all(completion["finished"] or completion["tokens"] == 8 for completion in every)
    assert (metrics["prompts"], metrics["completions"]) == (5, 15)
    assert metrics["tokens"] == pytest.approx(sum(completion["tokens"] for completion in every) / 15)
    assert metrics["stop_rate"] == pytest.approx(sum(completion["finished"] for completion in every) / 15)
    progress = read_json(first.folder / "progress.json")
    assert (progress["step"], progress["total"], progress["note"]) == (1000, 1000, "sampling")
    assert progress["tokens_per_s"] > 0
    (logged,) = read_jsonl(first.folder / "metrics.jsonl")
    assert {name: logged[name] for name in metrics} == metrics


def test_without_prompts_the_stage_says_which_file_is_empty(
    make_context: MakeContext, models: dict[str, Path], rows: Path, tmp_path: Path
) -> None:
    (tmp_path / "prompts.jsonl").touch()
    with pytest.raises(InputError, match=r"prompts\.jsonl: prompts\.jsonl has no rows"):
        sample.run(make_context("sample", {"model": models["sft"], "data": tmp_path}))
