"""The forward of a pack, beneath `model(...)`: what TRL's losses call stays as it is, only the work below is less.

`install(model)` teaches a transformers model two things: `model(..., pack=pack, fused_lm_head=True)` computes the pack
instead of the padded rows and scores labelled positions only, and returns what TRL's fused head returns for the rows;
a sequence classifier's `model(..., pack=pack)` gives its logits [rows, labels]. Whether a model can be packed is found
in two ways: `refusal(config)` knows what never can (layers that carry a state from token to token), and `differs`
compares both ways of computing on a few short rows in the engine that will train, before the first step.
"""

from __future__ import annotations

import functools
import types
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_outputs import SequenceClassifierOutputWithPast
from trl.trainer.utils import FusedCausalLMOutput, maybe_gather_lm_head_ctx

from alignment.training.attention import PACKED, windows_seen
from alignment.training.head import score_tokens
from alignment.training.last_layer import narrow
from alignment.training.metrics import UNUSED
from alignment.training.packing import Pack, pack

PACKABLE_LAYERS = {"full_attention", "sliding_attention"}
MOST_SHAPES = 64  # of packs that are compiled for; those beyond run uncompiled
# How far apart packed and padded answers to the trial's rows may be in the mean, in nats (logits): rounding.
TRIAL_TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 3e-2}


def refusal(config: Any) -> str | None:
    """Why a model of this configuration is computed padded, or None. What it cannot tell, `differs` finds."""
    text = config.get_text_config()
    layers = set(getattr(text, "layer_types", None) or getattr(text, "layers_block_type", None) or ())
    if layers - PACKABLE_LAYERS:
        return f"its {', '.join(sorted(layers - PACKABLE_LAYERS))} layers are of a kind that packs do not know"
    if getattr(text, "is_encoder_decoder", False):
        return "it is an encoder-decoder"
    if getattr(text, "attention_chunk_size", None):
        return "its attention is cut into chunks"
    return None


def install(model: Any) -> None:
    """Teach a transformers model (not its PEFT or engine wrapper) to compute packs. Padded calls go on as before."""
    stock, classifies = model.forward, hasattr(model, "score")

    @functools.wraps(type(model).forward)
    def forward(self: Any, *args: Any, pack: Pack | None = None, **kwargs: Any) -> Any:
        if pack is None:
            return stock(*args, **kwargs)
        return _classify(self, pack) if classifies else _score(self, pack, kwargs.get("measure", True))

    model.forward = types.MethodType(forward, model)
    narrow(model)


def _hidden(model: Any, pack: Pack) -> Tensor:
    """[N, hidden]: the last hidden states of the pack's tokens."""
    output = model.base_model(
        input_ids=pack.ids,
        attention_mask=None,
        position_ids=pack.positions,
        use_cache=False,
        layout=pack.layout,
        read=pack.read,
    )
    return output.last_hidden_state[0]


def _score(model: Any, pack: Pack, measure: bool) -> FusedCausalLMOutput:
    """Per-token fields [rows, width - 1] of the padded rows, 0 where nothing is labelled.

    measure: entropy and top-1 too, which only metrics want.
    """
    hidden = _hidden(model, pack).index_select(0, pack.scored)
    head, scaling = model.get_output_embeddings(), HeadScaling.of(model.config)
    with maybe_gather_lm_head_ctx(head.weight, head.bias):  # ZeRO-3 holds but a shard of it
        log_probs, entropy, is_top1 = score_tokens(
            hidden, head.weight, head.bias, pack.targets, scaling.factor, scaling.softcap, measure
        )
    return FusedCausalLMOutput(
        loss=-log_probs.sum() / max(len(pack.targets), 1),
        log_probs=pack.spread(log_probs),
        entropy=None if entropy is None else pack.spread(entropy),
        is_top1=None if is_top1 is None else pack.spread(is_top1),
        mean_logits=UNUSED,  # type: ignore[arg-type] # DPOTrainer wants it for a metric that is not ours
        label_mask=pack.spread(torch.ones_like(pack.targets, dtype=torch.bool)),
    )


def _classify(model: Any, pack: Pack) -> SequenceClassifierOutputWithPast:
    """logits: [rows, labels], from the hidden state of each row's last token."""
    return SequenceClassifierOutputWithPast(logits=model.score(_hidden(model, pack).index_select(0, pack.last)))


