"""The comparison of the online update runs, and both sides compute the same losses."""

from __future__ import annotations

import pytest

from bench.online_update import TOLERANCE, Work, measure


@pytest.mark.parametrize("kind", ["grpo", "rloo"])
def test_the_losses_of_all_arms_are_equal(kind: str) -> None:
    found = measure(Work(kind, tokens=6, answers=4, prompts=2, steps=2, size="tiny"), repeats=1)
    assert len(found["arms"]) >= 3 and found["best"].startswith("TRL")
    assert all(max(row["apart"], row["norms"]) < TOLERANCE and row["median"] > 0 for row in found["arms"].values())
