"""Losses of pairs against TRL's own numbers: its loss code, on log-probs that a model would have given."""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import trl
from torch import Tensor
from trl.experimental.cpo import CPOTrainer
from trl.experimental.orpo import ORPOTrainer

from alignment.config.losses import PAIR_LOSSES as TRAITS
from alignment.training.metrics import UNUSED
from alignment.training.objective import Objective
from tests.training import tiny
from tests.training.losses.batches import micro_batch, settings_of

DIVERGENCES = {
    "forward_kl": {"divergence": "forward_kl"},
    "js": {"divergence": "js"},
    "alpha": {"divergence": "alpha"},
    "alpha above 1": {"divergence": "alpha", "divergence_alpha": 1.5},
}
SCORED = ("sigmoid", "hinge", "ipo_mean", "sigmoid_norm", "robust", "exo_pair", "discopop")  # that TRL lets through one
SMOOTHED = {"label_smoothing": 0.1}
CASES = [
    *({"loss": name} for name in (
        "sigmoid", "hinge", "ipo_mean", "nca_pair", "bco_pair", "sppo_hard", "apo_zero", "apo_down", "discopop",
        "sft", "sigmoid_norm", "aot", "aot_unpaired",
    )),
    *({"loss": name, **SMOOTHED} for name in ("exo_pair", "robust", "aot", "aot_unpaired")),
    *({"loss": name, **how, **(SMOOTHED if name in ("robust", "exo_pair") else {})}
      for name in SCORED for how in DIVERGENCES.values()),
    {"loss": "sigmoid", "ld_alpha": 0.4},
    {"loss": "aot", "ld_alpha": 0.4},
    {"loss": "sigmoid", "weighting": "wpo"},
    {"loss": "robust", "weighting": "wpo", "ld_alpha": 0.4, "divergence": "js", **SMOOTHED},
    {"loss": {"sigmoid": 0.8, "bco_pair": 0.2, "sft": 1.0}},
    {"loss": {"sigmoid": 1.0, "sft": 0.005}, "beta": 0.01},
]  # fmt: skip
TRL_NAMES = {"ipo_mean": "ipo"}
TRL_DIVERGENCES = {"js": "js_divergence", "alpha": "alpha_divergence"}


def by_trl(settings: Any, log_probs: Tensor, reference: Tensor, labels: Tensor, squares: Tensor) -> Tensor:
    """TRL's own loss code, on log-probs that a model would have given: only the forward is replaced."""
    trainer: Any = object.__new__(trl.DPOTrainer)
    output = SimpleNamespace(
        log_probs=log_probs, entropy=torch.zeros_like(log_probs), mean_logits=torch.zeros_like(log_probs),
        log_sum_sq_probs=squares, is_top1=log_probs > 0,
    )  # fmt: skip
    kept = None if settings.ld_alpha is None else Objective(settings).pairs(reference, None, labels, 1.0)
    sums = reference.sum(1).chunk(2) if kept is None else (kept.chosen, kept.rejected)
    vars(trainer).update(
        model=SimpleNamespace(training=True), aux_loss_enabled=False, ld_alpha=settings.ld_alpha,
        precompute_ref_logps=True, beta=settings.beta, label_smoothing=settings.label_smoothing,
        loss_types=[TRL_NAMES.get(name, name) for name in settings.losses], loss_weights=list(settings.losses.values()),
        f_divergence_type=TRL_DIVERGENCES.get(settings.divergence, settings.divergence),
        f_alpha_divergence_coef=settings.divergence_alpha, use_weighting=settings.weighting == "wpo",
        args=SimpleNamespace(discopop_tau=settings.discopop_tau), _metrics={"train": defaultdict(list)},
        accelerator=SimpleNamespace(
            device=torch.device("cpu"), gather=lambda value: UNUSED, gather_for_metrics=lambda value: UNUSED
        ),
        _total_train_tokens=0, _tp_size=1,
    )  # fmt: skip
    inputs = {
        "input_ids": labels.clamp(min=0), "attention_mask": torch.ones_like(labels),
        "completion_mask": (labels != -100).long(), "ref_chosen_logps": sums[0], "ref_rejected_logps": sums[1],
    }  # fmt: skip
    return trl.DPOTrainer._compute_loss(trainer, lambda **given: output, inputs, return_outputs=False)


