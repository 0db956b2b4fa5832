"""DPO's memory; docs/pains.md, 14 and 15."""

from __future__ import annotations

import copy
import dataclasses
import re
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from alignment.errors import MachineError
from tests.pains import stock
from tests.training import models, tiny, trainers
from tests.training.held import Alive
from tests.training.test_health import refuse
from tests.training.test_stages import run

WORDS = 8000  # of the vocabulary: with it logits take most of the memory, as they do in models of 0.5B


def test_llama_factory_7833_dpo_out_of_memory(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Most bytes at once, of the model on. TRL holds a second model and, on a CPU, scores every token of both padded
    sides; on a GPU those with a label, in tiles."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    model = models.make("llama", {**models.SMALL, "vocab_size": WORDS, "tie_word_embeddings": True}, scale=2.0)
    pairs = [{"prompt": "q" * 80 + str(n), "chosen": "yes" * (1 + n), "rejected": "no" * 8} for n in range(4)]
    with Alive() as theirs:
        made = stock.trainer("dpo", tokenizer, pairs, tmp_path, model, max_steps=2, per_device_train_batch_size=4)
        made.train()
    rows = [{name: row[name] for name in ("prompt_ids", "chosen_ids", "rejected_ids")} for row in made.train_dataset]
    with Alive() as ours:
        own = trainers.ours("dpo", copy.deepcopy(model), tmp_path, tiny_model, steps=2, budget=10_000, rows=rows)
        own.batches = dataclasses.replace(own.batches, global_batch_size=4)
        own.train()
    assert ours.most < theirs.most / 4, (ours.most, theirs.most)
    assert own.ref_model is None and made.ref_model is not None

    refuse(monkeypatch, above=40)
    with pytest.raises(MachineError, match="out of memory: 120 tokens a micro-batch take about") as caught:
        run(tmp_path, tiny.dpo())
    advice = [
        "engine.tokens_per_micro_batch=60",
        "engine.gradient_checkpointing=true",
        "engine=zero3",
        "LoRA of rank 8",
    ]
    places = [str(caught.value).index(one) for one in advice]
    assert places == sorted(places) and len(re.findall(r"about [\d.]+ [MG]B", str(caught.value))) == 5
