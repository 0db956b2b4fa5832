"""Losses of single answers that are wanted (desirable) or not, one number an answer.

r: the log-ratio log pi(y|x) - log pi_ref(y|x) of an answer, summed over its tokens, in nats.
"""

from __future__ import annotations

import torch
from torch import Tensor


def kto(
    ratio: Tensor,
    desirable: Tensor,
    kl: Tensor,
    *,
    beta: float,
    desirable_weight: float,
    undesirable_weight: float,
) -> Tensor:
    """KTO: Ethayarajh et al. 2024 (arXiv:2402.01306), eq. 8: lambda_y - v(x, y), with v = lambda_y sigma(beta (r - z0))
    for a wanted answer and lambda_y sigma(beta (z0 - r)) for an unwanted one (below eq. 8).

    ratio: [N]; desirable: [N] bool; kl: z0, a number >= 0 in nats, without a gradient. [N]: between 0 and lambda_y;
    lambda_y / 2 where policy = reference.

    By hand: beta = 1, z0 = 1, weights 1 and 2; wanted r = 2: 1 - sigma(1) = 0.268941; unwanted r = 0: 2 (1 - sigma(1))
    = 0.537883.
    """
    sign = torch.where(desirable, 1.0, -1.0)
    weight = torch.where(desirable, desirable_weight, undesirable_weight)
    return weight * (1 - torch.sigmoid(sign * beta * (ratio - kl)))  # (8)


def apo_zero_unpaired(ratio: Tensor, desirable: Tensor, kl: Tensor, **weights: float) -> Tensor:
    """APO-zero of single answers: D'Oosterlinck et al. 2024 (arXiv:2408.06266), eq. 7, a term for each. KTO whose
    reference point is 0. kl is not read.

    By hand: beta = 1, weights 1; wanted r = 1: 1 - sigma(1) = 0.268941; unwanted r = 0: 0.5.
    """
    return kto(ratio, desirable, torch.zeros_like(kl), **weights)  # (7)


UNPAIRED_LOSSES = {"kto": kto, "apo_zero_unpaired": apo_zero_unpaired}
