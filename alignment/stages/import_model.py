"""Start checkpoint -> a plain Hugging Face folder."""

from __future__ import annotations

from typing import Any

from alignment.data.fetch import fetch
from alignment.data.models import STEPS, import_model
from alignment.stages.context import StageContext


def run(context: StageContext) -> dict[str, Any]:
    settings = context.experiment.model
    context.progress(0, STEPS, note="fetching the start checkpoint", force=True)
    with context.busy("fetching the start checkpoint"):
        source = fetch(settings.source)
        adapter = None if settings.adapter is None else fetch(settings.adapter)
    return import_model(source, settings, context.folder / "model", context.progress, context.warn, adapter)
