"""Packs of many architectures against their padded rows: the same log-probs, the same gradients, no leak; and models
that cannot be packed, which are computed padded."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from alignment.training import shared_prefix
from alignment.training.attention import PACKED
from alignment.training.packing import Layout, Segment
from alignment.training.shared_prefix import differs, install, refusal
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


@pytest.mark.parametrize("name", ["llama", "gemma3", "qwen3", "mixtral"])
def test_adapters_are_trained_through_packs_as_through_padded_rows(name: str) -> None:
    """In the order of the trainer: TRL's head, adapters, then `install` on the model inside them."""
    from peft import LoraConfig, get_peft_model
    from trl.trainer.utils import add_fused_lm_head

    plain, batch = models.make(*models.PACKABLE[name]), models.rows(2)
    add_fused_lm_head(plain, outputs=("log_probs", "entropy", "is_top1"))
    model = get_peft_model(plain, LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "v_proj", "o_proj"]))
    with torch.no_grad():
        for part, parameter in model.named_parameters():
            if "lora_B" in part:
                parameter.normal_(std=0.3)
    install(model.get_base_model())
    stock = model(**batch, use_cache=False, fused_lm_head=True)
    wanted = models.gradients(model, models.weighted(stock.log_probs))
    model.get_base_model().set_attn_implementation(PACKED)
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


# --- what the trial finds ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("branches", [1, 2])
@ARCHITECTURES
def test_the_trial_finds_nothing_wrong_with_models_that_pack(name: str, branches: int) -> None:
    model = models.packing_model(name)
    assert refusal(model.config) is None
    assert differs(model, model, branches, torch.float32) is None
    assert model.config._attn_implementation == PACKED


@pytest.mark.parametrize("pad", [0, 5, 259])
def test_the_trial_finds_nothing_wrong_with_a_classifier(pad: int) -> None:
    """Padded, it finds the end of a row by the padding token: the trial's rows must be filled with that."""
    model = models.make_classifier(pad)
    install(model)
    assert differs(model, model, 2, torch.float32) is None


UNPACKABLE: dict[str, tuple[str, dict[str, Any], str]] = {
    "mamba": ("mamba", {
        "vocab_size": 260, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4,
    }, "layers are of a kind that packs do not know"),
    "jamba": ("jamba", {
        **models.SMALL, "num_hidden_layers": 4, "attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 2,
        "use_mamba_kernels": False, "mamba_d_state": 4, "mamba_dt_rank": 4,
    }, "layers are of a kind that packs do not know"),
    "bloom": ("bloom", {"vocab_size": 260, "hidden_size": 32, "n_layer": 2, "n_head": 4}, "packed it answers"),
    "gpt_neo": ("gpt_neo", {
        "vocab_size": 260, "hidden_size": 32, "num_layers": 2, "num_heads": 4, "window_size": 7,
        "attention_types": [[["global", "local"], 1]], "max_position_embeddings": 128, "bos_token_id": 1,
        "eos_token_id": 1,
    }, "packed it answers"),
    "gpt_oss": ("gpt_oss", {
        **models.SMALL, "head_dim": 8, "sliding_window": 7, "num_local_experts": 4, "num_experts_per_tok": 2,
    }, "its attention uses s_aux"),
    "stablelm": ("stablelm", models.SMALL, "does not hand the layout of a pack to its attention"),
}  # fmt: skip


@pytest.mark.parametrize("name", list(UNPACKABLE))
def test_models_that_do_not_pack_say_why_in_one_line_and_go_on_as_before(name: str) -> None:
    """Layers with a state (Mamba, Jamba), attention outside transformers' table (Bloom, GPT-Neo), sinks (gpt-oss), a
    layer that keeps keyword arguments to itself (StableLM)."""
    architecture, settings, said = UNPACKABLE[name]
    model, batch = models.ready(models.make(architecture, settings)), models.rows(2)
    attention = model.config._attn_implementation
    with torch.no_grad():
        before = model(**batch, use_cache=False, fused_lm_head=True).log_probs
    reasons = refusal(model.config), differs(model, model, 2, torch.float32)
    found = reasons[0] or reasons[1]
    assert found and said in found and "\n" not in found and reasons[1]
    assert model.config._attn_implementation == attention
    with torch.no_grad():
        assert torch.equal(model(**batch, use_cache=False, fused_lm_head=True).log_probs, before)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (
            SimpleNamespace(layer_types=["full_attention", "linear_attention"]),
            "its linear_attention layers are of a kind",
        ),
        (SimpleNamespace(layer_types=["sliding_attention", "conv"]), "its conv layers are of a kind"),
        (SimpleNamespace(is_encoder_decoder=True), "it is an encoder-decoder"),
        (SimpleNamespace(attention_chunk_size=8), "its attention is cut into chunks"),
        (SimpleNamespace(layer_types=["full_attention", "sliding_attention"], attention_chunk_size=None), None),
    ],
)
def test_configurations_of_models_that_never_pack_are_known(config: Any, said: str | None) -> None:
    config.get_text_config = lambda: config
    reason = refusal(config)
    assert reason is None if said is None else said in str(reason)


def test_a_window_that_does_not_reach_attention_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """4096 tokens: the trial's rows are too short to show it; the calls do."""
    import transformers.models.mistral.modeling_mistral as mistral

    architecture, settings = models.PACKABLE["mistral"]
    wide = {**settings, "sliding_window": 4096}
    whole = models.ready(models.make(architecture, wide))
    assert differs(whole, whole, 2, torch.float32) is None
    stock = mistral.MistralAttention.forward

    def deaf(self: Any, *given: Any, **named: Any) -> Any:
        kept, self.config.sliding_window = self.config.sliding_window, None
        try:
            return stock(self, *given, **named)
        finally:
            self.config.sliding_window = kept

    monkeypatch.setattr(mistral.MistralAttention, "forward", deaf)
    model = models.ready(models.make(architecture, wide))
    attention = model.config._attn_implementation
    assert differs(model, model, 2, torch.float32) == "its sliding window of 4096 tokens does not reach its attention"
    assert model.config._attn_implementation == attention


def test_layers_that_attend_elsewhere_are_noticed() -> None:
    config = SimpleNamespace(num_hidden_layers=3, sliding_window=None)
    assert shared_prefix._overlooked([None, None], config) == ("2 of its 3 layers attend through transformers' table")
    assert shared_prefix._overlooked([None] * 3, config) is None
