"""Rounds of a pipeline, said once -> ordinary nodes: `dpo` of three rounds becomes dpo_1, dpo_2, dpo_3.

What stands in a round may name, as an input, a node of the same round, `previous.NODE` of the round before, or a node
outside. What stands outside may name `last.NODE`, and, where a stage takes any number of inputs, `each.NODE`: under the
role `dpo` these are the roles dpo_1, dpo_2, ... A round's key depends on no later one, so more rounds reuse the first.

Sampling stages have settings of their own in each round: another seed, since equal random numbers would draw answers
again that the model has learned from, and the prompts of the round.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from alignment.config.faults import Fault
from alignment.config.launchers import SlurmLauncher
from alignment.config.nearest import closest
from alignment.config.schema import Experiment, Node, Rounds
from alignment.config.stages.answering import Sample
from alignment.config.stages.preparing import Prepare

PREVIOUS, LAST, EACH = "previous.", "last.", "each."
SEEDS_APART = 1_000_000  # of two rounds: round 2 of one seed is no round of the next one, which a sweep may have too


def expand(experiment: Experiment) -> Experiment:
    """With the rounds' nodes among the others. A name that means nothing stays as it is, for `faults` to find."""
    rounds = experiment.pipeline.rounds
    if rounds is None:
        return experiment
    stages = {new: settings for new, (_, settings) in _own_stages(experiment, rounds).items()}
    outside = {name: _outside(node, rounds) for name, node in experiment.pipeline.nodes.items()}
    inside = {
        f"{name}_{number}": _inside(experiment, node, rounds, number)
        for number in range(1, rounds.count + 1)
        for name, node in rounds.nodes.items()
    }
    after = {name for name, node in outside.items() if not inside.keys().isdisjoint(node.inputs.values())}
    before = {name: node for name, node in outside.items() if name not in after}
    made = {name: node for name, node in inside.items() if name not in outside}
    nodes = {**before, **made, **{name: outside[name] for name in outside if name in after}}
    final = _last(experiment.pipeline.final, rounds)
    changes: dict[str, Any] = {
        "stage": {**stages, **experiment.stage},
        "pipeline": experiment.pipeline.model_copy(update={"nodes": nodes, "final": final}),
        "launcher": _launcher(experiment, rounds),
    }
    return experiment.model_copy(update=changes)


def written(experiment: Experiment, key: str) -> str:
    """The key as a person has written it, of one that an expanded experiment has."""
    rounds, parts = experiment.pipeline.rounds, key.split(".")
    if rounds is None:
        return key
    if parts[:2] == ["pipeline", "nodes"] and len(parts) > 2:
        of_round, name = parts[2] in _names(rounds), parts[2].rpartition("_")[0]
        return ".".join(["pipeline", "rounds", "nodes", name, *parts[3:]]) if of_round else key
    if parts[0] == "stage" and len(parts) > 1:
        old, settings = _own_stages(experiment, rounds).get(parts[1], (parts[1], None))
        return key if experiment.stage.get(parts[1]) != settings else ".".join(["stage", old, *parts[2:]])
    return key


def faults(experiment: Experiment) -> Iterator[Fault]:
    """Of an expanded experiment: first names that mean nothing, then what cannot be."""
    rounds = experiment.pipeline.rounds
    yield from _outer_names(experiment, rounds)
    if rounds is None:
        return
    outer = [name for name in experiment.pipeline.nodes if name not in _names(rounds)]
    for name, node in rounds.nodes.items():
        made = {f"{name}_{number}": _inside(experiment, node, rounds, number) for number in range(1, rounds.count + 1)}
        if name in outer or any(experiment.pipeline.nodes[other] != its for other, its in made.items()):
            key = f"pipeline.rounds.nodes.{name}"
            yield Fault(f"`{key}` has the name of a node outside of the rounds", (key,), "name one of them differently")
    for new, (old, settings) in _own_stages(experiment, rounds).items():
        if experiment.stage[new] != settings:
            what = f"`stage.{new}` has the name of what the rounds make of `stage.{old}`"
            yield Fault(what, (f"stage.{new}",), "name it differently")
    for name, start in rounds.first.items():
        key = f"pipeline.rounds.first.{name}"
        if name not in rounds.nodes:
            yield Fault(f"`{key}`: the rounds have no such node", (key,), closest(name, rounds.nodes))
        if start not in outer:
            yield Fault(
                f"`{key}` names `{start}`, which is no node outside of the rounds", (key,), closest(start, outer)
            )
    for name, node in rounds.nodes.items():
        for role, parent in node.inputs.items():
            yield from _inner_name(rounds, outer, f"pipeline.rounds.nodes.{name}.inputs.{role}", parent)
    yield from _prompts(experiment, rounds)


