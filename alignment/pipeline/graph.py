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
    """Nodes, parents before children, otherwise in the order of conf/pipeline. Raises InputError.

    config/checks.py has seen to it that there is such an order and that every name means something. To build the graphs
    of many points at one moment, do it inside identity.one_look().
    """
    declared = experiment.pipeline.nodes
    built: dict[str, Node] = {}

    def visit(name: str) -> Node:
        if name not in built:
            node = declared[name]
            settings = experiment.stage[node.stage]
            parents = {role: visit(parent) for role, parent in node.inputs.items()}
            identity = stage_identity(experiment, settings, {role: parent.key for role, parent in parents.items()})
            built[name] = Node(name, node.stage, settings, parents, identity, digest(identity))
        return built[name]

    with one_look():
        for name in declared:
            visit(name)
    return list(built.values())


def run_id(experiment: Experiment, nodes: list[Node]) -> str:
    """Name and digest of what the run computes: the same settings always mean the same run folder."""
    return f"{experiment.name}-{digest([[node.name, node.key] for node in nodes])[:8]}"
