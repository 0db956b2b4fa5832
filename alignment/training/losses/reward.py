"""Losses of reward models: pure functions of rewards, one value a pair or a row, not yet averaged.

Rewards are logits without a unit; r_c and r_r are those of a pair's chosen and rejected answer.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def bradley_terry(
    chosen: Tensor, rejected: Tensor, margin: Tensor | None = None, label_smoothing: float = 0.0
) -> Tensor:
    """-log sigmoid(r_c - r_r - m), in nats a pair.

    chosen, rejected: [pairs]. margin: m, [pairs], how much better the chosen answer is said to be. label_smoothing: the
    share of labels that are taken to be the wrong way round; such a pair is wrong by its margin, too.

    Christiano et al. 2017 (arXiv:1706.03741, sec. 2.2.3) and Ouyang et al. 2022 (arXiv:2203.02155, eq. 1), on the model
    of Bradley and Terry 1952; the margin: Touvron et al. 2023 (Llama 2, arXiv:2307.09288, eq. 2). Smoothing is the
    expected loss under such labels, as Mitchell 2023 (ericmitchell.ai/cdpo.pdf) has it for DPO.

    By hand: r_c - r_r = ln 3: ln(4/3) = 0.287682; 2 ln 3 and m = ln 3: the same; ln 3, smoothing 0.1: 0.9 ln(4/3) + 0.1
    ln 4 = 0.397543; ln 2 where both rewards are equal.
    """
    apart = chosen - rejected
    m = torch.zeros_like(apart) if margin is None else margin
    as_labelled = -F.logsigmoid(apart - m)  # Llama 2, eq. 2; with m = 0 Ouyang et al., eq. 1
    if not label_smoothing:
        return as_labelled
    return (1 - label_smoothing) * as_labelled - label_smoothing * F.logsigmoid(-apart - m)  # cDPO (3) of rewards


def centring(chosen: Tensor, rejected: Tensor) -> Tensor:
    """(r_c + r_r)^2 of each pair, [pairs]: without it the loss leaves a constant of the rewards open.

    Eisenstein et al. 2023 (arXiv:2312.09244, eq. 2); added with a small coefficient. By hand: rewards 2 and -5: 9.
    """
    return (chosen + rejected) ** 2  # (2), the term of eta


def squared_error(rewards: Tensor, scores: Tensor) -> Tensor:
    """(r - s)^2 of each row, [rows]: pointwise regression, as of Wang et al. 2024 (HelpSteer2, arXiv:2406.08673), who
    give it no equation. By hand: r = 1.5, s = 1: 0.25.
    """
    return (rewards - scores) ** 2


def binary_cross_entropy(rewards: Tensor, scores: Tensor) -> Tensor:
    """-s log sigmoid(r) - (1 - s) log(1 - sigmoid(r)) of each row, [rows], in nats. scores: in [0, 1], the chance that
    the answer is good. Cross-entropy with a soft label, of no one paper; Bradley-Terry's loss against an answer of
    reward 0. By hand: r = ln 3, s = 1/2: 1/2 ln(4/3) + 1/2 ln 4 = 0.836988.
    """
    return F.binary_cross_entropy_with_logits(rewards, scores, reduction="none")
