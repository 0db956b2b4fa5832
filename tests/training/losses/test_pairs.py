"""Losses of pairs: the values derived by hand in their docstrings, gradients, fixed points, limits."""

from __future__ import annotations

import inspect
import itertools
import math
from typing import Any

import pytest
import torch

from alignment.config.losses import COEFFICIENTS
from alignment.config.losses import PAIR_LOSSES as TRAITS
from alignment.training.losses import pairs as losses
from alignment.training.losses.divergence import divergence_score
from alignment.training.losses.pairs import PAIR_LOSSES, Pairs, Threshold
from alignment.training.objective import Objective, columns
from tests.training import tiny
from tests.training.losses.batches import micro_batch, settings_of

LN2 = math.log(2)


def given(
    chosen: Any = (0.0,), rejected: Any = (0.0,), tokens: tuple[Any, Any] = ((6.0,), (4.0,)), **other: Any
) -> Pairs:
    """Pairs of these log-ratios: log-probs under a reference that gives 0 to every answer."""
    w, l = (torch.as_tensor(one, dtype=torch.float64) for one in (chosen, rejected))  # noqa: E741
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
    ("cpo", given((-6.0,), (-8.0,)), {"beta": 0.5, "label_smoothing": 0.0, "cpo_alpha": 1.0}, 1.313262),
    ("orpo", given((-6 * LN2,), (-4 * LN2,)), {"beta": 0.1}, 0.762462),
    ("nll", given((-6.0,)), {}, 1.0),
    ("sft", given((-6.0, -2.0), (0.0, 0.0), TWO), {}, 0.8),
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "pairs", "how", "expected"), BY_HAND, ids=lambda value: value if isinstance(value, str) else ""
)
def test_values_derived_by_hand(name: str, pairs: Pairs, how: dict[str, Any], expected: float) -> None:
    """The derivation is in the docstring of the loss, and ends in this number."""
    assert float(PAIR_LOSSES[name](pairs, **how).mean()) == pytest.approx(expected, abs=2e-6)
    by_hand = (inspect.getdoc(PAIR_LOSSES[name]) or "").partition("By hand")[2]
    assert ("ln 2" if expected == LN2 else f"{expected:.7g}") in by_hand


def test_every_loss_has_a_value_derived_by_hand() -> None:
    assert {name for name, *_ in BY_HAND} == set(PAIR_LOSSES)


@pytest.mark.parametrize(
    ("divergence", "expected"),
    [("reverse_kl", 1.0), ("forward_kl", 1 - math.exp(-1)), ("js", 0.379885), ("alpha", 0.786939)],
)
def test_divergence_scores_at_a_log_ratio_of_one(divergence: str, expected: float) -> None:
    """And 0, with the slope of its docstring, where policy = reference."""
    score = divergence_score(torch.tensor([1.0], dtype=torch.float64), divergence, 0.5)
    assert float(score) == pytest.approx(expected, abs=2e-6)
    start = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    score = divergence_score(start, divergence, 0.5)
    assert float(score.detach()) == 0.0
    assert float(torch.autograd.grad(score, start)[0]) == pytest.approx(0.5 if divergence == "js" else 1.0)


def test_the_alpha_divergence_is_the_forward_kl_at_0_and_the_reverse_kl_at_1() -> None:
    """And 1 - alpha is that of the paper, whose f' is (1 - t^-a) / a."""
    ratio = torch.linspace(-2, 2, 9, dtype=torch.float64)
    for alpha, limit in ((1e-7, "forward_kl"), (1 - 1e-7, "reverse_kl")):
        wanted = divergence_score(ratio, limit, 0.5)
        torch.testing.assert_close(divergence_score(ratio, "alpha", alpha), wanted, rtol=1e-5, atol=1e-6)
    papers = (1 - torch.exp(-0.3 * ratio)) / 0.3
    torch.testing.assert_close(divergence_score(ratio, "alpha", 0.7), papers)


