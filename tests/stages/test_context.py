"""What a stage says of how far it is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from alignment.stages import context as module
from alignment.stages.context import StageContext
from tests.training import tiny


@pytest.fixture
def stage(tmp_path: Path) -> StageContext:
    return tiny.context(tmp_path, {}, tiny.dpo(), tiny.engine())


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Its only number is the time in seconds."""
    now = [1000.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    return now


def told(stage: StageContext, clock: list[float], at: float, step: int, total: int, note: str = "") -> float | None:
    clock[0] = at
    stage.progress(step, total, note=note)
    left: float | None = json.loads((stage.folder / "progress.json").read_text())["left_s"]
    return left


@pytest.mark.parametrize("steps", [10, 40])
def test_the_time_left_of_training_is_not_reckoned_from_the_reference_pass(
    steps: int, stage: StageContext, clock: list[float]
) -> None:
    """40 pairs in 100 s, then steps of 2 s; also where there are as many steps as there were pairs."""
    told(stage, clock, 1001, 0, 0, "loading the model")
    assert told(stage, clock, 1010, 4, 40, "reference log-probs") is None
    assert told(stage, clock, 1020, 8, 40, "reference log-probs") == pytest.approx(80)
    assert told(stage, clock, 1100, 40, 40, "reference log-probs") == 0
    assert told(stage, clock, 1102, 1, steps) is None, "nothing is known of a step yet"
    assert told(stage, clock, 1104, 2, steps) == pytest.approx(2 * (steps - 2))
    assert told(stage, clock, 1110, 5, steps) == pytest.approx(2 * (steps - 5))


def test_parts_of_one_count_are_reckoned_together(stage: StageContext, clock: list[float]) -> None:
    """As evaluate does, whose parts have shares of one total."""
    told(stage, clock, 1000, 0, 1000, "answering")
    told(stage, clock, 1060, 600, 1000, "answering")
    assert told(stage, clock, 1070, 700, 1000, "held-out loss") == pytest.approx(30)


def test_calls_that_are_not_shown_count(stage: StageContext, clock: list[float]) -> None:
    told(stage, clock, 1000, 40, 40)
    told(stage, clock, 1000.1, 1, 10)
    told(stage, clock, 1000.3, 2, 10)
    assert told(stage, clock, 1001.1, 6, 10) == pytest.approx(0.8)
