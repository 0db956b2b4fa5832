"""Whether prompts leave room for answers in the model's window, as the stages that ask them would find it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from alignment.config.compose import compose
from alignment.errors import InputError
from alignment.estimating.seen import config_of
from alignment.estimating.windows import Prompts, finding
from alignment.generation import check_window

TOKENS = np.array([90, 20, 60, 40, 50])  # of five rows; the first is trained on, the others asked
SPLITS = {"heldout": np.array([1, 2]), "prompts": np.array([3, 4]), "train": np.array([0])}
WHOLE = Prompts(TOKENS, np.arange(5), SPLITS, lambda row: f"rows.jsonl:{row + 1}")
FIRST = Prompts(TOKENS, np.arange(5), None, WHOLE.place)
EVALUATE, SAMPLE, ONLINE = "stage.evaluate.max_new_tokens", "stage.sample.max_new_tokens", "stage.grpo.max_new_tokens"


def found(name: str, overrides: list[str], prompts: Prompts | None, pipeline: str = "sft_sample_dpo") -> dict[str, Any]:
    return finding(compose([f"pipeline={pipeline}", *overrides]), name, 128, prompts)


@pytest.mark.parametrize(
    ("name", "key", "asked", "row", "pipeline"),
    [
        ("evaluate_sft", EVALUATE, [20, 60], 3, "sft_sample_dpo"),
        ("samples", SAMPLE, [40, 50], 5, "sft_sample_dpo"),
        ("grpo", ONLINE, [40, 50], 5, "sft_grpo"),
    ],
)
def test_it_fails_where_the_stage_would_at_the_longest_prompt_of_its_split(
    name: str, key: str, asked: list[int], row: int, pipeline: str
) -> None:
    longest = max(asked)
    fits = 128 - longest
    check_window([[0] * n for n in asked], fits, 128)
    assert found(name, [f"{key}={fits}"], WHOLE, pipeline)["state"] == "ok"
    with pytest.raises(InputError) as caught:
        check_window([[0] * n for n in asked], fits + 1, 128)
    told = found(name, [f"{key}={fits + 1}"], WHOLE, pipeline)
    assert (told["state"], told["code"], told["where"]) == ("failed", 3, f"rows.jsonl:{row}")
    assert told["what"] == caught.value.what
    assert f"{key}={fits}" in told["fix"] and f"max_prompt_length={longest - 1}" in told["fix"]


def test_of_samples_those_prompts_count_that_are_asked() -> None:
    settings = [f"{SAMPLE}=80", "stage.sample.prompts=1"]
    assert found("samples", settings, WHOLE)["state"] == "ok"
    assert found("samples", [*settings, "stage.sample.first_prompt=1"], WHOLE)["state"] == "failed"


def test_where_not_all_rows_are_known_it_is_a_warning() -> None:
    told = found("evaluate_sft", [f"{EVALUATE}=60"], FIRST)
    assert (told["state"], told["where"]) == ("warning", "rows.jsonl:1") and "a prompt of 90 tokens" in told["what"]


@pytest.mark.parametrize("prompts", [FIRST, None])
def test_settings_that_leave_no_room_are_a_warning_until_the_rows_are_known(prompts: Prompts | None) -> None:
    told = found("evaluate_sft", [f"{EVALUATE}=33"], prompts)
    assert told["state"] == "warning" and "prompts may have 96 tokens" in told["what"]
    assert found("evaluate_sft", [f"{EVALUATE}=32"], prompts)["state"] == "ok"
    assert found("evaluate_sft", [f"{EVALUATE}=33"], WHOLE)["state"] == "ok", "none is so long"


def test_an_architecture_that_transformers_does_not_know_is_the_fault_of_its_file(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "nosuch"}')
    with pytest.raises(InputError, match=r"config.json: transformers cannot read it: .*nosuch"):
        config_of(tmp_path)
