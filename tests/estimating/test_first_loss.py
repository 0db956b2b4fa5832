"""DPO's loss before its first update: what the product's loss makes of a small model of the same architecture."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPTJConfig, Qwen2Config, Qwen3Config

from alignment.errors import InputError
from alignment.estimating.first_loss import AT_ZERO, first_loss
from tests.estimating.test_memory import llama
from tests.training import tiny

ROWS = tiny.pair_rows(6)
CONFIGS: dict[str, Any] = {
    "llama": llama(),
    "gpt2": GPT2Config(vocab_size=300, n_embd=96, n_head=6, n_layer=3),
    "qwen2": Qwen2Config(hidden_size=96, num_attention_heads=6, num_key_value_heads=2, num_hidden_layers=5),
    "qwen3": Qwen3Config(hidden_size=96, num_attention_heads=6, num_key_value_heads=2, num_hidden_layers=5),
}


@pytest.mark.parametrize("lora", [None, tiny.LORA], ids=["whole", "adapters"])
@pytest.mark.parametrize("kind", CONFIGS)
def test_it_is_ln_2_whatever_the_architecture(kind: str, lora: Any) -> None:
    found = first_loss(tiny.dpo(lora=lora), CONFIGS[kind], ROWS)
    assert found is not None and found.fits
    assert found.expected == math.log(2) and found.found == pytest.approx(math.log(2), abs=1e-4)


def test_an_architecture_of_which_no_small_model_is_made_is_said() -> None:
    with pytest.raises(InputError, match="no small model of this architecture"):
        first_loss(tiny.dpo(), GPTJConfig(), ROWS)


@pytest.mark.parametrize("name", AT_ZERO)
def test_what_losses_are_by_hand_is_what_the_objective_makes_of_them(name: str) -> None:
    """ipo: (0 - 1 / (2 beta))^2 = 25 with beta = 0.1; hinge: 1."""
    found = first_loss(tiny.dpo(loss=name, beta=0.1), llama(), ROWS)
    assert found is not None and found.expected == AT_ZERO[name](0.1) == pytest.approx(found.found, abs=1e-4)
    assert {"ipo_mean": 25.0, "hinge": 1.0}.get(name, found.expected) == pytest.approx(found.expected)


def test_a_loss_that_nothing_is_known_of_is_held_to_adapters_alone() -> None:
    whole, adapted = (first_loss(tiny.dpo(loss="discopop", lora=lora), llama(), ROWS) for lora in (None, tiny.LORA))
    assert whole is not None and whole.expected is None and whole.fits
    assert adapted is not None and adapted.expected == pytest.approx(whole.found, abs=1e-4)
    two = first_loss(tiny.dpo(loss={"sigmoid": 1.0, "hinge": 0.5}), llama(), ROWS)
    assert two is not None and two.expected == pytest.approx(math.log(2) + 0.5)


def test_losses_without_a_reference_or_of_whole_batches_are_left_out() -> None:
    assert first_loss(tiny.dpo(loss="simpo"), llama(), ROWS) is None
    assert first_loss(tiny.dpo(loss="aot"), llama(), ROWS) is None


def test_adapters_that_do_not_begin_as_nothing_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    from peft.tuners.lora import LoraLayer

    before = LoraLayer.reset_lora_parameters

    def spoiled(self: Any, name: str, *how: Any) -> None:
        before(self, name, *how)
        torch.nn.init.normal_(self.lora_B[name].weight, std=5.0)

    monkeypatch.setattr(LoraLayer, "reset_lora_parameters", spoiled)
    found = first_loss(tiny.dpo(lora=tiny.LORA, beta=1.0), llama(), ROWS)
    assert found is not None and not found.fits
