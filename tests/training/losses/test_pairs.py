"""Losses of pairs: the values derived by hand in their docstrings, TRL's own numbers, gradients, fixed points."""

from __future__ import annotations

import inspect
import itertools
import math
from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import trl
from torch import Tensor
from trl.experimental.cpo import CPOTrainer
from trl.experimental.orpo import ORPOTrainer

from alignment.config.losses import COEFFICIENTS
from alignment.config.losses import PAIR_LOSSES as TRAITS
from alignment.training.losses import pairs as losses
from alignment.training.losses.pairs import PAIR_LOSSES, Pairs, Threshold, divergence_score
from alignment.training.metrics import UNUSED
from alignment.training.objective import Objective, columns
from tests.training import tiny

LN2 = math.log(2)


def given(
    chosen: Any = (0.0,), rejected: Any = (0.0,), tokens: tuple[Any, Any] = ((6.0,), (4.0,)), **other: Any
) -> Pairs:
    """Pairs of these log-ratios: log-probs under a reference that gives 0 to every answer."""
    w, l = (torch.tensor(one, dtype=torch.float64) for one in (chosen, rejected))  # noqa: E741
    chosen_tokens, rejected_tokens = (torch.tensor(one, dtype=torch.float64) for one in tokens)
    zero = torch.zeros_like(w)
    return Pairs(
        w, l, other.get("ref_chosen", zero), other.get("ref_rejected", zero), w - other.get("ref_chosen", zero), l,
        -w, chosen_tokens, rejected_tokens, float(chosen_tokens.mean()),
    )  # fmt: skip


TWO = ((6.0, 4.0), (4.0, 4.0))
BY_HAND: list[tuple[str, Pairs, dict[str, Any], float]] = [
    ("sigmoid", given((3.0,), (1.0,)), {"beta": 0.5, "label_smoothing": 0.0}, 0.313262),
    ("sigmoid", given((3.0,), (1.0,)), {"beta": 0.5, "label_smoothing": 0.1}, 0.413262),
    ("hinge", given((3.0,), (1.0,)), {"beta": 0.25}, 0.5),
    ("ipo_sum", given((3.0,), (1.0,)), {"beta": 0.5}, 1.0),
    ("ipo_mean", given((3.0,), (1.0,)), {"beta": 0.5}, 0.5625),
    ("sigmoid_norm", given((3.0,), (1.0,)), {"beta": 4.0}, 0.313262),
    ("robust", given((1.0,), (0.0,)), {"beta": 1.0, "label_smoothing": 0.1}, 0.188262),
    ("exo_pair", given(), {"beta": 1.0, "label_smoothing": 0.1}, 0.510826),
    ("discopop", given((1.0,), (0.0,)), {"beta": 0.05, "discopop_tau": 0.05}, 0.875180),
    ("dpop", given((-1.0,), (-3.0,)), {"beta": 0.5, "dpop_lambda": 1.0}, 0.474077),
    ("cal_dpo", given((1.0,), (0.0,)), {"beta": 0.5}, 1.313262),
    ("rdpo", given((3.0,), (1.0,), ((9.0,), (4.0,))), {"beta": 0.5, "length_penalty": 0.2}, 0.126928),
    ("nca_pair", given((1.0,), (0.0,)), {"beta": 1.0}, 1.316466),
    ("bco_pair", given((1.0,), (0.0,)), {"beta": 1.0}, 1.006409),
    ("sppo_hard", given((1.0,), (0.0,)), {"beta": 0.5}, 1.0),
    ("apo_zero", given((1.0,), (0.0,)), {"beta": 1.0}, 0.768941),
    ("apo_down", given((1.0,), (0.0,)), {"beta": 1.0}, 1.0),
    ("aot", given((2.0, 0.0), (0.0, 0.0), TWO), {"beta": 1.0, "label_smoothing": 0.0}, 0.410038),
    ("aot_unpaired", given((1.0, 0.0), (0.0, 1.0), TWO), {"beta": 1.0, "label_smoothing": 0.0}, LN2),
    (
        "beta_dpo", given((2.0, 2.0), (0.0, 0.0), TWO),
        {"beta": 0.1, "beta_dpo_alpha": 0.5, "beta_dpo_keep": 1.0, "threshold": Threshold(1.0, 1.0),
         "noise": torch.tensor([0.5, 0.5], dtype=torch.float64)}, 0.554355,
    ),
    ("simpo", given((-6.0,), (-8.0,)), {"beta": 2.0, "simpo_gamma": 1.0, "label_smoothing": 0.0}, 0.313262),
    ("cpo", given((-6.0,), (-8.0,)), {"beta": 0.5, "label_smoothing": 0.0}, 1.313262),
    ("orpo", given((-6 * LN2,), (-4 * LN2,)), {"beta": 0.1}, 0.762462),
    ("nll", given((-6.0,)), {}, 1.0),
    ("sft", given((-6.0, -2.0), (0.0, 0.0), TWO), {}, 0.8),
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "pairs", "how", "expected"), BY_HAND, ids=lambda value: value if isinstance(value, str) else ""
)
def test_values_derived_by_hand(name: str, pairs: Pairs, how: dict[str, Any], expected: float) -> None:
    """The derivation is in the docstring of the loss."""
    assert float(PAIR_LOSSES[name](pairs, **how).mean()) == pytest.approx(expected, abs=2e-6)


