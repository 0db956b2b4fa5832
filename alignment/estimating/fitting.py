"""Findings of `alignment check` on the stages that train: whether memory and disk are enough, and DPO's first loss."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from alignment.config.schema import Experiment
from alignment.config.stages.preference import Dpo
from alignment.config.stages.preparing import ImportModel
from alignment.config.stages.training import Train
from alignment.errors import Finding, InputError, MachineError, TrainingError
from alignment.estimating.first_loss import LN_2, FirstLoss, first_loss
from alignment.estimating.memory import MemoryEstimate, of_experiment
from alignment.estimating.seen import Lengths
from alignment.estimating.sizes import is_estimated, tensors_of
from alignment.estimating.suggesting import suggestion
from alignment.files import size_text
from alignment.training.activations import BF16, FP32
from alignment.training.checkpoints import most_at_once, size_of_one

__all__ = ["disk_bytes", "findings", "is_estimated"]
MODELS = ("a model", "a reward model")  # what stages make that takes disk
ERROR = 0.15  # by so much the estimate may be wrong (docs/preflight.md): no run is refused for less
NOTHING = "nothing that is tried makes it fit: take a smaller model, or machines with more memory"


def findings(
    experiment: Experiment,
    config: Any,
    seen: Mapping[str, Lengths],
    suggest: bool = False,
    only: Sequence[str] | None = None,
) -> Iterator[Finding]:
    """config: a transformers configuration. seen: node that prepares rows -> how long they are. suggest: say
    also the smallest change that fits. only: nodes that are still to be made; None: all."""
    estimates = of_experiment(experiment, config, seen)
    if only is not None:
        estimates = {name: estimate for name, estimate in estimates.items() if name in only}
    all_fit = all(one.fits for one in estimates.values())
    found = [] if all_fit else suggestion(experiment, config, seen)
    for name, estimate in estimates.items():
        yield _memory(name, estimate, found)
    if estimates:
        yield _disk(experiment, disk_bytes(experiment, estimates, config, only))
    if suggest:
        yield _suggested(found)
    else:
        yield from (one for one in _losses(experiment, config, seen) if only is None or one["check"].split()[1] in only)


def _memory(name: str, estimate: MemoryEstimate, found: list[str] | None) -> Finding:
    parts, load, room = estimate.parts, estimate.load, estimate.room
    largest = sorted(((value, part) for part, value in parts._asdict().items() if value), reverse=True)
    named = ", ".join(f"{part} {size_text(value)}" for value, part in largest)
    how = f"{load.tokens} tokens a micro-batch{', checkpointing' if estimate.checkpointing else ''}"
    how += "" if estimate.known else "; its rows are not there yet, and taken to be as long as they may become"
    of_room = "" if room is None else f" of {size_text(room)}"
    what = f"total {size_text(parts.total)}{of_room}: {named} ({how})"
    facts = {
        **parts._asdict(), "total": parts.total, "least": estimate.least, "room": room, "device": load.device,
        "processes": load.world_size, "tokens_per_micro_batch": load.tokens, "scored": load.scored,
        "gradient_checkpointing": estimate.checkpointing, "parameters": load.parameters, "trainable": load.trainable,
        "rows_known": estimate.known,
    }  # fmt: skip
    told: Finding = {"check": f"memory {name}", "state": "ok", "what": what, "facts": facts}
    if room is None or estimate.fits:
        return told
    told |= {"state": "warning", "where": "engine", "fix": " ".join(found) if found else NOTHING}
    if estimate.least > (1 + ERROR) * room:
        least = f"{size_text(estimate.least)} even with the smallest micro-batches and checkpointing"
        least += "" if estimate.known else ", of rows of one token"
        told |= {"state": "failed", "what": f"does not fit: {least}; {what}", "code": MachineError.exit_code}
    return told


def _losses(experiment: Experiment, config: Any, seen: Mapping[str, Lengths]) -> Iterator[Finding]:
    """Of DPO's first step, where its pairs are there."""
    for name, node in experiment.pipeline.nodes.items():
        settings, rows = experiment.stage[node.stage], seen.get(node.inputs.get("data", ""))
        if not isinstance(settings, Dpo) or rows is None or not rows.some:
            continue
        told: Finding = {"check": f"loss {name}"}
        try:
            found = first_loss(settings, config, rows.some)
        except InputError as error:
            yield {**told, "state": "note", "what": error.what}
            continue
        if found is None:
            continue
        yield {**told, **_of_loss(found, f"stage.{node.stage}")}


def _of_loss(found: FirstLoss, where: str) -> Finding:
    facts, what = found._asdict(), f"{found.found:.4f} before the first update"
    if found.expected is None:
        return {"state": "note", "what": f"{what}; no value is known to hold it to", "facts": facts}
    known = "ln 2" if math.isclose(found.expected, LN_2) else f"{found.expected:.4f}"
    if found.fits:
        return {"state": "ok", "what": f"{what}, which is {known}", "facts": facts}
    what = f"{what}, where policy and reference are one: it should be {known}"
    return {"state": "failed", "what": what, "facts": facts, "where": where, "code": TrainingError.exit_code}


def _suggested(found: list[str] | None) -> Finding:
    what = NOTHING if found is None else " ".join(found) or "all fits as it is"
    return {"check": "suggest", "state": "note", "what": what, "facts": {"overrides": found}}


def disk_bytes(
    experiment: Experiment, estimates: Mapping[str, MemoryEstimate], config: Any, only: Sequence[str] | None = None
) -> dict[str, int]:
    """What the stages need of the store. weights: of all models that are made, in fp32, the imported one as
    `storage_precision` says; checkpoints: of the one stage that has most of them, for they go with its end, but for
    `keep_best` of each. only: nodes that are still to be made; None: all."""
    weights, most, kept = 0, 0, 0
    count, best = most_at_once(experiment.checkpoint), experiment.checkpoint.keep_best
    for name, node in experiment.pipeline.nodes.items():
        settings = experiment.stage[node.stage]
        if settings.makes not in MODELS or (only is not None and name not in only):
            continue
        rounded = isinstance(settings, ImportModel) and experiment.model.storage_precision == "bf16"
        numbers = estimates[name].load.parameters if name in estimates else sum(tensors_of(config, settings).values())
        weights += (BF16 if rounded else FP32) * numbers
        if name not in estimates or not isinstance(settings, Train):
            continue
        load = estimates[name].load
        one = size_of_one(load.trainable, load.moving)
        most, kept = max(most, count * one), kept + min(best, count) * one
    return {"weights": weights, "checkpoints": max(most, kept)}


def _disk(experiment: Experiment, needed: Mapping[str, int]) -> Finding:
    store = Path(experiment.store)
    there = next(folder for folder in (store, *store.absolute().parents) if folder.exists())
    free = shutil.disk_usage(there).free
    weights, checkpoints = needed["weights"], needed["checkpoints"]
    what = f"weights {size_text(weights)} and checkpoints {size_text(checkpoints)} of {size_text(free)} free"
    told: Finding = {"check": "disk", "state": "ok", "what": what, "facts": {**needed, "free": free}}
    if free < 1.1 * weights:  # as files.require_room asks
        fix = "free some disk, or set store=..."
        return {**told, "state": "failed", "where": str(store), "fix": fix, "code": MachineError.exit_code}
    if free < weights + checkpoints:
        fix = "free some disk, lower checkpoint.keep_last, or set store=..."
        return {**told, "state": "warning", "where": str(store), "fix": fix}
    return told