# --- names ------------------------------------------------------------------------------------------------------------


def _names(rounds: Rounds) -> set[str]:
    return {f"{name}_{number}" for name in rounds.nodes for number in range(1, rounds.count + 1)}


def _inside(experiment: Experiment, node: Node, rounds: Rounds, number: int) -> Node:
    """A node of the round with this number, from 1 on."""
    own = f"{node.stage}_{number}"
    stage = own if own in _own_stages(experiment, rounds) else node.stage
    return Node(stage=stage, inputs={role: _meant(name, rounds, number) for role, name in node.inputs.items()})


def _meant(name: str, rounds: Rounds, number: int) -> str:
    before = name.removeprefix(PREVIOUS)
    if name.startswith(PREVIOUS) and before in rounds.nodes:
        return f"{before}_{number - 1}" if number > 1 else rounds.first.get(before, name)
    return f"{name}_{number}" if name in rounds.nodes else name


def _outside(node: Node, rounds: Rounds) -> Node:
    inputs: dict[str, str] = {}
    for role, name in node.inputs.items():
        of_each = name.removeprefix(EACH)
        each = {f"{role}_{number}": f"{of_each}_{number}" for number in range(1, rounds.count + 1)}
        if name.startswith(EACH) and of_each in rounds.nodes and each.keys().isdisjoint(node.inputs):
            inputs |= each
        else:
            inputs[role] = _last(name, rounds)
    return Node(stage=node.stage, inputs=inputs)


def _last(name: str, rounds: Rounds) -> str:
    of_last = name.removeprefix(LAST)
    return f"{of_last}_{rounds.count}" if name.startswith(LAST) and of_last in rounds.nodes else name


def _outer_names(experiment: Experiment, rounds: Rounds | None) -> Iterator[Fault]:
    """Names from outside into the rounds that mean nothing, or of a round's node without saying which."""
    known, inside, count = (rounds.nodes, _names(rounds), rounds.count) if rounds else ({}, set(), 0)
    named = {
        f"pipeline.nodes.{node}.inputs.{role}": name
        for node, settings in experiment.pipeline.nodes.items()
        if node not in inside
        for role, name in settings.inputs.items()
    }
    for key, name in {**named, "pipeline.final": experiment.pipeline.final}.items():
        word = next((word for word in (PREVIOUS, LAST, EACH) if name.startswith(word)), None)
        if word and not rounds:
            yield Fault(f"`{key}` names `{name}`, and the pipeline has no rounds", (key,), "name a node")
        elif word == PREVIOUS or (word == EACH and key == "pipeline.final"):
            yield Fault(f"`{key}` names `{name}`", (key,), f"from here say {LAST}{name.removeprefix(word)}")
        elif word and name.removeprefix(word) in known:  # what `_outside` has left
            twice = next(at for number in range(1, count + 1) if (at := f"{key}_{number}") in named)
            what = f"`{key}` names `{name}`, which makes an input of the name of `{twice}`"
            yield Fault(what, (key, twice), "name one of them differently")
        elif word:
            what = f"`{key}` names `{name}`, and the rounds have no such node"
            yield Fault(what, (key,), closest(name.removeprefix(word), known, word))
        elif name in known:
            yield Fault(
                f"`{key}` names `{name}`, of which each round has one", (key,), f"say {LAST}{name}, or {name}_1"
            )


