"""Rounds of on-policy DPO through the command line, on a tiny model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from alignment.files import read_jsonl
from tests.conftest import Command, runs, states, tiny_stages

pytestmark = pytest.mark.slow
OUT = (
    "verdict",
    "best_of_n",
    "evaluate_start",
    "evaluate_sft",
    "sft",
)  # rounds of the start model, without evaluations
STAGES = tiny_stages("prepare_sft", "sample", "judge", "dpo")


def test_a_further_round_goes_on_from_the_last_model_and_reuses_the_rest(
    forked: Command, command: Command, tiny_settings: list[str], tmp_path: Path
) -> None:
    """One round, then two: only the second round is made, from the first one's model."""
    store = tmp_path / "store"
    less = [*(f"~pipeline.nodes.{name}" for name in OUT), "~pipeline.rounds.nodes.evaluate_dpo"]
    settings = ["pipeline=iterative_dpo", *tiny_settings, *STAGES, *less, "pipeline.rounds.first.dpo=start"]
    forked(store, "run", *settings, "pipeline.rounds.count=1", "name=one")
    forked(store, "run", *settings, "pipeline.rounds.count=2", "name=two")
    found = {run["name"]: run for run in runs(command, store)}
    assert set(states(found["one"]).values()) == {"done"}
    made = {name for name, state in states(found["two"]).items() if state == "done"}
    assert made == {"samples_2", "judged_2", "pairs_2", "reference_2", "dpo_2"}
    assert found["two"]["final"] == "dpo_2"
    key = {node["name"]: node["key"] for node in found["two"]["nodes"]}
    results = {name: store / "store" / digest[:16] for name, digest in key.items()}
    second = {name: json.loads((results[name] / "record.json").read_text()) for name in made}
    assert second["samples_2"]["parents"]["model"] == second["dpo_2"]["parents"]["model"] == key["dpo_1"]
    assert second["dpo_2"]["metrics"]["reference_computed"] == 0, "the last round's model, its reference, has a pass"
    samples = [list(read_jsonl(results[f"samples_{number}"] / "samples.jsonl")) for number in (1, 2)]
    assert [row["prompt"] for row in samples[0]] == [row["prompt"] for row in samples[1]]
    assert samples[0] != samples[1]
    assert not (results["samples_2"] / "sampled.jsonl").exists(), "what was kept for further attempts is no result"
