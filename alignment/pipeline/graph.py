"""The graph of an experiment: its nodes in topological order, each with its key."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from alignment.config.schema import Experiment
from alignment.config.stages.base import Stage
from alignment.files import digest
from alignment.pipeline.identity import one_look, stage_identity


@dataclass(frozen=True)
class Node:
    """One stage of one experiment. parents: role -> node it takes the role from. key: SHA-256 of the identity (hex)."""

    name: str
    stage: str
    settings: Stage
    parents: dict[str, Node]
    identity: dict[str, Any]
    key: str

    @property
    def kind(self) -> str:
        return str(self.settings.kind)  # type: ignore[attr-defined]


def build(experiment: Experiment) -> list[Node]:
    """Nodes, parents before children, otherwise in the order of conf/pipeline, without those that nothing has a use for
    (the reference, where the loss compares with none). Raises InputError.

    config/checks.py has seen to it that there is such an order and that every name means something. To build the graphs
    of many points at one moment, do it inside identity.one_look().
    """
    declared = experiment.pipeline.nodes
    built: dict[str, Node] = {}

    def used(name: str) -> dict[str, str]:
        """role -> node, without the roles that the settings have no use for."""
        needless = experiment.stage[declared[name].stage].needless()
        return {role: parent for role, parent in declared[name].inputs.items() if role not in needless}

    def visit(name: str) -> Node:
        if name not in built:
            node = declared[name]
            settings = experiment.stage[node.stage]
            parents = {role: visit(parent) for role, parent in used(name).items()}
            identity = stage_identity(experiment, settings, {role: parent.key for role, parent in parents.items()})
            built[name] = Node(name, node.stage, settings, parents, identity, digest(identity))
        return built[name]

    asked = {parent for node in declared.values() for parent in node.inputs.values()}
    needed = {parent for name in declared for parent in used(name).values()}
    with one_look():
        for name in declared:
            if name in needed or name not in asked:  # who only fills roles without a use is left out
                visit(name)
    return list(built.values())


def run_id(experiment: Experiment, nodes: list[Node]) -> str:
    """Name and digest of what the run computes: the same settings always mean the same run folder."""
    return f"{experiment.name}-{digest([[node.name, node.key] for node in nodes])[:8]}"
