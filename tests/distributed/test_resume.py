"""Interrupted equals uninterrupted on several ranks: bit for bit on as many, to 1e-5 on others and other engines.

Here is what depends on how and when it is saved; kinds of stages, losses and engines are in test_engines_agree.py.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.launching import launch, rows_of, weights_of

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
        "saving": more.get("saving", {}), "noise": more.get("noise", False),
    }  # fmt: skip


def bits(folder: Path) -> tuple[Any, bytes]:
    rows = [{name: value for name, value in row.items() if name not in TIMES} for row in rows_of(folder)]
    return rows, (folder / "model" / "model.safetensors").read_bytes()


VARIANTS: dict[str, dict[str, Any]] = {
    "sft_ddp": {"strategy": "ddp"},
    "dpo_zero2": {"strategy": "zero2"},
    "sft_zero3": {"strategy": "zero3"},
    "sft_zero2_bf16": {"strategy": "zero2", "settings": {"precision": "bf16"}},
    "dpo_zero3_bf16": {"strategy": "zero3", "settings": {"precision": "bf16"}},
    "sft_zero3_persistent": {"strategy": "zero3", "engine": {"param_persistence_threshold": 100_000}},
    "dpo_zero3_bf16_persistent": {  # some parameters, not all
        "strategy": "zero3", "settings": {"precision": "bf16"}, "engine": {"param_persistence_threshold": 600},
    },
    "sft_zero3_hpz": {"strategy": "zero3", "engine": {"hpz": 2}},
    "dpo_ddp_logged_seldom": {"strategy": "ddp", "settings": {"log_every": 3}},
    "sft_ddp_noise": {"strategy": "ddp", "noise": True},
    "dpo_zero3_noise": {"strategy": "zero3", "noise": True},
}  # fmt: skip
NOISE = [name for name, variant in VARIANTS.items() if variant.get("noise")]

# A part of a checkpoint is written two steps after its copy was made, then comes the next one: those of steps 1 and 3
# count from the end of 3 and 5 on. The attempt is lost while it computes step 7; the next one is asked to stop in its
# second step, while the part of step 4 waits to be written.
LOST: Any = [{"lose": 7}, 2, None]
STEPS_OF_LOST = [1, 2, 3, 4, 5, 6, 4, 5, 6, 7, 8]
BEHIND = {"every_steps": 1, "asynchronous": True, "behind": 2}
WRITTEN_BEHIND = ["sft_ddp", "dpo_zero2", "sft_zero3", "dpo_zero3_bf16"]


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("resumed")
    plan = []
    for name, variant in VARIANTS.items():
        kind = name[:3]
        plan.append(case(f"{name}_whole", kind, **variant))
        plan.append(case(f"{name}_parts", kind, **variant, stops=STOPS))
        if name in WRITTEN_BEHIND:  # at once: DDP rounds otherwise in a process that DeepSpeed was in
            plan.append(case(f"{name}_lost", kind, **variant, stops=LOST, saving=BEHIND))
    launch(folder, 2, plan)
    return folder


@pytest.mark.parametrize("name", VARIANTS)
def test_on_as_many_ranks_it_is_the_same_bit_for_bit(name: str, together: Path) -> None:
    require_each_step_once(together / f"{name}_parts", 2)
    whole, parts = (bits(together / f"{name}_{arm}") for arm in ("whole", "parts"))
    assert parts[0] == whole[0]
    assert parts[1] == whole[1]


@pytest.mark.parametrize("name", WRITTEN_BEHIND)
def test_what_is_written_while_training_goes_on_is_gone_on_from_bit_for_bit(name: str, together: Path) -> None:
    whole, lost = (together / f"{name}_{arm}" for arm in ("whole", "lost"))
    for rank in range(2):
        assert steps_of(lost, rank) == STEPS_OF_LOST
    assert bits(lost) == bits(whole)


@pytest.mark.parametrize("name", NOISE)
def test_every_rank_goes_on_with_its_random_numbers(name: str, together: Path) -> None:
    seen = []
    for rank in range(2):
        whole, parts = (generators(together / f"{name}_{arm}", rank) for arm in ("whole", "parts"))
        assert parts == whole
        seen.append([state for _, *states in whole for state in states])
        assert len(set(seen[rank])) == 3 * 8, "all three are drawn from at every step"
    assert all(one != other for one, other in zip(*seen, strict=True)), "every rank has numbers of its own"


def require_each_step_once(folder: Path, ranks: int) -> None:
    """Who was asked to stop has saved its last step, and the next one went on from there: none was computed twice."""
    for rank in range(ranks):
        assert steps_of(folder, rank) == list(range(1, 9))


def steps_of(folder: Path, rank: int) -> list[int]:
    """Those that all attempts have computed."""
    return [step for step, *_ in generators(folder, rank)]


def generators(folder: Path, rank: int) -> list[list[Any]]:
    """After every step of every attempt: the step, and the states of three generators."""
    return [json.loads(line) for line in (folder / f"generators-{rank}.jsonl").read_text().splitlines()]


# On four ranks the order of a sum of more than two depends on how gradients lie in buckets. Of the small model's
# parameters some have fewer elements than there are ranks, and most of them end in padding under ZeRO.
FOUR = {
    "sft_ddp": ("sft", "ddp", "start"),
    "sft_zero3_small": ("sft", "zero3", "small"),
    "sft_zero2_small": ("sft", "zero2", "small"),
}


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("four")
    plan = [
        case(f"{name}_{arm}", kind, strategy, stops, settings={"start": start})
        for name, (kind, strategy, start) in FOUR.items()
        for arm, stops in (("whole", [None]), ("parts", STOPS))
    ]
    launch(folder, 4, plan)
    return folder


@pytest.mark.parametrize("name", FOUR)
def test_four_ranks_too(name: str, four: Path) -> None:
    require_each_step_once(four / f"{name}_parts", 4)
    assert bits(four / f"{name}_parts") == bits(four / f"{name}_whole")


# Legs: ranks, engine by what is trained (all of the usual model, of the small one, adapters), and after how many
# steps it is left. All adapters decay: DeepSpeed drops the group without decay, which is empty then.
JOURNEYS: dict[str, list[tuple[int, dict[str, str], int | None]]] = {
    "zero2": [
        (4, {"start": "zero2", "small": "zero3"}, 2),
        (2, {"start": "zero2", "small": "zero3"}, 2),
        (1, {"start": "zero2", "small": "zero3"}, 2),
        (2, {"start": "zero2", "small": "zero2"}, None),
    ],
    "engines": [
        (2, {"start": "zero3", "lora": "ddp"}, 2),
        (2, {"start": "zero1", "lora": "zero3"}, 2),
        (1, {"start": "single", "lora": "single"}, 2),
        (2, {"start": "ddp", "lora": "zero2"}, None),
    ],
}


def cases(engines: dict[str, str], stop: int | None = None) -> list[dict[str, Any]]:
    """SFT and DPO, logged every third step."""
    start = {"start": {}, "small": {"start": "small"}, "lora": {"lora": True}}
    return [
        case(f"{kind}_{trained}", kind, strategy, [stop], settings={"log_every": 3, **start[trained]})
        for trained, strategy in engines.items()
        for kind in KINDS
    ]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("uninterrupted")
    launch(folder, 1, cases(dict.fromkeys(("start", "small", "lora"), "single")))
    return folder


@pytest.mark.parametrize("journey", JOURNEYS)
def test_on_other_numbers_of_ranks_and_engines_it_is_the_same_to_rounding(
    journey: str, uninterrupted: Path, tmp_path: Path
) -> None:
    for world_size, engines, stop in JOURNEYS[journey]:
        launch(tmp_path, world_size, plan := cases(engines, stop))
    for name in (one["name"] for one in plan):
        require_each_step_once(tmp_path / name, 1)
        whole, parts = rows_of(uninterrupted / name), rows_of(tmp_path / name)
        assert [row["step"] for row in parts] == [row["step"] for row in whole] == [3, 6, 8]
        for one, other in zip(whole, parts, strict=True):
            for metric in set(one) - TIMES:
                assert other[metric] == pytest.approx(one[metric], abs=TOLERANCE, rel=TOLERANCE), (name, metric)
        resumed = weights_of(tmp_path / name / "model")
        for parameter, value in weights_of(uninterrupted / name / "model").items():
            assert (resumed[parameter] - value).abs().max() < TOLERANCE, (name, parameter)
