"""RLOO and GRPO: REINFORCE's kind, with a clipped ratio and the prompt's other answers as baseline."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from alignment.config.stages.online import Clipped, Grpo, PolicyGradient
from alignment.training import advantages
from alignment.training.losses import policy as losses
from alignment.training.online import OnlineTrainer, distance, mismatch
from alignment.training.rollouts import Group, Rollout, Targets, rewards_of


class ClippedTrainer(OnlineTrainer):
    """The sum of the tokens' losses, each with its weight, by the number of answers or tokens of the global batch."""

    settings: Clipped

    def _weight(self, groups: Sequence[Group]) -> float:
        """Answers count that are only masked: they are part of the estimate, as in TRL, and few that are left do not
        weigh more for it."""
        judged = [answer for group in groups for answer in group.answers if answer.reward is not None]
        tokens, longest = sum(len(answer.trained) for answer in judged), self.settings.max_new_tokens
        return losses.divisor(len(judged), tokens, longest, self.settings.aggregate)

    def _sum(self, output: Any, targets: Targets) -> Tensor:
        loss, self._sums = self._token_losses(output, targets)
        return (loss * losses.token_weights(targets.mask, self.settings.aggregate)).sum()

    def _token_losses(self, output: Any, targets: Targets) -> tuple[Tensor, dict[str, Tensor | float]]:
        """[rows, width - 1], and what is measured."""
        settings = self.settings
        log_probs = output.log_probs
        old = targets.old if self._reuses else log_probs.detach()
        clip = settings.epsilon_low, settings.epsilon_high
        surrogate = losses.clipped_surrogate(log_probs, old, targets.advantages, targets.mask, settings.ratio, *clip)
        loss = surrogate.loss
        if self.settings.refers and self.kl.place == "loss":
            pull = losses.kl(log_probs, targets.reference, self.kl.estimator)
            if self.kl.corrected:
                pull = losses.corrected(pull, log_probs, old, targets.mask, self.kl.estimator)
            loss = loss + targets.coefficient * pull
        return loss, self._measured(output, targets, surrogate)

    @torch.no_grad()
    def _measured(self, output: Any, targets: Targets, surrogate: losses.Surrogate) -> dict[str, Tensor | float]:
        """Sums over the answers' tokens."""
        mask = targets.mask
        sums: dict[str, Tensor | float] = {
            "tokens": mask.sum(),
            "entropy": output.entropy.sum(),
            "ratio": (surrogate.ratio * mask).sum(),
            "clip_fraction": (surrogate.clipped & mask).sum(),
        }
        if self.settings.refers:
            sums["kl"] = losses.kl(output.log_probs, targets.reference, self.kl.estimator).sum()
        return {**sums, **mismatch(output.log_probs, targets)}


class PolicyGradientTrainer(ClippedTrainer):
    """RLOO, GRPO and its relatives: an answer's tokens all have its advantage."""

    settings: PolicyGradient

    def _credit(self, rollout: Rollout) -> None:
        settings = self.settings
        rewards, valid = rewards_of(rollout.groups)
        if self.settings.refers and self.kl.place == "reward":
            rewards = rewards - rollout.coefficient * _distances(rollout.groups)
        if isinstance(settings, Grpo):
            worth = advantages.group_relative(rewards, valid, settings.scale_by_std)
        else:
            worth = advantages.leave_one_out(rewards, valid)
        if settings.whiten:
            worth = advantages.whiten(worth, valid)
        for group, values in zip(rollout.groups, worth.tolist(), strict=True):
            for answer, value in zip(group.answers, values, strict=True):
                answer.advantages = [value] * len(answer.ids)


def _distances(groups: Sequence[Group]) -> Tensor:
    """[groups, answers]: nats an answer from the start model; 0 for one that is not trained on."""
    each = [[distance(answer) if answer.trained else 0.0 for answer in group.answers] for group in groups]
    return torch.tensor(each, dtype=torch.float64)
