"""Whether adapters fit the start model: its own, and those that stages train. A model without storage is made of its
configuration, and of an adapter the header of its file is read."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from alignment.config.schema import Experiment
from alignment.config.stages.reward_model import RewardModel
from alignment.config.stages.training import Train
from alignment.data.adapters import check_fits
from alignment.errors import ConfigError, Finding
from alignment.estimating.sizes import without_storage
from alignment.training.model import lora_config


def check_start_adapter(config: Any, folder: Path) -> None:
    """config: a transformers configuration of the model that it is merged into. Raises InputError."""
    check_fits(copy.deepcopy(without_storage(config)), folder)  # puts the adapter on it


def findings(experiment: Experiment, config: Any, only: Sequence[str] | None = None) -> Iterator[Finding]:
    """Of stages whose adapters are to be put on modules that the model does not have. only: nodes that are still to be
    made; None: all. Raises InputError if transformers itself has no such architecture."""
    for name, node in experiment.pipeline.nodes.items():
        settings = experiment.stage[node.stage]
        if not isinstance(settings, Train) or settings.lora is None or (only is not None and name not in only):
            continue
        try:  # of weights in 4 bits the modules have the same names
            lora = settings.lora.model_copy(update={"quantize": None})
            lora_config(lora, without_storage(config, isinstance(settings, RewardModel)))
        except ConfigError as error:
            told = {"check": f"adapters {name}", "state": "failed", "what": error.what, "code": error.exit_code}
            yield {**told, "where": f"stage.{node.stage}.{error.where}", "fix": error.fix}
