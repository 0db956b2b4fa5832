"""Losses of preference pairs (chosen y_w, rejected y_l, prompt x), one number a pair.

Notation: w, l: log-probs of the two answers under the policy, summed over their tokens, in nats; w_ref, l_ref: under
the reference model; |y|: tokens of an answer. Log-ratios w - w_ref and l - l_ref are beta times smaller than the
implicit rewards of Rafailov et al. 2023 (arXiv:2305.18290, eq. 5). sigma is the logistic function.

Every function takes Pairs and the coefficients it names, and returns [N]: the mean over the global batch is the loss.
Which coefficients, and whether it wants a reference model, stands in alignment/config/losses.py too, where the settings
are checked without torch; a test holds both together.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from alignment.training.losses.divergence import EXPONENT

PairLoss = Callable[..., Tensor]
# Nats of an answer, or of a margin, by which two computations of the same may differ. Measured on a random Llama of
# four layers in batches of two widths: 1.2e-5 in fp32; in bf16 8e-3 for answers of 200 tokens, 1.4e-2 for 800.
ROUNDING = 3e-2


@dataclass(frozen=True)
class Pairs:
    """N pairs of a global batch, or of a part of it.

    chosen, rejected: [N] sums of log-probs under the policy, nats; LD-DPO weighs the tokens of the tail in them.
    ref_chosen, ref_rejected: [N], the same under the reference model; 0 where there is none.
    chosen_score, rejected_score: [N] what an f-divergence makes of the log-ratios; for the reverse KL the log-ratios.
    chosen_nll: [N] minus the plain sum of the chosen answer's log-probs.
    chosen_tokens, rejected_tokens: [N] tokens of the answers, end-of-turn token included.
    mean_chosen_tokens: tokens a chosen answer has in the mean of the global batch.
    """

    chosen: Tensor
    rejected: Tensor
    ref_chosen: Tensor
    ref_rejected: Tensor
    chosen_score: Tensor
    rejected_score: Tensor
    chosen_nll: Tensor
    chosen_tokens: Tensor
    rejected_tokens: Tensor
    mean_chosen_tokens: float

    @property
    def chosen_ratio(self) -> Tensor:
        return self.chosen - self.ref_chosen

    @property
    def rejected_ratio(self) -> Tensor:
        return self.rejected - self.ref_rejected

    @property
    def margin(self) -> Tensor:
        """[N]: the difference of the scores; the argument of DPO's sigmoid over beta."""
        return self.chosen_score - self.rejected_score

    @property
    def mean_margin(self) -> Tensor:
        """[N]: the difference of the scores a token."""
        return self.chosen_score / self.chosen_tokens - self.rejected_score / self.rejected_tokens


# --- DPO and what changes its link function ---------------------------------------------------------------------------


def sigmoid(pairs: Pairs, *, beta: float, label_smoothing: float) -> Tensor:
    """DPO, Rafailov et al. 2023 (arXiv:2305.18290), eq. 7. label_smoothing > 0: conservative DPO, where that share of
    the labels is taken to be flipped (Mitchell 2023, ericmitchell.ai/cdpo.pdf, eq. 3). ln 2 where policy = reference.

    By hand: w - w_ref = 3, l - l_ref = 1, beta = 0.5: ln(1 + e^-1) = 0.313262; smoothing 0.1: 0.9 * 0.313262
    + 0.1 * ln(1 + e) = 0.413262.
    """
    return _smoothed(beta * pairs.margin, label_smoothing)  # (7); cDPO (3)


def hinge(pairs: Pairs, *, beta: float) -> Tensor:
    """SLiC's hinge on DPO's margin: Zhao et al. 2023 (arXiv:2305.10425), eq. 1, normalised as in Liu et al. 2024 (RSO,
    arXiv:2309.06657), eq. 7. 1 where policy = reference, 0 once beta * margin >= 1.

    By hand: margin 2, beta 0.25: 1 - 0.5 = 0.5.
    """
    return torch.relu(1 - beta * pairs.margin)  # (7)


def ipo_sum(pairs: Pairs, *, beta: float) -> Tensor:
    """IPO with summed log-ratios, as the paper writes it: Azar et al. 2024 (arXiv:2310.12036), eq. 17; beta is its tau.
    Least, 0, where the margin is 1 / (2 beta): it does not fall for ever as DPO does.

    By hand: margin 2, beta 0.5: (2 - 1)^2 = 1; where policy = reference 1 / (4 beta^2).
    """
    return (pairs.margin - 1 / (2 * beta)) ** 2  # (17)


