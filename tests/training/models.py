"""Tiny random models of many architectures, rows for them, and the stock padded way of scoring rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification
from trl.trainer.utils import add_fused_lm_head

from alignment.training.packing import Pack, pack
from alignment.training.shared_prefix import install

VOCABULARY = 260
WINDOW = 7  # shorter than most rows
SMALL = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128, "pad_token_id": 0,
    "bos_token_id": None, "eos_token_id": 1,
}  # fmt: skip
GPT = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128, "bos_token_id": 1,
       "eos_token_id": 1}  # fmt: skip
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2, "router_aux_loss_coef": 0.0}
# What packs: name -> (architecture, what its configuration says).
PACKABLE: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {**SMALL, "tie_word_embeddings": True}),
    "mistral": ("mistral", {**SMALL, "sliding_window": WINDOW}),
    "qwen2": ("qwen2", SMALL),
    "qwen3": ("qwen3", {**SMALL, "head_dim": 16}),
    "gemma2": ("gemma2", {
        **SMALL, "head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": WINDOW, "attn_logit_softcapping": 1.0,
        "final_logit_softcapping": 0.5,
    }),
    "gemma3": ("gemma3_text", {
        **SMALL, "num_hidden_layers": 6, "head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": WINDOW,
        "sliding_window_pattern": 3,
    }),
    "gpt2": ("gpt2", GPT),
    "phi3": ("phi3", SMALL),
    "olmo2": ("olmo2", SMALL),
    "mixtral": ("mixtral", {**SMALL, **EXPERTS}),
    "cohere": ("cohere", {**SMALL, "logit_scale": 0.25}),
    "hyperclovax": ("hyperclovax", {**SMALL, "logits_scaling": 0.25}),
    "granite": ("granite", {**SMALL, "logits_scaling": 4.0, "attention_multiplier": 0.3, "residual_multiplier": 0.5}),
}  # fmt: skip


def make(architecture: str, settings: dict[str, Any], scale: float = 8.0) -> Any:
    """A model whose attention matters: weights `scale` times as large as usual, no dropout."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(architecture, **settings), dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.mul_(scale if "proj" in name or "attn" in name else 2.0)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model


def make_classifier(pad: int = 0, **settings: Any) -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model("llama", **{**SMALL, **settings, "pad_token_id": pad}, num_labels=1)
    return AutoModelForSequenceClassification.from_config(config)


def packing_model(name: str) -> Any:
    """Of PACKABLE, ready for padded and packed calls as a trainer makes it."""
    return ready(make(*PACKABLE[name]))


def ready(model: Any) -> Any:
    add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))
    install(model)
    return model


def rows(branches: int, groups: int = 3, seed: int = 0) -> dict[str, Tensor]:
    """Rows of 9 to 32 tokens; those of a group begin alike; the first 4 tokens and some others have no label."""
    random = torch.Generator().manual_seed(seed)

    def number(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=random))

    made = []
    for _ in range(groups):
        shared = torch.randint(3, VOCABULARY, (number(8, 18),), generator=random)
        made.append(
            [
                torch.cat([shared, torch.randint(3, VOCABULARY, (number(1, 15),), generator=random)])
                for _ in range(branches)
            ]
        )
    return together([made[group][branch] for branch in range(branches) for group in range(groups)])


def together(documents: Sequence[Tensor]) -> dict[str, Tensor]:
    """Padded on the right."""
    ids = torch.nn.utils.rnn.pad_sequence(list(documents), batch_first=True)
    lengths = torch.tensor([len(document) for document in documents])
    mask = (torch.arange(ids.shape[1])[None] < lengths[:, None]).long()
    labels = ids.masked_fill((mask == 0) | (ids % 7 == 0), -100)
    labels[:, :4] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def packed(batch: dict[str, Tensor], branches: int, **how: Any) -> Pack:
    return pack(batch["input_ids"], batch["attention_mask"], batch["labels"], branches, **how)


def gradients(model: Any, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


def weighted(answer: Tensor) -> Tensor:
    """A loss in which every token has another weight, as DPO gives chosen and rejected ones."""
    return (answer * torch.linspace(-1, 2, answer.numel()).view(answer.shape)).sum()


def apart(got: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    """The most that a gradient differs, as a part of the largest entry of its parameter's."""
    assert got.keys() == wanted.keys()
    return max(
        float((got[name] - value).abs().max() / value.abs().max().clamp(min=1e-30)) for name, value in wanted.items()
    )
