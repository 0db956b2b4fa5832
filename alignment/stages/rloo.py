"""REINFORCE leave-one-out: answers of the policy, against the mean reward of the others of their prompt."""

from __future__ import annotations

from typing import Any

from alignment.stages import online
from alignment.stages.context import StageContext
from alignment.training.policy_gradient import PolicyGradientTrainer


def run(context: StageContext) -> dict[str, Any]:
    return online.run(context, PolicyGradientTrainer)
