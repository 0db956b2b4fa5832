"""Packs of many architectures against their padded rows: the same log-probs, the same gradients, no leak."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from alignment.training.attention import PACKED
from alignment.training.packing import Layout, Segment
from alignment.training.shared_prefix import HeadScaling, compile_layers, decoder_layers, install
from tests.training import models

ARCHITECTURES = pytest.mark.parametrize("name", list(models.PACKABLE))


pytestmark = pytest.mark.usefixtures("one_thread")


# --- the same numbers -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("branches", [1, 2, 4])
@ARCHITECTURES
def test_packs_give_what_padded_rows_give(name: str, branches: int) -> None:
    """Stock: TRL's fused head on padded rows, attention as transformers chooses it."""
    model, batch = models.packing_model(name), models.rows(branches)
    stock = model(**batch, use_cache=False, fused_lm_head=True)
    wanted = models.gradients(model, models.weighted(stock.log_probs))
    model.set_attn_implementation(PACKED)
    pack = models.packed(batch, branches)
    ours = model(**batch, use_cache=False, fused_lm_head=True, pack=pack)
    got = models.gradients(model, models.weighted(ours.log_probs))
    assert pack.tokens < batch["input_ids"].numel()
    torch.testing.assert_close(ours.log_probs, stock.log_probs, rtol=0, atol=1e-5)
    torch.testing.assert_close(ours.entropy, stock.entropy, rtol=0, atol=1e-4)
    assert torch.equal(ours.is_top1, stock.is_top1) and torch.equal(ours.label_mask, stock.label_mask)
    assert ours.loss.item() == pytest.approx(stock.loss.item(), abs=1e-5)
    assert models.apart(got, wanted) <= 1e-4


@ARCHITECTURES
def test_the_models_of_these_tests_would_show_a_leak(name: str) -> None:
    """If every token saw all tokens before it in the pack, the log-probs would be far from right."""
    model, batch = models.packing_model(name), models.rows(2)
    model.set_attn_implementation(PACKED)
    pack = models.packed(batch, 2)
    leaking = dataclasses.replace(pack, layout=Layout([Segment(0, pack.tokens, 0, 0)]))
    with torch.no_grad():
        assert float((model(pack=pack).log_probs - model(pack=leaking).log_probs).abs().max()) > 0.05


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("mistral", {"sliding_window": None}),
        ("gemma2", {"sliding_window": 100}),
        ("gemma2", {"attn_logit_softcapping": None}),
        ("gemma2", {"final_logit_softcapping": None}),
        ("gemma3", {"sliding_window": 100}),
        ("cohere", {"logit_scale": 1.0}),
        ("granite", {"logits_scaling": 1.0}),
    ],
)
def test_the_models_of_these_tests_would_show_a_setting_overlooked(name: str, change: dict[str, Any]) -> None:
    architecture, settings = models.PACKABLE[name]
    pack = models.packed(models.rows(2), 2)
    answers = []
    for changes in ({}, change):
        model = models.ready(models.make(architecture, {**settings, **changes}))
        model.set_attn_implementation(PACKED)
        with torch.no_grad():
            answers.append(model(pack=pack).log_probs)
    assert float((answers[0] - answers[1]).abs().max()) > 0.05


