"""Twenty steps of training on packs against stock TRL on padded rows, for several architectures."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.training import models, trainers
from tests.training.test_trial import UNPACKABLE

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("kind", ["sft", "dpo"])
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "qwen3", "mixtral", "gpt_neo"])
def test_losses_are_those_of_stock_trl(name: str, kind: str, tmp_path: Path, tiny_model: Path) -> None:
    """Rows of 6 to 45 tokens in several micro-batches. GPT-Neo attends outside transformers' table: it goes padded."""
    architecture, settings = {**models.PACKABLE, **{name: UNPACKABLE[name][:2] for name in UNPACKABLE}}[name]
    model = models.make(architecture, settings, scale=2.0)
    said: list[str] = []
    ours = trainers.losses(trainers.ours(kind, model, tmp_path / "ours", tiny_model, say=said.append))
    stock = trainers.losses(trainers.stock(kind, model, tmp_path / "stock", tiny_model))
    assert len(ours) == len(stock) == 20 and abs(ours[0] - ours[-1]) > 0.05, "it learns"
    assert ours == pytest.approx(stock, abs=1e-4)
    assert ("rows are padded, not packed" in said[0]) == (name == "gpt_neo")


def test_losses_of_a_reward_model_are_those_of_stock_trl(tmp_path: Path, tiny_model: Path) -> None:
    model = models.make_classifier()
    said: list[str] = []
    ours = trainers.losses(trainers.ours("reward", model, tmp_path / "ours", tiny_model, say=said.append))
    stock = trainers.losses(trainers.stock("reward", model, tmp_path / "stock", tiny_model))
    assert len(ours) == len(stock) == 20 and abs(ours[0] - ours[-1]) > 0.05, "it learns"
    assert ours == pytest.approx(stock, abs=1e-4)
    assert said[0].startswith("records are packed without padding")
