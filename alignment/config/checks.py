"""Settings that are right one by one and impossible together. Only what the pipeline uses is looked at."""

from __future__ import annotations

import graphlib
from collections.abc import Iterable, Iterator
from typing import Any

from alignment.config import answering_checks, model_checks, rounds, shape
from alignment.config.engine_checks import engine_faults, four_bit_faults
from alignment.config.execution import PercentilePruning
from alignment.config.explain import ADD, MISSING
from alignment.config.faults import Fault, Use
from alignment.config.launchers import SlurmLauncher, TorchrunLauncher
from alignment.config.nearest import closest
from alignment.config.online_checks import online_faults
from alignment.config.preference_checks import loss_faults
from alignment.config.provenance import Origin
from alignment.config.reward_term_checks import term_faults
from alignment.config.rewards import HIGHER_IS_BETTER, RESERVED
from alignment.config.schema import Experiment
from alignment.config.stages.answering import Compare
from alignment.config.stages.preference import Referenced
from alignment.config.stages.preparing import FORMATS, Prepare
from alignment.config.stages.reward_model import OF_REWARD_MODELS
from alignment.config.stages.training import Train
from alignment.errors import ConfigError


def check(experiment: Experiment, origin: Origin) -> None:
    """Raises ConfigError for the first fault."""
    for fault in _faults(experiment):
        keys = (rounds.written(experiment, key) for key in fault.keys)
        raise ConfigError(fault.what, where=origin.where(*keys), fix=fault.fix)


def is_faulty(experiment: Experiment) -> bool:
    return any(True for _ in _faults(experiment))


def _faults(experiment: Experiment) -> Iterator[Fault]:
    """Lazy: what is looked at later may rest on what was found right before."""
    yield from rounds.faults(experiment)
    yield from _names(experiment)
    uses = [Use(experiment, node) for node in experiment.pipeline.nodes]
    for use in uses:
        yield from _roles(use)
    yield from _circle(experiment)
    yield from _final(experiment)
    yield from _launcher(experiment)
    yield from _objective(experiment)
    yield from _pruning(experiment)
    if trains := [use for use in uses if use.settings.distributed]:
        yield from engine_faults(experiment, max(use.world_size for use in trains))
    for use in uses:
        for look in (_model, _prepare, _rows, _train, four_bit_faults, _reference, _reward, _compare):
            yield from look(use)
        yield from answering_checks.faults(use)
        yield from loss_faults(use.settings, use.key)
        yield from model_checks.faults(use, lambda node: Use(experiment, node))
        yield from online_faults(use.settings, use.key, experiment.engine)


# --- the graph --------------------------------------------------------------------------------------------------------


def _names(experiment: Experiment) -> Iterator[Fault]:
    nodes, final = experiment.pipeline.nodes, experiment.pipeline.final
    if final not in nodes:
        yield _unknown("pipeline.final", final, "which is no node", nodes)
    for name, node in nodes.items():
        if node.stage not in experiment.stage:
            key = f"pipeline.nodes.{name}.stage"
            yield _unknown(key, node.stage, "which the stage group lacks", experiment.stage)
        for role, parent in node.inputs.items():
            if parent not in nodes:
                yield _unknown(f"pipeline.nodes.{name}.inputs.{role}", parent, "which is no node", nodes)


def _roles(use: Use) -> Iterator[Fault]:
    """Every role is one that the stage has, is filled if it must be, and by a node that makes what it takes."""
    settings = use.settings
    known = {**settings.inputs, **settings.optional_inputs}
    for role, parent in use.inputs.items():
        takes = settings.takes(role)
        if takes is None:
            what = f"`{use.role(role)}`: a stage of this kind has no such role"
            yield Fault(what, (use.role(role),), closest(role, known))
        elif (made := Use(use.experiment, parent).settings.makes) != takes:
            able = (node for node in use.experiment.pipeline.nodes if Use(use.experiment, node).settings.makes == takes)
            what = f"`{use.role(role)}` names `{parent}`, which makes {made}, not {takes}"
            yield Fault(what, (use.role(role),), f"nodes that make {takes}: {', '.join(able) or 'none'}")
    for role in (role for role in settings.inputs if role not in use.inputs):
        inputs = f"pipeline.nodes.{use.node}.inputs"
        yield Fault(f"`{inputs}` lacks the role `{role}`", (inputs,), "name the node that fills it")