@pytest.mark.parametrize("branches", [1, 2])
@ARCHITECTURES
def test_another_document_changes_nothing_to_the_bit(name: str, branches: int) -> None:
    """Four groups; every token t of group 1 becomes (t - 3 + 1) mod 257 + 3: other ones, shared as before.
    Mixtral's experts take other tokens beside a document's own, and a matrix product of other height may round
    differently: there, 2e-6."""
    model, batch = models.packing_model(name), models.rows(branches, groups=4)
    model.set_attn_implementation(PACKED)
    others = {part: value.clone() for part, value in batch.items()}
    changed = torch.arange(4 * branches) % 4 == 1
    ids = others["input_ids"]
    ids[changed] = torch.where(others["attention_mask"][changed] == 1, (ids[changed] - 2) % 257 + 3, 0)
    before, after = models.packed(batch, branches), models.packed(others, branches)
    assert before.layout.segments == after.layout.segments and not torch.equal(before.ids, after.ids)
    with torch.no_grad():
        first, second = model(pack=before).log_probs, model(pack=after).log_probs
    assert not torch.equal(first[changed], second[changed])
    if name == "mixtral":
        torch.testing.assert_close(first[~changed], second[~changed], rtol=0, atol=2e-6)
    else:
        assert torch.equal(first[~changed], second[~changed])


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "mixtral"])
def test_checkpointing_gives_the_same_gradients(name: str, reentrant: bool) -> None:
    """The layout reaches layers that are computed a second time."""
    model, pack = models.packing_model(name), models.packed(models.rows(2), 2)
    model.set_attn_implementation(PACKED)
    model.train()
    wanted = models.gradients(model, models.weighted(model(pack=pack).log_probs))
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()  # as Trainer does: a reentrant checkpoint wants an input with a gradient
    got = models.gradients(model, models.weighted(model(pack=pack).log_probs))
    assert models.apart(got, wanted) <= 1e-6


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", ["llama", "gemma3", "qwen3", "mixtral"])
def test_adapters_are_trained_through_packs_as_through_padded_rows(name: str, checkpointing: bool) -> None:
    """In the order of the trainer: TRL's head, adapters, then `install` on the model inside them."""
    from peft import LoraConfig, get_peft_model
    from trl.trainer.utils import add_fused_lm_head

    plain, batch = models.make(*models.PACKABLE[name]), models.rows(2)
    add_fused_lm_head(plain, outputs=("log_probs", "entropy", "is_top1"))
    targets = ["q_proj", "v_proj", "o_proj", *([] if name == "mixtral" else ["down_proj"])]  # experts are no Linear
    model = get_peft_model(plain, LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=targets))
    with torch.no_grad():
        for part, parameter in model.named_parameters():
            if "lora_B" in part:
                parameter.normal_(std=0.3)
    install(model.get_base_model())
    stock = model(**batch, use_cache=False, fused_lm_head=True)
    wanted = models.gradients(model, models.weighted(stock.log_probs))
    model.get_base_model().set_attn_implementation(PACKED)
    if checkpointing:
        model.train()
        model.gradient_checkpointing_enable({"use_reentrant": False})
    pack = models.packed(batch, 2)
    ours = model(**batch, use_cache=False, fused_lm_head=True, pack=pack)
    got = models.gradients(model, models.weighted(ours.log_probs))
    torch.testing.assert_close(ours.log_probs, stock.log_probs, rtol=0, atol=1e-5)
    assert wanted and all("lora" in part for part in wanted) and models.apart(got, wanted) <= 1e-4
    with torch.no_grad(), model.disable_adapter():
        base = model(pack=pack, fused_lm_head=True).log_probs
        model.get_base_model().set_attn_implementation("sdpa")
        padded = model(**batch, use_cache=False, fused_lm_head=True).log_probs
    torch.testing.assert_close(base, padded, rtol=0, atol=1e-5)
    assert not torch.allclose(base, ours.log_probs, atol=0.05), "the adapters matter"


@ARCHITECTURES
def test_bf16_is_near_fp32(name: str) -> None:
    """Rounding to 8 bits: 2e-2 nats in the mean over the scored tokens."""
    model, pack = models.packing_model(name), models.packed(models.rows(2), 2)
    model.set_attn_implementation(PACKED)
    with torch.no_grad():
        exact = model(pack=pack).log_probs
        with torch.autocast("cpu", torch.bfloat16):
            rounded = model(pack=pack).log_probs
    assert rounded.dtype == torch.float32
    assert float((rounded - exact).abs().sum() / len(pack.targets)) <= 2e-2


def test_a_pack_filled_up_to_a_bucket_gives_the_same() -> None:
    model, batch = models.packing_model("llama"), models.rows(2)
    model.set_attn_implementation(PACKED)
    with torch.no_grad():
        plain, filled = (model(pack=models.packed(batch, 2, bucket=bucket)).log_probs for bucket in (1, 64))
    torch.testing.assert_close(plain, filled, rtol=0, atol=1e-6)


def test_nothing_scored_is_a_loss_of_zero_with_a_gradient_of_zero() -> None:
    model, batch = models.packing_model("llama"), models.rows(1)
    batch["labels"][:] = -100
    model.set_attn_implementation(PACKED)
    answer = model(pack=models.packed(batch, 1))
    assert answer.loss.item() == 0 and not answer.log_probs.any()
    assert not any(value.any() for value in models.gradients(model, answer.log_probs.sum()).values())