@dataclass(frozen=True)
class HeadScaling:
    """What becomes of logits: times factor (Cohere, Granite, HyperCLOVA X), then softcap * tanh(logits / softcap)
    (Gemma)."""

    factor: float
    softcap: float | None

    @classmethod
    def of(cls, config: Any) -> HeadScaling:
        text = config.get_text_config()
        factor = getattr(text, "logit_scale", None) or 1.0
        scaling = getattr(text, "logits_scaling", None) or 1.0
        factor = factor * scaling if text.model_type == "hyperclovax" else factor / scaling
        return cls(factor, getattr(text, "final_logit_softcapping", None))


def compile_layers(model: Any) -> None:
    """torch.compile each decoder layer; attention stays as it is. Packs of whole buckets have few shapes.

    All layers are of one class, so what is compiled for the first serves the others.
    """
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, MOST_SHAPES)
    count = model.config.get_text_config().num_hidden_layers
    for group in model.modules():
        if isinstance(group, torch.nn.ModuleList) and len(group) == count:
            for layer in group:
                layer.compile(dynamic=False)
            return


# --- trial ------------------------------------------------------------------------------------------------------------


def trial_rows(vocabulary: int, device: torch.device, branches: int, pad: int = 0) -> tuple[dict[str, Tensor], Pack]:
    """A few rows, padded and packed: four rows of unlike length; as two groups, they begin alike.

    pad: the token that fills rows up, and is nowhere in them: padded, a classifier finds the ends of its rows by it.
    """
    lengths, shared = (23, 11, 17, 14), (9, 5)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, vocabulary, (4, max(lengths)), generator=generator)
    mask = (torch.arange(max(lengths))[None] < torch.tensor(lengths)[:, None]).long()
    if branches == 2:
        for first, count in enumerate(shared):
            ids[first + 2, :count] = ids[first, :count]
    ids = ids.masked_fill(ids == pad, (pad + 1) % vocabulary).masked_fill(mask == 0, pad)
    labels = ids.masked_fill(mask == 0, -100)
    rows = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    return {name: value.to(device) for name, value in rows.items()}, pack(ids, mask, labels, branches).to(device)


@torch.no_grad()
def differs(model: Any, engine: Any, branches: int, dtype: torch.dtype) -> str | None:
    """Why packs of this model are not what its padded rows are, or None. Leaves attention switched to what will do.

    model: the transformers model; engine: what training calls (itself, or DDP or DeepSpeed around it). Every process
    of a group must call it: the rows are the same on all.
    """
    answer = "logits" if hasattr(model, "score") else "log_probs"
    text = model.config.get_text_config()
    pad = getattr(text, "pad_token_id", None) or 0
    rows, packed = trial_rows(text.vocab_size, next(model.parameters()).device, branches, pad)
    if answer == "logits":
        rows.pop("labels")
    else:
        rows["fused_lm_head"] = True  # type: ignore[assignment]
    wanted = getattr(engine(**rows, use_cache=False), answer).float()
    before = model.config._attn_implementation
    try:
        model.set_attn_implementation(PACKED)
        with windows_seen() as windows:
            got = getattr(engine(**rows, use_cache=False, pack=packed), answer).float()
        reason = _unlike(got, wanted, dtype) or _overlooked(windows, text)
    except Exception as error:  # whatever an unknown architecture makes of unknown arguments
        reason = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    if reason is not None:
        model.set_attn_implementation(before)
    return reason


def _unlike(got: Tensor, wanted: Tensor, dtype: torch.dtype) -> str | None:
    """Rounding differs in sign from token to token: the mean says more than the largest."""
    apart = float((wanted - got).abs().mean())
    if apart <= TRIAL_TOLERANCE[dtype]:
        return None
    return f"packed it answers {apart:.2g} away from what it answers padded"


def _overlooked(windows: list[int | None], config: Any) -> str | None:
    """The trial's rows are short: what a long one would show is read off the calls."""
    if len(windows) != config.num_hidden_layers:
        return f"{len(windows)} of its {config.num_hidden_layers} layers attend through transformers' table"
    declared = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    slides = "sliding_attention" in kinds if kinds else getattr(config, "use_sliding_window", True)
    if declared and slides and declared not in windows:
        return f"its sliding window of {declared} tokens does not reach its attention"
    return None
