"""Stages that train on preferences: pairs (DPO and its family), and single answers that are wanted or not (KTO)."""

from __future__ import annotations

from collections.abc import Collection
from math import inf
from typing import ClassVar, Literal, get_args

from pydantic import field_validator
from pydantic_core import PydanticCustomError

from alignment.config.losses import COEFFICIENTS, PAIR_LOSSES, Traits
from alignment.config.nearest import closest
from alignment.config.settings import Settings, identity
from alignment.config.stages.training import Train

SEVERAL = "stage.dpo.loss='{sigmoid: 1.0, nll: 0.2}'"


def _fault(what: str, fix: str) -> PydanticCustomError:
    return PydanticCustomError("loss", what, {"fix": fix})


class Referenced(Train):
    """Compares the policy with its reference: the start model of the stage."""

    optional_inputs: ClassVar[dict[str, str]] = {"reference": "log-probs"}
    ordering = ("reference",)  # what it finds computed it need not compute


class ReferenceUpdate(Settings):
    """TR-DPO (Gorbatovski et al. 2024, arXiv:2404.09656): every so many steps the reference takes this share of the
    policy's weights, and the rest of its own. 1: the hard update (eq. 6), below: the soft one (eq. 5)."""

    every_steps: int = identity(gt=0)
    share: float = identity(gt=0, le=1)


class Dpo(Referenced):
    """Direct preference optimisation (Rafailov et al. 2023, arXiv:2305.18290) and its family (docs/algorithms.md)."""

    task = "preference"
    kind: Literal["dpo"] = identity()
    loss: str | dict[str, float] = identity()
    beta: float = identity(gt=0)
    label_smoothing: float = identity(ge=0, lt=0.5)
    divergence: Literal["reverse_kl", "forward_kl", "js", "alpha"] = identity()
    divergence_alpha: float = identity(gt=0)
    weighting: Literal["none", "wpo"] = identity()
    ld_alpha: float | None = identity(ge=0, le=1)
    reference_update: ReferenceUpdate | None = identity()
    discopop_tau: float = identity(gt=0)
    dpop_lambda: float = identity(ge=0)
    length_penalty: float = identity()
    simpo_gamma: float = identity()
    cpo_alpha: float = identity(ge=0)
    beta_dpo_alpha: float = identity(ge=0)
    beta_dpo_keep: float = identity(gt=0, le=1)
    beta_dpo_momentum: float = identity(ge=0, lt=1)

    @field_validator("loss", mode="before")
    @classmethod
    def _known(cls, value: object) -> object:
        """A name, or names with weights above 0."""
        if not isinstance(value, str | dict):
            raise _fault("is neither a name nor names with weights", f"stage.dpo.loss=sigmoid, or {SEVERAL}")
        if isinstance(value, dict) and not value:
            raise _fault("names no loss", f"one of: {', '.join(PAIR_LOSSES)}")
        for name in value if isinstance(value, dict) else [value]:
            if name == "ipo":
                fix = "ipo_mean: log-ratios a token, as TRL; ipo_sum: summed, as the paper writes it"
                raise _fault("names a loss with two readings", fix)
            if fix := meant_by(name):
                raise _fault("names no loss of pairs", fix)
            if name not in PAIR_LOSSES:
                raise _fault("names an unknown loss", closest(str(name), PAIR_LOSSES))
        for weight in value.values() if isinstance(value, dict) else ():
            if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < inf:
                raise _fault("has a loss without a finite weight above 0", SEVERAL)
        return value

    @property
    def losses(self) -> dict[str, float]:
        """name -> weight."""
        return {self.loss: 1.0} if isinstance(self.loss, str) else dict(self.loss)

    @property
    def traits(self) -> list[Traits]:
        return [PAIR_LOSSES[name] for name in self.losses]

    @property
    def refers(self) -> bool:
        """Whether there is a reference model at all."""
        return any(traits.reference for traits in self.traits)

    @property
    def by_token(self) -> bool:
        """Whether what it raises is a mean over tokens, not a sum (SimPO, ORPO); beside a loss with a reference metrics
        are that one's."""
        return not self.refers and any(traits.means for traits in self.traits)

    @property
    def reward_scale(self) -> float:
        """What metrics multiply log-ratios by: nats where no loss has a beta, which is in no key then."""
        return 1.0 if "beta" in self.idle() else self.beta

    def needless(self) -> frozenset[str]:
        """A reference that moves is computed as training gets on."""
        return frozenset(() if self.refers and self.reference_update is None else {"reference"})

    def idle(self) -> frozenset[str]:
        """What none of the losses reads."""
        used = {name for traits in self.traits for name in traits.uses}
        idle = {name for name in COEFFICIENTS if name not in used}
        if not any(traits.scores for traits in self.traits):
            idle |= {"divergence", "divergence_alpha"}
        if self.divergence != "alpha":
            idle.add("divergence_alpha")
        return frozenset(idle)


class Kto(Referenced):
    """Single answers that are wanted or not: KTO (Ethayarajh et al. 2024, arXiv:2402.01306) and APO-zero's unpaired
    form (D'Oosterlinck et al. 2024, arXiv:2408.06266)."""

    task = "unpaired"
    kind: Literal["kto"] = identity()
    loss: Literal["kto", "apo_zero_unpaired"] = identity()
    beta: float = identity(gt=0)
    desirable_weight: float = identity(ge=0)
    undesirable_weight: float = identity(ge=0)

    @property
    def has_reference_point(self) -> bool:
        """Whether it looks at answers to other prompts."""
        return self.loss == "kto"

    def needless(self) -> frozenset[str]:
        """The stage would compute the reference's log-probs of answers to other prompts, too."""
        return frozenset(() if self.has_reference_point else {"reference"})


def meant_by(loss: str) -> str:
    """How what people call so is asked for on the command line, where it is no name of a loss of pairs; else empty."""
    if loss == "dpo":
        return "DPO's own is loss=sigmoid"
    of_single_answers = get_args(Kto.model_fields["loss"].annotation)
    return f"pipeline=kto stage.kto.loss={loss}, on single answers" if loss in of_single_answers else ""


def weighted(key: str, losses: Collection[str]) -> str:
    """How several losses are asked for on the command line; an example if these are not all losses."""
    known = all(name in PAIR_LOSSES for name in losses)
    return f"{key}='{{{', '.join(f'{name}: 1.0' for name in losses)}}}'" if known else SEVERAL
