"""The estimate of a process's memory against what the kernel counts, on two of the configurations of bench.memory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bench import memory

SMALL: dict[str, Any] = {"model": "llama 17M", "tokens": 512}


@pytest.mark.slow
@pytest.mark.parametrize("case", [{"stage": "sft", **SMALL}, {"stage": "dpo", **SMALL}], ids=["sft", "dpo"])
def test_the_peak_of_a_process_is_predicted_within_15_percent(case: dict[str, Any], tmp_path: Path) -> None:
    measured = memory.peak(case, tmp_path)
    predicted = memory.predict(case, tmp_path).parts.total
    assert predicted == pytest.approx(measured, rel=0.15)


def test_the_page_has_what_was_measured_and_all_of_it_is_within_15_percent() -> None:
    kept = json.loads(memory.OUT.read_text())
    assert len(kept) >= 12
    assert memory.table(kept) in memory.PAGE.read_text(), "python -m bench.memory --predict --write"
    for name, found in kept.items():
        assert found["predicted"] == pytest.approx(found["measured"], rel=0.15), name


def test_what_is_kept_is_what_is_estimated_now(tmp_path: Path) -> None:
    kept = json.loads(memory.OUT.read_text())
    for case in memory.CASES[:2]:
        memory.write_rows(tmp_path / "inputs" / case["stage"], case["stage"])
        assert memory.predict(case, tmp_path).parts._asdict() == kept[memory.name_of(case)]["parts"]
