"""What of the settings of an online stage is impossible together."""

from __future__ import annotations

from collections.abc import Iterator

from alignment.config.execution import Engine
from alignment.config.faults import Fault
from alignment.config.stages.base import Stage
from alignment.config.stages.online import Clipped, Grpo, Kl, Online, PolicyGradient, Ppo


def online_faults(settings: Stage, key: str, engine: Engine) -> Iterator[Fault]:
    """key: of the stage's settings."""
    if not isinstance(settings, Online):
        return
    if engine.compile:
        what = f"`engine.compile` is true, and `{key}` decodes: every token would be another shape to compile for"
        yield Fault(what, ("engine.compile", key), "engine.compile=false")
    if engine.hpz > 1:
        what = f"`engine.hpz` is {engine.hpz}, and `{key}` decodes, which was not tried with it"
        yield Fault(what, ("engine.hpz", key), "engine.hpz=1")
    if settings.lora is not None and settings.lora.quantize is not None:
        what = f"`{key}.lora.quantize` is {settings.lora.quantize}, and decoding was not tried with weights of 4 bits"
        yield Fault(what, (f"{key}.lora.quantize",), f"{key}.lora.quantize=null")
    kl = getattr(settings, "kl", None)
    if isinstance(kl, Kl):
        yield from _kl(kl, f"{key}.kl")
    if isinstance(settings, Clipped):
        yield from _followed(settings, key)
    if isinstance(settings, PolicyGradient):
        yield from _masked(settings, key)
    if isinstance(settings, Grpo) and settings.scale_by_std and settings.refers and settings.kl.place == "reward":
        keys = f"{key}.kl.place", f"{key}.scale_by_std"
        what = (
            f"`{keys[0]}` is reward, and `{keys[1]}` true: a prompt whose rewards are all one would be trained on its"
        )
        fix = f"{keys[0]}=loss, or {keys[1]}=false"
        yield Fault(f"{what} KL alone, at full size whatever the coefficient", keys, fix)
    if isinstance(settings, Ppo) and settings.ratio != "token":
        what = (
            f"`{key}.ratio` is {settings.ratio}: one ratio for an answer would average away what GAE says of its tokens"
        )
        yield Fault(what, (f"{key}.ratio",), f"{key}.ratio=token")
    elif isinstance(settings, Clipped) and settings.ratio != "token" and settings.aggregate != "sequence":
        keys = f"{key}.aggregate", f"{key}.ratio"
        what = f"`{keys[0]}` is {settings.aggregate}, and `{keys[1]}` {settings.ratio}: an answer's one ratio would"
        yield Fault(
            f"{what} count once for each of its tokens, so long answers more",
            keys,
            f"{keys[0]}=sequence, as in GSPO's equation 5 (arXiv:2507.18071); or {keys[1]}=token",
        )


def _masked(settings: PolicyGradient, key: str) -> Iterator[Fault]:
    if settings.refers and settings.truncated == "mask" and settings.kl.place == "reward":
        keys = f"{key}.truncated", f"{key}.kl.place"
        what = f"`{keys[0]}` is mask, and `{keys[1]}` reward: answers that are cut would be measured without a KL, so"
        yield Fault(
            f"{what} those that end would look worse than they, and be trained away",
            keys,
            f"{keys[0]}=penalty or keep, or {keys[1]}=loss",
        )


def _followed(settings: Clipped, key: str) -> Iterator[Fault]:
    """What a target follows is the mean over answers that are trained on: those alone have a reference."""
    if not settings.refers or settings.kl.target is None:
        return
    resamples = settings.resamples if isinstance(settings, PolicyGradient) else 0
    leaves_out = [("truncated", "mask", "keep or penalty")] if settings.truncated == "mask" else []
    leaves_out += [("resamples", str(resamples), "0")] if resamples else []
    for name, value, instead in leaves_out:
        target, other = f"{key}.kl.target", f"{key}.{name}"
        what = f"`{target}` is {settings.kl.target:g}, and `{other}` {value}: the distance would be of the answers"
        fix = f"{target}=null, or {other}={instead}"
        yield Fault(f"{what} that are left, not of the policy", (target, other), fix)


def _kl(kl: Kl, key: str) -> Iterator[Fault]:
    if kl.target is not None and kl.coefficient == 0:
        keys = f"{key}.target", f"{key}.coefficient"
        what = f"`{keys[0]}` is {kl.target:g}, and `{keys[1]}` is 0, which no factor changes"
        yield Fault(what, keys, "a first coefficient")
    if kl.place == "reward" and kl.estimator != "k1" and kl.coefficient:
        estimator, place = f"{key}.estimator", f"{key}.place"
        what = (
            f"`{place}` is reward, and `{estimator}` {kl.estimator}: off a reward its own slope is lost, and near the"
        )
        yield Fault(f"{what} start model it pulls by next to nothing, or away", (estimator, place),
                    f"{estimator}=k1, or {place}=loss")  # fmt: skip
    if kl.place == "loss" and kl.estimator == "k1" and kl.coefficient and not kl.corrected:
        estimator, place, corrected = f"{key}.estimator", f"{key}.place", f"{key}.corrected"
        what = f"`{estimator}` is k1, and `{place}` is loss: its gradient is 0 in expectation, and only noise"
        yield Fault(what, (estimator, place, corrected), f"{corrected}=true, {estimator}=k2 or k3, or {place}=reward")