@pytest.mark.parametrize("divergence", ["forward_kl", "alpha"])
def test_an_answer_that_has_fallen_far_is_still_pulled_back_and_is_not_the_whole_step(divergence: str) -> None:
    """Powers of t go on along their tangent above e^10; the paper's would be e^39 here, or 0 where they are cut."""
    far = torch.tensor([-9.0, -10.0, -11.0, -39.0, -500.0], requires_grad=True)
    score = divergence_score(far, divergence, 1e-6)
    (slope,) = torch.autograd.grad(score.sum(), far)
    wanted = torch.tensor([9.0, 10.0, 10.0, 10.0, 10.0]).exp()
    torch.testing.assert_close(slope, wanted, rtol=1e-4, atol=0.0)
    torch.testing.assert_close(score[2], score[1] - wanted[1], rtol=1e-4, atol=0.0)
    objective = Objective(settings_of("ipo_sum", divergence=divergence, divergence_alpha=1e-6))
    sums = torch.tensor([-1.0, -40.0], requires_grad=True)
    pairs = objective.pairs_of(sums, torch.full((2,), -1.0), -sums[:1], torch.tensor([9, 9]), 9.0)
    (slope,) = torch.autograd.grad(objective(pairs).sum(), sums)
    assert slope.square().sum().isfinite(), "the norm of the gradient"


@pytest.mark.parametrize("name", ["dpop", "beta_dpo"])
def test_where_training_begins_rounding_decides_nothing(name: str) -> None:
    """The reference of another kernel is as far away as bf16 makes it for an answer: neither which chosen answers have
    fallen nor which pairs are outliers may depend on it."""
    objective, found = Objective(settings_of(name, beta_dpo_keep=0.5)), []
    random, tokens = torch.Generator().manual_seed(0), torch.full((16,), 50)
    sums = (-100 * torch.rand(16, generator=random)).double().requires_grad_()
    for seed in range(4):
        noise = 1e-2 * torch.randn(16, generator=torch.Generator().manual_seed(seed)).double()
        pairs = objective.pairs_of(sums, sums.detach() + noise, -sums[:8], tokens, 50.0)
        objective.threshold = Threshold().after(pairs.margin.detach(), 0.9)
        loss = objective(pairs, noise=torch.rand(8, generator=torch.Generator().manual_seed(1)))
        found.append(torch.autograd.grad(loss.sum(), sums)[0])
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-2, atol=1e-6)  # beta times noise is 3e-3


def test_log_ratios_of_long_answers_are_not_lost_in_their_sums() -> None:
    """20,000 tokens of about a nat each: float32 sums would be off by 1e-3 and more."""
    random = torch.Generator().manual_seed(0)
    ours = -torch.rand(2, 20_000, generator=random) * 2
    theirs, labels = ours - 1e-4 * torch.rand(2, 20_000, generator=random), torch.ones(2, 20_001, dtype=torch.long)
    pairs = Objective(settings_of("sigmoid")).pairs(ours, theirs, labels, 20_000.0)
    exact = (ours.double() - theirs.double()).sum(1)
    assert [float(pairs.chosen_ratio), float(pairs.rejected_ratio)] == pytest.approx(exact.tolist(), abs=1e-9)


@pytest.mark.parametrize(("loss", "by_token"), [("simpo", True), ({"sigmoid": 1.0, "orpo": 0.1}, False)])
def test_beside_a_reference_metrics_are_of_whole_answers(loss: Any, by_token: bool) -> None:
    assert tiny.dpo(loss=loss).by_token is by_token


def test_the_settings_name_what_the_functions_read() -> None:
    assert PAIR_LOSSES.keys() == TRAITS.keys()
    for name, function in PAIR_LOSSES.items():
        reads = {p.name for p in inspect.signature(function).parameters.values() if p.kind is p.KEYWORD_ONLY}
        given = set(TRAITS[name].uses) - {"beta_dpo_momentum"}
        assert reads - {"threshold", "noise"} == given, name
    assert set(COEFFICIENTS) <= set(tiny.dpo().model_fields)


# --- gradients, fixed points, limits ----------------------------------------------------------------------------------


