"""A stage that is stopped and goes on ends as one that was not: every bit of it, losses and weights."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from alignment.errors import PreemptedError
from alignment.signals import Listener
from alignment.stages import dpo, sft
from tests.training import tiny

STAGES = {"sft": sft.run, "dpo": dpo.run}
SAME_ALWAYS = ("time", "tokens_per_s")


class After(Listener):
    """Asked to stop once this many ticks were counted by the stage."""

    def __init__(self, context: Any, step: int) -> None:
        super().__init__()
        self._context, self._step = context, step

    @property
    def asked(self) -> str | None:  # type: ignore[override]
        path = self._context.folder / "metrics.jsonl"
        rows = path.read_text().splitlines() if path.exists() else []
        return "SIGTERM" if len(rows) >= self._step else None

    @asked.setter
    def asked(self, value: str | None) -> None:
        pass


def attempt(
    folder: Path, kind: str, stop_after: int | None = None, setup: Any = None, saving: Any = None, **settings: Any
) -> Any:
    inputs = tiny.write_inputs(folder.parent, kind)
    context = tiny.context(folder, inputs, getattr(tiny, kind)(**settings), setup or tiny.engine(), saving=saving)
    context.shared = folder.parent
    if stop_after is not None:
        context.stop = After(context, stop_after)
    return STAGES[kind](context)


def rows(folder: Path) -> list[dict[str, float]]:
    read = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name not in SAME_ALWAYS} for row in read]


def weights(folder: Path) -> str:
    return hashlib.sha256((folder / "model" / "model.safetensors").read_bytes()).hexdigest()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("lora", [None, tiny.LORA], ids=["full", "lora"])
@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_interrupted_is_uninterrupted_bit_for_bit_wherever_it_stops(
    kind: str, lora: Any, precision: str, tmp_path: Path
) -> None:
    how = {"lora": lora, "precision": precision, "max_steps": 8}
    attempt(tmp_path / "whole", kind, **how)
    for stop in (1, 3, 5, 7):
        with pytest.raises(PreemptedError, match="SIGTERM: saved at step"):
            attempt(tmp_path / "parts", kind, stop_after=stop, **how)
    summary = attempt(tmp_path / "parts", kind, **how)
    assert rows(tmp_path / "parts") == rows(tmp_path / "whole")
    assert weights(tmp_path / "parts") == weights(tmp_path / "whole")
    assert summary["steps"] == 8
    assert not (tmp_path / "parts" / "checkpoints").exists()
