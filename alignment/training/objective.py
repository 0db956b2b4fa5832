"""What stage.dpo.loss names: a weighted sum of losses over pairs, and the pairs that it sees."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from alignment.config.losses import PAIR_LOSSES as TRAITS
from alignment.config.stages.preference import Dpo
from alignment.training.losses.divergence import divergence_score
from alignment.training.losses.pairs import PAIR_LOSSES, Pairs, Threshold
from alignment.training.packing import IGNORED


@dataclass
class Objective:
    """The loss of pairs as the settings say it. threshold: what beta-DPO carries from batch to batch."""

    settings: Dpo
    threshold: Threshold = field(default_factory=Threshold)

    @property
    def weighs(self) -> bool:
        return self.settings.weighting == "wpo"

    @property
    def whole(self) -> bool:
        """Whether a pair's loss depends on all pairs of the global batch."""
        return any(traits.whole for traits in self.settings.traits)

    def __call__(self, pairs: Pairs, weights: Tensor | None = None, noise: Tensor | None = None) -> Tensor:
        """[N]. weights: [N] of the pairs. noise: [N] uniform numbers, for a loss that leaves pairs out at random."""
        total = sum(weight * self._function(name, noise)(pairs) for name, weight in self.settings.losses.items())
        assert isinstance(total, Tensor)
        return total if weights is None else total * weights

    def _function(self, name: str, noise: Tensor | None) -> Callable[[Pairs], Tensor]:
        used = {use: getattr(self.settings, use) for use in TRAITS[name].uses if use != "beta_dpo_momentum"}
        extra: dict[str, Any] = {"threshold": self.threshold, "noise": noise} if name == "beta_dpo" else {}
        return partial(PAIR_LOSSES[name], **used, **extra)

    def pairs(self, log_probs: Tensor, reference: Tensor | None, labels: Tensor, mean_chosen_tokens: float) -> Pairs:
        """log_probs, reference: [2 pairs, width - 1] of the tokens of both answers, 0 elsewhere, all chosen rows first.

        labels: [2 pairs, width], -100 where nothing is scored.
        """
        scored = labels[:, 1:] != IGNORED
        tokens = scored.sum(1)
        kept = None if self.settings.ld_alpha is None else _verbosity(scored, tokens, self.settings.ld_alpha)
        sums = _sums(log_probs, kept)
        theirs = torch.zeros_like(sums) if reference is None else _sums(reference, kept)
        return self.pairs_of(sums, theirs, -_sums(log_probs, None).chunk(2)[0], tokens, mean_chosen_tokens)

    def pairs_of(self, sums: Tensor, theirs: Tensor, chosen_nll: Tensor, tokens: Tensor, mean: float) -> Pairs:
        """sums, theirs: [2 pairs] of policy and reference; tokens: [2 pairs]; all chosen answers first."""
        scores = divergence_score(sums - theirs, self.settings.divergence, self.settings.divergence_alpha)
        (chosen, rejected), (ref_chosen, ref_rejected) = sums.chunk(2), theirs.chunk(2)
        (chosen_score, rejected_score), (chosen_tokens, rejected_tokens) = scores.chunk(2), tokens.chunk(2)
        return Pairs(
            chosen, rejected, ref_chosen, ref_rejected, chosen_score, rejected_score, chosen_nll, chosen_tokens,
            rejected_tokens, mean,
        )  # fmt: skip

    @torch.enable_grad()
    def slopes(self, told: Sequence[tuple[int, list[float]]], noise: torch.Generator, mean: float) -> dict[int, Tensor]:
        """Row number -> [4]: the pair's loss, and the derivative of the whole batch's sum by its `leaves`.

        told: (row number, columns) of every pair of a global batch, in any order. beta-DPO's averages move by it.
        """
        told = sorted(told)  # the same on all processes, however the batch was split
        table = torch.tensor([row for _, row in told], dtype=torch.float64)
        chosen, rejected, chosen_nll, *fixed, weights = table.unbind(1)
        given = [one.clone().requires_grad_() for one in (chosen, rejected, chosen_nll)]
        ref_chosen, ref_rejected, chosen_tokens, rejected_tokens = fixed
        theirs, tokens = torch.cat([ref_chosen, ref_rejected]), torch.cat([chosen_tokens, rejected_tokens])
        pairs = self.pairs_of(torch.cat(given[:2]), theirs, given[2], tokens, mean)
        if "beta_dpo" in self.settings.losses:
            self.threshold = self.threshold.after(pairs.margin.detach(), self.settings.beta_dpo_momentum)
        losses = self(pairs, weights, torch.rand(len(told), generator=noise, dtype=torch.float64))
        found = torch.autograd.grad(losses.sum(), given, allow_unused=True, materialize_grads=True)
        each = torch.stack([losses.detach(), *found], 1).float()
        alike: dict[int, list[Tensor]] = {}  # where an epoch ends within a batch a row may be in it twice
        for (number, _), row in zip(told, each, strict=True):
            alike.setdefault(number, []).append(row)
        return {number: torch.stack(same).mean(0) for number, same in alike.items()}

    def state_dict(self) -> dict[str, Any]:
        return {"threshold": asdict(self.threshold)} if "beta_dpo" in self.settings.losses else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.threshold = Threshold(**state["threshold"]) if "threshold" in state else self.threshold

    def weights(self, log_probs: Tensor, log_sum_squares: Tensor | None, labels: Tensor) -> Tensor | None:
        """[N], without a gradient: WPO's weight of a pair, the likelihood of both answers under the policy a token, in
        relation to that of its own samples (Zhou et al. 2024, arXiv:2406.11827, eq. 2, sampled alignment).

        log_sum_squares: [2 pairs, width - 1] log of sum_v p(v)^2, 0 where nothing is scored. As in TRL the weight may
        be above 1, where answers are likelier than samples are in the mean; the authors' code cuts it there.

        By hand: p = 1/4, 1/4 of a chosen answer, sum of squares 1/2 at both: exp(mean of log 1/2) = 1/2; p = 1/2 of a
        rejected answer of one token, sum 1/2: 1. The pair weighs 1/2.
        """
        if not self.weighs:
            return None
        if log_sum_squares is None:
            raise RuntimeError("the forward has left out the sums of squares that weights are made of")
        tokens = (labels[:, 1:] != IGNORED).sum(1)
        means = (log_probs.detach() - log_sum_squares.detach()).sum(1) / tokens
        chosen, rejected = means.exp().chunk(2)
        return chosen * rejected  # (2)


