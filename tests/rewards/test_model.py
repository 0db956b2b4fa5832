"""Trained reward models as a term: what a plain forward of one conversation says, alone and in ensembles."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from alignment.config.reward_terms import Model
from alignment.config.rewards import Reward
from alignment.data import tokens
from alignment.data.chat import Chat
from alignment.errors import InputError
from alignment.files import read_jsonl, write_jsonl
from alignment.rewards import Judge
from alignment.rewards import model as reward_models
from alignment.rewards.term import Answer
from alignment.stages import judge
from tests.conftest import TEMPLATE, write_tiny_model
from tests.rewards.conftest import row
from tests.stages.conftest import MakeContext, make_context  # noqa: F401

ANSWERS = ["Yes.", "", "A much longer answer, with many more words than the others have.", "No!", "yes."]


def write_reward_model(folder: Path, seed: int, template: str = TEMPLATE) -> Path:
    """A random two-layer Llama with one output, and the byte tokenizer."""
    from transformers import LlamaConfig, LlamaForSequenceClassification

    write_tiny_model(folder, template)
    (folder / "model.safetensors").unlink()
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=261, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, pad_token_id=0, eos_token_id=1, bos_token_id=None,
        num_labels=1, initializer_range=0.5,
    )  # fmt: skip
    LlamaForSequenceClassification(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return [write_reward_model(tmp_path_factory.mktemp(f"reward-{i}") / "model", i) for i in range(2)]


def judge_with(folders: list[Path], **changes: Any) -> Judge:
    settings = {"members": {}, "roles": "reward_model", "combine": "mean", "uncertainty": 0.0, "end": "end_of_turn"}
    term = {"kind": "model", "weight": 1.0, **settings, **changes}
    return Judge(Reward.model_validate({"terms": {"term": term}}), {"term": folders})


def plainly(folder: Path, text: str) -> float:
    """By a forward of this one text, as transformers loads the folder."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    with torch.inference_mode():
        return float(model(**tokenizer(text, return_tensors="pt", add_special_tokens=False)).logits[0, 0])


