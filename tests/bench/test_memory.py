"""The estimate of a process's memory against what the kernel counts, on two of the configurations of bench.memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from bench import memory

SMALL: dict[str, Any] = {"model": "llama 17M", "tokens": 512}


@pytest.mark.slow
@pytest.mark.parametrize("case", [{"stage": "sft", **SMALL}, {"stage": "dpo", **SMALL}], ids=["sft", "dpo"])
def test_the_peak_of_a_process_is_predicted_within_15_percent(case: dict[str, Any], tmp_path: Path) -> None:
    measured = max(found["peak"] for found in memory.measure(case, tmp_path))
    predicted = memory.predict(case, tmp_path).parts.total
    assert predicted == pytest.approx(measured, rel=0.15)
