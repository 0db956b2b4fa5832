"""The typed schema of a resolved experiment: every key, its type, its bounds, and its side.

A key is declared once, on one of two sides. *identity*: it can change a result, so it is part of the stage's key.
*execution*: it says where or how the work is done and cannot change a result, so it is not. Values live in conf/.
The parts: sources.py, rewards.py, stages/, execution.py, launchers.py.
"""

from __future__ import annotations

from typing import Annotated, get_args

from pydantic import Field

from alignment.config.data_checks import Checks
from alignment.config.execution import Checkpoint, Engine, Pruning, Tracking
from alignment.config.hardware import Hardware
from alignment.config.launchers import LocalLauncher, SlurmLauncher, TorchrunLauncher
from alignment.config.patterns import NAME, RUN
from alignment.config.rewards import Reward
from alignment.config.settings import Settings, execution, identity
from alignment.config.sources import Dataset, Model
from alignment.config.stages.answering import Compare, Evaluate, Judge, Sample
from alignment.config.stages.base import Stage
from alignment.config.stages.merging import Merge
from alignment.config.stages.online import Grpo, OnlineDpo, Ppo, Rloo
from alignment.config.stages.preference import Dpo, Kto
from alignment.config.stages.preparing import ImportModel, Prepare
from alignment.config.stages.reward_model import EvaluateReward, RewardModel
from alignment.config.stages.training import Reference, Sft

AnyStage = Annotated[
    ImportModel
    | Prepare
    | Sft
    | Reference
    | Dpo
    | Kto
    | Rloo
    | Grpo
    | OnlineDpo
    | Ppo
    | RewardModel
    | EvaluateReward
    | Merge
    | Sample
    | Judge
    | Evaluate
    | Compare,
    Field(discriminator="kind"),
]

STAGES: dict[str, type[Stage]] = {
    get_args(stage.model_fields["kind"].annotation)[0]: stage for stage in get_args(get_args(AnyStage)[0])
}

Launcher = Annotated[LocalLauncher | TorchrunLauncher | SlurmLauncher, Field(discriminator="kind")]


class Node(Settings):
    """One stage of the graph: which settings it takes, and which node fills each of its roles."""

    stage: str = execution()
    inputs: dict[str, str] = execution()


class Rounds(Settings):
    """Nodes that are there `count` times, each round after the one before it (config/rounds.py).

    prompts: of each round, from the prompts after those of the round before; null: all prompts in each. first: what
    `previous.NODE` means in the first round.
    """

    count: int = execution(ge=1)
    prompts: int | None = execution(ge=1)
    first: dict[str, str] = execution()
    nodes: dict[Annotated[str, Field(pattern=NAME)], Node] = execution(min_length=1)


class Pipeline(Settings):
    """rounds: said once; their nodes stand among `nodes` when an experiment is composed."""

    rounds: Rounds | None = execution(default=None)
    nodes: dict[Annotated[str, Field(pattern=NAME)], Node] = execution(min_length=1)
    final: str = execution()


class Experiment(Settings):
    name: str = execution(pattern=RUN)
    seed: int = identity(ge=0)
    store: str = execution(min_length=1)
    min_free_gb: float = execution(ge=0)
    retries: int = execution(ge=0)
    retry_wait_s: float = execution(ge=0)
    check: bool = execution()
    objective: list[str] = execution(min_length=1)
    pipeline: Pipeline = execution()
    model: Model = identity()
    data: dict[Annotated[str, Field(pattern=NAME)], Dataset] = identity()
    checks: Checks = identity()
    stage: dict[Annotated[str, Field(pattern=NAME)], AnyStage] = identity()
    reward: Reward = identity()
    engine: Engine = execution()
    checkpoint: Checkpoint = execution()
    launcher: Launcher = execution()
    tracking: Tracking = execution()
    hardware: Hardware = execution()
    pruning: Pruning = execution()
