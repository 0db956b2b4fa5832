"""The page of estimates quotes what was measured, and what was measured in the CPU's seconds keeps to the goal."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench.pages import markers
from bench.time_estimate import CASES, GOAL, summed, table

DOCS = Path(__file__).parents[2] / "docs"
TOLD = json.loads((DOCS / "time_estimate.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("by", ["cpu", "clock"])
def test_the_pages_tables_are_those_of_the_measurement(by: str) -> None:
    page = (DOCS / "estimate.md").read_text(encoding="utf-8")
    begin, end = markers(f"time-{by}")
    assert page.partition(begin)[2].partition(end)[0].strip() == table(TOLD[by]["cases"])


def test_estimates_after_a_calibration_keep_to_the_goal_for_six_cases_or_more() -> None:
    cases = TOLD["cpu"]["cases"]
    assert len(cases) >= 6 and {case["kind"] for case in cases} == {"sft", "dpo", "kto"}
    assert {case["size"] for case in cases} == {"S", "M"} and min(case["steps"] for case in cases) >= 20
    assert all(abs(error) <= GOAL for case in cases for error in case["errors"])


def test_medians_of_repeats_are_what_is_told() -> None:
    plain = {"by_figures_s": 1.0, "calibrated_s": 2.0, "steps": 20, "tokens": 100.0, "operations": 1e9}
    told = summed(CASES[0], [{**plain, "taken_s": taken} for taken in (1.0, 2.0, 4.0)])
    assert told["errors"] == [1.0, 0.0, -0.5] and (told["error"], told["error_by_figures"]) == (0.0, -0.5)
