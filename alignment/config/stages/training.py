"""Stages that train, and the one that computes what training compares itself with."""

from __future__ import annotations

from typing import Any, ClassVar, Literal, Self

from pydantic import field_validator, model_validator
from pydantic_core import PydanticCustomError

from alignment.config.settings import Settings, execution, identity
from alignment.config.stages.base import Stage

# Initialisations of PEFT that do not start at the model itself: name -> why not.
REFUSED_INIT = {
    "pissa": "moves a part of the weights into the adapter: with it off the model is not the start model",
    "olora": "moves a part of the weights into the adapter: with it off the model is not the start model",
    "corda": "moves a part of the weights into the adapter, and looks at other data for it",
    "lora_ga": "moves a part of the weights into the adapter, and looks at other data for it",
    "loftq": "puts quantised weights in the place of the start model's",
    "eva": "looks at other data before it begins",
    "mica": "trains A alone, which is another method",
}


class Lora(Settings):
    """Low-rank adapters (Hu et al. 2021, arXiv:2106.09685): W + (alpha / rank) B A.

    rslora: alpha / sqrt(rank) in the place of alpha / rank (Kalajdzievski 2023, arXiv:2312.03732). dora: the length of
    each row of W + s B A is trained by itself (Liu et al. 2024, arXiv:2402.09353, equation 5). init: of A and B; B A is
    zero before the first update. modules_to_save: names of modules that are trained whole. quantize: what W is kept
    as while adapters are trained (QLoRA: Dettmers et al. 2023, arXiv:2305.14314), with its constants quantised too.

    Values of its own, those of conf/stage/, for who turns adapters on where they were null: lora={rank: 16}.
    """

    rank: int = identity(default=8, gt=0)
    alpha: float = identity(default=16.0, gt=0)
    dropout: float = identity(default=0.0)
    target_modules: str | list[str] = identity(default="all-linear")
    rslora: bool = identity(default=False)
    dora: bool = identity(default=False)
    init: Literal["kaiming", "gaussian", "orthogonal"] = identity(default="kaiming")
    modules_to_save: list[str] = identity(default=[])
    quantize: Literal["nf4"] | None = identity(default=None)

    @field_validator("dropout")
    @classmethod
    def _is_off(cls, value: float) -> float:
        """Recipes name the key, so it is known here; but random masks would make a result depend on the engine."""
        if value != 0:
            fix = "its masks would make results depend on micro-batches and processes; DPO's reference has none"
            raise PydanticCustomError("dropout", "must be 0.0", {"fix": fix})
        return value

    @field_validator("init", mode="before")
    @classmethod
    def _starts_at_the_model(cls, value: Any) -> Any:
        """With its adapter off the model is the reference, and with it on too before the first update."""
        if why := REFUSED_INIT.get(str(value).split("_niter_")[0]):
            raise PydanticCustomError("init", "must be kaiming, gaussian or orthogonal", {"fix": f"{value} {why}"})
        return value

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.init == "orthogonal" and self.rank % 2:
            fix = "raise the rank by one, or init=kaiming"
            raise PydanticCustomError("odd", "has init orthogonal, which needs an even rank", {"fix": fix})
        named = {self.target_modules} if isinstance(self.target_modules, str) else set(self.target_modules)
        if both := sorted(named & set(self.modules_to_save)):
            what = "names {name} in both target_modules and modules_to_save"
            raise PydanticCustomError("twice", what, {"name": both[0], "fix": "an adapter on it, or all of it"})
        return self

    def idle(self) -> frozenset[str]:
        """Variants that are off."""
        off = {"rslora": False, "dora": False, "init": "kaiming", "modules_to_save": [], "quantize": None}
        return frozenset(name for name, value in off.items() if getattr(self, name) == value)


class Train(Stage):
    """task: of the rows that are trained on."""

    makes = "a model"
    inputs: ClassVar[dict[str, str]] = {"model": "a model", "data": "rows"}
    task: ClassVar[str]
    distributed = True
    packages: ClassVar[tuple[str, ...]] = (
        "torch", "transformers", "trl", "peft", "accelerate", "deepspeed", "numpy", "bitsandbytes",
    )  # fmt: skip
    global_batch_size: int = identity(gt=0)
    epochs: float = identity(gt=0)
    max_steps: int | None = identity(gt=0)
    learning_rate: float = identity(gt=0, lt=1)
    schedule: Literal["constant", "linear", "cosine"] = identity()
    warmup_ratio: float = identity(ge=0, le=1)
    weight_decay: float = identity(ge=0)
    adam_beta1: float = identity(ge=0, lt=1)
    adam_beta2: float = identity(ge=0, lt=1)
    adam_epsilon: float = identity(gt=0)
    max_grad_norm: float = identity(gt=0)
    precision: Literal["fp32", "bf16"] = identity()
    lora: Lora | None = identity()
    nonfinite: Literal["halt", "skip", "rollback"] = identity()
    max_nonfinite: int = identity(ge=1)
    seed: int = identity(ge=0)
    log_every: int = execution(gt=0)
    spike_alarm: float | None = execution(gt=0)


class Sft(Train):
    """Supervised fine-tuning: cross-entropy on the assistant's tokens."""

    task = "sft"
    kind: Literal["sft"] = identity()


class Reference(Stage):
    """Log-probs of DPO's reference, its start model, of the pairs that such a DPO sees: kept for whoever needs them."""

    makes = "log-probs"
    inputs: ClassVar[dict[str, str]] = {"model": "a model", "data": "rows"}
    distributed = True
    packages = ("torch", "transformers")
    kind: Literal["reference"] = identity()
    precision: Literal["fp32", "bf16"] = identity()
    global_batch_size: int = identity(gt=0)
    epochs: float = identity(gt=0)
    max_steps: int | None = identity(gt=0)
    seed: int = identity(ge=0)

    def sees_all(self) -> bool:
        return self.max_steps is None and self.epochs >= 1

    def idle(self) -> frozenset[str]:
        """Where all pairs are seen it does not matter when."""
        return frozenset({"global_batch_size", "epochs", "seed"} if self.sees_all() else ())
