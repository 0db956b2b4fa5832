"""Settings of the engine that are impossible together, or with what the pipeline trains."""

from __future__ import annotations

from collections.abc import Iterator

from alignment.config.faults import Fault, Use
from alignment.config.schema import Experiment
from alignment.config.stages.preference import Referenced
from alignment.config.stages.training import Reference, Sft, Train


def engine_faults(experiment: Experiment, processes: int) -> Iterator[Fault]:
    """processes: of the stage that has most."""
    strategy, offload = experiment.engine.strategy, experiment.engine.offload
    told = f"`engine.strategy` is {strategy}"
    if strategy == "single" and processes > 1:
        yield Fault(
            f"{told}, which is one process, and `launcher` gives a stage {processes}",
            ("engine.strategy", "launcher.processes", "launcher.nodes", "launcher"),
            "engine=ddp, zero1, zero2 or zero3; or launcher=local",
        )
    if offload != "none" and not strategy.startswith("zero"):
        yield Fault(
            f"`engine.offload` is {offload}, which needs ZeRO, and {told}",
            ("engine.offload", "engine.strategy"),
            "engine=zero1, zero2 or zero3; or engine.offload=none",
        )
    if offload == "all" and strategy != "zero3":
        yield Fault(
            f"`engine.offload` is all, which needs ZeRO-3, and {told}",
            ("engine.offload", "engine.strategy"),
            "engine=zero3, or engine.offload=optimizer",
        )
    if experiment.engine.nvme_path is not None and offload != "all":
        yield Fault(
            f"`engine.nvme_path` is set, and `engine.offload` is {offload}: no parameters leave the device",
            ("engine.nvme_path", "engine.offload"),
            "engine=zero3_offload, or engine.nvme_path=null",
        )
    if experiment.engine.param_persistence_threshold is not None and strategy != "zero3":
        key = "engine.param_persistence_threshold"
        yield Fault(f"`{key}` is set, which ZeRO-3 alone knows, and {told}", (key, "engine.strategy"), "engine=zero3")
    yield from _sequence(experiment, processes)
    yield from _hpz(experiment.engine.hpz, strategy, processes)
    if experiment.engine.compile and strategy == "zero3":  # whose hooks gather weights inside what would be compiled
        yield Fault(
            f"`engine.compile` is true, and {told}, which gathers weights layer by layer",
            ("engine.compile", "engine.strategy"),
            "engine.compile=false, or engine=zero2",
        )


def _sequence(experiment: Experiment, processes: int) -> Iterator[Fault]:
    """Processes that share a sequence divide all processes, and share what was tried: packs of SFT, DPO and KTO."""
    key, size = "engine.sequence_parallel", experiment.engine.sequence_parallel
    if size == 1:
        return
    told = f"`{key}` is {size}"
    if processes % size:
        what = f"{told}, which does not divide `launcher.processes`, {processes}"
        yield Fault(what, (key, "launcher.processes"), f"{key}=1, or so many processes that it does")
    if experiment.engine.compile:
        yield Fault(f"{told}, and `engine.compile` is true", (key, "engine.compile"), "leave one of them out")
    if experiment.engine.hpz > 1:
        what = f"{told}, and `engine.hpz` {experiment.engine.hpz}: the two were not tried together"
        yield Fault(what, (key, "engine.hpz"), "leave one of them out")
    for name, node in experiment.pipeline.nodes.items():
        settings = experiment.stage[node.stage]
        if settings.distributed and not isinstance(settings, Sft | Referenced | Reference):
            what = f"{told}, and `{name}` is a stage of kind {settings.kind}"
            yield Fault(
                what, (key, f"pipeline.nodes.{name}.stage"), f"{key}=1: sft, dpo, kto and reference alone share packs"
            )


def _hpz(hpz: int, strategy: str, processes: int) -> Iterator[Fault]:
    if hpz == 1:
        return
    if strategy != "zero3":
        keys = "engine.hpz", "engine.strategy"
        yield Fault(
            f"`engine.hpz` is {hpz}, which ZeRO-3 alone knows, and `engine.strategy` is {strategy}",
            keys,
            "engine.hpz=1, or engine=zero3",
        )
    if processes % hpz:
        yield Fault(
            f"`engine.hpz` is {hpz}, which does not divide `launcher.processes`, {processes}",
            ("engine.hpz", "launcher.processes"),
            "the number of processes on one machine, or 1",
        )


def four_bit_faults(use: Use) -> Iterator[Fault]:
    """QLoRA needs an engine that leaves weights as they are, and its own reference."""
    lora = use.settings.lora if isinstance(use.settings, Train) else None
    if lora is None or lora.quantize is None:
        return
    key, strategy = f"{use.key}.lora.quantize", use.experiment.engine.strategy
    if strategy.startswith("zero"):
        what = (
            f"`{key}` is {lora.quantize}, and `engine.strategy` {strategy}, which would cast or cut weights of 4 bits"
        )
        yield Fault(what, (key, "engine.strategy"), "engine=ddp or single")
    engine = use.experiment.engine
    for name, is_on, off in (
        ("sequence_parallel", engine.sequence_parallel > 1, 1),
        ("compile", engine.compile, "false"),
    ):
        if is_on:
            what = f"`{key}` is {lora.quantize}, and `engine.{name}` was not tried with weights of 4 bits"
            yield Fault(what, (key, f"engine.{name}"), f"engine.{name}={off}")
    if "reference" in use.inputs and "reference" not in use.settings.needless():
        role = use.role("reference")
        what = f"`{key}` is {lora.quantize}, and `{role}` computes with all bits: `{use.node}` would use none of it"
        leave = f"~pipeline.nodes.{use.inputs['reference']} ~{role}"
        yield Fault(what, (key, role), f"leave that stage out: {leave}")