def ipo_mean(pairs: Pairs, *, beta: float) -> Tensor:
    """IPO with log-ratios a token, which is TRL's reading, and by TRL's word what the authors computed: the same beta
    then means the same for short and long answers. Eq. 17 of arXiv:2310.12036.

    By hand: w - w_ref = 3 over 6 tokens, l - l_ref = 1 over 4, beta = 0.5: (0.5 - 0.25 - 1)^2 = 0.5625.
    """
    return (pairs.mean_margin - 1 / (2 * beta)) ** 2  # (17)


def sigmoid_norm(pairs: Pairs, *, beta: float) -> Tensor:
    """Length-normalised DPO: Lambert et al. 2024 (Tulu 3, arXiv:2411.15124), eq. 6. ln 2 where policy = reference.

    By hand: w - w_ref = 3 over 6 tokens, l - l_ref = 1 over 4, beta = 4: ln(1 + e^-1) = 0.313262.
    """
    return -logsigmoid(beta * pairs.mean_margin)  # (6)


def robust(pairs: Pairs, *, beta: float, label_smoothing: float) -> Tensor:
    """Robust DPO: an unbiased estimate of DPO's loss where a share of the labels is flipped; Chowdhury et al. 2024
    (arXiv:2403.00409), eq. 12. ln 2 where policy = reference. It falls in the margin everywhere, for ever, and is not
    bounded below: its slope -beta (sigma(-beta m) + share / (1 - 2 share)) tends to a constant, not to 0.

    By hand: beta * margin = 1, share 0.1: (0.9 * 0.313262 - 0.1 * 1.313262) / 0.8 = 0.188262.
    """
    right, wrong = -logsigmoid(beta * pairs.margin), -logsigmoid(-beta * pairs.margin)
    return ((1 - label_smoothing) * right - label_smoothing * wrong) / (1 - 2 * label_smoothing)  # (12)


def exo_pair(pairs: Pairs, *, beta: float, label_smoothing: float) -> Tensor:
    """EXO: the reverse KL of the policy's preference from the smoothed labels; Ji et al. 2024 (arXiv:2402.00856), eq.
    16. Least, 0, where sigma(beta * margin) = 1 - label_smoothing.

    By hand: beta * margin = 0, smoothing 0.1: 0.5 ln(0.5 / 0.9) + 0.5 ln(0.5 / 0.1) = 0.510826.
    """
    logits = beta * pairs.margin
    chosen, rejected = logsigmoid(logits), logsigmoid(-logits)  # of the policy
    labels = math.log1p(-label_smoothing), math.log(label_smoothing)
    return chosen.exp() * (chosen - labels[0]) + rejected.exp() * (rejected - labels[1])  # (16)


def discopop(pairs: Pairs, *, beta: float, discopop_tau: float) -> Tensor:
    """DiscoPOP, a loss found by a language model: Lu et al. 2024 (arXiv:2406.08414), eq. 5. Not convex, and not
    monotone: at tau = 0.05 it rises from beta * margin = -0.12 to 0.07. (ln 2 + 1) / 2 where policy = reference.

    By hand: beta * margin = 0.05, tau = 0.05: blend sigma(1) = 0.731059; 0.268941 * 0.668460 + 0.731059 * 0.951229
    = 0.875180.
    """
    logits = beta * pairs.margin
    blend = torch.sigmoid(logits / discopop_tau)
    exponential = torch.exp(
        (logsigmoid(logits / discopop_tau) - logits).clamp(max=EXPONENT)
    )  # blend times exp(-logits)
    return (1 - blend) * -logsigmoid(logits) + exponential  # (5)


def dpop(pairs: Pairs, *, beta: float, dpop_lambda: float) -> Tensor:
    """DPO-positive: a penalty where the chosen answer has become less likely than under the reference; Pal et al. 2024
    (arXiv:2402.13228), eq. 3. ln 2 where policy = reference.

    A fall by less than ROUNDING is none: where training begins all are 0 but for rounding, which would decide which
    pairs have 1 + lambda times the slope.

    By hand: w - w_ref = -1, l - l_ref = -3, beta = 0.5, lambda = 1: margin 2 - 1 = 1; ln(1 + e^-0.5) = 0.474077.
    """
    fallen = pairs.ref_chosen - pairs.chosen
    fallen = torch.where(fallen > ROUNDING, fallen, 0.0)
    return -logsigmoid(beta * (pairs.margin - dpop_lambda * fallen))  # (3)


