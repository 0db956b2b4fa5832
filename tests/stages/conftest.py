"""Contexts for stages that answer, judge and compare: shipped settings, a sharp tiny model, rows by hand."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from alignment.config.compose import compose
from alignment.files import write_jsonl
from alignment.stages.context import StageContext
from tests.conftest import write_tiny_model
from tests.generation.conftest import sharpen

QUESTIONS = ["Who are you?", "Hi", "Name a colour, please", "1 + 1", "What is love?"]
MakeContext = Callable[..., StageContext]


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Results of two stages, each with a model/: `start`, and `sft`, which is another."""
    folder = tmp_path_factory.mktemp("models")
    for name in ("start", "sft"):
        write_tiny_model(folder / name / "model")
    sharpen(folder / "sft" / "model")
    return {name: folder / name for name in ("start", "sft")}


@pytest.fixture(scope="session")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The result of a prepare stage: five prompts, and the same five with a reference answer."""
    folder = tmp_path_factory.mktemp("rows")
    prompts = [
        {"id": f"row-{i}", "prompt": [{"role": "user", "content": text}], "reference": f"Well, {text.lower()}"}
        for i, text in enumerate(QUESTIONS)
    ]
    write_jsonl(folder / "prompts.jsonl", prompts)
    write_jsonl(folder / "heldout.jsonl", prompts)
    return folder


@pytest.fixture
def make_context(tmp_path: Path) -> MakeContext:
    """make_context(stage, inputs, name=..., **changed settings) -> a context in a folder of its own."""

    def make(stage: str, inputs: dict[str, Path], name: str | None = None, **changes: Any) -> StageContext:
        overrides = [f"stage.{stage}.{key}={value}" for key, value in changes.items()]
        experiment = compose(["pipeline=sft_sample_dpo", "reward=sentiment", *overrides])
        folder = tmp_path / (name or stage)
        folder.mkdir()
        return StageContext(
            name=name or stage, run="test", key="0" * 64, folder=folder,
            settings=experiment.stage[stage], experiment=experiment, inputs=inputs,
        )  # fmt: skip

    return make
