from __future__ import annotations

from pathlib import Path

import pytest
import torch

from alignment.config.stages.training import Lora
from alignment.errors import TrainingError
from alignment.training.model import check_whole, load, lora_config


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_model_in_training_has_no_dropout_and_keeps_its_configuration(kind: str, tmp_path: Path) -> None:
    """Llama's attention takes the probability as a number, GPT-2 has Dropout modules: both must be off."""
    from transformers import AutoConfig, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    small = {"vocab_size": 64, "bos_token_id": 0, "eos_token_id": 1}
    if kind == "llama":
        sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
        LlamaForCausalLM(LlamaConfig(**small, **sizes, attention_dropout=0.5)).save_pretrained(tmp_path)
    else:
        GPT2LMHeadModel(GPT2Config(**small, n_embd=32, n_layer=1, n_head=2)).save_pretrained(tmp_path)
    model = load(tmp_path).train()
    ids = torch.arange(12).view(1, -1)
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, model(ids).logits, rtol=0, atol=0)
    model.save_pretrained(tmp_path / "again")
    kept = AutoConfig.from_pretrained(tmp_path / "again")
    assert (kept.attention_dropout if kind == "llama" else kept.resid_pdrop) == (0.5 if kind == "llama" else 0.1)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({}, "nothing was trained"),
        ({"a": torch.ones(2), "b": torch.ones(0)}, "b has no elements"),
        ({"a": torch.tensor([1.0, float("inf")])}, "a has values that are NaN or infinite"),
    ],
)
def test_weights_that_are_not_whole_are_never_written(weights: dict[str, torch.Tensor], message: str) -> None:
    with pytest.raises(TrainingError, match=message):
        check_whole(weights)


@pytest.mark.parametrize(("targets", "adapters"), [("q_proj", 1), (["q_proj", "v_proj"], 2), ("all-linear", 7)])
def test_one_target_may_be_named_without_a_list(targets: str | list[str], adapters: int) -> None:
    """PEFT takes a text other than all-linear for a pattern over whole paths, and finds nothing."""
    from peft import get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes))
    lora = Lora(rank=2, alpha=4.0, dropout=0.0, target_modules=targets)
    adapted = get_peft_model(model, lora_config(lora, model))
    assert sum("lora_A" in name for name, _ in adapted.named_parameters()) == adapters
