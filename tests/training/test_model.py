from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from alignment.errors import ConfigError, TrainingError
from alignment.training.model import check_whole, count_parameters, load, lora_config
from tests.training import tiny


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
    lora = tiny.lora(rank=2, target_modules=targets)
    adapted = get_peft_model(model, lora_config(lora, model))
    assert sum("lora_A" in name for name, _ in adapted.named_parameters()) == adapters


def llama(**more: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(1)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes, **more))


@pytest.mark.parametrize("init", ["kaiming", "gaussian", "orthogonal"])
@pytest.mark.parametrize("dora", [False, True])
def test_an_adapter_begins_at_the_start_model(init: str, dora: bool) -> None:
    """B A is zero, and DoRA's magnitudes are the lengths of the rows: the same logits to rounding, 1e-5."""
    from peft import get_peft_model

    model, ids = llama(), torch.arange(12)[None]
    with torch.no_grad():
        plain = model(ids).logits
        adapted = get_peft_model(model, lora_config(tiny.lora(init=init, dora=dora), model))
        torch.testing.assert_close(adapted(ids).logits, plain, atol=1e-5, rtol=0)
        with adapted.disable_adapter():
            torch.testing.assert_close(adapted(ids).logits, plain, atol=0, rtol=0)


@pytest.mark.parametrize(("rslora", "dora"), [(True, False), (False, True), (True, True)])
def test_variants_compute_what_their_papers_say(rslora: bool, dora: bool) -> None:
    """Of one layer, rank 4 and alpha 8: W' = W + s B A with s = 8 / 4 = 2, rsLoRA 8 / sqrt(4) = 4; DoRA (equation 5)
    then scales each row of W' to the length m. With m twice the start's lengths: 2 |W_i| W'_i / |W'_i|."""
    from peft import get_peft_model

    model = llama()
    weight = model.model.layers[0].self_attn.q_proj.weight.detach().clone()
    adapted = get_peft_model(model, lora_config(tiny.lora(target_modules="q_proj", rslora=rslora, dora=dora), model))
    layer = adapted.get_base_model().model.layers[0].self_attn.q_proj
    with torch.no_grad():
        layer.lora_B["default"].weight.normal_()
        moved = weight + (4.0 if rslora else 2.0) * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
        if dora:
            layer.lora_magnitude_vector["default"].weight.mul_(2)
            moved = 2 * weight.norm(dim=1, keepdim=True) * moved / moved.norm(dim=1, keepdim=True)
        inputs = torch.randn(3, 32)
        torch.testing.assert_close(layer(inputs), inputs @ moved.T, atol=1e-5, rtol=1e-5)
        merged = adapted.merge_and_unload().model.layers[0].self_attn.q_proj.weight
        torch.testing.assert_close(merged, moved, atol=1e-5, rtol=1e-5)


def test_a_module_trained_whole_is_named_by_its_whole_name() -> None:
    """PEFT takes every module whose name ends so: `norm` would be all norms."""
    model = llama()
    assert lora_config(tiny.lora(modules_to_save=["norm"]), model).modules_to_save == ["model.norm"]
    layers = ["model.layers.0.input_layernorm", "model.layers.1.input_layernorm"]
    assert lora_config(tiny.lora(modules_to_save=["input_layernorm"]), model).modules_to_save == layers
    assert lora_config(tiny.lora(modules_to_save=["layers.1.input_layernorm"]), model).modules_to_save == layers[1:]


@pytest.mark.parametrize(
    ("name", "tied", "why"),
    [
        ("nrom", False, "the model has no module `nrom` .did you mean `norm`"),
        ("wte", False, "the model has no module `wte` .some of .*embed_tokens, .*norm"),
        ("q_proj", False, "`q_proj` has an adapter: target_modules is all-linear"),
        ("mlp", False, "`mlp` has parts of its own, or no weights"),
        ("lm_head", True, "`lm_head` shares its weights"),
        ("embed_tokens", True, "`embed_tokens` shares its weights"),
    ],
)
def test_a_module_that_cannot_be_trained_whole_is_refused(name: str, tied: bool, why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        lora_config(tiny.lora(modules_to_save=[name]), llama(tie_word_embeddings=tied))


@pytest.mark.parametrize("name", ["model.norm", "lm_head", "embed_tokens", "q_proj"])
def test_weights_of_whole_modules_are_counted_as_peft_trains_them(name: str, tmp_path: Path) -> None:
    from peft import get_peft_model

    model = llama(tie_word_embeddings=False)
    model.save_pretrained(tmp_path)
    lora = tiny.lora(target_modules="k_proj", modules_to_save=[name])
    alone = get_peft_model(
        llama(), lora_config(tiny.lora(target_modules="k_proj"), model)
    ).get_nb_trainable_parameters()
    both = get_peft_model(model, lora_config(lora, model)).get_nb_trainable_parameters()
    assert count_parameters(tmp_path, [name]) == both[0] - alone[0]
