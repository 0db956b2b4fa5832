"""Losses of single answers: values derived by hand, TRL's own numbers, gradients, fixed points."""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import trl
from torch import Tensor

from alignment.training.losses.unpaired import UNPAIRED_LOSSES, apo_zero_unpaired, kto
from alignment.training.metrics import UNUSED

BOTH = torch.tensor([True, False])


def test_values_derived_by_hand() -> None:
    """The derivations are in the docstrings of the losses."""
    ratio = torch.tensor([2.0, 0.0], dtype=torch.float64)
    found = kto(ratio, BOTH, torch.tensor(1.0), beta=1.0, desirable_weight=1.0, undesirable_weight=2.0)
    assert found.tolist() == pytest.approx([0.268941, 0.537883], abs=1e-6)
    ratio = torch.tensor([1.0, 0.0], dtype=torch.float64)
    found = apo_zero_unpaired(ratio, BOTH, torch.tensor(9.0), beta=1.0, desirable_weight=1.0, undesirable_weight=1.0)
    assert found.tolist() == pytest.approx([0.268941, 0.5], abs=1e-6)


def by_trl(name: str, logps: Tensor, reference: Tensor, mismatched: Tensor, desirable: Tensor, **how: float) -> Tensor:
    """TRL's own loss code on log-probs that a model would have given; logps: [N, 1], an answer of one token."""
    trainer: Any = object.__new__(trl.KTOTrainer)
    output = SimpleNamespace(
        log_probs=logps, entropy=logps.detach(), mean_logits=logps.detach(), is_top1=logps > 0, aux_loss=None
    )
    vars(trainer).update(
        model=SimpleNamespace(training=True), aux_loss_enabled=False, precompute_ref_logps=True, loss_type=name,
        calculate_KL=name == "kto", _compute_kl_logps=lambda model, batch: mismatched, **how,
        accelerator=SimpleNamespace(
            device=torch.device("cpu"), gather=lambda value: UNUSED,
            gather_for_metrics=lambda value: value if value.numel() == 1 and value.is_floating_point() else UNUSED,
        ),
        _metrics={"train": defaultdict(list)}, _total_train_tokens=0, _tp_size=1,
    )  # fmt: skip
    count = len(logps)
    inputs = {
        "input_ids": torch.ones(count, 2, dtype=torch.long), "attention_mask": torch.ones(count, 2, dtype=torch.long),
        "completion_mask": torch.tensor([[0, 1]] * count), "label": desirable, "ref_logps": reference[:, 0],
        "ref_KL_logps": torch.zeros(count),
    }  # fmt: skip
    return trl.KTOTrainer._compute_loss(trainer, lambda **given: output, inputs, return_outputs=False)


@pytest.mark.parametrize("name", sorted(UNPAIRED_LOSSES))
def test_losses_and_gradients_equal_trls(name: str) -> None:
    """Of one batch, which TRL does not split: to 1e-6."""
    random = torch.Generator().manual_seed(0)
    reference, mismatched = -5 * torch.rand(6, 1, generator=random), torch.rand(6, generator=random)
    desirable = torch.tensor([True, True, False, True, False, False])
    how = {"beta": 0.3, "desirable_weight": 1.0, "undesirable_weight": 1.5}
    found = []
    for ours in (False, True):
        logps = (-5 * torch.rand(6, 1, generator=torch.Generator().manual_seed(1))).requires_grad_()
        if ours:
            ratio = (logps - reference)[:, 0]
            loss = UNPAIRED_LOSSES[name](ratio, desirable, mismatched.mean().clamp(min=0), **how).mean()
        else:
            loss = by_trl(name, logps, reference, mismatched, desirable, **how)
        found.append((loss.detach(), torch.autograd.grad(loss, logps)[0]))
    torch.testing.assert_close(found[1][0], found[0][0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found[1][1], found[0][1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", sorted(UNPAIRED_LOSSES))
def test_gradients_are_those_of_finite_differences_and_the_start_is_half_the_weight(name: str) -> None:
    how = {"beta": 0.3, "desirable_weight": 1.0, "undesirable_weight": 2.0}
    ratio = torch.tensor([0.7, -1.2], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda r: UNPAIRED_LOSSES[name](r, BOTH, torch.tensor(0.4), **how), [ratio])
    start = UNPAIRED_LOSSES[name](torch.zeros(2), BOTH, torch.tensor(0.0), **how)
    assert start.tolist() == pytest.approx([0.5, 1.0])