def _circle(experiment: Experiment) -> Iterator[Fault]:
    parents = {name: list(node.inputs.values()) for name, node in experiment.pipeline.nodes.items()}
    try:
        graphlib.TopologicalSorter(parents).prepare()
    except graphlib.CycleError as error:
        circle = error.args[1]
        yield Fault(
            f"the pipeline goes in a circle: {' -> '.join(circle)}",
            tuple(f"pipeline.nodes.{name}.inputs" for name in circle),
            "a node takes its inputs from nodes before it",
        )


def _final(experiment: Experiment) -> Iterator[Fault]:
    final = Use(experiment, experiment.pipeline.final)
    if final.settings.makes not in ("a model", "a reward model"):
        what = f"`pipeline.final` names `{final.node}`, which makes {final.settings.makes}, not a model"
        yield Fault(what, ("pipeline.final",), "name the node whose model people get")


# --- what a sweep looks for -------------------------------------------------------------------------------------------


def _objective(experiment: Experiment) -> Iterator[Fault]:
    names, known = experiment.objective, [*HIGHER_IS_BETTER, *experiment.reward.terms]
    if Use(experiment, experiment.pipeline.final).settings.makes == "a reward model":
        known = [*OF_REWARD_MODELS]
    for name in names:
        if name not in known:
            yield _unknown("objective", name, "which no evaluation measures", known)
    if len(set(names)) < len(names):
        yield Fault(f"`objective` names a metric twice: {', '.join(names)}", ("objective",), "name each once")


def _pruning(experiment: Experiment) -> Iterator[Fault]:
    """The stage whose metrics are looked at is one that trains."""
    rule, key = experiment.pruning, "pruning.node"
    if not isinstance(rule, PercentilePruning):
        return
    node = trains(experiment) if rule.node is None else rule.node
    training = [name for name in experiment.pipeline.nodes if isinstance(Use(experiment, name).settings, Train)]
    if node is None:
        yield Fault("`pruning` is on, and the pipeline trains nothing", ("pruning", "pruning.kind"), "pruning=none")
    elif node not in training:
        yield _unknown(key, node, "which is no node that trains", training)
    if isinstance(experiment.launcher, TorchrunLauncher) and experiment.launcher.nodes > 1:
        what = "`pruning` is on, and `launcher.nodes` is above 1: the machines would not stop the same trials"
        yield Fault(what, ("pruning", "launcher.nodes"), "pruning=none, or launcher=slurm")


def trains(experiment: Experiment) -> str | None:
    """The node that trains the final model, else the last one that trains."""
    nodes = experiment.pipeline.nodes
    training = [name for name in nodes if isinstance(Use(experiment, name).settings, Train)]
    if experiment.pipeline.final in training:
        return experiment.pipeline.final
    return training[-1] if training else None


# --- the launcher, and what is trained --------------------------------------------------------------------------------


def _launcher(experiment: Experiment) -> Iterator[Fault]:
    launcher = experiment.launcher
    if isinstance(launcher, SlurmLauncher):
        known = {*experiment.pipeline.nodes, *experiment.stage}
        for name in launcher.stages:
            if name not in known:
                yield _unknown(f"launcher.stages.{name}", name, "which is no node or stage of the pipeline", known)
    if not isinstance(launcher, TorchrunLauncher):
        return
    if launcher.rank >= launcher.nodes:
        what = f"`launcher.rank` is {launcher.rank}, and there are {launcher.nodes} nodes"
        yield Fault(what, ("launcher.rank", "launcher.nodes"), "ranks are counted from 0")
    if launcher.nodes > 1 and launcher.head is None:
        what = f"`launcher.nodes` is {launcher.nodes}, and `launcher.head` is null"
        yield Fault(what, ("launcher.head", "launcher.nodes"), "say where they meet: launcher.head=HOST:PORT")
    elif launcher.nodes > 1 and not 0 < int(str(launcher.head).rpartition(":")[2]) < 65536:
        yield Fault(f"`launcher.head` is {launcher.head}", ("launcher.head",), "a port is a number from 1 to 65535")


