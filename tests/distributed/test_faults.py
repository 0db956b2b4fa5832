"""What goes wrong on one of two ranks is known to both, before it does harm."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.launching import STRATEGIES, launch, rows_of, weights_of
from tests.distributed.test_resume import bits, case

pytestmark = pytest.mark.slow

TOLERANCE = 1e-5
WHERE = ("loss", "gradient")


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("faults")
    plan = []
    for strategy in STRATEGIES:
        for where in WHERE:
            poison = {"where": where, "steps": [3], "rank": 1}
            halt = case(f"halt_{strategy}_{where}", "dpo", strategy, saving={"every_steps": 1})
            plan.append({**halt, "poison": poison, "fails": True})
            skip = case(f"skip_{strategy}_{where}", "dpo", strategy, settings={"nonfinite": "skip"})
            plan.append({**skip, "poison": poison})
    skip = case("skip_bf16", "dpo", "zero2", settings={"nonfinite": "skip", "precision": "bf16"})
    plan.append({**skip, "poison": {"where": "gradient", "steps": [3], "rank": 1}})
    for kind in ("kto", "sft"):  # and of processes that share sequences
        halt = case(f"halt_{kind}", kind, "zero3", engine={} if kind == "kto" else {"sequence_parallel": 2})
        plan.append({**halt, "poison": {"where": "loss", "steps": [3], "rank": 1}, "fails": True})
    plan.append(case("whole", "sft", "zero3"))
    full = case("full", "sft", "zero3", saving={"every_steps": 1, "asynchronous": False})
    plan.append({**full, "no_room": {"rank": 1, "steps": [2, 3, 5]}})
    fuller = case("fuller", "sft", "zero2", saving={"every_steps": 1, "asynchronous": False})
    plan.append({**fuller, "no_room": {"rank": 1, "steps": [2, 3, 4, 5]}, "fails": True})
    launch(folder, 2, plan)
    return folder


def warnings(folder: Path) -> list[str]:
    return (folder / "warnings.txt").read_text().splitlines()


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_nan_on_one_rank_halts_both_before_the_update(strategy: str, where: str, together: Path) -> None:
    folder = together / f"halt_{strategy}_{where}"
    one, other = ((folder / f"error-{rank}.txt").read_text() for rank in range(2))
    assert one == other
    assert re.match(
        r"step 3, rows? [\d, ]+ of the training split, from 0: the (loss|gradient's norm) is (nan|inf)", one
    )
    assert [row["step"] for row in rows_of(folder)] == [1, 2]


@pytest.mark.parametrize("kind", ["kto", "sft"])
def test_whoever_trains_halts(kind: str, together: Path) -> None:
    one, other = ((together / f"halt_{kind}" / f"error-{rank}.txt").read_text() for rank in range(2))
    assert one == other and one.startswith("step 3, row")


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_skipped_step_is_skipped_alike_under_every_engine(strategy: str, where: str, together: Path) -> None:
    reference, folder = together / "skip_ddp_loss", together / f"skip_{strategy}_{where}"
    for one, other in zip(rows_of(reference), rows_of(folder), strict=True):
        if one["step"] != 3:
            assert other["loss"] == pytest.approx(one["loss"], abs=TOLERANCE)
        assert other["learning_rate"] == one["learning_rate"]
    theirs = weights_of(folder / "model")
    for name, value in weights_of(reference / "model").items():
        assert (theirs[name] - value).abs().max() < TOLERANCE, name
    assert any("its update is skipped" in line for line in warnings(folder))


def test_in_bf16_too(together: Path) -> None:
    rows: list[dict[str, Any]] = rows_of(together / "skip_bf16")
    assert [row["step"] for row in rows] == list(range(1, 9))
    assert rows[-1]["skipped_steps"] == 1
    assert all(value.isfinite().all() for value in weights_of(together / "skip_bf16" / "model").values())


def test_a_part_that_one_rank_cannot_write_costs_the_checkpoint_and_nothing_else(together: Path) -> None:
    told = warnings(together / "full")
    assert [re.search(r"of step (\d) could not be written", line)[1] for line in told] == ["2", "3", "5"]  # type: ignore[index]
    assert "the newest whole one is of step 1: " in told[0] and "(rank 1)" in told[0]
    assert bits(together / "full") == bits(together / "whole")


def test_too_many_in_a_row_end_both(together: Path) -> None:
    one, other = ((together / "fuller" / f"error-{rank}.txt").read_text() for rank in range(2))
    assert one == other
    assert "3 saves in a row failed: " in one
    assert sorted(path.name for path in (together / "fuller" / "checkpoints").iterdir()) == ["step-00000001"]
