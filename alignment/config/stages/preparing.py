"""Stages that bring in a model and rows."""

from __future__ import annotations

from typing import ClassVar, Literal

from alignment.config.settings import Settings, execution, identity
from alignment.config.stages.base import Reads, Stage

# What rows of a task are prepared from; pairs are taken apart for unpaired ones.
FORMATS = {
    "sft": ("messages", "sharegpt", "alpaca", "prompt_completion", "text"),
    "preference": ("preference", "scored_list"),
    "unpaired": ("unpaired", "preference"),
    "scored": ("scored", "scored_list"),
}


class ImportModel(Stage):
    """Start checkpoint -> a plain Hugging Face folder with the run's chat template."""

    makes = "a model"
    groups = ("model",)
    packages = ("torch", "transformers", "tokenizers", "gguf", "peft")
    kind: Literal["import_model"] = identity()


class Splits(Settings):
    """Rows of each split, disjoint, taken in this order after a shuffle; null takes all that is left."""

    heldout: int = identity(ge=0)
    prompts: int = identity(ge=0)
    train: int | None = identity(ge=1)


class Prepare(Stage):
    """Rows of a data set or of a parent -> checked, split, tokenised rows and a report of what was dropped and why.

    against: data sets whose prompts models are evaluated on; what contains one is not trained on.
    """

    makes = "rows"
    inputs: ClassVar[dict[str, str]] = {"model": "a model"}
    optional_inputs: ClassVar[dict[str, str]] = {"data": "pairs", "heldout": "rows"}
    reads: ClassVar[Reads] = {"heldout": "heldout"}
    groups = ("data", "checks")
    packages = ("transformers", "tokenizers", "datasets", "rensa", "regex")  # the last two: what is near what
    kind: Literal["prepare"] = identity()
    task: Literal["sft", "preference", "unpaired", "scored"] = identity()
    dataset: str | list[str] | None = identity()
    against: list[str] = identity()
    max_length: int = identity(gt=0)
    max_prompt_length: int = identity(gt=0)
    over_long: Literal["drop", "error", "truncate_prompt"] = identity()
    splits: Splits = identity()
    seed: int = identity(ge=0)
    workers: int | None = execution(gt=0)

    @property
    def datasets(self) -> list[str]:
        """Names of the data sets whose rows are prepared together; none: the parent's rows."""
        return [self.dataset] if isinstance(self.dataset, str) else list(self.dataset or ())

    @property
    def read(self) -> list[str]:
        """Names of all data sets that the stage reads."""
        return [*self.datasets, *self.against]
