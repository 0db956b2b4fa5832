"""What is found before the first step: which models pack, and why the others do not."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig

from alignment.training import trial as trial_module
from alignment.training.attention import KERNELS, WORDS, Call
from alignment.training.shared_prefix import install
from alignment.training.trial import Trial, refusal, trial
from tests.training import models

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = torch.device("cpu")


def tried(model: Any, branches: int = 2, engine: Any = None) -> Trial:
    return trial(model, engine or model, branches, torch.float32, CPU)


@pytest.mark.parametrize("branches", [1, 2])
@pytest.mark.parametrize("name", list(models.PACKABLE))
def test_the_trial_finds_nothing_wrong_with_models_that_pack(name: str, branches: int) -> None:
    model = models.packing_model(name)
    attention = model.config._attn_implementation
    assert refusal(model.config, longest=100) is None
    assert tried(model, branches) == Trial(None, WORDS["cpu"])
    assert model.config._attn_implementation == attention


@pytest.mark.parametrize("pad", [0, 5, 259])
def test_the_trial_finds_nothing_wrong_with_a_classifier(pad: int) -> None:
    """Padded, it finds the end of a row by the padding token: the trial's rows must be filled with that."""
    model = models.make_classifier(pad)
    install(model)
    assert tried(model).reason is None


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
    reasons = refusal(model.config, 100), tried(model).reason
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
    reason = refusal(config, 100)
    assert reason is None if said is None else said in str(reason)


def test_a_window_that_does_not_reach_attention_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """4096 tokens: the trial's rows are too short to show it; the calls do."""
    import transformers.models.mistral.modeling_mistral as mistral

    architecture, settings = models.PACKABLE["mistral"]
    wide = {**settings, "sliding_window": 4096}
    whole = models.ready(models.make(architecture, wide))
    assert tried(whole).reason is None
    stock = mistral.MistralAttention.forward

    def deaf(self: Any, *given: Any, **named: Any) -> Any:
        kept, self.config.sliding_window = self.config.sliding_window, None
        try:
            return stock(self, *given, **named)
        finally:
            self.config.sliding_window = kept

    monkeypatch.setattr(mistral.MistralAttention, "forward", deaf)
    model = models.ready(models.make(architecture, wide))
    assert tried(model).reason == "its sliding window of 4096 tokens does not reach its attention"


def calls(*windows: int | None) -> list[Call]:
    return [Call(window, "cpu") for window in windows]


def test_layers_that_attend_elsewhere_are_noticed() -> None:
    config = SimpleNamespace(num_hidden_layers=3, sliding_window=None)
    few = "2 of its 3 layers attend through transformers' table"
    assert trial_module._overlooked(calls(None, None), config) == few
    assert trial_module._overlooked(calls(None, None, None), config) is None


@pytest.mark.parametrize(
    ("windows", "said"),
    [
        ((7, None, 7), None),
        ((7, None, None), "its sliding window of 7 tokens does not reach the attention of layer 3"),
        ((None, 7, 7), "its sliding window of 7 tokens does not reach the attention of layer 1"),
        ((7, 7, 7), "its layer 2 attends through a window of 7 tokens, though it is said to have none"),
        ((9, None, 7), "its sliding window of 7 tokens does not reach the attention of layer 1"),
    ],
)
def test_each_layer_has_its_own_window(windows: tuple[int | None, ...], said: str | None) -> None:
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    config = SimpleNamespace(num_hidden_layers=3, sliding_window=7, layer_types=kinds)
    assert trial_module._overlooked(calls(*windows), config) == said


# --- how the trial is made --------------------------------------------------------------------------------------------


class Engine:
    """Calls the model; shifts its padded answers by `padded` where they are wider than the first, packed ones by
    `packed`."""

    def __init__(self, model: Any, padded: float = 0.0, packed: float = 0.0) -> None:
        self.model, self.padded, self.packed, self.width = model, padded, packed, 0

    def __call__(self, **given: Any) -> Any:
        answer, width = self.model(**given), given["input_ids"].shape[1]
        self.width = self.width or width
        shift = self.packed if "pack" in given else self.padded if width > self.width else 0.0
        return SimpleNamespace(log_probs=answer.log_probs + shift)


@pytest.mark.parametrize(
    ("padded", "packed", "packs"),
    [
        (0.0, 1e-5, True),  # the floor, 2e-5
        (0.0, 4e-5, False),
        (1e-4, 3e-4, True),  # four times its own 1e-4
        (1e-4, 5e-4, False),
        (1.0, 4e-3, True),  # the cap, 5e-3
        (1.0, 6e-3, False),
    ],
)
def test_a_model_that_rounds_more_may_differ_more_up_to_a_cap(padded: float, packed: float, packs: bool) -> None:
    model = models.packing_model("llama")
    assert (tried(model, engine=Engine(model, padded, packed)).reason is None) == packs


