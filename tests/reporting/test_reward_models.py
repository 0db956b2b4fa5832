"""What a run's report and its last lines say of reward models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from alignment.reporting.gather import gather, summarise
from alignment.reporting.page import render
from alignment.reporting.reward_models import reward_models
from alignment.reporting.sweeps import objective
from alignment.reporting.terminal import next_steps
from alignment.reporting.words import main_facts

FOUND = {
    "metrics": {
        "pairs": 200.0, "accuracy": 0.715, "accuracy_low": 0.648, "accuracy_high": 0.773, "margin": 0.62, "ece": 0.041,
        "members": 3.0, "uncertainty_auroc": 0.66, "length_correlation": -0.214,
    },
    "calibration": [{"low": 0.5, "high": 0.55, "pairs": 41, "confidence": 0.524, "accuracy": 0.561}],
}  # fmt: skip


def make_run(store: Path, found: Any) -> Path:
    """One reward model, which is the final model, and its evaluation, which has found `found`."""
    nodes = []
    for number, (name, kind, inputs) in enumerate(
        [("rm", "reward_model", {}), ("measured", "evaluate_reward", {"model": "rm"})]
    ):
        key = f"{number}" * 64
        (store / "store" / key[:16] / "model").mkdir(parents=True)
        (store / "store" / key[:16] / "record.json").write_text(json.dumps({"key": key, "kind": kind, "metrics": {}}))
        nodes.append({"name": name, "kind": kind, "key": key, "state": "done", "inputs": inputs, "seconds": 1.0})
    if found is not None:
        (store / "store" / ("1" * 16) / "evaluation.json").write_text(json.dumps(found))
    row = {"step": 1, "loss": 0.69, "accuracy": 0.5, "margin": 0.0, "mean_reward": 0.1}
    (store / "store" / ("0" * 16) / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    folder = store / "runs" / "mine"
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps({"run": "mine", "final": "rm", "nodes": nodes}))
    return folder


def test_a_report_tells_how_right_and_how_sure_reward_models_are(tmp_path: Path) -> None:
    report = gather(make_run(tmp_path, FOUND), tmp_path)
    (part,) = reward_models(report)
    assert (part["told"]["rows"], part["told"]["members"]) == ("200", "3")
    table = {row["title"]: row["value"] for row in part["told"]["table"]}
    assert table["Accuracy"] == "71.5 %" and table["Calibration error"] == "4.1 %" and table["Margin"] == "0.620"
    assert table["Correlation of reward and length"] == "\N{MINUS SIGN}0.214"
    assert part["told"]["table"][0]["interval"] == "[64.8 % to 77.3 %]"
    page = render(report)
    assert '<section id="reward-models"' in page and "3 models together" in page and "56.1 %" in page
    for title in ("Accuracy", "Calibration error", "Correlation of reward and length"):
        assert title in page and table[title] in page


def test_what_has_not_been_found_is_said(tmp_path: Path) -> None:
    report = gather(make_run(tmp_path, None), tmp_path)
    assert reward_models(report) == [{"stage": report.stages[1], "told": None}]
    assert "The stage measured has found nothing yet." in render(report)


def test_nobody_is_asked_to_talk_to_a_reward_model(tmp_path: Path) -> None:
    folder = make_run(tmp_path, FOUND)
    summary = summarise(json.loads((folder / "run.json").read_text()), tmp_path)
    said = "\n".join(line.plain for line in next_steps(summary, None))
    assert "final model" in said and "talk to it" not in said
    assert main_facts(FOUND["metrics"]) == "pairs 200  accuracy 0.715  ECE 0.041"
    assert main_facts({"reward": 0.5, "reward_failed": 0.0}) == "reward 0.5"
    assert main_facts({"reward": 0.5, "reward_failed": 3.0}) == "reward 0.5  3 answers without a reward"


def test_a_sweep_learns_what_was_measured_of_a_reward_model(tmp_path: Path) -> None:
    folder = make_run(tmp_path, FOUND)
    run = json.loads((folder / "run.json").read_text())
    assert objective(run, tmp_path, ["accuracy"]) == 0.715
    assert objective(run, tmp_path, ["accuracy", "ece"]) == (0.715, 0.041)
    assert objective(run, tmp_path, ["pairs"]) is None, "a count is no metric of the model"
