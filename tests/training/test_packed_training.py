"""Twenty steps of training on packs against stock TRL on padded rows, for several architectures."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from alignment.training.trainers import Packing
from tests.training import models, tiny, trainers
from tests.training.test_trial import ROTARY, UNPACKABLE

pytestmark = pytest.mark.usefixtures("one_thread")
REQUIRED = [
    "llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "gpt2", "phi3", "olmo2", "mixtral", "gpt_neo",
]  # fmt: skip


@pytest.mark.parametrize("kind", ["sft", "dpo"])
@pytest.mark.parametrize("name", REQUIRED)
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


def test_weights_of_pairs_are_those_of_packs_where_rows_are_padded(tmp_path: Path, tiny_model: Path) -> None:
    """WPO's, for which TRL's head has to be asked, as the stage asks it; and they are not 1."""
    from alignment.stages import dpo

    weighs, found = tiny.dpo(weighting="wpo", max_steps=3), []
    for on in (True, False):
        inputs = tiny.write_inputs(tmp_path / str(on), "dpo")
        context = tiny.context(tmp_path / str(on), inputs, weighs, tiny.engine())
        made = dpo.make_trainer

        def unpacked(*given: Any, packing: Packing, made: Any = made, on: bool = on, **more: Any) -> Any:
            return made(*given, packing=replace(packing, on=packing.on and on), **more)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(dpo, "make_trainer", unpacked)
            dpo.run(context)
        lines = (context.folder / "metrics.jsonl").read_text().splitlines()
        found.append([json.loads(line)["loss"] for line in lines])
    assert found[0] == pytest.approx(found[1], abs=1e-5) and abs(found[0][0] - math.log(2)) > 1e-3


def test_losses_of_a_reward_model_are_those_of_stock_trl(tmp_path: Path, tiny_model: Path) -> None:
    model = models.make_classifier()
    said: list[str] = []
    ours = trainers.losses(trainers.ours("reward", model, tmp_path / "ours", tiny_model, say=said.append))
    stock = trainers.losses(trainers.stock("reward", model, tmp_path / "stock", tiny_model))
    assert len(ours) == len(stock) == 20 and abs(ours[0] - ours[-1]) > 0.05, "it learns"
    assert ours == pytest.approx(stock, abs=1e-4)
    assert said[0].startswith("records are packed without padding")


PADDED = "rows are padded, not packed: "


def test_what_is_compiled_for_packs_is_not_for_padded_rows(tmp_path: Path, tiny_model: Path) -> None:
    architecture, settings, reason = UNPACKABLE["gpt_oss"]
    said: list[str] = []
    packing = Packing(compile=True)
    trainer = trainers.ours(
        "sft", models.make(architecture, settings), tmp_path, tiny_model, steps=1, packing=packing, say=said.append
    )
    trainers.losses(trainer)
    assert said == [PADDED + reason, "engine.compile is ignored: layers are compiled for packs, not for padded rows"]
    assert trainer.packing == Packing(on=False)


@pytest.mark.parametrize("kind", ["sft", "dpo", "reward"])
def test_the_longest_row_decides_about_rotary_frequencies(kind: str, tmp_path: Path, tiny_model: Path) -> None:
    """A row of a pair, not the pair."""
    rows = {
        "sft": lambda row: [row["input_ids"]],
        "dpo": lambda row: [row["prompt_ids"] + row[name] for name in ("chosen_ids", "rejected_ids")],
        "reward": lambda row: [row["prompt_ids"] + row[name] for name in ("chosen_ids", "rejected_ids")],
    }[kind]
    longest = max(len(one) for row in trainers.ROWS[kind]() for one in rows(row))
    architecture, settings, _ = ROTARY["dynamic"]
    for window in (longest - 1, longest):
        settings = {**settings, "max_position_embeddings": window}
        model = (
            models.make_classifier(**{k: v for k, v in settings.items() if k != "pad_token_id"})
            if kind == "reward"
            else models.make(architecture, settings)
        )
        said: list[str] = []
        trainers.losses(trainers.ours(kind, model, tmp_path / str(window), tiny_model, steps=1, say=said.append))
        assert said[0].startswith(PADDED + "its rotary") == (window < longest), said


def test_where_one_process_cannot_pack_nobody_attends_to_packs(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """This one can, and must be left as it was: padded rows come without a layout."""
    monkeypatch.setattr("alignment.training.trainers.all_gather", lambda mine: [mine, "out of memory"])
    said: list[str] = []
    trainer = trainers.ours("sft", models.make(*models.PACKABLE["llama"]), tmp_path, tiny_model, 1, say=said.append)
    trainers.losses(trainer)
    assert said == [PADDED + "out of memory"]
