"""PPO with a value head on the policy's hidden states: one forward gives log-probs and values of a pack."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from alignment.config.stages.online import Ppo
from alignment.errors import TrainingError
from alignment.training import advantages
from alignment.training.losses import policy as losses
from alignment.training.policy_gradient import ClippedTrainer
from alignment.training.rollouts import Answer, Rollout, Targets
from alignment.training.shared_prefix import VALUE_HEAD


class PPOTrainer(ClippedTrainer):
    """The value head begins at 0, is trained and checkpointed with the policy, and is no part of the model written."""

    settings: Ppo
    _reuses = True  # values of before the first update are wanted in any case

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        plain = self._plain_model()
        head = nn.Linear(plain.config.get_text_config().hidden_size, 1)
        nn.init.zeros_(head.weight)
        nn.init.zeros_(head.bias)
        setattr(plain, VALUE_HEAD, head.to(plain.device))  # after the adapters: it is trained itself

    def _before_training(self) -> None:
        super()._before_training()
        if not self.packing.on:
            what = "PPO's value head is computed on packs, and the rows of this model are padded"
            raise TrainingError(what, fix="RLOO or GRPO, which need no values")

    def _by_policy(self, inputs: dict[str, Any]) -> dict[str, Tensor]:
        output = self._look(inputs)
        return {"old": output.log_probs, "values": output.state_values}

    def _credit(self, rollout: Rollout) -> None:
        settings = self.settings
        answers = [answer for group in rollout.groups for answer in group.answers if answer.trained]
        worth = []
        for answer in answers:
            values = torch.tensor(answer.values, dtype=torch.float64)
            rewards = self._rewards(answer, rollout.coefficient)
            found, returns = advantages.generalized(rewards, values, settings.gamma, settings.lam)
            worth.append(found)
            answer.returns = returns.tolist()
        if not worth:
            return
        flat = torch.cat(worth)
        if settings.whiten:
            flat = advantages.whiten(flat, torch.ones_like(flat, dtype=torch.bool))
        for answer, some in zip(answers, flat.split([len(one) for one in worth]), strict=True):
            answer.advantages = some.tolist()

    def _rewards(self, answer: Answer, coefficient: float) -> Tensor:
        """[tokens]: the answer's reward comes with its last token, the KL's with each (Ziegler et al. 2019, eq. 2)."""
        rewards = torch.zeros(len(answer.ids), dtype=torch.float64)
        rewards[-1] = answer.reward or 0.0
        if self.settings.refers and self.kl.place == "reward":
            own, reference = (torch.tensor(x, dtype=torch.float64) for x in (answer.log_probs, answer.reference))
            rewards -= coefficient * losses.kl(own, reference, "k1")  # as of answers (`distance`)
        return rewards

    def _token_losses(self, output: Any, targets: Targets) -> tuple[Tensor, dict[str, Tensor | float]]:
        loss, sums = super()._token_losses(output, targets)
        value = losses.value_loss(output.state_values, targets.values, targets.returns, self.settings.value_clip)
        told = {"value": output.state_values.detach().sum(), "value_loss": value.detach().sum()}
        return loss + self.settings.value_coefficient * value, {**sums, **told}