def leaves(pairs: Pairs) -> tuple[Tensor, Tensor, Tensor]:
    """What of the pairs has a gradient, each [N]."""
    return pairs.chosen, pairs.rejected, pairs.chosen_nll


def columns(pairs: Pairs, weights: Tensor | None) -> Tensor:
    """[N, 8] float64: all that `Objective.slopes` wants to know of pairs."""
    given = [*leaves(pairs), pairs.ref_chosen, pairs.ref_rejected, pairs.chosen_tokens, pairs.rejected_tokens]
    given.append(torch.ones_like(pairs.chosen) if weights is None else weights)
    return torch.stack([one.double() for one in given], 1)


def _sums(log_probs: Tensor, kept: Tensor | None) -> Tensor:
    """[2 pairs], in float64: sums of long answers are thousands of nats, and what counts are small differences."""
    return (log_probs if kept is None else log_probs * kept).sum(1, dtype=torch.float64)


def _verbosity(scored: Tensor, tokens: Tensor, alpha: float) -> Tensor:
    """[2 pairs, width - 1]: 1 for the first tokens of an answer, as many as the shorter one has, alpha after them.

    LD-DPO, Liu et al. 2024 (arXiv:2409.06411), eq. 12. By hand: answers of 3 and 1 tokens, alpha 0.4: 1, 0.4, 0.4; 1.
    """
    shorter = torch.minimum(*tokens.chunk(2)).repeat(2)
    return torch.where(scored.cumsum(1) <= shorter[:, None], 1.0, alpha)  # (12)
