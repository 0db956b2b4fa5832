"""The stage that measures reward models on held-out rows: numbers of real models, several at once, what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification

from alignment.config.stages.preparing import Prepare, Splits
from alignment.config.stages.reward_model import EvaluateReward
from alignment.data import preparation
from alignment.data.chat import Chat
from alignment.data.named import reading_of
from alignment.data.preparation import Source
from alignment.data.sources import Row
from alignment.data.splitting import Share, divide
from alignment.data.writing import write
from alignment.errors import InputError
from alignment.files import read_json, read_jsonl, write_json
from alignment.reporting.reward_models import SHOWN
from alignment.rewards.model import Scorer
from alignment.rewards.term import Answer
from alignment.stages import evaluate_reward
from alignment.stages.context import StageContext
from alignment.training.classifier import load_classifier
from tests.conftest import default_checks, write_tiny_model

PAIRS = [
    {"prompt": f"Is {i} nice?", "chosen": f"Yes, {i} is{' very' * (i % 3)} lovely.", "rejected": "No" + "!" * (i % 5)}
    for i in range(24)
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """start/model, three reward models of it that were not trained, pairs and answers with scores."""
    folder = tmp_path_factory.mktemp("rewards")
    start = write_tiny_model(folder / "start" / "model")
    for seed in (1, 2, 3):
        target = folder / f"member-{seed}" / "model"
        shutil.copytree(start, target)
        load_classifier(start, seed).save_pretrained(target)
        write_json(folder / f"member-{seed}" / "reward_model.json", {"loss": "bradley_terry", "margin": 0.0})
    scored = [{"prompt": pair["prompt"], "completion": pair["chosen"], "score": i / 24} for i, pair in enumerate(PAIRS)]
    for task, rows in (("preference", PAIRS), ("scored", scored)):
        (folder / task).mkdir()
        prepared(folder / task, Chat.load(start), rows, task)
    return folder


def prepared(target: Path, chat: Chat, values: list[dict[str, Any]], task: Any) -> None:
    rows = [Row(value, "rows.jsonl", number, number) for number, value in enumerate(values, start=1)]
    settings = Prepare(
        kind="prepare", task=task, dataset="x", against=[], max_length=90, max_prompt_length=60, over_long="drop",
        seed=0, workers=None,
        splits=Splits(heldout=10, prompts=0, train=None),
    )  # fmt: skip
    reading = reading_of(settings, "auto", {}, default_checks(), chat)
    judged = preparation.judge([Source("mine", rows, reading, "rows.jsonl")], target, lambda *a, **k: None, None)
    write(judged, divide(judged, settings.splits, settings.seed, [Share()]), target, chat)


def measure(folder: Path, target: Path, data: str, *members: Path) -> dict[str, Any]:
    target.mkdir()
    roles = dict(zip(("model", "model_2", "model_3"), members, strict=False))
    settings = EvaluateReward(kind="evaluate_reward", batch_size=3, precision="fp32")
    inputs = {**roles, "data": folder / data}
    return evaluate_reward.run(StageContext("measured", "run", "key", target, settings, None, inputs))  # type: ignore[arg-type]


def alone(model: Path, ids: list[int]) -> float:
    with torch.no_grad():
        return float(AutoModelForSequenceClassification.from_pretrained(model)(torch.tensor([ids])).logits.item())


def test_the_rewards_are_those_of_each_answer_alone(folder: Path, tmp_path: Path) -> None:
    metrics = measure(folder, tmp_path / "out", "preference", folder / "member-1")
    chat, rows = Chat.load(folder / "start" / "model"), list(read_jsonl(tmp_path / "out" / "rewards.jsonl"))
    by_id = {row["id"]: row for row in rows}
    heldout = list(read_jsonl(folder / "preference" / "heldout.jsonl"))
    assert [row["id"] for row in rows] == [row["id"] for row in heldout]
    for asked in heldout[:4]:
        messages = [*asked["prompt"], {"role": "assistant", "content": asked["reference"]}]
        ids = chat.encode(chat.tokenizer.apply_chat_template(messages, tokenize=False))
        assert by_id[asked["id"]]["chosen"] == [pytest.approx(alone(folder / "member-1" / "model", ids), abs=1e-5)]
    margins = np.array([row["chosen"][0] - row["rejected"][0] for row in rows])
    assert metrics["accuracy"] == (margins > 0).mean() and metrics["pairs"] == 10
    confidence, right = 1 / (1 + np.exp(-np.abs(margins))), margins > 0
    bins = np.floor((confidence - 0.5) * 20)  # each of width 0.05
    gaps = [np.sum(bins == one) * abs(np.mean((right - confidence)[bins == one])) for one in np.unique(bins)]
    assert metrics["ece"] == pytest.approx(sum(gaps) / 10)
    rewards, tokens = [row["chosen"] + row["rejected"] for row in rows], [row["tokens"] for row in rows]
    both = np.corrcoef(np.ravel(rewards), np.ravel(tokens))[0, 1]
    assert metrics["length_correlation"] == pytest.approx(both) and abs(both) > 0.01
    told = read_json(tmp_path / "out" / "evaluation.json")
    assert told["metrics"] == metrics and sum(row["pairs"] for row in told["calibration"]) == 10
    (logged,) = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert {name: value for name, value in logged.items() if name not in ("step", "time")} == metrics
    assert {"accuracy", "ece", "length_correlation"} <= {*metrics} & {*SHOWN}, "logged, and in the report"


def test_what_is_measured_is_what_the_reward_term_gives(folder: Path, tmp_path: Path) -> None:
    measure(folder, tmp_path / "out", "preference", folder / "member-2")
    by_id = {row["id"]: row for row in read_jsonl(tmp_path / "out" / "rewards.jsonl")}
    heldout = list(read_jsonl(folder / "preference" / "heldout.jsonl"))
    scorer = Scorer(folder / "member-2" / "model", "end_of_turn")
    given = scorer([Answer(row, row["reference"]) for row in heldout], lambda: None)
    assert given == [pytest.approx(by_id[row["id"]]["chosen"][0], abs=1e-5) for row in heldout]


def test_an_ensemble_is_the_mean_of_its_members_and_knows_where_they_differ(folder: Path, tmp_path: Path) -> None:
    members = [folder / f"member-{seed}" for seed in (1, 2, 3)]
    metrics = measure(folder, tmp_path / "out", "preference", *members)
    rows = list(read_jsonl(tmp_path / "out" / "rewards.jsonl"))
    margins = np.array([np.subtract(row["chosen"], row["rejected"]) for row in rows])  # [pairs, members]
    assert metrics["members"] == 3 and metrics["margin"] == pytest.approx(margins.mean())
    assert metrics["uncertainty"] == pytest.approx(margins.std(1).mean()) and metrics["uncertainty"] > 0.01


def test_scores_are_compared_as_the_loss_meant_them(folder: Path, tmp_path: Path) -> None:
    for loss in ("mse", "bce", "bradley_terry"):
        shutil.copytree(folder / "member-1", tmp_path / loss)
        write_json(tmp_path / loss / "reward_model.json", {"loss": loss, "margin": 0.0})
        metrics = measure(folder, tmp_path / f"out-{loss}", "scored", tmp_path / loss)
        rewards = np.array([row["completion"][0] for row in read_jsonl(tmp_path / f"out-{loss}" / "rewards.jsonl")])
        scores = {row["id"]: row["score"] for row in read_jsonl(folder / "scored" / "train.jsonl")}
        assert len(scores) == 14 and metrics["rows"] == len(rewards) == 10
        assert ("mse" in metrics) == (loss != "bradley_terry") and -1 <= metrics["spearman"] <= 1
    assert "accuracy" in measure(folder, tmp_path / "out-pairs", "preference", tmp_path / "bce"), "which have no score"


def test_margins_of_a_model_trained_to_keep_pairs_apart_are_taken_for_no_log_odds(folder: Path, tmp_path: Path) -> None:
    """-log sigmoid(r - m) is least, for pairs of which a share p is labelled right, at r above log(p / (1 - p))."""
    shutil.copytree(folder / "member-1", tmp_path / "apart")
    write_json(tmp_path / "apart" / "reward_model.json", {"loss": "bradley_terry", "margin": 1.0})
    apart, plain = (
        measure(folder, tmp_path / f"of-{one.name}", "preference", one)
        for one in (tmp_path / "apart", folder / "member-1")
    )
    assert plain.keys() - apart.keys() == {"ece", "heldout_loss"}
    assert apart["accuracy"] == plain["accuracy"]


def test_a_model_that_gives_nan_is_not_measured(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "member-1", tmp_path / "broken")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "broken" / "model")
    with torch.no_grad():
        model.score.weight[:, 0] = torch.nan
    model.save_pretrained(tmp_path / "broken" / "model")
    with pytest.raises(InputError, match="20 of 20 rewards are NaN or infinite"):
        measure(folder, tmp_path / "out", "preference", folder / "member-1", tmp_path / "broken")


def test_what_cannot_be_measured_is_one_line(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "member-2", tmp_path / "other")
    write_json(tmp_path / "other" / "reward_model.json", {"loss": "mse", "margin": 0.0})
    with pytest.raises(InputError, match="trained with different losses: model bradley_terry, model_2 mse"):
        measure(folder, tmp_path / "a", "preference", folder / "member-1", tmp_path / "other")
    write_json(tmp_path / "other" / "reward_model.json", {"loss": "bradley_terry", "margin": 1.0})
    with pytest.raises(InputError, match=r"trained with different margins: model 0\.0, model_2 1\.0"):
        measure(folder, tmp_path / "m", "preference", folder / "member-1", tmp_path / "other")
    (tmp_path / "other" / "model" / "chat_template.jinja").write_text("{{ messages[0].content }}{{ eos_token }}")
    write_json(tmp_path / "other" / "reward_model.json", {"loss": "bradley_terry", "margin": 0.0})
    with pytest.raises(InputError, match="another chat template"):
        measure(folder, tmp_path / "b", "preference", tmp_path / "other")
    shutil.copytree(folder / "preference", tmp_path / "old")
    shutil.rmtree(tmp_path / "old" / "heldout")
    with pytest.raises(InputError, match="no whole pairs or scored answers are held out"):
        measure(tmp_path, tmp_path / "c", "old", folder / "member-1")