def cal_dpo(pairs: Pairs, *, beta: float) -> Tensor:
    """Calibrated DPO: the log-ratios are also drawn to plus and minus 1 / (2 beta), so that the chosen answer does not
    become less likely with the rejected one; Xiao et al. 2024 (arXiv:2412.14516), eq. 10. The contrast has no beta.
    Its authors' code halves the squares. ln 2 + 1 / (2 beta^2) where policy = reference.

    By hand: w - w_ref = 1, l - l_ref = 0, beta = 0.5: ln(1 + e^-1) + (1 - 1)^2 + (0 + 1)^2 = 1.313262.
    """
    aim = 1 / (2 * beta)
    calibration = (pairs.chosen_ratio - aim) ** 2 + (pairs.rejected_ratio + aim) ** 2
    return -logsigmoid(pairs.chosen_ratio - pairs.rejected_ratio) + calibration  # (10)


def rdpo(pairs: Pairs, *, beta: float, length_penalty: float) -> Tensor:
    """R-DPO: length is taken out of what the pair is taken to say; Park et al. 2024 (arXiv:2403.19159), eq. 9. A chosen
    answer that is longer by n tokens begins with a margin of length_penalty * n, so the loss where policy = reference
    is ln(1 + e^(-length_penalty n)).

    By hand: margin 2, beta 0.5, 5 tokens longer, penalty 0.2: ln(1 + e^-2) = 0.126928.
    """
    longer = pairs.chosen_tokens - pairs.rejected_tokens
    return -logsigmoid(beta * pairs.margin + length_penalty * longer)  # (9)


# --- each answer for itself -------------------------------------------------------------------------------------------


def nca_pair(pairs: Pairs, *, beta: float) -> Tensor:
    """NCA for pairs: Chen et al. 2024 (arXiv:2402.05369), eq. 13 with K = 2: it raises the chosen answer's likelihood
    itself. 2 ln 2 where policy = reference.

    By hand: beta ratios 1 and 0: 0.313262 + 0.5 * 1.313262 + 0.5 * 0.693147 = 1.316466.
    """
    chosen, rejected = beta * pairs.chosen_ratio, beta * pairs.rejected_ratio
    return -logsigmoid(chosen) - 0.5 * logsigmoid(-chosen) - 0.5 * logsigmoid(-rejected)  # (13)


def bco_pair(pairs: Pairs, *, beta: float) -> Tensor:
    """BCO on pairs without its reward shift, as in TRL: Jung et al. 2024 (arXiv:2404.04656), eq. 8; MPO's quality term.
    2 ln 2 where policy = reference.

    By hand: beta ratios 1 and 0: 0.313262 + 0.693147 = 1.006409.
    """
    return -logsigmoid(beta * pairs.chosen_ratio) - logsigmoid(-beta * pairs.rejected_ratio)  # (8)


def sppo_hard(pairs: Pairs, *, beta: float) -> Tensor:
    """SPPO with win probabilities 1 and 0: Wu et al. 2024 (arXiv:2405.00675), eq. 4.7; beta is its 1 / eta. Least, 0,
    where the log-ratios are plus and minus 1 / (2 beta).

    By hand: ratios 1 and 0, beta 0.5: (1 - 1)^2 + (0 + 1)^2 = 1.
    """
    aim = 0.5 / beta
    return (pairs.chosen_ratio - aim) ** 2 + (pairs.rejected_ratio + aim) ** 2  # (4.7)


def apo_zero(pairs: Pairs, *, beta: float) -> Tensor:
    """APO-zero, for chosen answers better than the model's own: D'Oosterlinck et al. 2024 (arXiv:2408.06266), eq. 7. 1
    where policy = reference; between 0 and 2.

    By hand: beta ratios 1 and 0: (1 - 0.731059) + 0.5 = 0.768941.
    """
    return 1 - torch.sigmoid(beta * pairs.chosen_ratio) + torch.sigmoid(beta * pairs.rejected_ratio)  # (7)


def apo_down(pairs: Pairs, *, beta: float) -> Tensor:
    """APO-down, for chosen answers worse than the model's own: both become less likely, the rejected one more so;
    arXiv:2408.06266, eq. 8. 1 where policy = reference.

    By hand: beta ratios 1 and 0: 0.731059 + (1 - 0.731059) = 1.
    """
    chosen, margin = beta * pairs.chosen_ratio, beta * (pairs.chosen_ratio - pairs.rejected_ratio)
    return torch.sigmoid(chosen) + 1 - torch.sigmoid(margin)  # (8)


