"""Losses of online learning against values derived by hand, their gradients, their limits."""

from __future__ import annotations

import math

import pytest
import torch
from torch.autograd import gradcheck

from alignment.training.losses import policy

LOG2 = math.log(2)


def tensor(*rows: list[float]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.float64)


ONES = tensor([1.0, 1.0])


@pytest.mark.parametrize(
    ("apart", "worth", "wanted", "clipped"),
    [
        (0.0, 3.0, -3.0, False),  # nothing has moved: -A
        (LOG2, 1.0, -1.28, True),  # w = 2 is cut to 1 + high
        (LOG2, -1.0, 2.0, False),  # what is worse and became likelier counts in full
        (-LOG2, 1.0, -0.5, False),  # what is better and became less likely too
        (-LOG2, -1.0, 0.8, True),  # w = 1/2 is cut to 1 - low
    ],
)
def test_clipped_surrogate(apart: float, worth: float, wanted: float, clipped: bool) -> None:
    given = tensor([apart - 1.0]), tensor([-1.0]), tensor([worth]), tensor([1.0])
    found = policy.clipped_surrogate(*given, "token", low=0.2, high=0.28)
    assert found.loss.item() == pytest.approx(wanted) and found.clipped.item() is clipped


def test_the_ratio_of_a_sequence_is_of_the_sum_or_the_mean_of_its_own_tokens() -> None:
    """Log-ratios 0.3 and 0.1, and a third token that is none of the answer's."""
    now, old, mask = tensor([0.3, 0.1, 7.0]), tensor([0.0, 0.0, 0.0]), tensor([1.0, 1.0, 0.0])
    assert policy.log_ratio(now, old, mask, "sequence").tolist() == [[pytest.approx(0.4)]]
    assert policy.log_ratio(now, old, mask, "sequence_mean").tolist() == [[pytest.approx(0.2)]]
    assert policy.log_ratio(now, old, mask, "token").tolist() == [[0.3, 0.1, 0.0]]


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_where_nothing_has_moved_its_gradient_is_that_of_reinforce(level: policy.Ratio) -> None:
    """- A at every token, whatever is clipped elsewhere; a sequence's tokens weigh 1 / 2 each, and share one ratio."""
    now = tensor([-1.0, -2.0]).requires_grad_()
    found = policy.clipped_surrogate(now, now.detach(), 3 * ONES, ONES, level, 0.2, 0.2)
    (found.loss * policy.token_weights(ONES, "sequence" if level == "sequence" else "token")).sum().backward()
    assert now.grad is not None and now.grad.tolist() == [[-3.0, -3.0]]


@pytest.mark.parametrize("level", ["token", "sequence", "sequence_mean"])
def test_gradients(level: policy.Ratio) -> None:
    random = torch.Generator().manual_seed(1)
    now, old, worth = (torch.randn(3, 4, generator=random, dtype=torch.float64) for _ in range(3))
    mask = tensor([1, 1, 1, 0], [1, 1, 1, 1], [1, 0, 0, 0])
    now = (0.3 * now).requires_grad_()
    assert gradcheck(lambda x: policy.clipped_surrogate(x, 0.3 * old, worth, mask, level, 0.2, 0.3).loss, now)
    for estimator in ("k1", "k2", "k3"):
        assert gradcheck(lambda x, e=estimator: policy.kl(x, old, e), now)
    assert gradcheck(lambda x: policy.value_loss(x, old, worth, 0.2), now)


def test_kl_estimators() -> None:
    """d = log 2: k1 = d, k2 = d^2 / 2, k3 = 1/2 - 1 + d."""
    found = [policy.kl(tensor([LOG2]), tensor([0.0]), name).item() for name in ("k1", "k2", "k3")]
    assert found == pytest.approx([LOG2, LOG2**2 / 2, LOG2 - 0.5])


def test_k1_and_k3_are_unbiased_and_k2_nearly_so() -> None:
    """Expectations over p = (0.6, 0.4) of the estimators of KL(p || q), q = (0.5, 0.5)."""
    p, q = tensor([0.6, 0.4]), tensor([0.5, 0.5])
    exact = (p * (p / q).log()).sum().item()
    found = {name: (p * policy.kl(p.log(), q.log(), name)).sum().item() for name in ("k1", "k2", "k3")}
    assert found["k1"] == pytest.approx(exact, abs=1e-12) and found["k3"] == pytest.approx(exact, abs=1e-12)
    assert found["k2"] == pytest.approx(exact, rel=0.02)