def _inner_name(rounds: Rounds, outer: Iterable[str], key: str, name: str) -> Iterator[Fault]:
    before = name.removeprefix(PREVIOUS)
    if not name.startswith(PREVIOUS):
        if name not in rounds.nodes and name not in outer:
            yield Fault(f"`{key}` names `{name}`, which is no node", (key,), closest(name, [*rounds.nodes, *outer]))
    elif before not in rounds.nodes:
        what = f"`{key}` names `{name}`, and the rounds have no such node"
        yield Fault(what, (key,), closest(before, rounds.nodes, PREVIOUS))
    elif before not in rounds.first:
        what = f"`{key}` names `{name}`, and `pipeline.rounds.first` does not say what it is in the first round"
        yield Fault(
            what, (key, "pipeline.rounds.first"), f"pipeline.rounds.first.{before}: a node outside of the rounds"
        )


# --- settings of a round ----------------------------------------------------------------------------------------------


def _own_stages(experiment: Experiment, rounds: Rounds) -> dict[str, tuple[str, Sample]]:
    """Name -> (the stage it comes from, its settings), of sampling stages in a round; the first keeps those that it has
    where all rounds have the same prompts."""
    own = {}
    for stage in dict.fromkeys(node.stage for node in rounds.nodes.values()):
        settings = experiment.stage.get(stage)
        if not isinstance(settings, Sample):
            continue
        for number in range(1 if rounds.prompts else 2, rounds.count + 1):
            changes: dict[str, Any] = {"seed": settings.seed + (number - 1) * SEEDS_APART}
            if rounds.prompts:
                first = settings.first_prompt + (number - 1) * rounds.prompts
                changes |= {"first_prompt": first, "prompts": rounds.prompts}
            own[f"{stage}_{number}"] = (stage, settings.model_copy(update=changes))
    return own


def _launcher(experiment: Experiment, rounds: Rounds) -> Any:
    """What a job asks for by the name of a node or stage of the rounds, each of them asks for."""
    launcher = experiment.launcher
    if not isinstance(launcher, SlurmLauncher):
        return launcher
    asked, own = launcher.stages, _own_stages(experiment, rounds)
    made = {new: old for new, (old, _) in own.items()}
    made |= {f"{name}_{number}": name for name in rounds.nodes for number in range(1, rounds.count + 1)}
    stages = {name: what for name, what in asked.items() if name in experiment.stage or name not in rounds.nodes}
    for new, old in made.items():
        if old in asked:
            stages.setdefault(new, asked[old])
    return launcher.model_copy(update={"stages": stages})


def _prompts(experiment: Experiment, rounds: Rounds) -> Iterator[Fault]:
    key = "pipeline.rounds.prompts"
    if rounds.prompts is None:
        return
    own = _own_stages(experiment, rounds)
    if not own:
        yield Fault(f"`{key}` is {rounds.prompts}, and no node of the rounds samples", (key,), f"{key}=null")
    for stage in dict.fromkeys(stage for stage, _ in own.values()):
        its, samples = f"stage.{stage}.prompts", experiment.stage[stage]
        if isinstance(samples, Sample) and samples.prompts is not None:
            what = f"`{its}` is {samples.prompts}, and `{key}` {rounds.prompts}, which each round would take instead"
            yield Fault(what, (its, key), f"{its}=null, or {key}=null")
    for node in rounds.nodes.values():
        rows = experiment.pipeline.nodes.get(node.inputs.get("data", ""))
        prepare = experiment.stage.get(rows.stage) if rows else None
        _, settings = own.get(f"{node.stage}_{rounds.count}", (None, None))
        if settings is None or rows is None or not isinstance(prepare, Prepare):
            continue
        asked, split = settings.first_prompt + rounds.prompts, f"stage.{rows.stage}.splits.prompts"
        if prepare.splits.prompts < asked:
            what = f"`{split}` is {prepare.splits.prompts}, and {rounds.count} rounds of {rounds.prompts} need {asked}"
            yield Fault(what, (split, key, "pipeline.rounds.count"), f"raise it, lower {key}, or set {key}=null")
