"""Losses of online reinforcement learning, a token each: pure functions, without any division by a number of tokens.

Shapes: R answers, T positions; log-probs in nats under the policy at temperature 1. What is not an answer's token is
masked by the weights of `token_weights`, whose sum over the whole global batch is its number of answers, its tokens or
answers x longest: so sums divided once by that number cannot depend on micro-batches or processes.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from alignment.training.losses.divergence import EXPONENT

Ratio = Literal["token", "sequence", "sequence_mean"]
Estimator = Literal["k1", "k2", "k3"]
Aggregate = Literal["sequence", "token", "constant"]


class Surrogate(NamedTuple):
    """loss, ratio, clipped (bool): each [R, T]; of a ratio of whole sequences the same at all tokens of a row."""

    loss: Tensor
    ratio: Tensor
    clipped: Tensor


def log_ratio(log_probs: Tensor, old: Tensor, mask: Tensor, level: Ratio) -> Tensor:
    """log(pi / pi_old): [R, T] of each token, or [R, 1] of each answer.

    Beyond EXPONENT, where the ratio would be infinite and its gradient 0 times that, it stays there, and has no slope.

    sequence: the sum over its tokens (REINFORCE and RLOO take an answer for one action; Ahmadian et al. 2024,
    arXiv:2402.14740, sec. 3). sequence_mean: that by its tokens (GSPO, Zheng et al. 2025, arXiv:2507.18071, eq. 7).

    By hand: log-ratios 0.3 and 0.1 of an answer's two tokens: 0.3, 0.1; sequence 0.4; sequence_mean 0.2.
    """
    apart = (log_probs - old) * mask
    if level != "token":
        apart = apart.sum(1, keepdim=True)
    if level == "sequence_mean":
        apart = apart / mask.sum(1, keepdim=True).clamp(min=1)  # GSPO (7), its log
    return apart.clamp(-EXPONENT, EXPONENT)


def clipped_surrogate(
    log_probs: Tensor, old: Tensor, advantages: Tensor, mask: Tensor, level: Ratio, low: float, high: float
) -> Surrogate:
    """PPO's (Schulman et al. 2017, arXiv:1707.06347, eq. 7): -min(w A, clip(w, 1 - low, 1 + high) A), w = pi / pi_old.

    high above low is DAPO's clip-higher (Yu et al. 2025, arXiv:2503.14476, eq. 10). Where pi is pi_old its gradient is
    REINFORCE's, -A grad log pi (Williams 1992). log_probs, old, advantages, mask: [R, T].

    By hand, low 0.2, high 0.28: w = 1, A = 3: -3. w = 2, A = 1: -1.28, clipped; A = -1: 2. w = 1/2, A = 1: -0.5; A =
    -1: 0.8, clipped.
    """
    ratio = torch.exp(log_ratio(log_probs, old, mask, level)).expand_as(log_probs)
    loss = -torch.min(ratio * advantages, ratio.clamp(1 - low, 1 + high) * advantages)  # PPO (7); DAPO (10)
    clipped = ((ratio < 1 - low) & (advantages < 0)) | ((ratio > 1 + high) & (advantages > 0))
    return Surrogate(loss, ratio, clipped)


def value_loss(values: Tensor, old: Tensor, returns: Tensor, clip: float | None) -> Tensor:
    """1/2 max((V - R)^2, (clip(V, V_old +- clip) - R)^2), a token: the code of PPO's authors and of Ziegler et al. 2019
    (arXiv:1909.08593); in the paper of PPO (eq. 9) it is the square alone.

    values, old, returns: [R, T]. clip None: 1/2 (V - R)^2.

    By hand: V = 2, V_old = 0, clip 0.5; R = 3: 1/2 max(1, 2.5^2) = 3.125; R = 0: 1/2 max(4, 0.25) = 2; R = 3 without a
    clip: 0.5.
    """
    error = (values - returns).square()  # PPO (9), L^VF
    if clip is not None:
        near = old + (values - old).clamp(-clip, clip)
        error = torch.max(error, (near - returns).square())
    return error / 2


def kl(log_probs: Tensor, reference: Tensor, estimator: Estimator) -> Tensor:
    """Of KL(pi || pi_ref), a token drawn from pi: Schulman's estimators (joschu.net/blog/kl-approx.html).

    With d = log(pi / pi_ref): k1 = d, unbiased, of either sign; k2 = d^2 / 2, biased, never negative; k3 =
    exp(-d) - 1 + d, unbiased and never negative (GRPO's, arXiv:2402.03300, eq. 4), which below d = -EXPONENT, where it
    would be infinite, stays as it is, and has no slope.

    By hand, d = ln 2: 0.693147; 0.240227; 1/2 - 1 + ln 2 = 0.193147.
    """
    apart = log_probs - reference
    if estimator == "k1":
        return apart
    if estimator == "k2":
        return apart.square() / 2
    apart = apart.clamp(min=-EXPONENT)
    return torch.expm1(-apart) + apart  # k3: GRPO (4)


def corrected(estimates: Tensor, log_probs: Tensor, old: Tensor, mask: Tensor, estimator: Estimator) -> Tensor:
    """An estimate times its token's ratio to the policy that was sampled (DeepSeek-V3.2, arXiv:2512.02556, sec. 3.1).

    That of the token also where the surrogate takes the answer's: the slope of a ratio that is a mean over T tokens is
    T times less, and so would be all that k1 pulls with, and what corrects k3. estimates: [R, T] as `kl` gives them by
    this estimator; the others [R, T].

    The gradient is then that of KL(pi || pi_ref) of the next token, at the prefixes that were sampled, also where an
    older policy gave it. Of k3 alone it is that of KL(pi_ref || pi), and of k1 alone 0 in expectation: the slope that
    the ratio has, where it is 1 too, is what is missing. That of k2 alone, d grad log pi, is it already, so its ratio
    only weighs: with a slope it would add that of d^2 / 2, and below d = -2 push away (Tang & Munos 2025,
    arXiv:2506.09477, on values and gradients of these estimators).

    By hand, pi (0.6, 0.4), pi_ref (0.5, 0.5), k3, as one token drawn from pi, the gradient by pi's first logit: without
    0.6 (0.4 (1 - 5/6)) + 0.4 (-0.6 (1 - 5/4)) = 0.1; with 0.24 (ln 1.2 - ln 0.8) = 0.097312, that of the KL.
    """
    ratio = torch.exp(log_ratio(log_probs, old, mask, "token"))  # sec. 3.1
    return estimates * (ratio.detach() if estimator == "k2" else ratio)


def adapted(coefficient: float, measured: float, target: float, gain: float) -> float:
    """The coefficient of the KL for the next rollout (Ziegler et al. 2019, arXiv:1909.08593, sec. 2.2).

    e = clip((KL - target) / target, -0.2, 0.2); coefficient *= 1 + gain e. measured, target: nats an answer.

    By hand, target 6, gain 0.1: at 6.6 times 1.01; at 60 times 1.02; at 0 times 0.98.
    """
    error = min(max((measured - target) / target, -0.2), 0.2)  # sec. 2.2, e_t
    return coefficient * (1 + gain * error)  # sec. 2.2, beta_{t+1}


def token_weights(mask: Tensor, how: Aggregate) -> Tensor:
    """[R, T], what a token's loss counts in the sum. mask: [R, T].

    sequence: 1 / tokens of its answer, so that the mean over answers is that of their means (GRPO, arXiv:2402.03300,
    eq. 3). token: 1 (DAPO, arXiv:2503.14476, eq. 12). constant: 1, to be divided by answers x longest (Dr. GRPO,
    arXiv:2503.20783, sec. 3.2).

    By hand, answers of 1 and 3 tokens of at most 10, losses 6; 1, 2, 3: sequence (6 + 2) / 2 = 4; token 12 / 4 = 3;
    constant 12 / 20 = 0.6.
    """
    counted = mask.to(torch.float32)
    # GRPO (3): 1 / |o_i|; DAPO (12) and Dr. GRPO: 1
    return counted / counted.sum(1, keepdim=True).clamp(min=1) if how == "sequence" else counted


def divisor(answers: int, tokens: int, longest: int, how: Aggregate) -> int:
    """What the sum over a global batch is divided by: GRPO (3), DAPO (12), Dr. GRPO sec. 3.2 in the order of `how`.

    longest: tokens that an answer may have. By hand: in `token_weights`.
    """
    return max({"sequence": answers, "token": tokens, "constant": answers * longest}[how], 1)  # GRPO (3), DAPO (12)
