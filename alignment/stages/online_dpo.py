"""Online DPO: of the policy's answers to each prompt the best is preferred to the worst."""

from __future__ import annotations

from typing import Any

from alignment.stages import online
from alignment.stages.context import StageContext
from alignment.training.online_preference import OnlineDPOTrainer


def run(context: StageContext) -> dict[str, Any]:
    return online.run(context, OnlineDPOTrainer)