# --- the whole global batch at once -----------------------------------------------------------------------------------


def aot(pairs: Pairs, *, beta: float, label_smoothing: float) -> Tensor:
    """AOT: the distribution of margins under the policy is to dominate that under the reference: both are sorted, and
    compared rank by rank; Melnyk et al. 2024 (arXiv:2406.05882), eq. 9. Of a whole global batch: [N] in the order of
    the margins.

    By hand: policy margins (2, 0), reference (0, 0), beta 1: ln(1 + e^0), ln(1 + e^-2): mean 0.410038.
    """
    policy, reference = pairs.chosen - pairs.rejected, pairs.ref_chosen - pairs.ref_rejected
    return _smoothed(beta * (policy.sort().values - reference.sort().values), label_smoothing)  # (9)


def aot_unpaired(pairs: Pairs, *, beta: float, label_smoothing: float) -> Tensor:
    """AOT of unpaired answers: log-ratios of the chosen answers are to dominate those of the rejected ones;
    arXiv:2406.05882, eq. 8. Of a whole global batch.

    By hand: chosen ratios (1, 0), rejected (0, 1), beta 1: sorted both (0, 1): ln 2.
    """
    delta = pairs.chosen_ratio.sort().values - pairs.rejected_ratio.sort().values
    return _smoothed(beta * delta, label_smoothing)  # (8)


@dataclass(frozen=True)
class Threshold:
    """beta-DPO's moving averages over global batches: of the mean margin (M_0) and of its standard deviation, nats."""

    mean: float = 0.0
    deviation: float = 0.0

    def after(self, margin: Tensor, momentum: float) -> Threshold:
        """margin: [N] of a whole global batch, nats; what is not finite is left out. Eq. 8 of arXiv:2407.08639.

        By hand: from 0 with momentum 0.9 margins 1 and 3: mean 0.1 * 2 = 0.2, deviation 0.1 * sqrt 2 = 0.141421.
        """
        margin = margin[margin.isfinite()]
        if not len(margin):
            return self
        deviation = float(margin.std()) if len(margin) > 1 else 0.0
        new = 1 - momentum
        mean = momentum * self.mean + new * float(margin.mean())  # (8)
        return Threshold(mean, momentum * self.deviation + new * deviation)


def beta_dpo(
    pairs: Pairs, *, beta: float, beta_dpo_alpha: float, beta_dpo_keep: float, threshold: Threshold, noise: Tensor
) -> Tensor:
    """beta-DPO: one beta a global batch, larger where its pairs are told apart more clearly than before, and outliers
    left out; Wu et al. 2024 (arXiv:2407.08639), eqs. 7 and 9, margins without beta as in its authors' code. Of a whole
    global batch. [N]: pairs that are left out have 0, the others N / kept times their loss.

    threshold: moving averages, this batch included. noise: [N] uniform in (0, 1), by which pairs are drawn without
    replacement with weights exp(-(M - M_0)^2 / (2 s^2)) (Efraimidis & Spirakis 2006: the largest u^(1/weight)).

    beta is at least 0.001, as there. Margins that deviate by less than ROUNDING have no outliers.

    By hand: margins (2, 2), M_0 = 1, alpha = 0.5, beta = 0.1, all kept: beta 0.15; ln(1 + e^-0.3) = 0.554355.
    """
    margin, count = pairs.margin.detach(), len(pairs.margin)
    told_apart = threshold.deviation > ROUNDING
    apart = (margin - threshold.mean) / threshold.deviation if told_apart else torch.zeros_like(margin)
    kept = max(1, int(count * beta_dpo_keep))
    chance = noise.log() * torch.exp(0.5 * apart.clamp(-30, 30) ** 2)  # log of u^(1/weight), weights of (7)
    drawn = chance.topk(kept).indices
    batch_beta = beta * (1 + beta_dpo_alpha * (float(margin[drawn].mean()) - threshold.mean))  # (9)
    used = torch.zeros_like(margin).index_fill(0, drawn, count / kept)
    return -logsigmoid(max(batch_beta, 1e-3) * pairs.margin) * used  # (9) in DPO's (7)


# --- without a reference model ----------------------------------------------------------------------------------------


