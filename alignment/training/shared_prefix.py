"""The forward of a pack, beneath `model(...)`: what TRL's losses call stays as it is, only the work below is less.

`install(model)` teaches a transformers model two things: `model(..., pack=pack, fused_lm_head=True)` computes the pack
instead of the padded rows and scores labelled positions only, and returns what TRL's fused head returns for the rows;
a sequence classifier's `model(..., pack=pack)` gives its logits [rows, labels]. Whether a model can be packed is found
in training/trial.py.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import SequenceClassifierOutputWithPast
from trl.trainer.utils import FusedCausalLMOutput, maybe_gather_lm_head_ctx

from alignment.training.attention import NotPackable
from alignment.training.head import score_tokens
from alignment.training.last_layer import narrow
from alignment.training.metrics import UNUSED
from alignment.training.packing import Pack
from alignment.training.sequence import size, whole

VALUE_HEAD = "value_head"  # a module of a model in training that estimates what is still to come (training/ppo.py)
MOST_SHAPES = 64  # of packs that are compiled for; those beyond run uncompiled


def install(model: Any) -> None:
    """Teach a transformers model (not its PEFT or engine wrapper) to compute packs. Padded calls go on as before."""
    classifies = hasattr(model, "score")
    model.padded_forward = model.forward  # a copy of the model takes it along, as its own

    @functools.wraps(type(model).forward)
    def forward(self: Any, *args: Any, pack: Pack | None = None, **kwargs: Any) -> Any:
        if pack is None:
            return self.padded_forward(*args, **kwargs)
        return (
            _classify(self, pack)
            if classifies
            else _score(self, pack, kwargs.get("measure", True), kwargs.get("squares", False))
        )

    model.forward = types.MethodType(forward, model)
    for layer in decoder_layers(model)[-1:]:
        narrow(layer)


def _hidden(model: Any, pack: Pack) -> Tensor:
    """[N, hidden]: the last hidden states of the pack's tokens."""
    output = model.base_model(
        input_ids=pack.ids,
        attention_mask=None,
        position_ids=pack.positions,
        use_cache=False,
        layout=pack.layout,
    )
    return output.last_hidden_state[0]


@dataclass
class Valued(FusedCausalLMOutput):
    """state_values: [rows, width - 1], what a value head thinks of the state before each labelled token."""

    state_values: Tensor | None = None


def _score(model: Any, pack: Pack, measure: bool, squares: bool) -> Valued:
    """Per-token fields [rows, width - 1] of the padded rows, 0 where nothing is labelled.

    measure: entropy and top-1 too, which only metrics want. squares: log of the sum of squared probabilities too.
    """
    hidden = _hidden(model, pack).index_select(0, pack.scored)
    head, scaling = model.get_output_embeddings(), HeadScaling.of(model.config)
    with maybe_gather_lm_head_ctx(head.weight, head.bias):  # ZeRO-3 holds but a shard of it
        log_probs, entropy, is_top1, squared = score_tokens(
            hidden,
            head.weight,
            head.bias,
            pack.targets,
            scaling.factor,
            scaling.softcap,
            measure,
            squares=squares,
        )
    spread = whole(pack.spread(log_probs))
    labelled = whole(pack.spread(torch.ones_like(pack.targets, dtype=torch.bool)))
    values = _values(getattr(model, VALUE_HEAD), hidden) if hasattr(model, VALUE_HEAD) else None
    return Valued(
        loss=-spread.sum() / labelled.sum().clamp(min=1),
        log_probs=spread,
        entropy=None if entropy is None else whole(pack.spread(entropy)),
        is_top1=None if is_top1 is None else whole(pack.spread(is_top1)),
        log_sum_sq_probs=None if squared is None else whole(pack.spread(squared)),
        mean_logits=UNUSED,  # type: ignore[arg-type] # DPOTrainer wants it for a metric that is not ours
        state_values=None if values is None else whole(pack.spread(values)),
        label_mask=labelled,
    )


def _values(head: Any, hidden: Tensor) -> Tensor:
    """[tokens], float32, computed in the precision that the head has: values and their clip are small differences,
    which autocast to bf16 would lose above a few units."""
    with torch.autocast(hidden.device.type, enabled=False):
        return head(hidden.to(head.weight.dtype))[:, 0].float()


def _classify(model: Any, pack: Pack) -> SequenceClassifierOutputWithPast:
    """logits: [rows, labels], from the hidden state of each row's last token."""
    if size() > 1:
        raise NotPackable("a classifier's rows end where one of the sharers alone has their tokens")
    return SequenceClassifierOutputWithPast(logits=model.score(_hidden(model, pack).index_select(0, pack.last)))


@dataclass(frozen=True)
class HeadScaling:
    """What becomes of logits: times factor (Cohere, Granite, HyperCLOVA X, Falcon-H1), then softcap * tanh(logits /
    softcap) (Gemma)."""

    factor: float
    softcap: float | None

    @classmethod
    def of(cls, config: Any) -> HeadScaling:
        """The fields that TRL's fused head reads, and the first of them that is there; a factor of 0 is one."""
        text = config.get_text_config()
        given = (getattr(text, name, None) for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"))
        factor, scaling = next((one for one in given if one is not None), None), getattr(text, "logits_scaling", None)
        if factor is None and scaling is not None:
            factor = scaling if text.model_type == "hyperclovax" else 1 / scaling
        return cls(1.0 if factor is None else factor, getattr(text, "final_logit_softcapping", None))


def decoder_layers(model: Any) -> list[torch.nn.Module]:
    """The layers of a transformers model's decoder, in their order: what gradient checkpointing computes anew."""

    def outermost(module: torch.nn.Module) -> Iterator[torch.nn.Module]:
        for child in module.children():
            if isinstance(child, GradientCheckpointingLayer):
                yield child
            else:
                yield from outermost(child)

    return list(outermost(model.get_decoder()))


def compile_layers(model: Any) -> int:
    """torch.compile each decoder layer; attention's kernel stays as it is. Returns how many layers there are.

    All layers are of one class, so what is compiled for the first serves the others; packs of whole buckets have few
    shapes. A layer that is checkpointed is compiled in its parts: PyTorch compiles nothing that holds a checkpoint.
    """
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, MOST_SHAPES)
    layers = decoder_layers(model)
    for layer in layers:
        for part in layer.children() if layer.gradient_checkpointing else [layer]:
            part.compile(dynamic=False)
    return len(layers)
