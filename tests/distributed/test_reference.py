"""Under every engine on two ranks: DPO after the stage that computes its reference's log-probs is DPO without it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.launching import launch

pytestmark = pytest.mark.slow

CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "ddp": ("ddp", {}, {}),
    "zero1": ("zero1", {}, {}),
    "zero2_bf16": ("zero2", {"precision": "bf16"}, {}),
    "zero3_lora": ("zero3", {"lora": True}, {}),
    "zero3_offload": ("zero3", {}, {"offload": "all"}),
}


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Each DPO twice: after the stage, and where nothing is shared with it."""
    folder, plan = tmp_path_factory.mktemp("references"), []
    for name, (strategy, settings, engine) in CASES.items():
        of_reference = {key: value for key, value in settings.items() if key != "lora"}
        for kind, shared, given in (
            ("reference", f"shared_{name}", of_reference),
            ("dpo", f"shared_{name}", settings),
            ("dpo", f"own_{name}", settings),
        ):
            case = {"name": f"{kind}_{shared}", "kind": kind, "strategy": strategy, "shared": shared}
            plan.append({**case, "settings": {**given, "max_steps": 3}, "engine": dict(engine)})
    launch(folder, 2, plan)
    return folder


def told(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "summary.json").read_text()))


def losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("name", CASES)
def test_dpo_after_the_stage_is_dpo_without_it_bit_for_bit(name: str, together: Path) -> None:
    before = told(together / f"reference_shared_{name}")
    assert [before[what] for what in ("rows", "found", "computed")] == [18, 0, 18]
    assert before["dtype"] == ("bf16-weights" if "bf16" in name else "fp32")
    after, alone = together / f"dpo_shared_{name}", together / f"dpo_own_{name}"
    assert [told(folder)["reference_computed"] for folder in (after, alone)] == [0, 18]
    assert losses(after) == losses(alone)
    assert (after / "model" / "model.safetensors").read_bytes() == (alone / "model" / "model.safetensors").read_bytes()
