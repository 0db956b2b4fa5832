from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from alignment.config.rewards import Reward
from alignment.errors import InputError
from alignment.files import model_files
from alignment.rewards import Encoder, Judge

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "cats", "purr", "stocks", "fell"]


def reward(**kinds: tuple[str, float]) -> Reward:
    terms = {name: {"kind": kind, "weight": weight, "source": None} for name, (kind, weight) in kinds.items()}
    return Reward.model_validate({"terms": terms})


def ask(*texts: str) -> list[dict[str, Any]]:
    return [{"id": text, "prompt": [{"role": "user", "content": text}]} for text in texts]


@pytest.fixture(scope="module")
def encoder_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random BERT with a vocabulary of four words."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("encoder")
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(folder)
    torch.manual_seed(1)
    config = BertConfig(
        vocab_size=len(WORDS), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=8, pad_token_id=0,
    )  # fmt: skip
    BertModel(config).save_pretrained(folder)
    return folder


def test_sentiment_of_known_sentences_is_vaders_compound_score() -> None:
    """Scores that the lexicon's authors print in their README for these two sentences: 0.8316 and -0.5461."""
    answers = ["VADER is smart, handsome, and funny.", "Today SUX!", "The table is made of wood."]
    scores = Judge(reward(mood=("sentiment", 1.0)), {}).score(ask("a", "b", "c"), answers)
    assert [score["terms"]["mood"] for score in scores] == pytest.approx([0.8316, -0.5461, 0.0], abs=1e-4)


def test_a_reward_is_the_weighted_sum_of_its_terms(encoder_folder: Path) -> None:
    """The prompt repeated is relevant by exactly 1: 2 x sentiment + 0.5 x 1."""
    judge = Judge(reward(mood=("sentiment", 2.0), topic=("relevance", 0.5)), {"topic": [encoder_folder]})
    (score,) = judge.score(ask("cats purr"), ["cats purr"])
    assert score["terms"] == pytest.approx({"mood": 0.0, "topic": 1.0}, abs=1e-6)
    assert score["reward"] == pytest.approx(0.5, abs=1e-6)
    (score,) = judge.score(ask("cats purr"), ["VADER is smart, handsome, and funny."])
    assert score["reward"] == pytest.approx(2 * 0.8316 + 0.5 * score["terms"]["topic"], abs=1e-6)


def test_each_batch_of_the_encoder_is_a_sign_of_life(encoder_folder: Path) -> None:
    """33 answers and the one prompt are 34 texts, 32 of which are a batch."""
    calls: list[int] = []
    judge = Judge(reward(topic=("relevance", 1.0)), {"topic": [encoder_folder]}, lambda: calls.append(1))
    judge.score(ask("cats") * 33, [f"purr {number}" for number in range(33)])
    assert len(calls) == 2


def test_an_empty_answer_is_worth_nothing_and_costs_nothing(encoder_folder: Path) -> None:
    judge = Judge(reward(mood=("sentiment", 1.0), topic=("relevance", 1.0)), {"topic": [encoder_folder]})
    empty, blank, word = judge.score(ask("cats", "cats", "cats"), ["", " \n", "cats"])
    assert empty == blank == {"reward": 0.0, "terms": {"mood": 0.0, "topic": 0.0}}
    assert word["terms"]["topic"] == pytest.approx(1.0, abs=1e-6)


def test_relevance_is_the_cosine_of_mean_pooled_vectors(encoder_folder: Path) -> None:
    """Each text by itself, without padding: mean over its tokens, then the cosine."""
    from transformers import AutoModel, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(encoder_folder), AutoModel.from_pretrained(encoder_folder).eval()

    def mean(text: str) -> torch.Tensor:
        with torch.inference_mode():
            return model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].mean(0)

    prompts, answers = ["cats", "stocks fell", "cats purr"], ["stocks fell cats purr", "purr", "fell"]
    found = Judge(reward(topic=("relevance", 1.0)), {"topic": [encoder_folder]}).score(ask(*prompts), answers)
    for prompt, answer, score in zip(prompts, answers, found, strict=True):
        expected = torch.nn.functional.cosine_similarity(mean(prompt), mean(answer), dim=0)
        assert score["terms"]["topic"] == pytest.approx(float(expected), abs=1e-5)


def test_relevance_looks_at_the_last_user_turn(encoder_folder: Path) -> None:
    talk = [
        {"role": "system", "content": "fell"},
        {"role": "user", "content": "stocks fell"},
        {"role": "assistant", "content": "fell"},
        {"role": "user", "content": "cats purr"},
    ]
    judge = Judge(reward(topic=("relevance", 1.0)), {"topic": [encoder_folder]})
    (score,) = judge.score([{"prompt": talk}], ["cats purr"])
    assert score["terms"]["topic"] == pytest.approx(1.0, abs=1e-6)


def test_the_encoder_reads_no_more_than_it_has_positions_or_was_trained_on(
    encoder_folder: Path, tmp_path: Path
) -> None:
    encoder = Encoder(encoder_folder)
    assert encoder.limit == 8
    long, same_start = encoder(["cats purr " * 3 + "fell", "cats purr " * 3 + "stocks stocks"])
    assert torch.equal(long, same_start), "both are cut to [CLS], six words, [SEP]"
    assert float(long.norm()) == pytest.approx(1.0, abs=1e-6)
    for file in encoder_folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "sentence_bert_config.json").write_text('{"max_seq_length": 4}')
    assert Encoder(tmp_path).limit == 4


def test_an_encoder_reads_only_the_files_that_are_in_the_key(encoder_folder: Path, tmp_path: Path) -> None:
    """Of what sentence-transformers writes, its own notes on modules are left; they lie in folders and are not read."""
    whole, alone = tmp_path / "whole", tmp_path / "alone"
    shutil.copytree(encoder_folder, whole)
    (whole / "sentence_bert_config.json").write_text('{"max_seq_length": 4}')
    (whole / "1_Pooling").mkdir()
    (whole / "1_Pooling" / "config.json").write_text('{"pooling_mode_cls_token": true}')
    (whole / "README.md").write_text("A model card")
    alone.mkdir()
    for file in model_files(whole):
        shutil.copy(file, alone / file.relative_to(whole))
    assert Encoder(alone).limit == Encoder(whole).limit == 4
    text = ["cats purr stocks fell"]
    assert torch.equal(Encoder(alone)(text)[0], Encoder(whole)(text)[0])


def test_a_folder_that_is_no_encoder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="sentence encoder does not load"):
        Judge(reward(topic=("relevance", 1.0)), {"topic": [tmp_path]})
