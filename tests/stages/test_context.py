"""What a stage says of how far it is."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from alignment.pipeline.store import ROLLOUTS
from alignment.stages import context as module
from alignment.stages.context import LONGEST, StageContext
from tests.conftest import fill
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


def test_what_is_being_done_is_said_at_most_five_times_a_second_unless_it_is_forced(
    stage: StageContext, clock: list[float]
) -> None:
    noted = lambda: json.loads((stage.folder / "progress.json").read_text())["note"]  # noqa: E731
    stage.note("sampling 1/9", force=False)
    stage.note("sampling 2/9", force=False)
    assert noted() == "sampling 1/9" and stage.got_on()[1] == 2, "each is a sign of life"
    clock[0] += 0.3
    stage.note("sampling 3/9", force=False)
    assert noted() == "sampling 3/9"
    stage.note("writing the model")
    assert noted() == "writing the model"


def test_rows_that_a_full_disk_refuses_wait_and_come_whole_and_in_order(small_disk: Path) -> None:
    """Pages that are there already may take some rows; none is torn, none is lost, and the stage does not notice."""
    context = tiny.context(small_disk, {}, tiny.sft(), tiny.engine())
    told: list[str] = []
    context.warn = told.append  # type: ignore[method-assign]
    context.log(1, {"loss": 1.0})
    fill(small_disk)
    for step in range(2, 200):
        context.log(step, {"loss": 1 / step})
        context.progress(step, 200, force=True)
    assert len([line for line in told if "wait in memory: No space left" in line]) == 1
    text = (small_disk / "metrics.jsonl").read_text()
    assert text.endswith("\n")
    with pytest.raises(OSError):
        context.flush()
    (small_disk / "filler").unlink()
    context.flush()
    rows = [json.loads(line) for line in (small_disk / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, 200))


def test_rewinding_forgets_later_rows_and_a_torn_one(tmp_path: Path) -> None:
    context = tiny.context(tmp_path, {}, tiny.sft(), tiny.engine())
    for step in (1, 2, 3, 4):
        context.log(step, {"loss": 1.0})
    with open(tmp_path / "metrics.jsonl", "a") as stream:
        stream.write('{"step": 2, "lo')
    context.rewind(2)
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [1, 2]
    context.rewind(0)
    assert (tmp_path / "metrics.jsonl").read_text() == ""


def test_rows_of_answers_are_rewound_too_whatever_is_written_in_them(tmp_path: Path) -> None:
    context = tiny.context(tmp_path, {}, tiny.sft(), tiny.engine())
    for step in (1, 3):
        context.write_row(ROLLOUTS, {"step": step, "text": "a\u2028b\x85c\r\nd\x0b"})
    context.rewind(2)
    (row,) = (tmp_path / ROLLOUTS).read_text().split("\n")[:-1]
    assert json.loads(row) == {"step": 1, "text": "a\u2028b\x85c\r\nd\x0b"}


def test_a_value_that_is_no_number_is_left_out_of_its_row(stage: StageContext) -> None:
    stage.log(1, {"loss": math.nan, "entropy": math.inf, "tokens": 3.0})
    (row,) = (stage.folder / "metrics.jsonl").read_text().splitlines()
    assert set(json.loads(row)) == {"step", "time", "tokens"}


def test_one_long_operation_counts_as_getting_on_for_as_long_as_it_may_take(
    stage: StageContext, clock: list[float]
) -> None:
    stage.progress(3, 10)
    still = stage.got_on()
    assert stage.got_on() == still
    with stage.busy("writing the model"):
        seen = [stage.got_on(), stage.got_on()]
        assert still < seen[0] < seen[1]
        assert json.loads((stage.folder / "progress.json").read_text())["note"] == "writing the model"
        clock[0] += LONGEST + 1
        assert stage.got_on() == stage.got_on(), "nothing takes for ever"
    assert stage.got_on() == stage.got_on()


def test_what_an_attempt_tells_the_next_one_adds_up(stage: StageContext) -> None:
    assert stage.told() == {}
    stage.tell_next(tokens_per_micro_batch=512)
    stage.tell_next(rolled_back=[3])
    stage.tell_next(tokens_per_micro_batch=256)
    assert stage.told() == {"tokens_per_micro_batch": 256, "rolled_back": [3]}