def test_every_loss_has_a_value_derived_by_hand() -> None:
    assert {name for name, *_ in BY_HAND} == set(PAIR_LOSSES)


@pytest.mark.parametrize(
    ("divergence", "expected"),
    [("reverse_kl", 1.0), ("forward_kl", 1 - math.exp(-1)), ("js", 0.379885), ("alpha", 0.786939)],
)
def test_divergence_scores_at_a_log_ratio_of_one(divergence: str, expected: float) -> None:
    score = divergence_score(torch.tensor([1.0], dtype=torch.float64), divergence, 0.5)
    assert float(score) == pytest.approx(expected, abs=2e-6)


def test_the_settings_name_what_the_functions_read() -> None:
    assert PAIR_LOSSES.keys() == TRAITS.keys()
    for name, function in PAIR_LOSSES.items():
        reads = {p.name for p in inspect.signature(function).parameters.values() if p.kind is p.KEYWORD_ONLY}
        given = set(TRAITS[name].uses) - {"beta_dpo_momentum"}
        assert reads - {"threshold", "noise"} == given, name
    assert set(COEFFICIENTS) <= set(tiny.dpo().model_fields)


# --- TRL's numbers ----------------------------------------------------------------------------------------------------

CASES = [
    *({"loss": name} for name in (
        "sigmoid", "hinge", "ipo_mean", "nca_pair", "bco_pair", "sppo_hard", "apo_zero", "apo_down", "discopop",
        "sft", "sigmoid_norm", "aot", "aot_unpaired",
    )),
    *({"loss": name, "label_smoothing": 0.1} for name in ("exo_pair", "robust", "aot")),
    *({"loss": name, "divergence": divergence}
      for name in ("sigmoid", "ipo_mean") for divergence in ("forward_kl", "js", "alpha")),
    {"loss": "sigmoid", "ld_alpha": 0.4},
    {"loss": "aot", "ld_alpha": 0.4},
    {"loss": "sigmoid", "weighting": "wpo"},
    {"loss": {"sigmoid": 0.8, "bco_pair": 0.2, "sft": 1.0}},
]  # fmt: skip
TRL_NAMES = {"ipo_mean": "ipo"}
TRL_DIVERGENCES = {"js": "js_divergence", "alpha": "alpha_divergence"}