def _train(use: Use) -> Iterator[Fault]:
    if not isinstance(use.settings, Train):
        return
    size, processes = use.settings.global_batch_size, use.shares
    if size < processes:
        key = f"{use.key}.global_batch_size"
        yield Fault(
            f"`{key}` is {size}, too few for {processes} processes",
            (key, "launcher.processes"),
            "raise it, or lower launcher.processes or launcher.nodes",
        )
    rows = Use(use.experiment, use.inputs["data"])
    if isinstance(rows.settings, Prepare) and rows.settings.task != use.settings.task:
        what = f"`{rows.key}.task` is {rows.settings.task}, and `{use.node}` trains on rows for {use.settings.task}"
        yield Fault(what, (f"{rows.key}.task", use.role("data")), f"{rows.key}.task={use.settings.task}, or other rows")


def _reference(use: Use) -> Iterator[Fault]:
    """Log-probs of another model, of other pairs or in another precision would be computed for nothing."""
    if not isinstance(use.settings, Referenced) or "reference" not in use.inputs or use.settings.needless():
        return
    reference, size = Use(use.experiment, use.inputs["reference"]), use.settings.global_batch_size
    if size < reference.shares:
        what = f"`{use.key}.global_batch_size` is {size}, too few for the {reference.shares} processes of"
        keys = f"{use.key}.global_batch_size", "launcher.processes"
        yield Fault(f"{what} `{reference.node}`", keys, "raise it, or give that stage fewer")
    for role in ("model", "data"):
        mine, its = use.inputs[role], reference.inputs[role]
        if mine != its:
            what = f"`{use.node}` has the {role} `{mine}`, and its reference, `{reference.node}`, `{its}`"
            yield Fault(what, (reference.role(role), use.role(role)), f"{reference.role(role)}={mine}")
    precision, wanted = getattr(reference.settings, "precision", None), use.settings.precision
    if precision != wanted:
        key = f"{reference.key}.precision"
        what = (
            f"`{key}` is {precision}, and `{use.key}.precision` {wanted}: `{use.node}` would use none of its log-probs"
        )
        yield Fault(what, (key, f"{use.key}.precision"), f"{key}={wanted}")


# --- model and data ---------------------------------------------------------------------------------------------------


def _model(use: Use) -> Iterator[Fault]:
    if "model" in use.settings.groups:
        model = use.experiment.model
        yield from _missing(model, "model")
        if model.adapter is not None and model.storage_precision != "fp32":
            key, what = "model.storage_precision", "which would round away some of what `model.adapter` changes"
            yield Fault(f"`{key}` is {model.storage_precision}, {what}", (key, "model.adapter"), f"{key}=fp32")


def _rows(use: Use) -> Iterator[Fault]:
    """The splits that the stage reads get rows."""
    for role, split in use.settings.reads.items():
        rows = Use(use.experiment, use.inputs[role]) if role in use.inputs else None
        if rows and isinstance(rows.settings, Prepare) and getattr(rows.settings.splits, split) == 0:
            key = f"{rows.key}.splits.{split}"
            yield Fault(f"`{key}` is 0, and `{use.node}` needs such rows", (key, use.role(role)), "raise it")


