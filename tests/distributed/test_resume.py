"""Interrupted equals uninterrupted on several ranks: bit for bit on as many, to 1e-5 on others and other engines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.distributed.test_engines_agree import FOUR_RANKS, STRATEGIES, TORCHRUN, launch, rows_of, weights_of

pytestmark = pytest.mark.slow

KINDS = ("sft", "dpo")
STOPS = [2, 3, None]  # of 8 steps: after the 2nd, after the 5th, then to the end
TOLERANCE = 1e-5
TIMES = {"time", "tokens_per_s"}
SETTINGS = {"max_steps": 8}


def case(name: str, kind: str, strategy: str, stops: Any = (None,), **more: Any) -> dict[str, Any]:
    settings, engine = {**SETTINGS, **more.get("settings", {})}, more.get("engine", {})
    return {
        "name": name, "kind": kind, "strategy": strategy, "settings": settings, "engine": engine, "stops": list(stops),
        "saving": more.get("saving", {}),
    }  # fmt: skip


def bits(folder: Path) -> tuple[Any, bytes]:
    rows = [{name: value for name, value in row.items() if name not in TIMES} for row in rows_of(folder)]
    return rows, (folder / "model" / "model.safetensors").read_bytes()


VARIANTS: dict[str, dict[str, Any]] = {
    **{strategy: {"strategy": strategy} for strategy in STRATEGIES},
    "zero3_bf16": {"strategy": "zero3", "settings": {"precision": "bf16"}},
    "zero2_bf16": {"strategy": "zero2", "settings": {"precision": "bf16"}},
    "zero3_lora": {"strategy": "zero3", "settings": {"lora": True}},
    "zero2_offload": {"strategy": "zero2", "engine": {"offload": "optimizer"}},
    "zero3_persistent": {"strategy": "zero3", "engine": {"param_persistence_threshold": 100_000}},
    "ddp_logged_seldom": {"strategy": "ddp", "settings": {"log_every": 3}},
}


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("resumed")
    plan = []
    for kind in KINDS:
        for name, variant in VARIANTS.items():
            plan.append(case(f"{kind}_{name}_whole", kind, **variant))
            plan.append(case(f"{kind}_{name}_parts", kind, **variant, stops=STOPS))
    launch(folder, TORCHRUN, plan)
    return folder


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kind", KINDS)
def test_on_as_many_ranks_it_is_the_same_bit_for_bit(kind: str, variant: str, together: Path) -> None:
    whole, parts = (bits(together / f"{kind}_{variant}_{arm}") for arm in ("whole", "parts"))
    assert parts[0] == whole[0]
    assert parts[1] == whole[1]


def test_four_ranks_too(tmp_path: Path) -> None:
    """Where the order of a sum of more than two depends on how gradients lie in buckets."""
    arms = {"whole": (None,), "parts": STOPS}
    plan = [
        case(f"{strategy}_{arm}", "sft", strategy, stops)
        for strategy in ("ddp", "zero3")
        for arm, stops in arms.items()
    ]
    launch(tmp_path, FOUR_RANKS, plan)
    for strategy in ("ddp", "zero3"):
        assert bits(tmp_path / f"{strategy}_parts") == bits(tmp_path / f"{strategy}_whole"), strategy


ALONE = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=1")
JOURNEYS = {
    "zero2": [(FOUR_RANKS, "zero2", 2), (TORCHRUN, "zero2", 2), (ALONE, "zero2", 2), (TORCHRUN, "zero2", None)],
    "engines": [(TORCHRUN, "zero3", 2), (TORCHRUN, "zero1", 2), (ALONE, "single", 2), (TORCHRUN, "ddp", None)],
}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("uninterrupted")
    launch(folder, ALONE, [case(kind, kind, "single", settings={"log_every": 3}) for kind in KINDS])
    return folder


@pytest.mark.parametrize("journey", JOURNEYS)
def test_on_other_numbers_of_ranks_and_engines_it_is_the_same_to_rounding(
    journey: str, uninterrupted: Path, tmp_path: Path
) -> None:
    for launcher, strategy, stop in JOURNEYS[journey]:
        launch(tmp_path, launcher, [case(kind, kind, strategy, [stop], settings={"log_every": 3}) for kind in KINDS])
    for kind in KINDS:
        whole, parts = rows_of(uninterrupted / kind), rows_of(tmp_path / kind)
        assert [row["step"] for row in parts] == [row["step"] for row in whole] == [3, 6, 8]
        for one, other in zip(whole, parts, strict=True):
            for name in set(one) - TIMES:
                assert other[name] == pytest.approx(one[name], abs=TOLERANCE, rel=TOLERANCE), (name, one["step"])
        resumed = weights_of(tmp_path / kind / "model")
        for name, value in weights_of(uninterrupted / kind / "model").items():
            assert (resumed[name] - value).abs().max() < TOLERANCE, name