VARIANTS = [
    *({"loss": name} for name in sorted(PAIR_LOSSES)),
    *({"loss": name, "divergence": divergence}
      for name in ("sigmoid", "dpop", "ipo_sum") for divergence in ("forward_kl", "js", "alpha")),
    *({"loss": name, "label_smoothing": 0.2} for name in ("sigmoid", "simpo", "cpo", "aot", "aot_unpaired")),
    *({"loss": name, "ld_alpha": 0.4} for name in ("sigmoid", "cal_dpo")),
    *({"loss": name, "weighting": "wpo"} for name in ("sigmoid", "hinge")),
    {"loss": {"sigmoid": 1.0, "nll": 1.0}, "weighting": "wpo", "ld_alpha": 0.4, "divergence": "js"},
]  # fmt: skip


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_gradients_are_those_of_finite_differences(changes: dict[str, Any]) -> None:
    """WPO's weights are held: they have no gradient. beta-DPO's beta too: it is a number of the batch."""
    smoothed = {"label_smoothing": 0.1} if changes["loss"] in ("exo_pair", "robust") else {}
    still = {"beta_dpo_keep": 1.0, "beta_dpo_alpha": 0.0}
    objective = Objective(tiny.dpo(**{"beta": 0.3, **smoothed, **still, **changes}))
    batch = (one.double() if one.is_floating_point() else one for one in micro_batch())
    log_probs, reference, labels, squares = batch
    given = log_probs.clone().requires_grad_()
    weights = objective.weights(given, squares if objective.weighs else None, labels)
    assert (weights is not None) == objective.weighs and (weights is None or not weights.requires_grad)
    noise = torch.full((5,), 0.5, dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda values: objective(objective.pairs(values, reference, labels, 5.0), weights, noise), [given], atol=1e-6
    )


def test_the_weights_of_wpo_by_hand() -> None:
    """In the docstring of Objective.weights: 1/2 of the chosen answer times 1 of the rejected one."""
    objective = Objective(tiny.dpo(weighting="wpo"))
    labels = torch.tensor([[-100, 7, 7], [-100, 7, -100]])
    log_probs = torch.tensor([[0.25, 0.25], [0.5, 1.0]]).log()
    squares = torch.tensor([[0.5, 0.5], [0.5, 1.0]]).log()
    assert objective.weights(log_probs, squares, labels).tolist() == pytest.approx([0.5])  # type: ignore[union-attr]


def test_what_an_answer_is_longer_by_counts_less() -> None:
    """In the docstring of _verbosity: 1, 0.4, 0.4 of an answer of 3 tokens beside one of 1. The likelihood term of a
    mix stays that of the whole answer."""
    objective = Objective(tiny.dpo(ld_alpha=0.4))
    labels = torch.tensor([[-100, -100, 7, 7, 7], [-100, -100, 7, -100, -100]])
    log_probs = torch.tensor([[0.0, -1.0, -10.0, -100.0], [0.0, -1.0, 0.0, 0.0]])
    pairs = objective.pairs(log_probs, 2 * log_probs, labels, 3.0)
    assert (pairs.chosen.tolist(), pairs.rejected.tolist()) == ([pytest.approx(-45.0)], [-1.0])
    assert pairs.ref_chosen.tolist() == [pytest.approx(-90.0)] and pairs.chosen_nll.tolist() == [111.0]


START = {
    "sigmoid": LN2, "hinge": 1.0, "ipo_sum": 25.0, "ipo_mean": 25.0, "sigmoid_norm": LN2, "robust": LN2, "dpop": LN2,
    "exo_pair": 0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(0.5 / 0.1), "discopop": (LN2 + 1) / 2,
    "cal_dpo": LN2 + 50.0, "nca_pair": 2 * LN2, "bco_pair": 2 * LN2, "sppo_hard": 50.0, "apo_zero": 1.0,
    "apo_down": 1.0, "aot": LN2, "aot_unpaired": LN2, "beta_dpo": LN2,
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(START))
def test_where_the_policy_is_the_reference_the_loss_is_known(name: str) -> None:
    """At step 0; beta is 0.1. What the others begin with depends on lengths and likelihoods: the next test."""
    objective = Objective(settings_of(name, beta_dpo_keep=1.0))
    log_probs, _, labels, _ = micro_batch()
    pairs = objective.pairs(log_probs, log_probs, labels, 5.0)
    noise = torch.full((5,), 0.5)
    assert float(objective(pairs, noise=noise).mean()) == pytest.approx(START[name], rel=1e-6)