def by_us(settings: Any, log_probs: Tensor, reference: Tensor | None, labels: Tensor, squares: Tensor | None) -> Tensor:
    objective = Objective(settings)
    mean = float((labels[: len(labels) // 2] != -100).sum(1).float().mean())
    pairs = objective.pairs(log_probs, reference, labels, mean)
    return objective(pairs, objective.weights(log_probs, squares if objective.weighs else None, labels)).mean()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_losses_and_their_gradients_equal_trls(case: dict[str, Any]) -> None:
    """To 1e-6 of the loss, and of every token's gradient; in float32, as in training."""
    settings, found = tiny.dpo(**case), []
    for by in (by_trl, by_us):
        log_probs, reference, labels, squares = micro_batch()
        log_probs.requires_grad_()
        loss = by(settings, log_probs, reference, labels, squares)
        (slope,) = torch.autograd.grad(loss, log_probs)
        found.append((loss.detach(), slope * (labels[:, 1:] != -100)))
    (theirs, their_slope), (ours, our_slope) = found
    torch.testing.assert_close(ours.double(), theirs.double(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(our_slope, their_slope, rtol=1e-5, atol=1e-6)


def test_ours_let_a_divergence_through_where_trl_does() -> None:
    """And where the margin of DPO stands in a loss that TRL has not."""
    own = {"ipo_sum", "dpop", "rdpo", "beta_dpo"}
    assert {name for name, traits in TRAITS.items() if traits.scores} == {*SCORED, *own}


# --- CPO, SimPO and ORPO: whole, from logits --------------------------------------------------------------------------


def answers(chosen: tuple[int, ...], rejected: tuple[int, ...], seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """(logits [2 pairs, width, 11], token ids, labels) of answers of so many tokens after a prompt of one, padded."""
    random = torch.Generator().manual_seed(seed)
    lengths = torch.tensor([*chosen, *rejected])
    width = 1 + int(lengths.max())
    ids = torch.randint(1, 11, (len(lengths), width), generator=random)
    scored = (torch.arange(width) >= 1) & (torch.arange(width) <= lengths[:, None])
    labels = ids.masked_fill(~scored, -100)
    return torch.randn(len(lengths), width, 11, generator=random), ids, labels


def whole_by_trl(stock: type, settings: Any, logits: Tensor, ids: Tensor, labels: Tensor) -> Tensor:
    """The loss of CPOTrainer or ORPOTrainer of a model with these logits."""
    trainer: Any = object.__new__(stock)
    vars(trainer).update(
        is_encoder_decoder=False, padding_value=0, pad_token_id=0, aux_loss_enabled=False, alpha=0.0,
        loss_type="simpo" if settings.loss == "simpo" else "sigmoid", beta=settings.beta,
        label_smoothing=settings.label_smoothing, simpo_gamma=settings.simpo_gamma,
        cpo_alpha=0.0 if settings.loss == "simpo" else settings.cpo_alpha,
        accelerator=SimpleNamespace(device=torch.device("cpu"), gather_for_metrics=lambda value: value),
    )  # fmt: skip
    mask = (labels != -100).long()
    mask[:, 0] = 1  # the prompt
    batch = {
        f"{side}_{name}": half
        for name, both in (("input_ids", ids), ("attention_mask", mask), ("labels", labels))
        for side, half in zip(("chosen", "rejected"), both.chunk(2), strict=True)
    }
    return trainer.get_batch_loss_metrics(lambda ids, **given: SimpleNamespace(logits=logits), batch)[0]


def whole_by_us(settings: Any, logits: Tensor, ids: Tensor, labels: Tensor) -> Tensor:
    each = logits[:, :-1].log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0]
    return by_us(settings, each * (labels[:, 1:] != -100), None, labels, None)


@pytest.mark.parametrize(
    ("name", "changes", "chosen"),
    [
        ("simpo", {"beta": 2.0}, (3, 7, 5)),
        ("simpo", {"beta": 2.0, **SMOOTHED}, (3, 7, 5)),
        ("cpo", {}, (3, 7, 5)),
        ("cpo", {"cpo_alpha": 0.3, **SMOOTHED}, (3, 7, 5)),
        ("orpo", {}, (6, 6, 6)),
    ],
    ids=str,
)
def test_losses_without_a_reference_equal_trls(name: str, changes: dict[str, Any], chosen: tuple[int, ...]) -> None:
    """To 1e-6, gradients too. ORPO's only where its likelihood is the same: TRL takes the mean over all tokens of the
    batch, prompts among them, so here prompts have one token, which nothing predicts, and chosen answers one length."""
    settings, found = settings_of(name, **changes), []
    for ours in (False, True):
        logits, ids, labels = answers(chosen, (4, 2, 8))
        logits.requires_grad_()
        stock = ORPOTrainer if name == "orpo" else CPOTrainer
        how = (settings, logits, ids, labels)
        loss = whole_by_us(*how) if ours else whole_by_trl(stock, *how)
        found.append((loss.detach(), torch.autograd.grad(loss, logits)[0]))
    torch.testing.assert_close(found[1][0].double(), found[0][0].double(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found[1][1], found[0][1], rtol=1e-5, atol=1e-6)
