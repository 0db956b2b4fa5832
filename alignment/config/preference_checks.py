"""Settings of losses that are right one by one and impossible together."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from alignment.config.faults import Fault
from alignment.config.provenance import COMMAND_LINE
from alignment.config.schema import Experiment
from alignment.config.stages.base import Stage
from alignment.config.stages.preference import SEVERAL, Dpo, Kto
from alignment.errors import ConfigError


def refuse_replaced_names(experiment: Experiment, overrides: Iterable[str]) -> None:
    """Raises ConfigError where all losses of a stage are ones that overrides have added, one by one: what Hydra adds to
    a name takes its place."""
    for name, settings in experiment.stage.items():
        adds = re.compile(rf"\+\+?(stage\.{name}\.loss\.(\w+))=")
        added = {found[2]: found[1] for one in overrides if (found := adds.match(one))}
        if isinstance(settings, Dpo) and added and set(settings.losses) <= added.keys():
            raise beside_a_name(next(iter(added.values())))


def beside_a_name(key: str) -> ConfigError:
    """key: of a loss's weight, given where the loss is one name."""
    loss, _, name = key.rpartition(".")
    what = f"`{loss}` is one name, in whose place `{name}` would be"
    return ConfigError(what, where=COMMAND_LINE, fix=f"write all losses with their weights, as in {SEVERAL}")


def loss_faults(settings: Stage, key: str) -> Iterator[Fault]:
    """key: of the stage's settings."""
    if isinstance(settings, Kto) and settings.desirable_weight == settings.undesirable_weight == 0:
        keys = f"{key}.desirable_weight", f"{key}.undesirable_weight"
        yield Fault(f"`{keys[0]}` and `{keys[1]}` are both 0: nothing would be learned", keys, "one of them above 0")
    if not isinstance(settings, Dpo):
        return
    loss, smoothing, weighting, divergence, alpha = (
        f"{key}.{name}" for name in ("loss", "label_smoothing", "weighting", "divergence", "divergence_alpha")
    )
    update = f"{key}.reference_update"
    if settings.reference_update is not None and not settings.refers:
        what = f"`{update}` is set, and {next(iter(settings.losses))} compares with no reference"
        yield Fault(what, (update, loss), f"{update}=null")
    moves, last = settings.reference_update, settings.max_steps
    if moves is not None and last is not None and last <= moves.every_steps:
        every, steps = f"{update}.every_steps", f"{key}.max_steps"
        what = f"`{every}` is {moves.every_steps} and `{steps}` {last}: the reference would never move"
        yield Fault(
            what, (every, steps), f"{steps} above {moves.every_steps}, {every}={max(last // 4, 1)}, or {update}=null"
        )
    if "exo_pair" in settings.losses and settings.label_smoothing == 0:
        what = f"`{smoothing}` is 0, and exo_pair compares with smoothed labels: its loss would be infinite"
        yield Fault(what, (smoothing, loss), f"{smoothing}=0.001, as loss=exo_pair has it")
    if settings.label_smoothing and "label_smoothing" in settings.idle():
        what = f"`{smoothing}` is {settings.label_smoothing:g}, and {next(iter(settings.losses))} smooths no labels"
        yield Fault(what, (smoothing, loss), f"{smoothing}=0.0, or a loss that does: sigmoid, robust, exo_pair, ...")
    whole = [name for name, traits in zip(settings.losses, settings.traits, strict=True) if traits.whole]
    if whole and settings.weighting != "none":
        what = f"`{weighting}` is {settings.weighting}, and {whole[0]} sorts pairs or leaves them out"
        yield Fault(what, (weighting, loss), f"{weighting}=none")
    sorts = [name for name in settings.losses if name in ("aot", "aot_unpaired")]
    if sorts and settings.global_batch_size == 1:
        size = f"{key}.global_batch_size"
        what = f"`{size}` is 1, and {sorts[0]} sorts the pairs of a global batch: there would be nothing to sort"
        yield Fault(what, (size, loss), f"raise {size}, or {loss}=sigmoid")
    if settings.divergence != "reverse_kl" and not any(traits.scores for traits in settings.traits):
        what = f"`{divergence}` is {settings.divergence}, and {next(iter(settings.losses))} does not go through one"
        yield Fault(what, (divergence, loss), f"{divergence}=reverse_kl, or a loss such as sigmoid")
    if settings.ld_alpha is not None and set(settings.losses) <= {"nll", "sft"}:
        what = f"`{key}.ld_alpha` is {settings.ld_alpha:g}, and {next(iter(settings.losses))} compares no lengths"
        yield Fault(what, (f"{key}.ld_alpha", loss), f"{key}.ld_alpha=null")
    means = [name for name, traits in zip(settings.losses, settings.traits, strict=True) if traits.means]
    if settings.ld_alpha is not None and means:
        what = f"`{key}.ld_alpha` is {settings.ld_alpha:g}, and {means[0]} divides by the length of an answer already"
        yield Fault(what, (f"{key}.ld_alpha", loss), f"{key}.ld_alpha=null, or a loss of sums such as sigmoid")
    if settings.divergence == "alpha" and settings.divergence_alpha == 1:
        what = f"`{alpha}` is 1, where the alpha divergence is the reverse KL"
        yield Fault(what, (alpha, divergence), f"{divergence}=reverse_kl")
