"""What tensors take: those that autograd keeps, those that are alive, and those of one DeepSpeed process of several."""

from __future__ import annotations

import gc
import json
import os
import weakref
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from tests.forks import say_into

PROCESSES = 4
TOKENS = 200


class Kept:
    """Bytes of distinct storages that autograd keeps, parameters apart."""

    def __init__(self, model: torch.nn.Module):
        self._own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        self._kept: dict[int, torch.Tensor] = {}

    def pack(self, tensor: torch.Tensor) -> torch.Tensor:
        if (place := tensor.untyped_storage().data_ptr()) not in self._own:
            self._kept[place] = tensor  # held, so that its place is not taken by another
        return tensor

    @property
    def bytes(self) -> int:
        return sum(tensor.untyped_storage().nbytes() for tensor in self._kept.values())


class Alive(TorchDispatchMode):
    """Bytes of the storages that operations make: now, and most at once."""

    def __init__(self) -> None:
        super().__init__()
        self.now, self.most, self._sizes = 0, 0, {}  # type: ignore[var-annotated]

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {tensor.untyped_storage()._cdata for tensor in tree_iter(args) if isinstance(tensor, torch.Tensor)}
        result = function(*args, **(kwargs or {}))
        for tensor in tree_iter(result):
            if isinstance(tensor, torch.Tensor) and not tensor.is_meta:
                storage = tensor.untyped_storage()
                if storage._cdata not in self._sizes and storage._cdata not in given:
                    self._sizes[storage._cdata] = storage.nbytes()
                    self.now += storage.nbytes()
                    weakref.finalize(storage, self._gone, storage._cdata)
        self.most = max(self.most, self.now)
        return result

    def _gone(self, storage: int) -> None:
        self.now -= self._sizes.pop(storage, 0)


def zero(strategy: str, precision: str = "bf16", lora: bool = False, **changes: Any) -> dict[str, int]:
    """Of the first of PROCESSES: weights, those that are trained, most bytes at once of what a step keeps (`held`), and
    of what a forward of TOKENS tokens leaves alive (`kept`).

    changes: of the engine's settings. Nobody else is there: collectives do nothing, in the memory that they take. What
    is alive counts after each of two backward passes of the second step, for then there are moments, and with ZeRO-1 in
    bf16 also in the all-reduce, which comes when the backward pass is over. What is not estimated is made small:
    buckets and gathered weights.
    """
    import deepspeed

    from alignment.training import engine
    from tests.training import tiny

    settings = engine.deepspeed_config(tiny.engine(strategy, **changes), tiny.sft(precision=precision), on_gpu=False)
    assert settings is not None
    settings["zero_optimization"].update(reduce_bucket_size=1000, stage3_prefetch_bucket_size=0)
    settings["zero_optimization"].update(stage3_max_live_parameters=0, stage3_max_reuse_distance=0)
    settings.update(gradient_accumulation_steps=2, train_batch_size=2 * PROCESSES)
    with Alive() as alive, pytest.MonkeyPatch.context() as patched:
        model = start(lora)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        sizes = {"parameters": size(list(model.parameters())), "trainable": size(trained)}
        adam = torch.optim.AdamW(trained, lr=1e-4, fused=True)
        module, *_ = deepspeed.initialize(model=model, optimizer=adam, config=settings)
        del model, trained
        step(module)
        seen: list[int] = []
        if (strategy, precision) == ("zero1", "bf16"):
            patched.setattr(dist, "all_reduce", partial(note, seen, alive, dist.all_reduce))
        step(module, lambda: seen.append(alive.now))
        before = alive.now
        out = module(input_ids=torch.ones(1, TOKENS, dtype=torch.long), use_cache=False, logits_to_keep=1)
        kept = alive.now - before
        del out
    deepspeed.utils.groups._ZERO_PARAM_INTRA_PARALLEL_GROUP = None  # of engine.hpz
    return {**sizes, "held": max(seen), "kept": kept}


def start(lora: bool) -> Any:
    """Many matrices, none of them large: one that DeepSpeed has in its hands counts little."""
    from peft import LoraConfig, TaskType, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(llama())
    if not lora:
        return model
    return get_peft_model(model, LoraConfig(task_type=TaskType.CAUSAL_LM, r=8, target_modules="all-linear"))


def llama() -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(
        hidden_size=128, intermediate_size=352, num_hidden_layers=4, num_attention_heads=4, vocab_size=300,
        bos_token_id=1, eos_token_id=2,
    )  # fmt: skip


def step(module: Any, between: Callable[[], None] = lambda: None) -> None:
    """Two micro-batches of two tokens, whose activations are next to nothing."""
    ids = torch.ones(1, 2, dtype=torch.long)
    for _ in range(2):
        module.backward(module(input_ids=ids, labels=ids).loss)
        gc.collect()
        between()
        module.step()


def note(seen: list[int], alive: Alive, collective: Callable[..., Any], *args: Any, **named: Any) -> Any:
    seen.append(alive.now)
    return collective(*args, **named)


def size(parameters: list[Any]) -> int:
    return sum(parameter.numel() for parameter in parameters)


def main(cases: Sequence[dict[str, Any]], folder: Path) -> None:
    """Of a process that is a fork: what `zero` returns with each of these arguments, into found.json."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from alignment.training import engine
    from tests.training import tiny

    say_into(folder / "said.txt")
    many = str(PROCESSES)
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE=many, LOCAL_WORLD_SIZE=many)
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=PROCESSES)
    engine.start(tiny.engine("zero1"), PROCESSES)
    gc.collect()
    gc.freeze()  # what was imported: it takes most of a collection's time
    (folder / "found.json").write_text(json.dumps([zero(**case) for case in cases]))
