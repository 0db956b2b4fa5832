"""A setting that is impossible with others, and the node of the pipeline that it is looked at for."""

from __future__ import annotations

from dataclasses import dataclass

from alignment.config.schema import Experiment
from alignment.config.stages.base import Stage


@dataclass(frozen=True)
class Fault:
    """keys: those that contradict each other, first the one to look at."""

    what: str
    keys: tuple[str, ...]
    fix: str


@dataclass(frozen=True)
class Use:
    """One node of the pipeline, with the settings of its stage."""

    experiment: Experiment
    node: str

    @property
    def key(self) -> str:
        return f"stage.{self.experiment.pipeline.nodes[self.node].stage}"

    @property
    def settings(self) -> Stage:
        return self.experiment.stage[self.experiment.pipeline.nodes[self.node].stage]

    @property
    def inputs(self) -> dict[str, str]:
        return self.experiment.pipeline.nodes[self.node].inputs

    @property
    def world_size(self) -> int:
        names = self.experiment.pipeline.nodes[self.node].stage, self.node
        nodes, processes = self.experiment.launcher.layout(*names, distributed=self.settings.distributed)
        return nodes * processes

    @property
    def shares(self) -> int:
        """Of a global batch; processes that share a sequence have one together."""
        return max(1, self.world_size // self.experiment.engine.sequence_parallel)

    def role(self, role: str) -> str:
        return f"pipeline.nodes.{self.node}.inputs.{role}"
