"""Online DPO: of the answers to each prompt the best against the worst, with the start model as reference."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from alignment.config.stages.online import OnlineDpo
from alignment.training.losses import policy as losses
from alignment.training.losses.pairs import Pairs, sigmoid
from alignment.training.metrics import NO_MARGIN
from alignment.training.online import OnlineTrainer, mismatch
from alignment.training.rollouts import Answer, Group, Rollout, Targets, best_and_worst


class OnlineDPOTrainer(OnlineTrainer):
    """The mean over the pairs of the global batch. A prompt whose answers are no pair weighs nothing."""

    settings: OnlineDpo
    _reuses = False  # the loss knows no policy but this and the reference

    def _mark(self, groups: Sequence[Group]) -> None:
        """Of each group two answers stay, the better one first."""
        super()._mark(groups)
        for group in groups:
            group.answers = _pair(group.answers, self.settings.min_margin)

    def _credit(self, rollout: Rollout) -> None:
        rollout.metrics["pairs"] = float(_pairs(rollout.groups))

    def _weight(self, groups: Sequence[Group]) -> float:
        return max(_pairs(groups), 1)

    def _sum(self, output: Any, targets: Targets) -> Tensor:
        beta = self.settings.beta
        chosen, rejected = (output.log_probs * targets.mask).sum(1).chunk(2)
        ref_chosen, ref_rejected = targets.reference.sum(1).chunk(2)
        chosen_tokens, rejected_tokens = targets.mask.sum(1).chunk(2)
        compared = Pairs(
            chosen, rejected, ref_chosen, ref_rejected, chosen - ref_chosen, rejected - ref_rejected, -chosen,
            chosen_tokens, rejected_tokens, mean_chosen_tokens=1.0,  # which this loss does not look at
        )  # fmt: skip
        loss, pairs = sigmoid(compared, beta=beta, label_smoothing=0.0), chosen_tokens > 0
        ratios = compared.chosen_ratio, compared.rejected_ratio
        rewards = [(beta * part * pairs).detach().double() for part in ratios]
        with torch.no_grad():
            self._sums = {
                "rows": pairs.sum(),
                "tokens": targets.mask.sum(),
                "entropy": output.entropy.sum(),
                "kl": losses.kl(output.log_probs, targets.reference, "k3").sum(),
                "rewards/chosen": rewards[0].sum(),
                "rewards/rejected": rewards[1].sum(),
                "rewards/margins": (rewards[0] - rewards[1]).sum(),
                "rewards/accuracies": (rewards[0] - rewards[1] > beta * NO_MARGIN).sum(),
                **mismatch(output.log_probs, targets),
            }
        return (loss * pairs).sum()


def _pair(answers: Sequence[Answer], min_margin: float) -> list[Answer]:
    """The best and the worst; of answers with one reward the first. Neither is trained on where they are no pair."""
    ends = best_and_worst([answer for answer in answers if answer.kept])
    if ends is not None and _reward(ends[0]) - _reward(ends[1]) >= min_margin:
        return list(ends)
    for answer in answers[:2]:
        answer.kept = False
    return list(answers[:2])


def _reward(answer: Answer) -> float:
    return 0.0 if answer.reward is None else answer.reward


def _pairs(groups: Sequence[Group]) -> int:
    return sum(group.answers[0].kept for group in groups)