@pytest.mark.parametrize("branches", [1, 2])
@pytest.mark.parametrize("name", list(models.PACKABLE))
def test_what_a_wrong_mask_gives_is_beyond_the_cap(name: str, branches: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every token sees all tokens before it in the pack; the model's own rounding is made out to be as large."""
    from alignment.training.packing import Segment, pack

    def leaking(*given: Any, **how: Any) -> Any:
        made = pack(*given, **how)
        made.layout.segments[:] = [Segment(0, made.tokens, 0, 0)]
        return made

    monkeypatch.setattr(trial_module, "pack", leaking)
    model = models.packing_model(name)
    assert "packed it answers" in str(tried(model, branches, Engine(model, padded=1.0)).reason)


def test_a_padded_forward_that_fails_is_the_models_own_error(monkeypatch: pytest.MonkeyPatch) -> None:
    model = models.packing_model("llama")

    def broken(**given: Any) -> Any:
        raise RuntimeError("no such weight")

    with pytest.raises(RuntimeError, match="no such weight"):
        tried(model, engine=broken)


def test_a_forward_that_takes_no_unknown_arguments_is_not_called_with_any(monkeypatch: pytest.MonkeyPatch) -> None:
    model = models.packing_model("llama")
    stock, given = model.model.forward, []

    def strict(input_ids: Any, attention_mask: Any = None, use_cache: bool = True) -> Any:
        given.append(input_ids.shape)
        return stock(input_ids=input_ids, attention_mask=attention_mask, use_cache=use_cache)

    monkeypatch.setattr(model.model, "forward", strict)
    assert tried(model).reason == "its forward does not hand on arguments that it does not know"
    assert given == [(4, 23), (4, 23 + trial_module.WIDER)]


def test_a_failure_in_the_middle_of_a_packed_forward_lets_it_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hooks that an engine has on a module before its forward must meet their partners after it."""
    model, counts = models.packing_model("llama"), Counter[Any]()
    for module in model.modules():
        module.register_forward_pre_hook(lambda module, given: counts.update([(module, "begun")]))
        module.register_forward_hook(lambda module, given, answer: counts.update([(module, "ended")]))

    def broken(*given: Any) -> Tensor:
        raise ValueError("head size 512 is too large\nmore")

    monkeypatch.setitem(KERNELS, "cpu", broken)
    assert tried(model).reason == "ValueError: head size 512 is too large"
    assert counts[model, "begun"] == 3 and len({module for module, _ in counts}) > 10
    assert all(counts[module, "begun"] == counts[module, "ended"] for module, _ in list(counts))


# --- rotary frequencies that follow the length of a call --------------------------------------------------------------

ROTARY = {
    "longrope": ("phi3", {
        **models.SMALL, "original_max_position_embeddings": 64, "rope_parameters": {
            "rope_type": "longrope", "rope_theta": 10_000.0, "short_factor": [1.0] * 4, "long_factor": [2.0] * 4,
        },
    }, 64),
    "dynamic": ("llama", {
        **models.SMALL, "rope_parameters": {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 2.0},
    }, 128),
}  # fmt: skip


@pytest.mark.parametrize("kind", list(ROTARY))
def test_rotary_frequencies_that_follow_the_longest_row_are_refused_beyond_the_first_window(kind: str) -> None:
    architecture, settings, window = ROTARY[kind]
    model = models.ready(models.make(architecture, settings))
    assert refusal(model.config, window) is None and tried(model).reason is None
    assert refusal(model.config, window + 1) == (
        f"its rotary frequencies ({kind}) follow the longest row of a micro-batch beyond {window} tokens"
    )


@pytest.mark.parametrize("kind", list(ROTARY))
def test_the_answer_of_such_a_model_depends_on_its_neighbours(kind: str) -> None:
    """Why they are refused: stock, a short row's log-probs change when a row beyond the window is beside it."""
    architecture, settings, window = ROTARY[kind]
    model = models.ready(models.make(architecture, settings))
    short, neighbour, long = (torch.arange(count) % 250 + 5 for count in (20, window, window + 1))
    with torch.no_grad():
        answers = [
            model(**models.together([short, other]), use_cache=False, fused_lm_head=True).log_probs[0, :19]
            for other in (short, neighbour, long)
        ]
    torch.testing.assert_close(answers[0], answers[1], rtol=0, atol=1e-5)
    assert float((answers[0] - answers[2]).abs().max()) > 1e-3


def test_frequencies_of_each_kind_of_layer_are_looked_at() -> None:
    config = AutoConfig.for_model("llama", **models.SMALL)
    config.rope_parameters = {
        "full_attention": {"rope_type": "longrope", "original_max_position_embeddings": 16},
        "sliding_attention": {"rope_type": "default"},
    }
    assert refusal(config, 16) is None and "(longrope)" in str(refusal(config, 17))


@pytest.mark.parametrize("scored", [True, False])
@pytest.mark.parametrize("branches", [1, 2])
def test_the_trials_rows_leave_something_out_of_the_last_layer(branches: int, scored: bool) -> None:
    """Else its short cut would be tried by the first step."""
    _, made = trial_module.trial_rows(260, CPU, branches, scored=scored)
    assert made.layout.read is not None and len(made.layout.read) < made.tokens - 4
    assert any(segment.unread for segment in made.layout.segments)
    assert bool(len(made.targets)) == scored


def test_a_last_layer_that_cannot_be_cut_short_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """An MLP that adds a number of each token of the whole call, say."""
    model = models.packing_model("llama")
    mlp = model.model.layers[-1].mlp
    stock = mlp.whole_forward
    mlp.whole_forward = lambda hidden: stock(hidden) + 0.1 * torch.arange(hidden.shape[1])[None, :, None]
    assert "packed it answers" in str(tried(model).reason)
