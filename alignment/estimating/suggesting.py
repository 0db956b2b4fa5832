"""The smallest change with which a run fits into memory, as overrides for its command.

Tried in this order, from what costs time to what changes the result: fewer tokens a micro-batch, gradient
checkpointing, a higher stage of ZeRO where there are several processes, offloading on a GPU, bf16, LoRA; then more
machines of a cluster. Each is added to those before until all fits, and then what is not needed is left out again.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from alignment.config.schema import Experiment
from alignment.config.stages.training import Lora, Train
from alignment.errors import AlignmentError
from alignment.estimating.machine import processes
from alignment.estimating.memory import MemoryEstimate, of_experiment
from alignment.estimating.seen import Lengths

FEWEST = 128  # tokens of a micro-batch: fewer are not proposed
MOST = 64  # machines
RANK = 16
TOKENS = "engine.tokens_per_micro_batch"
Changes = dict[str, Any]  # key of the experiment -> value


def suggestion(experiment: Experiment, config: Any, seen: Mapping[str, Lengths]) -> list[str] | None:
    """Overrides, quoted for a shell; none if all fits as it is; None if nothing that is tried makes it fit.

    config: a transformers configuration. seen: node that prepares rows -> how long they are.
    """

    def estimated(changes: Changes) -> dict[str, MemoryEstimate]:
        return of_experiment(changed(experiment, changes), config, seen)

    def fits(changes: Changes) -> bool | None:
        """None: the settings do not go together, such as more processes than rows in a global batch."""
        try:
            return all(one.fits for one in estimated(changes).values())
        except AlignmentError:
            return None

    tried: Changes = {}
    lacking = {name: one for name, one in estimated(tried).items() if not one.fits}
    if not lacking:
        return []
    for more in _in_order(experiment, lacking):
        if (found := fits({**tried, **more})) is None:
            continue
        tried = {**tried, **more}
        if found:
            return [shlex.quote(f"{key}={_text(value)}") for key, value in _needed(tried, fits).items()]
    return None


def _needed(tried: Changes, fits: Callable[[Changes], bool | None]) -> Changes:
    """Without what is not needed, and with as many tokens as fit beside the rest."""
    for key in list(tried)[:-1]:
        fewer = {name: value for name, value in tried.items() if name != key}
        if fits(fewer):
            tried = fewer
    while TOKENS in tried and len(tried) > 1:
        more = {**tried, TOKENS: 2 * tried[TOKENS]}
        if not fits(more):
            break
        tried = more
    return tried


def _in_order(experiment: Experiment, lacking: Mapping[str, MemoryEstimate]) -> Iterator[Changes]:
    """lacking: nodes that do not fit as it is."""
    engine, nodes = experiment.engine, experiment.pipeline.nodes
    tokens = max(one.load.tokens for one in lacking.values())
    while tokens > FEWEST:
        tokens //= 2
        yield {TOKENS: max(tokens, FEWEST)}
    yield {"engine.gradient_checkpointing": True}
    if min(one.load.world_size for one in lacking.values()) > 1:
        for strategy in ("zero2", "zero3"):
            if engine.strategy < strategy:  # ddp, zero1, zero2, zero3
                yield {"engine.strategy": strategy}
    on_gpu = any(one.load.device == "cuda" for one in lacking.values())
    if on_gpu and engine.strategy.startswith("zero") and engine.offload == "none":
        yield {"engine.offload": "optimizer"}
    stages = {nodes[name].stage: experiment.stage[nodes[name].stage] for name in lacking}
    rounding: Changes = {f"stage.{name}.precision": "bf16" for name, one in stages.items() if _is_fp32(one)}
    if rounding:
        yield rounding
    whole = {name for name, one in stages.items() if isinstance(one, Train) and one.lora is None}
    if whole:
        yield {f"stage.{name}.lora": Lora(rank=RANK) for name in whole}
    if experiment.launcher.kind == "slurm":
        yield from _more_machines(experiment, lacking)


def _more_machines(experiment: Experiment, lacking: Mapping[str, MemoryEstimate]) -> Iterator[Changes]:
    now = max(processes(experiment, name)[0] for name in lacking)
    while (now := 2 * now) <= MOST:
        yield {"launcher.nodes": now, "engine.strategy": "zero3"}


def _is_fp32(settings: Any) -> bool:
    return getattr(settings, "precision", None) == "fp32"


def changed(experiment: Experiment, changes: Changes) -> Experiment:
    """A copy with these values, which the schema is known to allow."""
    for key, value in changes.items():
        experiment = _put(experiment, key.split("."), value)
    return experiment


def _put(place: Any, path: list[str], value: Any) -> Any:
    first, *rest = path
    old = place[first] if isinstance(place, dict) else getattr(place, first)
    new = _put(old, rest, value) if rest else value
    return {**place, first: new} if isinstance(place, dict) else place.model_copy(update={first: new})


def _text(value: Any) -> str:
    if isinstance(value, Lora):
        return f"{{rank: {value.rank}}}"
    return str(value).lower() if isinstance(value, bool) else str(value)