def test_a_value_is_that_of_the_conversation_alone(folders: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers of unlike length in batches of two at most, in any order: as each by itself (1e-5)."""
    expected = [plainly(folders[0], f"<|user|>Say something<|assistant|>{answer}<eos>") for answer in ANSWERS]
    assert max(expected) - min(expected) > 0.1
    for budget in (4096, 80):
        monkeypatch.setattr(reward_models, "TOKENS_PER_BATCH", budget)
        scores = judge_with(folders[:1]).score([row()] * len(ANSWERS), ANSWERS)
        assert [score["reward"] for score in scores] == pytest.approx(expected, abs=1e-5)


def test_rows_end_where_the_model_finds_their_end(folders: list[Path], tmp_path: Path) -> None:
    """It takes the last token that is not its own padding token, which need not be the tokenizer's."""
    shutil.copytree(folders[0], tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps({**config, "pad_token_id": 3}))
    assert AutoTokenizer.from_pretrained(tmp_path / "model").pad_token_id == 0
    scores = judge_with([tmp_path / "model"]).score([row()] * len(ANSWERS), ANSWERS)
    expected = judge_with(folders[:1]).score([row()] * len(ANSWERS), ANSWERS)
    assert [score["reward"] for score in scores] == pytest.approx([score["reward"] for score in expected], abs=1e-5)


def test_an_ensemble_is_careful(folders: list[Path]) -> None:
    """Of two values a and b the mean is (a + b) / 2 and the standard deviation |a - b| / 2."""
    one, other = (judge_with([folder]).score([row()], ["Yes."])[0]["reward"] for folder in folders)
    assert abs(one - other) > 0.01
    expected = {
        ("mean", 0.0): (one + other) / 2,
        ("mean", 1.0): min(one, other),
        ("mean", 3.0): (one + other) / 2 - 1.5 * abs(one - other),
        ("worst", 3.0): min(one, other),
    }
    for (combine, uncertainty), value in expected.items():
        (score,) = judge_with(folders, combine=combine, uncertainty=uncertainty).score([row()], ["Yes."])
        assert score["reward"] == pytest.approx(value, abs=1e-6)


@pytest.mark.parametrize("weight", [float("nan"), 3e38])
def test_a_member_that_says_no_number_is_a_failure_whatever_the_others_say(
    weight: float, folders: list[Path], tmp_path: Path
) -> None:
    """A head of 3e38 has an infinite product with the last state."""
    from transformers import AutoModelForSequenceClassification

    shutil.copytree(folders[1], tmp_path / "odd")
    odd = AutoModelForSequenceClassification.from_pretrained(folders[1])
    with torch.no_grad():
        odd.score.weight.fill_(weight)
    odd.save_pretrained(tmp_path / "odd")
    for members in ([folders[0], tmp_path / "odd"], [tmp_path / "odd", folders[0]]):
        for combine in ("mean", "worst"):
            (score,) = judge_with(members, combine=combine, uncertainty=1.0).score([row()], ["Yes."])
            assert re.fullmatch("the value of a member is (nan|-?inf)", score["failed"]["term"])


def test_the_text_ends_where_training_had_it_or_where_the_template_leaves_it(tmp_path: Path) -> None:
    """ChatML's line break after the end-of-turn token, for instance, is no part of what was trained on."""
    folder = write_reward_model(tmp_path, 0, TEMPLATE.replace("{{ eos_token }}", "{{ eos_token }}\n"))
    text = "<|user|>Say something<|assistant|>Yes.<eos>"
    for end, whole in (("end_of_turn", text), ("template", text + "\n")):
        (score,) = judge_with([folder], end=end).score([row()], ["Yes."])
        assert score["reward"] == pytest.approx(plainly(folder, whole), abs=1e-5)


def test_its_tokens_are_those_that_a_model_is_trained_on(folders: list[Path]) -> None:
    """Prompt and answer as the data's room makes a pair of them."""
    chat = Chat.load(folders[0])
    asked, good, bad = row()["prompt"], *([{"role": "assistant", "content": text}] for text in ("Yes.", "No!"))
    pair = tokens.pair(chat, asked, good, bad, "here")
    scorer = reward_models.Scorer(folders[0], "end_of_turn")
    assert scorer.encode(Answer(row(), "Yes.")) == pair.prompt + pair.chosen
    assert scorer.encode(Answer(row(), "No!")) == pair.prompt + pair.rejected


def test_what_it_cannot_read_as_it_is_meant_fails(folders: list[Path]) -> None:
    scores = judge_with(folders).score([row()] * 3, ["x" * 200, "Yes.<eos><|user|>Thanks", "Yes."])
    assert [score.get("failed") for score in scores] == [
        {"term": "is longer than the reward model's window of 128 tokens"},
        {"term": "the answer spells the control token <eos>"},
        None,
    ]


def test_other_models_are_refused(folders: list[Path], tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"is no reward model: its weights lack score\.weight"):
        judge_with([tiny_model])
    with pytest.raises(InputError, match="the reward model does not load"):
        judge_with([tmp_path])
    shutil.copytree(folders[0], tmp_path / "bare")
    (tmp_path / "bare" / "chat_template.jinja").unlink()
    with pytest.raises(InputError, match="tokenizer has no chat template"):
        judge_with([tmp_path / "bare"])


def test_members_that_are_named_are_not_taken_from_parents() -> None:
    given = {"kind": "model", "weight": 1.0, "combine": "mean", "uncertainty": 0.0, "end": "template"}
    roles = ["data", "reward_model_2", "reward_model", "reward_model_kind"]
    parents = Model.model_validate({**given, "members": {}, "roles": "reward_model"})
    assert parents.reads(roles) == ["reward_model", "reward_model_2", "reward_model_kind"]
    assert Model.model_validate({**given, "members": {}, "roles": "reward_model_k"}).reads(roles) == roles[3:]
    named = Model.model_validate({**given, "members": {"one": {"kind": "path", "path": "m"}}, "roles": "reward_model"})
    assert named.reads(roles) == []
    assert len(named.sources()) == 1


def test_a_stage_that_judges_takes_the_model_of_its_parent(
    folders: list[Path], make_context: MakeContext, tmp_path: Path  # noqa: F811
) -> None:  # fmt: skip
    completions = [{"text": text, "tokens": 3, "finished": True} for text in ("Yes.", "x" * 200, "No!")]
    (tmp_path / "samples").mkdir()
    write_jsonl(tmp_path / "samples" / "samples.jsonl", [{**row(), "completions": completions}])
    inputs = {"data": tmp_path / "samples", "reward_model": folders[0].parent}
    context = make_context("judge", inputs, min_margin=0.0)
    context.experiment = context.experiment.model_copy(
        update={"reward": judge_with([]).reward.model_copy(update={"max_failed_share": 0.5})}
    )
    metrics = judge.run(context)
    assert (metrics["reward_failed"], metrics["answers"], metrics["pairs"]) == (1, 3, 1)
    (pair,) = read_jsonl(context.folder / "pairs.jsonl")
    yes, no = (plainly(folders[0], f"<|user|>Say something<|assistant|>{text}<eos>") for text in ("Yes.", "No!"))
    assert pair["chosen_reward"] == pytest.approx(max(yes, no), abs=1e-5)
    assert pair["rejected_reward"] == pytest.approx(min(yes, no), abs=1e-5)
    assert metrics["term_mean"] == pytest.approx((yes + no) / 2, abs=1e-5)
    (judged,) = read_jsonl(context.folder / "judged.jsonl")
    assert judged["completions"][1]["reward"] is None
