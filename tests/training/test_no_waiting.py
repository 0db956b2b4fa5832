"""The inner loop never waits for the device: what reads a number back happens once a step, not once a micro-batch.

On a GPU each such read stops the CPU until all work queued before it is done. On the CPU the same calls can be counted:
_local_scalar_dense is .item(), float() and bool() of a tensor; tolist() is counted by its name; nonzero has as many
rows as it finds, so that its shape must be read, also where an index is a mask.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from alignment.training.attention import PACKED
from tests.training import models, trainers

WAITING = {"_local_scalar_dense", "nonzero", "masked_select", "unique", "_unique2", "equal", "repeat_interleave"}
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_"}


pytestmark = pytest.mark.usefixtures("one_thread")


def is_mask(index: Any) -> bool:
    return index is not None and index.dtype in (torch.bool, torch.uint8)


class Count(TorchDispatchMode):
    """Calls that a GPU would have to be waited for."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self._tolist: Any = torch.Tensor.tolist

    def __enter__(self) -> Any:
        def tolist(tensor: Any) -> Any:
            self.calls["tolist"] += 1
            return self._tolist(tensor)

        torch.Tensor.tolist = tolist  # type: ignore[method-assign] # it is not dispatched
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        torch.Tensor.tolist = self._tolist  # type: ignore[method-assign]
        super().__exit__(*error)

    def __torch_dispatch__(self, function: Any, types: Any, given: Any = (), named: Any = None) -> Any:
        name = function.name().split("::")[1].split(".")[0]
        if name in WAITING or (name in INDEXING and any(map(is_mask, given[1]))):
            self.calls[name] += 1
        return function(*given, **(named or {}))


def waits_of_a_step(trainer: Any, count: int) -> Counter[str]:
    """Of the second training step, collated before it, in `count` micro-batches."""
    stock, counts = trainer.training_step, []

    def counted(*given: Any) -> Any:
        assert len(given[1]["micro_batches"]) == count
        with Count() as mode:
            loss = stock(*given)
        counts.append(mode.calls)
        return loss

    trainer.training_step = counted
    trainer.train()
    return counts[1]


def test_what_waits_is_counted() -> None:
    numbers = torch.arange(4)
    with Count() as mode:
        numbers[numbers > 1].sum().item()
        numbers[numbers > 2] = 0
        numbers[torch.tensor([1, 2])] += int(numbers[0])
        numbers.tolist()
    assert mode.calls == {"index": 1, "index_put_": 1, "_local_scalar_dense": 2, "tolist": 1}


@pytest.mark.parametrize("name", list(models.PACKABLE))
def test_a_forward_of_a_pack_and_its_backward_never_wait(name: str) -> None:
    """Nor does a mixture of experts, as transformers computes it by default."""
    model, pack = models.packing_model(name), models.packed(models.rows(2), 2)
    model.set_attn_implementation(PACKED)
    with Count() as mode:
        models.weighted(model(pack=pack).log_probs).backward()
    assert not mode.calls


@pytest.mark.parametrize("kind", ["sft", "dpo", "reward"])
def test_six_micro_batches_wait_as_often_as_one(kind: str, tmp_path: Path, tiny_model: Path) -> None:
    """Once: the loss and what the processes wish, which are known before the optimiser moves."""
    model = models.make_classifier() if kind == "reward" else models.make(*models.PACKABLE["mistral"])
    one, six = (
        waits_of_a_step(trainers.ours(kind, model, tmp_path, tiny_model, steps=2, budget=budget), count)
        for budget, count in ((10_000, 1), (1, 6))
    )
    assert one == six == {"tolist": 1}