def _prepare(use: Use) -> Iterator[Fault]:
    settings, key = use.settings, use.key
    if not isinstance(settings, Prepare):
        return
    if settings.max_prompt_length > settings.max_length:
        what = f"`{key}.max_prompt_length` is {settings.max_prompt_length}, more than the whole row's max_length"
        fix = f"at most {settings.max_length}, or raise {key}.max_length"
        yield Fault(what, (f"{key}.max_prompt_length", f"{key}.max_length"), fix)
    data, names = use.experiment.data, settings.datasets
    yield from _against(use, settings)
    if settings.dataset is None:
        if "data" not in use.inputs:
            why = "`task` is sft" if settings.task == "sft" else f"`{use.node}` is given no pairs by a parent"
            yield Fault(f"`{key}.dataset` is null, and {why}", (f"{key}.dataset",), f"name one of: {', '.join(data)}")
        return
    if not names or len(set(names)) < len(names):
        what = f"`{key}.dataset` names {'one twice' if names else 'no data set'}"
        yield Fault(what, (f"{key}.dataset",), f"name some of: {', '.join(data)}")
    for name in names:
        yield from _dataset(use, settings, name)
    weighed = [name for name in names if data[name].weight is not None]
    if weighed and len(weighed) < len(names):
        without = next(name for name in names if name not in weighed)
        keys = f"data.{weighed[0]}.weight", f"data.{without}.weight"
        yield Fault(f"`{keys[0]}` is set, and `{keys[1]}` is null", keys, "give all of a mixture a weight, or none")


def _against(use: Use, settings: Prepare) -> Iterator[Fault]:
    data, key = use.experiment.data, f"{use.key}.against"
    for name in settings.against:
        if name not in data:
            yield _unknown(key, name, "which the data group lacks", data)
        elif name in settings.datasets:
            what = f"`{key}` names `{name}`, and so does `{use.key}.dataset`"
            yield Fault(what, (key, f"{use.key}.dataset"), "train on it, or evaluate on it")
        else:
            yield from _missing(data[name], f"data.{name}")
    if settings.against and use.experiment.checks.contamination_share is None:
        what = f"`{key}` names what to compare with, and `checks.contamination_share` is null"
        yield Fault(what, (key, "checks.contamination_share"), "checks.contamination_share=0.5")


def _dataset(use: Use, settings: Prepare, name: str) -> Iterator[Fault]:
    data, key = use.experiment.data, use.key
    if name not in data:
        yield _unknown(f"{key}.dataset", name, "which the data group lacks", data)
        return
    yield from _missing(data[name], f"data.{name}")
    form = data[name].format
    if form != "auto" and form not in FORMATS[settings.task]:
        keys = f"{key}.task", f"{key}.dataset", f"data.{name}.format"
        what = f"`{keys[0]}` is {settings.task}, and `{keys[2]}` is {form}"
        fix = "preference rows have chosen and rejected answers, unpaired ones a label, scored ones a score"
        yield Fault(what, keys, fix)


def _missing(value: Any, key: str) -> Iterator[Fault]:
    for below, leaf in shape.leaves(value, key):
        if leaf == MISSING:
            yield Fault(f"`{below}` has no value", (below,), ADD.format(below))


# --- judging ----------------------------------------------------------------------------------------------------------


def _reward(use: Use) -> Iterator[Fault]:
    if "reward" not in use.settings.groups:
        return
    yield from _missing(use.experiment.reward, "reward")
    for name, term in use.experiment.reward.terms.items():
        key = f"reward.terms.{name}"
        if name in RESERVED:
            what = f"`{key}` has the name of another number that stages write"
            yield Fault(what, (key,), "name the term differently")
        if term.kind == "relevance" and term.source is None:
            what = f"`{key}.source` is null, and a relevance term needs a sentence encoder"
            yield Fault(what, (f"{key}.source",), "conf/reward/sentiment_relevance.yaml names one")
    yield from term_faults(use)


def _compare(use: Use) -> Iterator[Fault]:
    if not isinstance(use.settings, Compare):
        return
    baseline, candidate = f"{use.key}.baseline", f"{use.key}.candidate"
    for key, role in ((baseline, use.settings.baseline), (candidate, use.settings.candidate)):
        if role not in use.inputs:
            yield _unknown(key, role, f"which `{use.node}` does not compare", use.inputs)
    if use.settings.baseline == use.settings.candidate:
        what = f"`{candidate}` is the baseline, {use.settings.baseline}"
        yield Fault(what, (candidate, baseline), f"name two of: {', '.join(use.inputs)}")


def _unknown(key: str, name: str, why: str, known: Iterable[str]) -> Fault:
    return Fault(f"`{key}` names `{name}`, {why}", (key,), closest(name, known))
