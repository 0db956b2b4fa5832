"""Proximal policy optimisation: a value head says what an answer's tokens were worth."""

from __future__ import annotations

from typing import Any

from alignment.stages import online
from alignment.stages.context import StageContext
from alignment.training.ppo import PPOTrainer


def run(context: StageContext) -> dict[str, Any]:
    return online.run(context, PPOTrainer)
