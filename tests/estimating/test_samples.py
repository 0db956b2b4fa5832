"""What is known of rows before they are there, what is said of it, and which steps a calibration runs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from datasets import Dataset
from transformers import LlamaConfig

from alignment import calibrating
from alignment.config.compose import compose
from alignment.config.schema import Experiment
from alignment.estimating import samples, telling
from alignment.estimating.samples import AT_MOST, EXACT, KnownRows
from alignment.estimating.time import Layout, Stage
from alignment.estimating.work import records_of
from alignment.training.memory import Load
from tests.estimating.test_traffic import of
from tests.training import online

PROMPTS = np.array([5, 9, 7])
ROWS = KnownRows(Dataset.from_dict({"input_ids": [[1] * 20] * 3, "labels": [[1] * 20] * 3}), PROMPTS, 3, EXACT)


def settings_of(experiment: Experiment, name: str) -> Any:
    return experiment.stage[experiment.pipeline.nodes[name].stage]


@pytest.fixture(scope="module")
def sampled() -> Experiment:
    return compose(["pipeline=sft_sample_dpo", "stage.sample.max_new_tokens=30", "stage.judge.max_pairs_per_prompt=2"])


def test_pairs_that_a_judge_will_make_are_as_many_and_as_long_as_they_may_become(sampled: Experiment) -> None:
    found = dict(samples.trained(sampled, "rows", ROWS))
    assert list(found) == ["sft", "reference", "dpo"] and found["sft"] is ROWS
    prompts = settings_of(sampled, "rows").splits.prompts
    assert (found["dpo"].count, found["dpo"].how) == (2 * prompts, AT_MOST)
    records = records_of(settings_of(sampled, "dpo"), found["dpo"].rows)
    assert records.sizes.lengths.tolist() == (PROMPTS + 2 * 30).tolist()
    assert not list(telling.unknown(sampled, ["rows"]))


def test_of_rows_that_nobody_can_know_it_is_said_that_nobody_knows(sampled: Experiment) -> None:
    (first, second, third) = telling.unknown(sampled, [])
    assert [one["check"] for one in (first, second, third)] == ["time sft", "time reference", "time dpo"]
    assert first["state"] == "note" and "stages before `rows`" in first["what"]


def test_each_round_trains_on_pairs_of_its_own() -> None:
    rounds = compose(["pipeline=iterative_dpo", "pipeline.rounds.count=2"])
    names = [name for name, _ in samples.trained(rounds, "rows", ROWS)]
    assert names == ["sft", "reference_1", "dpo_1", "reference_2", "dpo_2"]


def test_what_is_sampled_is_read_once_a_token_where_that_takes_longer() -> None:
    """Two prompts a step, 4 answers of 6 tokens each; the weights are read 6 times: 16 answers go together."""
    settings = online.grpo(global_batch_size=2, completions_per_prompt=4, max_new_tokens=6)
    config = LlamaConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
    records = records_of(settings, np.array([10, 12]))
    assert records.sizes.lengths.tolist() == [10 + 24, 12 + 24]
    load = Load(100, "fp32", 1_000_000, 1_000_000)
    (loads,) = (one := Stage(settings, config, records, Layout(load, 100, False))).loads(1, on_gpu=False)
    slow, fast = one.step(loads, of(memory=1e6)), one.step(loads, of(memory=1e18))
    assert slow is not None and fast is not None
    assert slow.sampling == pytest.approx(6 * 4e6 / 1e6) and fast.sampling == pytest.approx(loads.sampling / of().rate)  # type: ignore[operator]


def test_a_calibration_runs_the_stage_itself_on_the_first_rows(sampled: Experiment) -> None:
    assert calibrating.calibrated(sampled) == ["sft"], "the pairs of dpo are not there yet"
    assert calibrating.calibrated(compose(["pipeline=sft_dpo"])) == ["sft", "dpo"]
    assert calibrating.calibrated(compose(["pipeline=sft_grpo"])) == ["sft"]
    short = calibrating.shortened(compose(["pipeline=sft_dpo"]), "dpo", "elsewhere")
    assert {name: node.inputs for name, node in short.pipeline.nodes.items()} == {
        "start": {}, "rows": {"model": "start"}, "dpo": {"model": "start", "data": "rows"},
    }  # fmt: skip
    settings = settings_of(short, "dpo")
    assert (settings.max_steps, settings.log_every, short.store) == (calibrating.STEPS + 1, 1, "elsewhere")
    limits = {data.limit for data in short.data.values()}
    assert limits <= {max(200, 2 * settings.global_batch_size * settings.max_steps)}
    assert Experiment.model_validate(short.model_dump()), "a worker reads it"


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.00123, "0.0012 s"), (9.9, "9.9 s"), (75.0, "75 s"), (600.0, "10 min"), (90_000.0, "25 h")]
)
def test_times_are_said_in_few_digits(seconds: float, text: str) -> None:
    assert telling.time_text(seconds) == text
