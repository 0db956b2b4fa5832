"""The loss of DPO's first step, computed before a run: policy and reference are the same then.

A random model of the start model's architecture with two small layers answers for it: what is looked at are the
settings (loss, adapters) and the data's own pairs, not the weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoConfig, AutoModelForCausalLM

from alignment.config.stages.preference import Dpo
from alignment.errors import InputError
from alignment.training.model import lora_config, without_dropout
from alignment.training.objective import Objective
from alignment.training.packing import IGNORED

LAYERS, HEADS, HEAD_SIZE = 2, 4, 16
Pair = Mapping[str, Sequence[int]]  # prompt_ids, chosen_ids, rejected_ids


LN_2 = math.log(2)
# Losses where no log-ratio is anything but 0, by beta: the formulas of docs/algorithms.md at 0.
AT_ZERO: dict[str, Callable[[float], float]] = {
    "sigmoid": lambda beta: LN_2,
    "sigmoid_norm": lambda beta: LN_2,
    "robust": lambda beta: LN_2,
    "dpop": lambda beta: LN_2,
    "hinge": lambda beta: 1.0,
    "apo_zero": lambda beta: 1.0,
    "apo_down": lambda beta: 1.0,
    "nca_pair": lambda beta: 2 * LN_2,
    "bco_pair": lambda beta: 2 * LN_2,
    "ipo_sum": lambda beta: 1 / (2 * beta) ** 2,
    "ipo_mean": lambda beta: 1 / (2 * beta) ** 2,
    "sppo_hard": lambda beta: 2 * (1 / (2 * beta)) ** 2,
}


class FirstLoss(NamedTuple):
    """found: the mean over the pairs. expected: where no log-ratio is anything but 0, of the sigmoid loss ln 2; None:
    nothing is known that it could be held to."""

    found: float
    expected: float | None

    @property
    def fits(self) -> bool:
        return self.expected is None or math.isclose(self.found, self.expected, rel_tol=1e-4, abs_tol=1e-4)


def first_loss(settings: Dpo, config: Any, pairs: Sequence[Pair]) -> FirstLoss | None:
    """config: a transformers configuration. None: of losses that look at whole batches, or have no reference.

    Raises InputError if no small model can be made of this architecture.
    """
    if not settings.refers or any(traits.whole for traits in settings.traits):
        return None
    ids, labels = _batch(pairs)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(settings.seed)
        model = _small(config, int(ids.max()) + 1)
        plain = model
        if settings.lora is not None:
            from peft import get_peft_model

            lora = settings.lora.model_copy(update={"quantize": None, "modules_to_save": []})
            model = get_peft_model(plain, lora_config(lora, plain))
        try:
            policy = _log_probs(model.eval(), ids, labels)
            with model.disable_adapter() if settings.lora is not None else nullcontext():
                reference = _log_probs(model, ids, labels)
        except (RuntimeError, ValueError, IndexError) as error:  # sizes that do not go together
            raise _no_small_model(error) from error
        objective, mean = Objective(settings), float((labels[: len(pairs)] != IGNORED).sum(1).float().mean())
        found = objective(objective.pairs(policy, reference, labels, mean)).mean()
        same = objective(objective.pairs(policy, policy, labels, mean)).mean()
    expected = _at_zero(settings)
    if expected is None and settings.lora is not None:  # what adapters that begin as nothing make of it
        expected = float(same)
    return FirstLoss(float(found), expected)


def _at_zero(settings: Dpo) -> float | None:
    """By hand; None of losses without a formula here, and where pairs are weighted by what the policy says of them."""
    if settings.weighting != "none" or not settings.losses.keys() <= AT_ZERO.keys():
        return None
    return sum(weight * AT_ZERO[name](settings.beta) for name, weight in settings.losses.items())


def _batch(pairs: Sequence[Pair]) -> tuple[Tensor, Tensor]:
    """ids, labels: [2 pairs, width], chosen rows first, padded on the right; of the vocabulary what occurs is left."""
    sides = [(pair["prompt_ids"], pair[f"{side}_ids"]) for side in ("chosen", "rejected") for pair in pairs]
    number = {one: place for place, one in enumerate(sorted({one for side in sides for part in side for one in part}))}
    rows = [torch.tensor([number[one] for part in side for one in part]) for side in sides]
    labels = [row.clone() for row in rows]
    for (prompt, _), label in zip(sides, labels, strict=True):
        label[: len(prompt)] = IGNORED
    return pad_sequence(rows, batch_first=True), pad_sequence(labels, batch_first=True, padding_value=IGNORED)


def _small(config: Any, vocabulary: int) -> Any:
    text = config.get_text_config()
    keys = HEADS if getattr(text, "num_key_value_heads", None) in (None, text.num_attention_heads) else HEADS // 2
    sizes = {"num_hidden_layers": LAYERS, "hidden_size": HEADS * HEAD_SIZE, "num_attention_heads": HEADS,
             "intermediate_size": 2 * HEADS * HEAD_SIZE, "num_key_value_heads": keys, "head_dim": HEAD_SIZE,
             "vocab_size": vocabulary, "pad_token_id": None, "bos_token_id": None, "eos_token_id": None}  # fmt: skip
    try:
        made = AutoConfig.for_model(**text.to_dict())
        for name, value in sizes.items():
            if hasattr(made, name):
                setattr(made, name, value)
        if getattr(made, "layer_types", None):
            made.layer_types = made.layer_types[:LAYERS]
        return without_dropout(AutoModelForCausalLM.from_config(made, trust_remote_code=False, dtype=torch.float32))
    except Exception as error:  # whatever an architecture asks of its sizes
        raise _no_small_model(error) from error


def _no_small_model(error: Exception) -> InputError:
    first = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return InputError(f"no small model of this architecture can be made: {first}", where="model.source")


def _log_probs(model: Any, ids: Tensor, labels: Tensor) -> Tensor:
    """[2 pairs, width - 1]: of the labelled tokens, 0 elsewhere. Rows are padded on the right, which nothing sees."""
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
    aims, scored = labels[:, 1:].clamp(min=0), labels[:, 1:] != IGNORED
    log_probs = torch.log_softmax(logits, -1).gather(2, aims[..., None])[..., 0]
    return log_probs.masked_fill(~scored, 0.0)
