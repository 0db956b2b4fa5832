"""DPO's memory; docs/pains.md, 14 and 15."""

from __future__ import annotations

import copy
import dataclasses
import json
import re
from pathlib import Path
from typing import NamedTuple

import pytest
from accelerate.commands.estimate import estimate_training_usage
from transformers import AutoTokenizer

from alignment.errors import MachineError
from tests.conftest import Command
from tests.pains import stock
from tests.training import models, tiny, trainers
from tests.training.held import Alive
from tests.training.test_health import refuse
from tests.training.test_stages import run

WORDS = 8000  # of the vocabulary: with it logits take most of the memory, as they do in models of 0.5B


class Peaks(NamedTuple):
    """Most bytes at once of two steps of DPO on the same four pairs, the model's own 1 MB among them."""

    theirs: int
    ours: int
    weights: int
    second_model: tuple[bool, bool]  # TRL's trainer, ours


@pytest.fixture(scope="module")
def peaks(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Peaks:
    folder, tokenizer = tmp_path_factory.mktemp("peaks"), AutoTokenizer.from_pretrained(tiny_model)
    model = models.make("llama", {**models.SMALL, "vocab_size": WORDS, "tie_word_embeddings": True}, scale=2.0)
    pairs = [{"prompt": "q" * 80 + str(n), "chosen": "yes" * (1 + n), "rejected": "no" * 8} for n in range(4)]
    with Alive() as theirs:
        made = stock.trainer("dpo", tokenizer, pairs, folder, model, max_steps=2, per_device_train_batch_size=4)
        made.train()
    rows = [{name: row[name] for name in ("prompt_ids", "chosen_ids", "rejected_ids")} for row in made.train_dataset]
    with Alive() as ours:
        own = trainers.ours("dpo", copy.deepcopy(model), folder, tiny_model, steps=2, budget=10_000, rows=rows)
        own.batches = dataclasses.replace(own.batches, global_batch_size=4)
        own.train()
    weights = 4 * sum(parameter.numel() for parameter in model.parameters())
    return Peaks(theirs.most, ours.most, weights, (made.ref_model is not None, own.ref_model is not None))


def test_llama_factory_7833_dpo_out_of_memory(peaks: Peaks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """TRL holds a second model and, on a CPU, scores every token of both padded sides; on a GPU those with a label, in
    tiles."""
    assert peaks.theirs > 4 * peaks.ours
    assert peaks.second_model == (True, False)

    refuse(monkeypatch, above=40)
    with pytest.raises(MachineError, match="out of memory: 120 tokens a micro-batch take about") as caught:
        run(tmp_path, tiny.dpo())
    order = ["engine.tokens_per_micro_batch=60", "engine.gradient_checkpointing=true", "engine=zero3", "LoRA of rank 8"]
    places = [str(caught.value).index(one) for one in order]
    assert places == sorted(places) and len(re.findall(r"about [\d.]+ [MG]B", str(caught.value))) == 5


@pytest.mark.slow
def test_axolotl_848_no_estimate_before_launch(
    peaks: Peaks, tmp_path: Path, tiny_settings: list[str], command: Command
) -> None:
    """accelerate's estimate knows the weights alone; here rows, micro-batch and engine count, and what will not fit is
    refused before anything is queued."""
    told = max(estimate_training_usage(peaks.weights, "float32").values())
    assert told == 4 * peaks.weights < peaks.theirs / 10

    splits = ("stage.prepare_sft.splits.heldout=4", "stage.prepare_sft.splits.prompts=4")
    cluster = ("launcher=slurm", "launcher.processes=1", "hardware=h100", "hardware.memory_gb=0.01")
    done = command(tmp_path / "store", "check", "pipeline=sft", *tiny_settings, *splits, *cluster, "--json", code=4)
    found = {one["check"]: one for one in json.loads(done.stdout)["findings"]}["memory sft"]
    assert found["state"] == "failed" and found["facts"]["total"] > 0.01e9 > found["facts"]["activations"] > 0
