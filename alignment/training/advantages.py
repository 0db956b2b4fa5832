"""How much better an answer was than was to be expected: advantages from rewards. Pure functions, in float64.

Shapes: P prompts, G answers each; T tokens. valid: which answers count. One that does not (its reward failed) has no
part in any baseline, and its advantage is 0; so is that of an answer which is the only one of its prompt.
"""

from __future__ import annotations

import torch
from torch import Tensor

EPSILON = 1e-4  # added to standard deviations, as in TRL


def leave_one_out(rewards: Tensor, valid: Tensor) -> Tensor:
    """RLOO (Ahmadian et al. 2024, arXiv:2402.14740, eq. 8): A_i = r_i - mean of the other answers' rewards.

    rewards: [P, G]; valid: [P, G] bool. Returns [P, G].

    By hand: of 1, 2, 6 the others' means are 4, 3.5, 1.5: -3, -1.5, 4.5.
    """
    count = valid.sum(1, keepdim=True)
    others = (rewards * valid).sum(1, keepdim=True) - rewards
    return _kept(rewards - others / (count - 1).clamp(min=1), rewards, valid)  # (8)


def group_relative(rewards: Tensor, valid: Tensor, scale: bool) -> Tensor:
    """GRPO (Shao et al. 2024, arXiv:2402.03300, sec. 4.1.2): A_i = (r_i - mean r) / std r, over the prompt's answers.

    scale: divide by the standard deviation (of the sample: by G - 1); not in Dr. GRPO (Liu et al. 2025,
    arXiv:2503.20783, sec. 3.2): it weighs up prompts whose answers are nearly all right or all wrong.

    By hand: of 1, 2, 6 the mean is 3: -2, -1, 3; scaled by sqrt((4 + 1 + 9) / 2) = 2.645751: -0.755901, -0.377950,
    1.133851 (with EPSILON).
    """
    count = valid.sum(1, keepdim=True)
    apart = (rewards - (rewards * valid).sum(1, keepdim=True) / count.clamp(min=1)) * valid
    if scale:
        deviation = (apart.square().sum(1, keepdim=True) / (count - 1).clamp(min=1)).sqrt()
        apart = apart / (deviation + EPSILON)  # sec. 4.1.2, A_i
    return _kept(apart, rewards, valid)


def _kept(advantages: Tensor, rewards: Tensor, valid: Tensor) -> Tensor:
    """Rewards that differ by rounding alone have no advantage, however small the deviation that it is divided by."""
    return torch.where(valid & has_signal(rewards, valid)[:, None], advantages, 0.0)


def whiten(values: Tensor, valid: Tensor) -> Tensor:
    """(x - mean) / (std + EPSILON) over all valid values of a batch, 0 elsewhere.

    (Ziegler et al. 2019, arXiv:1909.08593, whiten advantages so; std of the sample.)

    By hand: of 1, 2, 3 mean 2, std 1: -0.9999, 0, 0.9999.
    """
    if int(valid.sum()) < 2:
        return torch.where(valid, values, 0.0)
    known = values[valid]
    return torch.where(valid, (values - known.mean()) / (known.std() + EPSILON), 0.0)


def has_signal(rewards: Tensor, valid: Tensor) -> Tensor:
    """[P] bool: whether the valid answers of a prompt differ in their rewards, so that its advantages are not all 0:
    the constraint of DAPO's dynamic sampling (arXiv:2503.14476, eq. 11), for rewards that are not 0 or 1 too.

    What is closer than a reward model's rounding is the same: a prompt's fate may not depend on which answers were
    scored together.

    By hand: 1, 2, 6: true; 5, 5, 5 + 1e-7: false.
    """
    highest = rewards.masked_fill(~valid, -torch.inf).amax(1)
    lowest = rewards.masked_fill(~valid, torch.inf).amin(1)
    return differ(highest, lowest)  # DAPO (11)


def differ(one: Tensor, other: Tensor) -> Tensor:
    """Whether two rewards are apart by more than rounding, 1e-6 of the larger or of 1.

    By hand: 5 and 5 + 1e-7: no; 1e-5 and 0: yes; 1e4 and 1e4 + 1e-3: no.
    """
    return (one - other).abs() > 1e-6 * torch.maximum(one.abs(), other.abs()).clamp(min=1)


def generalized(rewards: Tensor, values: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """GAE (Schulman et al. 2016, arXiv:1506.02438, eq. 16) of one answer: (advantages [T], returns [T]).

    rewards: [T], of each token; values: [T], V of the state before each token; after the last one the episode is over.
    delta_t = r_t + gamma V_{t+1} - V_t, A_t = delta_t + gamma lam A_{t+1}; returns are A + V.

    By hand, gamma = lam = 1/2, rewards 1, 0, 3, values 0, 1, 2: from the end deltas 1, 0, 1.5; A = 1, 0.25, 1.5625.
    """
    advantages = []
    after = following = 0.0
    for reward, value in zip(reversed(rewards.tolist()), reversed(values.tolist()), strict=True):  # 100 times as fast
        delta = reward + gamma * following - value
        after = delta + gamma * lam * after  # (16)
        advantages.append(after)
        following = value
    found = rewards.new_tensor(advantages[::-1])
    return found, found + values