def micro_batch(seed: int = 0, count: int = 5) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(log-probs, reference, labels, log sum of squares) of 5 pairs, as a padded micro-batch: [10, width]."""
    random = torch.Generator().manual_seed(seed)
    width, lengths = 14, torch.randint(2, 9, (2 * count,), generator=random)
    labels = torch.full((2 * count, width), -100)
    for row, length in enumerate(lengths.tolist()):
        labels[row, 4 : 4 + length] = 7
    scored = labels[:, 1:] != -100
    log_probs, reference = (-3 * torch.rand(2 * count, width - 1, generator=random) * scored for _ in range(2))
    squares = -2 * torch.rand(2 * count, width - 1, generator=random) * scored
    return log_probs, reference, labels, squares


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
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(our_slope, their_slope, rtol=1e-5, atol=1e-6)


def by_us(settings: Any, log_probs: Tensor, reference: Tensor, labels: Tensor, squares: Tensor) -> Tensor:
    objective = Objective(settings)
    mean = float((labels[: len(labels) // 2] != -100).sum(1).float().mean())
    pairs = objective.pairs(log_probs, reference, labels, mean)
    return objective(pairs, objective.weights(log_probs, squares if objective.weighs else None, labels)).mean()


def test_the_reference_free_losses_equal_trls() -> None:
    log_probs, _, labels, _ = micro_batch()
    pairs = Objective(tiny.dpo(loss="simpo")).pairs(log_probs, None, labels, 1.0)
    means = pairs.chosen / pairs.chosen_tokens, pairs.rejected / pairs.rejected_tokens
    stock = SimpleNamespace(
        alpha=0.0, beta=2.0, simpo_gamma=1.0, label_smoothing=0.1, loss_type="simpo",
        accelerator=SimpleNamespace(device=torch.device("cpu")),
    )  # fmt: skip
    theirs, *_ = CPOTrainer.cpo_loss(stock, *means)
    ours = losses.simpo(pairs, beta=2.0, simpo_gamma=1.0, label_smoothing=0.1)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)

    stock.loss_type, stock.beta = "sigmoid", 0.1
    theirs, *_ = CPOTrainer.cpo_loss(stock, pairs.chosen, pairs.rejected)
    ours = losses.cpo(pairs, beta=0.1, label_smoothing=0.1) - losses.nll(pairs)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)

    theirs, *_ = ORPOTrainer.odds_ratio_loss(stock, *means)
    ours = losses.nll(pairs) - losses.orpo(pairs, beta=0.1)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


# --- gradients, fixed points, limits ----------------------------------------------------------------------------------


def settings_of(name: str, **changes: Any) -> Any:
    return tiny.dpo(loss=name, **{"label_smoothing": 0.1 if name in ("exo_pair", "robust") else 0.0, **changes})


@pytest.mark.parametrize("name", sorted(PAIR_LOSSES))
def test_gradients_are_those_of_finite_differences(name: str) -> None:
    objective = Objective(settings_of(name, beta=0.3, beta_dpo_keep=1.0))
    log_probs, reference, labels, _ = (one.double() if one.is_floating_point() else one for one in micro_batch())
    noise = torch.full((5,), 0.5, dtype=torch.float64)
    objective.threshold = Threshold(float("-inf") if name != "beta_dpo" else 0.0, 0.0)
    if name == "beta_dpo":  # its beta is a number of the batch, not a function to be differentiated
        objective = Objective(settings_of(name, beta_dpo_keep=1.0, beta_dpo_alpha=0.0))
    given = log_probs.clone().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda values: objective(objective.pairs(values, reference, labels, 5.0), noise=noise), [given], atol=1e-6
    )


START = {
    "sigmoid": LN2, "hinge": 1.0, "ipo_sum": 25.0, "ipo_mean": 25.0, "sigmoid_norm": LN2, "robust": LN2, "dpop": LN2,
    "exo_pair": 0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(0.5 / 0.1), "discopop": (LN2 + 1) / 2,
    "cal_dpo": LN2 + 50.0, "nca_pair": 2 * LN2, "bco_pair": 2 * LN2, "sppo_hard": 50.0, "apo_zero": 1.0,
    "apo_down": 1.0, "aot": LN2, "aot_unpaired": LN2, "beta_dpo": LN2,
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(START))
def test_where_the_policy_is_the_reference_the_loss_is_known(name: str) -> None:
    """At step 0; beta is 0.1. Those without a reference, and R-DPO, whose margin begins with the lengths, have none."""
    objective = Objective(settings_of(name, beta_dpo_keep=1.0))
    log_probs, _, labels, _ = micro_batch()
    pairs = objective.pairs(log_probs, log_probs, labels, 5.0)
    noise = torch.full((5,), 0.5)
    assert float(objective(pairs, noise=noise).mean()) == pytest.approx(START[name], rel=1e-6)


MONOTONE = {"sigmoid", "hinge", "sigmoid_norm", "dpop", "rdpo", "simpo", "apo_zero", "bco_pair", "cpo", "orpo"}


@pytest.mark.parametrize("name", sorted(MONOTONE))
def test_the_loss_falls_with_the_margin_where_its_paper_says_so(name: str) -> None:
    objective = Objective(settings_of(name))
    values = []
    for shift in torch.linspace(-4, 4, 17).tolist():
        log_probs, reference, labels, _ = micro_batch(count=1)
        scored = (labels[:1, 1:] != -100).float()
        log_probs[:1] = (log_probs[:1] - 4.1 * scored / scored.sum()) + shift * scored / scored.sum()
        values.append(float(objective(objective.pairs(log_probs, reference, labels, 5.0))))
    assert all(after <= before + 1e-9 for before, after in itertools.pairwise(values)), values
    assert values[-1] < values[0]


@pytest.mark.parametrize(("name", "best"), [("ipo_sum", 5.0), ("sppo_hard", 5.0), ("cal_dpo", 5.0)])
def test_the_loss_is_least_at_its_aim(name: str, best: float) -> None:
    """1 / (2 beta) at beta 0.1: of the margin for IPO, of a side, the other held at its aim, for SPPO and Cal-DPO."""
    objective = Objective(tiny.dpo(loss=name))
    other = 0.0 if name == "ipo_sum" else -best

    def loss(ratio: float) -> float:
        pairs = objective.pairs_of(
            torch.tensor([ratio, other]), torch.zeros(2), torch.zeros(1), torch.tensor([4, 4]), 4.0
        )
        return float(objective(pairs))

    around = [loss(best + step) for step in (-1.0, -0.2, 0.2, 1.0)]
    assert loss(best) < min(around) + (1e-2 if name == "cal_dpo" else 0.0)  # the contrast pulls a little further


def test_a_smoothed_label_has_a_margin_that_is_enough() -> None:
    """Conservative DPO is least where sigma(beta margin) = 1 - smoothing: log(0.9 / 0.1) / beta."""
    objective = Objective(tiny.dpo(label_smoothing=0.1, beta=1.0))
    margin = torch.tensor([math.log(9.0), 0.0], dtype=torch.float64, requires_grad=True)
    pairs = objective.pairs_of(margin, torch.zeros(2), torch.zeros(1), torch.tensor([4, 4]), 4.0)
    (slope,) = torch.autograd.grad(objective(pairs).sum(), margin)
    assert float(slope.abs().max()) < 1e-12


def test_a_mix_is_the_weighted_sum_of_its_losses() -> None:
    log_probs, reference, labels, _ = micro_batch()
    mixed = Objective(tiny.dpo(loss={"sigmoid": 1.0, "nll": 0.25}))
    pairs = mixed.pairs(log_probs, reference, labels, 5.0)
    alone = losses.sigmoid(pairs, beta=0.1, label_smoothing=0.0) + 0.25 * losses.nll(pairs)
    torch.testing.assert_close(mixed(pairs), alone)


@pytest.mark.parametrize("name", ["aot", "aot_unpaired", "beta_dpo"])
def test_a_loss_of_the_whole_batch_does_not_depend_on_how_it_is_told(name: str) -> None:
    """Its slopes are the gradient of the sum over the batch, whatever the order in which processes tell their pairs."""
    log_probs, reference, labels, _ = micro_batch()
    found = []
    for order in ([0, 1, 2, 3, 4], [3, 1, 4, 0, 2]):
        objective = Objective(settings_of(name))
        rows = columns(objective.pairs(log_probs, reference, labels, 5.0), None).tolist()
        told = [(10 + number, rows[number]) for number in order]
        slopes = objective.slopes(told, torch.Generator().manual_seed(1), 5.0)
        found.append(torch.stack([slopes[10 + number] for number in range(5)]))
    assert torch.equal(*found)
    if name != "beta_dpo":
        given = log_probs.double().requires_grad_()
        pairs = objective.pairs(given, reference.double(), labels, 5.0)
        (slope,) = torch.autograd.grad(objective(pairs).sum(), given)
        expected = torch.stack([slope[row][labels[row, 1:] != -100][0] for row in range(5)]).float()
        torch.testing.assert_close(found[0][:, 1], expected)


def test_beta_follows_the_margin_of_the_batch_and_outliers_are_left_out() -> None:
    """Averages after one batch of margins m: 0.1 mean(m), 0.1 std(m) (momentum 0.9, from 0)."""
    objective = Objective(tiny.dpo(loss="beta_dpo"))
    margins = torch.tensor([1.0, 1.2, 0.8, 1.1, 60.0], dtype=torch.float64)
    zero, tokens = torch.zeros(5, dtype=torch.float64), torch.full((5,), 4.0, dtype=torch.float64)
    pairs = Pairs(margins, zero, zero, zero, margins, zero, -margins, tokens, tokens, 4.0)
    told = list(enumerate(columns(pairs, None).tolist()))
    objective.threshold = Threshold(1.0, 0.5)
    slopes = objective.slopes(told, torch.Generator().manual_seed(0), 4.0)
    assert objective.threshold.mean == pytest.approx(0.9 + 0.1 * float(margins.mean()))
    assert slopes[4].abs().max() == 0, "the outlier"
    assert sum(float(slopes[number][0]) > 0 for number in range(4)) == 4, "four of five are kept"
    again = Objective(objective.settings)
    again.load_state_dict(objective.state_dict())
    assert again.threshold == objective.threshold


@pytest.mark.parametrize("ratio", [500.0, -500.0])
@pytest.mark.parametrize("divergence", ["reverse_kl", "forward_kl", "js", "alpha"])
@pytest.mark.parametrize("name", sorted(PAIR_LOSSES))
def test_answers_that_have_become_impossible_leave_gradients_numbers(name: str, divergence: str, ratio: float) -> None:
    """In float32: hundreds of nats are ordinary for a long rejected answer."""
    objective = Objective(settings_of(name, divergence=divergence, beta=1.0, beta_dpo_keep=1.0))
    sums = torch.tensor([-600.0, -600.0 + ratio], requires_grad=True)
    theirs, tokens = torch.tensor([-600.0, -600.0]), torch.tensor([100, 100])
    pairs = objective.pairs_of(sums, theirs, -sums[:1], tokens, 100.0)
    loss = objective(pairs, noise=torch.tensor([0.5])).sum()
    (slope,) = torch.autograd.grad(loss, sums)
    assert loss.isfinite() and slope.isfinite().all(), (float(loss), slope.tolist())


def test_a_batch_without_numbers_leaves_the_averages_of_beta_dpo_as_they_were() -> None:
    before = Threshold(1.0, 0.5)
    assert before.after(torch.tensor([math.nan, math.inf]), 0.9) == before
    assert before.after(torch.tensor([2.0, math.nan]), 0.9) == Threshold(0.9 + 0.2, 0.45)
