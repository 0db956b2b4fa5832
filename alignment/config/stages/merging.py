"""The stage that makes one model of two."""

from __future__ import annotations

from typing import ClassVar, Literal

from alignment.config.settings import identity
from alignment.config.stages.base import Stage


class Merge(Stage):
    """Weights between those of two models of one architecture: t is how far from `model` to `other`."""

    makes = "a model"
    inputs: ClassVar[dict[str, str]] = {"model": "a model", "other": "a model"}
    packages = ("torch", "transformers")
    kind: Literal["merge"] = identity()
    method: Literal["linear", "slerp"] = identity()
    t: float = identity(ge=0, le=1)