@pytest.mark.parametrize(
    ("name", "changes", "expected"),
    [
        ("rdpo", {"length_penalty": 0.2}, math.log1p(math.exp(-1))),  # the chosen answer has 5 tokens more
        ("simpo", {"simpo_gamma": 1.0}, math.log1p(math.e)),  # as likely a token: gamma is missing
        ("cpo", {"cpo_alpha": 1.0}, LN2 + 9 / 4),  # as likely, 9 nats over 4 tokens in the mean of the batch
        ("orpo", {"beta": 0.5}, 1.0 + 0.5 * LN2),  # as likely a token, 1 nat each
    ],
)  # fmt: skip
def test_where_both_answers_are_as_likely_the_others_are_known_too(
    name: str, changes: dict[str, Any], expected: float
) -> None:
    """Answers of 9 and 4 tokens, of 1 nat each; for CPO, which takes sums, of 9 nats each."""
    objective = Objective(settings_of(name, **changes))
    sums = torch.tensor([-9.0, -9.0 if name == "cpo" else -4.0], dtype=torch.float64)
    theirs = sums if objective.settings.refers else torch.zeros(2)
    pairs = objective.pairs_of(sums, theirs, -sums[:1], torch.tensor([9, 4]), 4.0)
    assert objective(pairs).tolist() == pytest.approx([expected], rel=1e-12)


def test_every_loss_has_a_known_value_at_its_start() -> None:
    alone = {"nll", "sft"}  # a likelihood, and nothing that is compared
    assert {*START, "rdpo", "simpo", "cpo", "orpo", *alone} == set(PAIR_LOSSES)


MONOTONE = {
    "sigmoid", "hinge", "sigmoid_norm", "dpop", "rdpo", "simpo", "apo_zero", "bco_pair", "cpo", "orpo", "robust",
}  # fmt: skip


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


def test_robust_falls_for_ever_and_below_every_bound() -> None:
    """Its slope in the margin tends to -beta share / (1 - 2 share): -0.125 at beta 1, share 0.1."""
    margins = torch.tensor([1e2, 1e4, 1e6], dtype=torch.float64)
    values = losses.robust(given(margins, torch.zeros(3)), beta=1.0, label_smoothing=0.1)
    assert values.tolist() == pytest.approx((-0.125 * margins).tolist(), rel=1e-9)


def test_discopop_rises_where_training_begins() -> None:
    """At tau 0.05. f = (1 - b) L + b E; at 0: b = 1/2, b' = 1 / (4 tau) = 5, L = ln 2, E = 1, L' = -1/2, E' = -1, so
    f' = 5 (1 - ln 2) - 3/4 = 0.784264: the first steps pull the answers together. It falls outside -0.12 to 0.07."""
    margin = torch.tensor([-1.0, -0.13, -0.11, 0.0, 0.06, 0.08, 1.0], dtype=torch.float64, requires_grad=True)
    pairs = Objective(tiny.dpo(loss="discopop")).pairs_of(
        torch.cat([margin, torch.zeros(7)]), torch.zeros(14), -margin, torch.full((14,), 4), 4.0
    )
    (slope,) = torch.autograd.grad(losses.discopop(pairs, beta=1.0, discopop_tau=0.05).sum(), margin)
    assert (slope > 0).tolist() == [False, False, True, True, True, False, False]
    assert float(slope[3]) == pytest.approx(5 * (1 - LN2) - 0.75, abs=1e-12)


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


def test_the_averages_of_beta_dpo_by_hand() -> None:
    """In the docstring of Threshold.after."""
    after = Threshold().after(torch.tensor([1.0, 3.0], dtype=torch.float64), 0.9)
    assert (after.mean, after.deviation) == (pytest.approx(0.2), pytest.approx(0.141421, abs=1e-6))
