"""The graph of an experiment: its nodes in topological order, each with its key."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import Any

from alignment.config.schema import Experiment, Stage
from alignment.errors import ConfigError
from alignment.files import digest
from alignment.pipeline.identity import stage_identity


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
    """Nodes, parents before children, otherwise in the order of conf/pipeline. Raises ConfigError, InputError."""
    declared = experiment.pipeline.nodes
    if experiment.pipeline.final not in declared:
        raise ConfigError(
            f"`pipeline.final` names `{experiment.pipeline.final}`, which is no node",
            fix=_near(experiment.pipeline.final, declared),
        )
    built: dict[str, Node] = {}

    def visit(name: str, above: tuple[str, ...]) -> Node:
        if name in above:
            raise ConfigError(f"the pipeline goes in a circle: {' -> '.join([*above, name])}", where="pipeline.nodes")
        if name not in built:
            node = declared[name]
            settings = experiment.stage.get(node.stage)
            if settings is None:
                raise ConfigError(
                    f"`pipeline.nodes.{name}.stage` names `{node.stage}`, which the stage group lacks",
                    fix=_near(node.stage, experiment.stage),
                )
            _check_roles(name, settings, node.inputs, declared)
            parents = {role: visit(parent, (*above, name)) for role, parent in node.inputs.items()}
            identity = stage_identity(experiment, node.stage, settings, {r: p.key for r, p in parents.items()})
            built[name] = Node(name, node.stage, settings, parents, identity, digest(identity))
        return built[name]

    for name in declared:
        visit(name, ())
    return list(built.values())


def run_id(experiment: Experiment, nodes: list[Node]) -> str:
    """Name and digest of what the run computes: the same settings always mean the same run folder."""
    return f"{experiment.name}-{digest([[node.name, node.key] for node in nodes])[:8]}"


def _check_roles(name: str, settings: Stage, inputs: dict[str, str], declared: dict[str, Any]) -> None:
    where = f"pipeline.nodes.{name}.inputs"
    for role, parent in inputs.items():
        if parent not in declared:
            raise ConfigError(f"`{where}.{role}` names `{parent}`, which is no node", fix=_near(parent, declared))
        if not settings.open_inputs and role not in settings.inputs + settings.optional_inputs:
            raise ConfigError(
                f"`{where}.{role}`: a stage of this kind has no such role",
                fix=_near(role, settings.inputs + settings.optional_inputs),
            )
    for role in settings.inputs:
        if role not in inputs:
            raise ConfigError(f"`{where}` lacks the role `{role}`", fix="name the node that fills it")


def _near(name: str, known: Any) -> str:
    near = difflib.get_close_matches(name, list(known), 1, 0.5)
    return f"did you mean `{near[0]}`?" if near else "known: " + ", ".join(known)
