"""Several processes: engines that differ, hangs, empty tensors, other world sizes; docs/pains.md, 10, 16 to 18 and 22.

The stock half is DeepSpeed and accelerate on two processes over gloo, whose group has a patience of two seconds where
the default is half an hour.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from alignment.config.compose import compose
from alignment.config.schema import STAGES
from alignment.errors import LostError
from tests.distributed.launching import launch, rows_of, weights_of
from tests.distributed.test_resume import case
from tests.pains import ranks
from tests.pipeline.test_supervisor import World

pytestmark = pytest.mark.slow
ENGINES = ("ddp", "zero1", "zero2", "zero3")
SHORT = {"settings": {"max_steps": 4}}
TOLERANCE = 1e-5
TIMEOUT = re.compile("timed out|timeout", re.IGNORECASE)  # gloo's words differ by who notices


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("stock")
    return {**ranks.start(ranks.two, folder, 2)[0], "alone": ranks.start(ranks.alone, folder, 1)[0]}


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Under each engine on two processes; one of them is asked to stop after two steps, and goes on on one."""
    folder = tmp_path_factory.mktemp("ours")
    saving = {"every_steps": 1}
    plan = [case(strategy, "sft", strategy, saving=saving, **SHORT) for strategy in ENGINES]
    launch(folder, 2, [*plan, case("travels", "sft", "zero2", [2], **SHORT)])
    launch(folder, 1, [case("travels", "sft", "single", **SHORT), case("single", "sft", "single", **SHORT)])
    return folder


def losses(folder: Path) -> list[float]:
    return [row["loss"] for row in rows_of(folder)]


def test_deepspeed_7697_zero_stage_changes_results(stock: dict[str, Any], ours: Path) -> None:
    """DeepSpeed's stages agree in fp32 by now; in bf16 ZeRO-0 differs from the others."""
    without, with_zero = stock["alone"]["losses"]["0"], stock["alone"]["losses"]["2"]
    assert max(abs(one - other) for one, other in zip(without, with_zero, strict=True)) > 1e-4

    for engine in ENGINES:
        assert losses(ours / engine) == pytest.approx(losses(ours / "single"), abs=TOLERANCE), engine
        for name, value in weights_of(ours / "single" / "model").items():
            assert (weights_of(ours / engine / "model")[name] - value).abs().max() <= TOLERANCE, (engine, name)


def test_trl_1584_hang_on_save(tmp_path: Path, stock: dict[str, Any], ours: Path) -> None:
    """Weights that are gathered by the process that saves, and by no other."""
    assert TIMEOUT.search(stock["error"]) and stock["seconds"] >= ranks.PATIENCE.total_seconds()

    assert list((ours / "zero3").glob("checkpoints/step-*/manifest.json")), "saved at every step, by all"
    assert (ours / "zero3" / "model" / "model.safetensors").exists()
    hung = World(tmp_path, watchdog_s=30.0)  # should one stand still all the same
    hung.each = lambda: (hung.beat(0, ticks=min(50, int(hung.now))), hung.beat(1) if hung.now < 50 else None)
    assert hung.watched.watch() < 0 and hung.killed_at == pytest.approx(80, abs=3)
    assert isinstance(hung.watched.fault, LostError) and "rank 1 has shown no life for 30 s" in str(hung.watched.fault)


def test_openrlhf_839_saved_tensors_of_size_0(stock: dict[str, Any], ours: Path) -> None:
    assert stock["sizes"] and set(stock["sizes"]) == {0}, "a model file is there, all of its tensors are empty"

    start, trained = (weights_of(folder / "model") for folder in (ours / "start", ours / "zero3"))
    assert {name: value.shape for name, value in trained.items()} == {name: one.shape for name, one in start.items()}
    assert json.loads((ours / "zero3" / "summary.json").read_text())["empty_parameters"] > 0, "though sharded"


def test_deepspeed_2898_world_size_changed(stock: dict[str, Any], ours: Path) -> None:
    assert "used a DP world size of 2 but the current world size is 1" in stock["alone"]["error"]

    assert [row["step"] for row in rows_of(ours / "travels")] == [1, 2, 3, 4]
    assert losses(ours / "travels") == pytest.approx(losses(ours / "single"), abs=TOLERANCE)
    for name, value in weights_of(ours / "single" / "model").items():
        assert (weights_of(ours / "travels" / "model")[name] - value).abs().max() <= TOLERANCE, name


def test_trl_4578_barrier_times_out_while_one_tokenises(tmp_path: Path, ours: Path) -> None:
    waiting = ranks.start(ranks.tokenised_by_one, tmp_path, 2)[1]
    assert TIMEOUT.search(waiting)

    launcher = compose(["launcher=torchrun", "launcher.processes=2", "engine=ddp"]).launcher
    layouts = [launcher.layout(name, distributed=STAGES[name].distributed) for name in ("prepare", "sft")]
    assert layouts == [(1, 1), (1, 2)], "rows are tokenised by one process, before there is a group"
    assert all((ours / name / "summary.json").exists() for name in ENGINES), "those that train only open what it wrote"
