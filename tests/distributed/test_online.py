"""Online stages on two ranks: the answers, rewards and losses of one process, and interrupted as not interrupted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from alignment.pipeline.store import ROLLOUTS
from alignment.stages import grpo, online_dpo, ppo, rloo
from alignment.stages import online as online_stage
from tests.distributed.launching import STRATEGIES, launch, rows_of, weights_of
from tests.distributed.test_resume import bits
from tests.training import online, tiny

pytestmark = pytest.mark.slow

STAGES = {"rloo": rloo, "grpo": grpo, "online_dpo": online_dpo, "ppo": ppo}
REUSED = {"max_steps": 4, "batches_per_rollout": 1, "epochs_per_rollout": 2}
OF_KIND: dict[str, dict[str, Any]] = {
    "rloo": {"max_steps": 3}, "grpo": REUSED, "online_dpo": {"max_steps": 3}, "ppo": {"max_steps": 4},
}  # fmt: skip
DYNAMIC = {
    "resamples": 2, "completions_per_prompt": 2,
    "kl": {"coefficient": 0.05, "estimator": "k3", "place": "loss", "target": 0.1, "gain": 0.1, "corrected": True},
}  # fmt: skip
JUDGE = "reward_model"
CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "judged": ("rloo", "zero3", {"max_steps": 2}),
    **{f"{kind}_{strategy}": (kind, strategy, of_kind) for strategy in STRATEGIES for kind, of_kind in OF_KIND.items()},
    "grpo_zero3_lora": ("grpo", "zero3", {**REUSED, "lora": True}),
    "grpo_zero3_offload": ("grpo", "zero3", REUSED),
    "ppo_zero3_offload": ("ppo", "zero3", OF_KIND["ppo"]),
    # Prompts without signal are replaced, at times fewer than there are processes; the coefficient follows its target.
    **{f"grpo_{strategy}_dynamic": ("grpo", strategy, {**REUSED, **DYNAMIC}) for strategy in ("zero2", "zero3")},
}
STOPS = {"rloo": 1, "grpo": 3, "online_dpo": 1, "ppo": 3}  # between two rollouts, or in the midst of the second one
RESUMED = {f"{kind}_{strategy}": [stop, None] for kind, stop in STOPS.items() for strategy in ("zero2", "zero3")}
RESUMED["grpo_zero2_dynamic"] = [3, None]
NAMES = ("loss", "grad_norm", "reward", "answer_tokens", "kl", "ratio", "mismatch_k3", "entropy", "value", "value_loss")


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("online")
    plan = [{"name": JUDGE, "kind": "reward_model", "strategy": "ddp", "settings": {"max_steps": 4}, "engine": {}}]
    for name, (kind, strategy, settings) in CASES.items():
        case: dict[str, Any] = {"name": name, "kind": kind, "strategy": strategy}
        if name == "judged":
            case[JUDGE] = JUDGE
        for arm, stops in (("", [None]), ("_parts", RESUMED.get(name))):
            if stops:
                engine = {"offload": "all"} if "offload" in name else {}
                plan.append({**case, "name": name + arm, "stops": stops, "settings": dict(settings), "engine": engine})
    launch(folder, 2, plan)
    return folder


@pytest.fixture(scope="module")
def alone(together: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(kind, changes, the judge if it is a model) -> the folder of the stage in this process, which runs once."""
    folder, done = tmp_path_factory.mktemp("alone"), {}
    inputs = online.write_inputs(folder)

    def run(kind: str, changes: dict[str, Any], judge: Path | None) -> Path:
        name = f"{kind}{changes}{judge}"
        if name not in done:
            settings = getattr(online, kind)(**{**changes, "lora": tiny.LORA if changes.get("lora") else None})
            given = inputs | ({JUDGE: judge} if judge else {})
            setup = tiny.engine(tokens_per_micro_batch=250)
            context = tiny.context(folder / str(len(done)), given, settings, setup, reward=online.BY_MODEL)
            with pytest.MonkeyPatch.context() as patched:
                if judge is None:
                    patched.setattr(online_stage, "judge_of", lambda context: online.letters())
                STAGES[kind].run(context)
            done[name] = context.folder
        return done[name]

    return run


@pytest.mark.parametrize("name", CASES)
def test_two_ranks_do_what_one_process_does(name: str, together: Path, alone: Any) -> None:
    kind, _, changes = CASES[name]
    single = alone(kind, changes, together / JUDGE if name == "judged" else None)
    one, two = rows_of(single), rows_of(together / name)
    assert len(one) == len(two) == changes["max_steps"]
    for row, other in zip(one, two, strict=True):
        found = {key: other[key] for key in NAMES if key in row}
        assert found == pytest.approx({key: row[key] for key in found}, abs=1e-5, rel=1e-4)
    if "resamples" in changes:
        assert any(row["sampled_prompts"] % 2 for row in two), "one of the processes has once had nothing to sample"
    mine, theirs = weights_of(single / "model"), weights_of(together / name / "model")
    for key, value in mine.items():
        torch.testing.assert_close(theirs[key], value, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", RESUMED)
def test_interrupted_it_goes_on_bit_for_bit(name: str, together: Path) -> None:
    assert bits(together / f"{name}_parts") == bits(together / name)
    parts, whole = ((together / folder / ROLLOUTS).read_bytes() for folder in (f"{name}_parts", name))
    assert parts == whole, "nor are there other answers to be looked at"