@pytest.mark.parametrize("older", [None, (0.8, 0.2)])
@pytest.mark.parametrize("first", [0.6, math.exp(-4)])
@pytest.mark.parametrize(("estimator", "alone"), [("k1", 0.0), ("k2", 0.097312), ("k3", 0.1)])
def test_corrected_its_gradient_is_that_of_the_kl(
    estimator: policy.Estimator, alone: float, first: float, older: tuple[float, float] | None
) -> None:
    """By logits of p = (first, 1 - first), of the expectation over tokens of p, or of an older policy; q = (0.5, 0.5).
    At first = 0.6 that of k3 alone is p - q, of k2 alone the KL's. A token far less likely than in q, of which a slope
    of k2's ratio would push away, is pulled back."""
    logits, q = tensor([math.log(first / (1 - first)), 0.0])[0].requires_grad_(), tensor([0.5, 0.5])
    now = logits.log_softmax(0)[None]
    old = now.detach() if older is None else tensor(list(older)).log()
    pull = policy.kl(now, q.log(), estimator)
    (bare,) = torch.autograd.grad((now.detach().exp() * pull).sum(), logits, retain_graph=True)
    whole = old.exp() * policy.corrected(pull, now, old, ONES, estimator)
    (found,) = torch.autograd.grad(whole.sum(), logits, retain_graph=True)
    (exact,) = torch.autograd.grad((now.exp() * (now - q.log())).sum(), logits)
    assert found.tolist() == pytest.approx(exact.tolist())
    if first == 0.6:
        assert exact[0].item() == pytest.approx(0.097312, abs=1e-6) and bare[0].item() == pytest.approx(alone, abs=1e-6)


@pytest.mark.parametrize(("estimator", "ends"), [("k1", 0.0), ("k2", 0.1), ("k3", 0.1)])
def test_off_the_reward_k1_alone_pulls_to_the_start_model(estimator: policy.Estimator, ends: float) -> None:
    """Why config/online_checks.py refuses the others there. Eight tokens of unequal chance, a reward of 0: what an
    exact gradient of the estimate's mean does, whose advantages are its values, in 200 steps. Nats from the start."""
    start = torch.linspace(-1.0, 1.0, 8, dtype=torch.float64).log_softmax(0)
    logits = (2 * start).clone().requires_grad_()
    for _ in range(200):
        now = logits.log_softmax(0)
        value = policy.kl(now.detach()[None], start[None], estimator)[0]
        (slope,) = torch.autograd.grad((now.detach().exp() * value * now).sum(), logits)
        logits = (logits - 2.0 * slope).detach().requires_grad_()
    left = float((now.exp() * (now - start)).sum())
    assert left < 1e-6 if ends == 0 else left > ends


@pytest.mark.parametrize("worth", [0.0, 1.0, -1.0])
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_a_policy_that_ran_away_has_finite_losses_and_slopes(level: policy.Ratio, worth: float) -> None:
    """Log-ratios of 90: exp of them is infinite in float32."""
    now = torch.full((1, 2), 90.0, requires_grad=True)
    found = policy.clipped_surrogate(
        now, torch.zeros(1, 2), torch.full((1, 2), worth), torch.ones(1, 2), level, 0.2, 0.2
    )
    found.loss.sum().backward()
    assert now.grad is not None and now.grad.isfinite().all() and found.loss.isfinite().all()
    assert worth or found.loss.abs().sum() == 0


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
@pytest.mark.parametrize("far", [90.0, -90.0])
def test_a_policy_that_ran_away_has_a_finite_kl_and_slope(estimator: policy.Estimator, far: float) -> None:
    now = torch.full((1, 2), far, requires_grad=True)
    nothing, ones = torch.zeros(1, 2), torch.ones(1, 2)
    policy.corrected(policy.kl(now, nothing, estimator), now, nothing, ones, estimator).sum().backward()
    assert now.grad is not None and now.grad.isfinite().all()
    assert policy.kl(now, nothing, estimator).sum().isfinite()


def test_the_value_may_not_run_away_from_what_it_was() -> None:
    """V = 2 from V_old = 0, clip 0.5. Return 3: (2-3)^2 = 1 but clipped (0.5-3)^2 = 6.25. Return 0: 4 against 0.25."""
    found = policy.value_loss(tensor([2.0, 2.0]), tensor([0.0, 0.0]), tensor([3.0, 0.0]), clip=0.5)
    assert found.tolist() == [[3.125, 2.0]]
    assert policy.value_loss(tensor([2.0]), tensor([0.0]), tensor([3.0]), clip=None).tolist() == [[0.5]]


@pytest.mark.parametrize(("measured", "factor"), [(6.0, 1.0), (6.6, 1.01), (60.0, 1.02), (0.0, 0.98)])
def test_the_coefficient_follows_its_target(measured: float, factor: float) -> None:
    """Target 6: e = 0.1 at 6.6, and never beyond 0.2; gain 0.1."""
    assert policy.adapted(0.5, measured, target=6.0, gain=0.1) == pytest.approx(0.5 * factor)


def test_weights_and_divisors() -> None:
    """Two answers of 1 and 3 tokens, of at most 10."""
    mask = tensor([1, 0, 0], [1, 1, 1])
    losses = tensor([6, 9, 9], [1, 2, 3])
    wanted = {"sequence": (6 + 2) / 2, "token": 12 / 4, "constant": 12 / 20}
    for how, value in wanted.items():
        total = (losses * policy.token_weights(mask, how)).sum().item()  # type: ignore[arg-type]
        assert total / policy.divisor(2, 4, 10, how) == pytest.approx(value)  # type: ignore[arg-type]
