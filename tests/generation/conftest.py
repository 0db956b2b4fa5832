"""A tiny model whose answers differ: random weights made sharp, so that arg max and tokens have a clear margin."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from alignment import generation
from tests.conftest import write_tiny_model

STOPS = [1, *range(10, 60)]  # the end-of-turn token, and 50 letters: a fifth of the vocabulary, so that answers end


def sharpen(folder: Path) -> None:
    """Random weights of standard deviation 0.02 say next to nothing: ten times as much."""
    model, _ = generation.load(folder, "fp32")
    with torch.no_grad():
        for name, weights in model.named_parameters():
            if "norm" not in name:
                weights.mul_(10)
    model.save_pretrained(folder)


@pytest.fixture(scope="session")
def sharp_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_tiny_model(tmp_path_factory.mktemp("sharp"))
    sharpen(folder)
    return folder


@pytest.fixture
def loaded(sharp_model: Path) -> tuple[Any, Any]:
    """(model, tokenizer) that stop at any of STOPS."""
    model, tokenizer = generation.load(sharp_model, "fp32")
    model.generation_config.eos_token_id = STOPS
    return model, tokenizer
