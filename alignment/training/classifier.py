"""A causal language model's folder as the start of a reward model: its layers, and a new head with one number."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForSequenceClassification
from trl.trainer.reward_trainer import suppress_seqcls_warning

from alignment.config.stages.training import Lora
from alignment.errors import InputError
from alignment.training.model import lora_config, without_dropout

HEAD = "score"  # what transformers calls the head of a decoder that classifies


def load_classifier(folder: Path, seed: int) -> Any:
    """fp32 master weights, no dropout, one label; the head is drawn from the seed, the same under every engine.

    It is normal with the deviation 1 / sqrt(hidden size + 1), so that the first rewards are about as large as 1
    (Stiennon et al. 2020, arXiv:2009.01325; Huang et al. 2024, arXiv:2403.17031). ZeRO-3 as in `model.load`.
    Raises InputError for architectures that have no such head.
    """
    config = AutoConfig.from_pretrained(folder, local_files_only=True, num_labels=1)
    if type(config) not in AutoModelForSequenceClassification._model_mapping:
        what = f"transformers has no sequence classifier of the architecture {config.model_type}"
        raise InputError(what, where=str(folder), fix="choose another start model")
    auto: Any = AutoModelForSequenceClassification
    with suppress_seqcls_warning():  # the head is missing, as it must be
        model, loading = auto.from_pretrained(
            folder, config=config, dtype=torch.float32, local_files_only=True, output_loading_info=True
        )
    if lost := sorted(name for name in loading["missing_keys"] if not name.startswith(f"{HEAD}.")):
        raise InputError(f"has no weights for {lost[0]} of its sequence classifier", where=str(folder))
    head = getattr(model, HEAD, None)
    if not isinstance(head, torch.nn.Linear):
        what = f"the sequence classifier of the architecture {config.model_type} has no linear head `{HEAD}`"
        raise InputError(what, where=str(folder), fix="choose another start model")
    draw = torch.Generator().manual_seed(seed)
    with _whole(head), torch.no_grad():
        weight = torch.randn((1, head.in_features), generator=draw) / math.sqrt(head.in_features + 1)
        head.weight.copy_(weight)
        if head.bias is not None:
            head.bias.zero_()
    return without_dropout(model)


@contextmanager
def _whole(module: Any) -> Iterator[None]:
    """Its parameters are there to be written, which ZeRO-3 has in shards."""
    if not any(hasattr(parameter, "ds_id") for parameter in module.parameters()):
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(list(module.parameters()), modifier_rank=0):
        yield


def adapters(lora: Lora | None, model: Any) -> Any:
    """PEFT's configuration of the adapters, or None."""
    made = lora_config(lora, model)
    if made is not None:
        made.task_type = "SEQ_CLS"  # by which PEFT trains the head whole
    return made