def simpo(pairs: Pairs, *, beta: float, simpo_gamma: float, label_smoothing: float) -> Tensor:
    """SimPO: mean log-probs a token with a target margin; Meng et al. 2024 (arXiv:2405.14734), eq. 6.

    By hand: w = -6 over 6 tokens, l = -8 over 4, beta = 2, gamma = 1: 2 * (-1 + 2) - 1 = 1: 0.313262.
    """
    means = pairs.chosen / pairs.chosen_tokens - pairs.rejected / pairs.rejected_tokens
    return _smoothed(beta * means - simpo_gamma, label_smoothing)  # (6)


def cpo(pairs: Pairs, *, beta: float, label_smoothing: float, cpo_alpha: float) -> Tensor:
    """CPO: DPO with a uniform reference, and the chosen answer's likelihood; Xu et al. 2024 (arXiv:2401.08417), eqs. 3
    and 5. Eq. 5 has the sum over an answer's tokens; here it is `sft`, the mean over all chosen tokens of the global
    batch, as their code and TRL have it for a micro-batch. cpo_alpha: its weight, 1 in the paper.

    By hand: w = -6 over 6 tokens, l = -8, beta = 0.5: ln(1 + e^-1) + 1 = 1.313262; where w = l = -6: ln 2 + 1.
    """
    contrast = _smoothed(beta * (pairs.chosen - pairs.rejected), label_smoothing)  # (3)
    return contrast + cpo_alpha * sft(pairs)  # (5)


def orpo(pairs: Pairs, *, beta: float) -> Tensor:
    """ORPO: the chosen answer's likelihood, and the odds of chosen over rejected; Hong et al. 2024 (arXiv:2403.07691),
    eqs. 6 and 7; beta is its lambda. P(y|x) is the geometric mean over the answer's tokens (eq. 3), so the likelihood
    is `nll`, each answer's own mean. Their code and TRL take the mean over the batch's tokens, the prompts' among them.

    By hand: both answers at p = 1/2 a token: odds equal: ln 2 + beta ln 2; beta 0.1: 0.762462.
    """
    chosen, rejected = pairs.chosen / pairs.chosen_tokens, pairs.rejected / pairs.rejected_tokens
    log_odds = chosen - rejected - (_log_not(chosen) - _log_not(rejected))
    return nll(pairs) - beta * logsigmoid(log_odds)  # (6), (7)


def nll(pairs: Pairs) -> Tensor:
    """Minus the mean log-prob of the chosen answer's tokens: RPO's term, Pang et al. 2024 (arXiv:2404.19733), eq. 1.
    Alone it is fine-tuning on the chosen answers, each of which counts alike.

    By hand: w = -6 over 6 tokens: 1.
    """
    return pairs.chosen_nll / pairs.chosen_tokens  # (1), second term


def sft(pairs: Pairs) -> Tensor:
    """Minus the mean log-prob of all chosen tokens of the global batch, which is TRL's `sft`: long answers count more.
    The term of MPO (Wang et al. 2024, arXiv:2411.10442, sec. 3.2).

    By hand: w = -6 over 6 tokens and -2 over 4: (6 + 2) / 10 = 0.8 in the mean.
    """
    return pairs.chosen_nll / pairs.mean_chosen_tokens  # an answer's sum over the mean length: its share of that mean


# --- parts -----------------------------------------------------------------------------------------------------------


def _smoothed(logits: Tensor, label_smoothing: float) -> Tensor:
    """-log sigma(logits), where a share of the labels is taken to be flipped: Mitchell 2023 (cdpo.pdf), eq. 3."""
    if label_smoothing == 0:
        return -logsigmoid(logits)
    return -(1 - label_smoothing) * logsigmoid(logits) - label_smoothing * logsigmoid(-logits)  # cDPO (3)


def _log_not(log_prob: Tensor) -> Tensor:
    """log(1 - p) of log p < 0, exact near both ends (Maechler 2012)."""
    log_prob = log_prob.clamp(max=-1e-7)  # an answer that is certain has infinite odds
    return torch.where(log_prob > -math.log(2), torch.log(-torch.expm1(log_prob)), torch.log1p(-torch.exp(log_prob)))


PAIR_LOSSES: dict[str, PairLoss] = {
    f.__name__: f
    for f in (
        sigmoid, hinge, ipo_sum, ipo_mean, sigmoid_norm, robust, exo_pair, discopop, dpop, cal_dpo, rdpo, nca_pair,
        bco_pair, sppo_hard, apo_zero, apo_down, aot, aot_unpaired, beta_dpo, simpo, cpo, orpo, nll, sft,
    )
}  # fmt: skip
