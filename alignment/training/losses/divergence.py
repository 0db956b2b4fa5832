"""What takes the log-ratio's place in a margin where another divergence than the reverse KL holds the policy."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import softplus

# Exponent from which a divergence goes on along its tangent: what has fallen further is still pulled back.
STRAIGHT = 10.0
EXPONENT = 40.0  # whose square is still a float32; beyond, losses and gradients would be infinite, or 0 times infinity


def divergence_score(log_ratio: Tensor, divergence: str, alpha: float) -> Tensor:
    """f'(t) of t = pi / pi_ref up to a constant, which a margin does not see: Wang et al. 2024 (f-DPO,
    arXiv:2309.16240), table 1. log_ratio: log t of whole answers, nats; same shape.

    reverse_kl: log t. forward_kl: -1 / t (here 1 added). js: log(2 t / (1 + t)). alpha: (t^(alpha - 1) - 1) / (alpha -
    1), which is TRL's: alpha is 1 minus the paper's, whose f' is (1 - t^-a) / a. So alpha near 0 is the forward KL and
    near 1 the reverse KL. All are 0 and have slope 1 (js: 1/2) in log t where policy = reference.

    Powers of t above e^10 go on along their tangent in log t: whole answers are so far apart soon, and one such pair
    would be the whole step, or infinite.

    By hand, t = e: 1; 1 - 1/e = 0.632121; ln 2 - ln(1 + 1/e) = 0.379885; alpha = 0.5: (e^-0.5 - 1) / -0.5 = 0.786939.
    """
    match divergence:
        case "reverse_kl":
            return log_ratio  # table 1, row 1
        case "forward_kl":
            return -_expm1(-log_ratio)  # table 1, row 2
        case "js":
            return math.log(2) - softplus(-log_ratio)  # table 1, row 3
        case _:
            power = alpha - 1
            return _expm1(power * log_ratio) / power  # table 1, row 4


def _expm1(exponent: Tensor) -> Tensor:
    """exp(x) - 1, above STRAIGHT on its tangent there."""
    near = exponent.clamp(max=STRAIGHT)
    return torch.expm1(near) + torch.exp(near) * (exponent - near)
