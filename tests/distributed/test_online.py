"""Online stages on two ranks: the answers, rewards and losses of one process, and interrupted as not interrupted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from alignment.stages import grpo, online_dpo, ppo, rloo
from alignment.stages import online as online_stage
from tests.distributed.launching import launch, rows_of, weights_of
from tests.distributed.test_resume import bits
from tests.training import online, tiny

pytestmark = pytest.mark.slow

STAGES = {"rloo": rloo, "grpo": grpo, "online_dpo": online_dpo, "ppo": ppo}
REUSED = {"max_steps": 6, "batches_per_rollout": 1, "epochs_per_rollout": 2}
CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "ddp": ("rloo", "ddp", {"max_steps": 4}),
    "zero2": ("rloo", "zero2", {"max_steps": 4}),
    "zero3": ("grpo", "zero3", REUSED),
    "zero3_lora": ("grpo", "zero3", {**REUSED, "lora": True}),
    "offload": ("grpo", "zero3", {"max_steps": 3}),
    "online_dpo": ("online_dpo", "zero2", {"max_steps": 3}),
    "ppo": ("ppo", "zero3", {"max_steps": 4}),
}
NAMES = ("loss", "grad_norm", "reward", "answer_tokens", "kl", "ratio", "mismatch_k3", "entropy")


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("online")
    plan = [
        {
            "name": name,
            "kind": kind,
            "strategy": strategy,
            "settings": settings,
            "engine": {"offload": "all"} if name == "offload" else {},
        }
        for name, (kind, strategy, settings) in CASES.items()
    ]
    parts = next(case for case in plan if case["name"] == "zero3")
    plan.append({**parts, "name": "zero3_parts", "settings": dict(parts["settings"]), "stops": [3, None]})
    launch(folder, 2, plan)
    return folder


@pytest.mark.parametrize("name", CASES)
def test_two_ranks_do_what_one_process_does(
    name: str, together: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind, _, changes = CASES[name]
    monkeypatch.setattr(online_stage, "judge_of", lambda context: online.letters())
    settings = getattr(online, kind)(**{**changes, "lora": tiny.LORA if changes.get("lora") else None})
    setup = tiny.engine(tokens_per_micro_batch=250)
    STAGES[kind].run(tiny.context(tmp_path / "out", online.write_inputs(tmp_path), settings, setup))
    one, two = rows_of(tmp_path / "out"), rows_of(together / name)
    assert len(one) == len(two) == changes["max_steps"]
    for row, other in zip(one, two, strict=True):
        found = {key: other[key] for key in NAMES if key in row}
        assert found == pytest.approx({key: row[key] for key in found}, abs=1e-5, rel=1e-4)
    mine, theirs = weights_of(tmp_path / "out" / "model"), weights_of(together / name / "model")
    for key, value in mine.items():
        torch.testing.assert_close(theirs[key], value, atol=1e-4, rtol=1e-4)


def test_stopped_in_the_middle_of_a_rollout_it_goes_on_bit_for_bit(together: Path) -> None:
    assert bits(together / "zero3_parts") == bits(together / "zero3")
