"""What is said of memory and disk, and the smallest change that fits."""

from __future__ import annotations

import json
import shlex
import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import LlamaConfig

from alignment import preflight
from alignment.config.compose import compose
from alignment.estimating.fitting import ERROR, disk_bytes, findings
from alignment.estimating.memory import MemoryEstimate, of_experiment
from alignment.estimating.seen import Lengths
from alignment.estimating.suggesting import suggestion
from tests.estimating.test_memory import llama

FULL = ["pipeline=sft", "stage.sft.lora=null", "stage.sft.precision=fp32", "stage.sft.global_batch_size=64"]
WIDE = [*FULL, "engine.tokens_per_micro_batch=8192", "engine.gradient_checkpointing=false"]
SEEN = {"rows": Lengths("sft", np.full(200, 60), np.full(200, 160), np.full(200, 100))}


def large() -> Any:
    """34 million weights."""
    sizes = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8, "num_attention_heads": 8}
    return LlamaConfig(**sizes, vocab_size=8000, bos_token_id=1, eos_token_id=2)


def within(overrides: list[str], room: int) -> list[str]:
    """With so many bytes for a process."""
    return [*overrides, f"hardware.memory_gb={room / 1e9}"]


def estimated(overrides: list[str], room: int = 10**15) -> dict[str, MemoryEstimate]:
    return of_experiment(compose(within(overrides, room)), large(), SEEN)


def total(overrides: list[str]) -> int:
    return estimated(overrides)["sft"].parts.total


def told(overrides: list[str], room: int, suggest: bool = False) -> dict[str, dict[str, Any]]:
    return {found["check"]: found for found in findings(compose(within(overrides, room)), large(), SEEN, suggest)}


def test_what_fits_is_told_with_its_parts() -> None:
    found = told(FULL, 10**15)["memory sft"]
    assert found["state"] == "ok" and "of 1000000.0 GB" in found["what"] and "activations" in found["what"]
    facts = found["facts"]
    parts = ("weights", "gradients", "optimiser", "reference", "activations", "logits", "decoding", "buffers")
    assert sum(facts[part] for part in (*parts, "allocator", "runtime", "writing", "rewards")) == facts["total"]


def test_what_fits_with_a_change_only_is_a_warning_that_says_it() -> None:
    found = told(WIDE, total(WIDE) - 10**6)["memory sft"]
    assert found["state"] == "warning" and found["fix"] == "engine.tokens_per_micro_batch=2560"
    assert "code" not in found


def test_what_cannot_fit_is_refused_with_the_code_of_a_machine() -> None:
    least = estimated(WIDE)["sft"].least
    found = told(WIDE, int(least / (1 + ERROR)) - 10**6)["memory sft"]
    assert (found["state"], found["code"]) == ("failed", 4) and "even with the smallest micro-batches" in found["what"]
    close = told(WIDE, int(least / (1 + ERROR)) + 10**6)["memory sft"]
    assert close["state"] == "warning", "the estimate may be wrong by that much"


@pytest.mark.parametrize(
    ("room", "keys"),
    [
        (1.0, []),
        (0.99, ["engine.tokens_per_micro_batch"]),
        (0.4, ["engine.tokens_per_micro_batch"]),
        (0.32, ["stage.sft.lora"]),
    ],
)
def test_the_smallest_change_is_proposed_in_the_order_of_the_page(room: float, keys: list[str]) -> None:
    bytes_of_room = int(room * total(WIDE))
    found = suggestion(compose(within(WIDE, bytes_of_room)), large(), SEEN)
    assert found is not None
    plain = [shlex.split(one)[0] for one in found]
    assert set(keys) <= {one.split("=")[0] for one in plain}
    again = estimated([*WIDE, *plain], bytes_of_room)
    assert all(one.fits for one in again.values()), "what is pasted fits"
    for one in plain:  # and nothing of it could be left out
        fewer = [other for other in plain if other != one]
        assert not all(left.fits for left in estimated([*WIDE, *fewer], bytes_of_room).values())


def test_several_processes_are_given_a_higher_stage_of_zero() -> None:
    ddp = [*FULL, "engine=ddp", "launcher=torchrun", "launcher.processes=4", "engine.tokens_per_micro_batch=160"]
    assert suggestion(compose(within(ddp, int(0.9 * total(ddp)))), large(), SEEN) == ["engine.strategy=zero2"]


def test_nothing_is_proposed_where_nothing_fits() -> None:
    assert suggestion(compose(within(FULL, 1000)), large(), SEEN) is None
    found = told(FULL, 1000, suggest=True)
    assert found["suggest"]["facts"]["overrides"] is None and "smaller model" in found["memory sft"]["fix"]


def test_the_disk_is_to_hold_all_results_and_the_most_checkpoints(monkeypatch: pytest.MonkeyPatch) -> None:
    """34 million weights in fp32, imported and trained; a checkpoint has 12 bytes of each; keep_last + keep_best + 1 of
    them at a time."""
    made = compose([*FULL, "checkpoint.keep_last=2", "checkpoint.keep_best=1", "model.storage_precision=fp32"])
    estimates = of_experiment(made, large(), SEEN)
    weights = estimates["sft"].load.parameters
    found = disk_bytes(made, estimates, large())
    assert found == {"weights": 2 * 4 * weights, "checkpoints": 4 * 12 * weights}
    rounded = compose([*FULL, "model.storage_precision=bf16"])
    assert disk_bytes(rounded, estimates, large(), ["start"])["weights"] == 2 * weights
    usage = namedtuple("usage", "total used free")
    states = {}
    for free in (7 * weights, 30 * weights, 60 * weights):
        monkeypatch.setattr(shutil, "disk_usage", lambda place, free=free: usage(0, 0, free))
        found = told([*FULL, "checkpoint.keep_best=1", "model.storage_precision=fp32"], 10**15)["disk"]
        states[free] = found["state"], found.get("code")
    assert list(states.values()) == [("failed", 4), ("warning", None), ("ok", None)]


def test_the_preflight_judges_by_the_room_that_the_hardware_has(
    tmp_path: Path, tiny_settings: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    small = ("stage.prepare_sft.splits.heldout=4", "stage.prepare_sft.splits.prompts=4")
    settings = within(["pipeline=sft", *tiny_settings, *small], 10**6)
    order = {"experiment": compose(settings).model_dump(), "prepare": ["rows"]}
    order |= {"rows": 100, "show": 0, "fit": "look", "estimate": False, "dropped": None, "stored": {}, "only": None}
    (tmp_path / "order.json").write_text(json.dumps(order))
    assert preflight.main([str(tmp_path / "order.json")]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    found = {line["check"]: line for line in lines}
    assert (found["memory sft"]["state"], found["memory sft"]["code"]) == ("failed", 4)
    assert found["memory sft"]["facts"]["room"] == 10**6


def test_a_tiny_model_is_small() -> None:
    assert of_experiment(compose(FULL), llama(), SEEN)["sft"].parts.weights < 10**6