@pytest.mark.parametrize("share", [True, False])
def test_a_classifier_gives_what_padded_rows_give(share: bool) -> None:
    model, batch = models.make_classifier(), models.rows(2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4.0 if parameter.dim() > 1 else 1.0)
    install(model)
    batch.pop("labels")
    stock = model(**batch, use_cache=False).logits
    wanted = models.gradients(model, models.weighted(stock))
    model.set_attn_implementation(PACKED)
    pack = models.packed({**batch, "labels": batch["input_ids"]}, 2, share=share)
    ours = model(**batch, use_cache=False, pack=pack).logits
    got = models.gradients(model, models.weighted(ours))
    assert ours.shape == (6, 1) and stock.std().item() > 0.05
    torch.testing.assert_close(ours, stock, rtol=0, atol=1e-5)
    assert models.apart(got, wanted) <= 1e-4


# --- the head's scale -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["cohere", "granite", "hyperclovax", "gemma2"])
def test_log_probs_are_those_of_the_models_own_logits(name: str) -> None:
    """Of the model as transformers ships it, which knows nothing of TRL's head."""
    model, batch = models.packing_model(name), models.rows(1)
    with torch.no_grad():
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
        model.set_attn_implementation(PACKED)
        got = model(pack=models.packed(batch, 1)).log_probs
    labels = batch["labels"][:, 1:]
    wanted = torch.log_softmax(logits[:, :-1], -1).gather(2, labels.clamp(min=0)[..., None])[..., 0]
    torch.testing.assert_close(got, wanted.masked_fill(labels == -100, 0), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "fields",
    [
        {}, {"logit_scale": 0.25}, {"logit_scale": 0.0}, {"logit_scale": None, "output_multiplier": 3.0},
        {"lm_head_multiplier": 0.5}, {"output_multiplier": 2.0, "lm_head_multiplier": 0.5}, {"logits_scaling": 4.0},
        {"logit_scale": 0.5, "logits_scaling": 4.0}, {"model_type": "hyperclovax", "logits_scaling": 4.0},
        {"logit_scale": 2.0, "final_logit_softcapping": 30.0},
    ],
    ids=str,
)  # fmt: skip
def test_scale_and_cap_are_those_that_trl_hands_to_its_kernel(
    fields: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    import trl.trainer.utils as trl_utils

    class Asked(Exception):
        pass

    def kernel(*given: Any) -> Any:
        raise Asked(*given[6:8])

    model, batch = models.make(*models.PACKABLE["llama"]), models.rows(1)
    for field, value in fields.items():
        (setattr if field != "model_type" else object.__setattr__)(model.config, field, value)
    trl_utils.add_fused_lm_head(model)
    monkeypatch.setattr(trl_utils._ChunkedLogProbFunction, "apply", kernel)
    with pytest.raises(Asked) as asked:
        model(**batch, fused_lm_head=True)
    ours = HeadScaling.of(model.config)
    assert (ours.softcap, ours.factor) == asked.value.args


# --- layers -----------------------------------------------------------------------------------------------------------


@ARCHITECTURES
def test_the_layers_are_found_by_what_they_are(name: str) -> None:
    model = models.make(*models.PACKABLE[name])
    layers = decoder_layers(model)
    assert len(layers) == model.config.num_hidden_layers and len({type(layer) for layer in layers}) == 1
    assert [part for part in model.modules() if part in layers] == layers, "in their order"


@pytest.mark.parametrize("checkpointing", [False, True])
def test_layers_are_compiled_also_under_checkpointing(checkpointing: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The compiler's front end alone: what it makes of a layer is run as it stands."""
    graphs: list[Any] = []

    def backend(graph: Any, given: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    stock = torch.compile
    monkeypatch.setattr(torch, "compile", lambda call, **how: stock(call, **how, backend=backend))
    torch._dynamo.reset()
    model, pack = models.packing_model("llama"), models.packed(models.rows(2), 2, bucket=64)
    model.set_attn_implementation(PACKED)
    model.train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    wanted = models.gradients(model, models.weighted(model(pack=pack).log_probs))
    assert compile_layers(model) == 2
    got = models.gradients(model, models.weighted(model(pack=pack).log_probs))
    torch._dynamo.reset()
    assert graphs and models.apart(got, wanted) <= 1e-6
