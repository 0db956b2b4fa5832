"""The parents' models -> the model between them."""

from __future__ import annotations

from typing import Any

from alignment.config.stages.merging import Merge
from alignment.stages.context import StageContext
from alignment.training.merging import merge


def run(context: StageContext) -> dict[str, Any]:
    settings: Merge = context.settings
    context.progress(0, 1, note="comparing the two models", force=True)
    one, other = (context.inputs[role] / "model" for role in ("model", "other"))
    return dict(merge(one, other, context.folder / "model", settings.method, settings.t, context.progress))
