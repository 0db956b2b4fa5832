from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from alignment.errors import ConfigError, MachineError
from alignment.training import engine
from tests.training import tiny


def test_a_lock_without_a_living_holder_is_removed_and_a_held_one_stays(tmp_path: Path) -> None:
    (tmp_path / "op_a").mkdir()
    (tmp_path / "op_b").mkdir()
    stale, held = tmp_path / "op_a" / "lock", tmp_path / "op_b" / "lock"
    hold = f"import os, time; os.open({str(held)!r}, os.O_CREAT | os.O_EXCL); print('held', flush=True); time.sleep(60)"
    holder = subprocess.Popen([sys.executable, "-c", hold], stdout=subprocess.PIPE)
    try:
        assert holder.stdout is not None and holder.stdout.readline() == b"held\n"
        stale.touch()
        assert engine.remove_stale_locks(tmp_path) == [stale]
        assert held.exists() and not stale.exists()
    finally:
        holder.kill()
        holder.wait()
    assert engine.remove_stale_locks(tmp_path) == [held], "the holder was killed while it built"
    assert engine.remove_stale_locks(tmp_path / "absent") == []


def test_single_with_two_processes_is_an_error() -> None:
    with pytest.raises(ConfigError, match="runs one process, the launcher started 2"):
        engine.start(tiny.engine("single"), world_size=2)


def test_sharers_of_sequences_divide_the_processes() -> None:
    with pytest.raises(ConfigError, match="3 processes cannot share sequences 2 by 2"):
        engine.start(tiny.engine("ddp", sequence_parallel=2), world_size=3)


@pytest.mark.parametrize(("strategy", "stage"), [("zero1", 1), ("zero2", 2), ("zero3", 3)])
def test_deepspeed_takes_the_clients_optimiser_and_the_settings(strategy: str, stage: int) -> None:
    config = engine.deepspeed_config(tiny.engine(strategy), tiny.sft(precision="bf16", max_grad_norm=0.5), on_gpu=False)
    assert config is not None
    assert "optimizer" not in config and "scheduler" not in config
    assert config["zero_optimization"]["stage"] == stage
    assert ("stage3_param_persistence_threshold" in config["zero_optimization"]) == (stage == 3)
    assert config["gradient_clipping"] == 0.5 and config["bf16"] == {"enabled": True}
    assert config["gradient_accumulation_steps"] == config["train_micro_batch_size_per_gpu"] == 1


@pytest.mark.parametrize(("hpz", "said"), [(1, {}), (8, {"zero_hpz_partition_size": 8})])
def test_a_second_copy_of_the_weights_is_asked_for_by_deepspeeds_name(hpz: int, said: dict[str, int]) -> None:
    config = engine.deepspeed_config(tiny.engine("zero3", hpz=hpz), tiny.sft(), on_gpu=False)
    assert config is not None
    named = {name: value for name, value in config["zero_optimization"].items() if "hpz" in name}
    assert named == said


def test_single_and_ddp_need_no_deepspeed() -> None:
    assert engine.deepspeed_config(tiny.engine("single"), tiny.sft(), on_gpu=False) is None
    assert engine.deepspeed_config(tiny.engine("ddp"), tiny.sft(), on_gpu=False) is None


def test_parameters_can_be_offloaded_under_zero3_only() -> None:
    with pytest.raises(ConfigError, match="offload=all needs ZeRO-3"):
        engine.deepspeed_config(tiny.engine("zero2", offload="all"), tiny.sft(), on_gpu=False)
    config = engine.deepspeed_config(tiny.engine("zero3", offload="all"), tiny.sft(), on_gpu=False)
    assert config is not None and {"offload_optimizer", "offload_param"} <= set(config["zero_optimization"])
    assert config["zero_force_ds_cpu_optimizer"] is False


def test_parameters_on_a_disk_leave_the_optimiser_in_memory() -> None:
    """Checkpoints read its state in place."""
    setup = tiny.engine("zero3", offload="all", nvme_path="/fast")
    config = engine.deepspeed_config(setup, tiny.sft(), on_gpu=False)
    assert config is not None
    zero = config["zero_optimization"]
    assert (zero["offload_param"]["device"], zero["offload_param"]["nvme_path"]) == ("nvme", "/fast")
    assert zero["offload_optimizer"]["device"] == "cpu"


def no_compiler(self: Any, verbose: bool) -> None:
    raise RuntimeError("Ninja is required to load C++ extensions\nand more")


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        ({"is_compatible": lambda self, verbose: False}, "engine.nvme_path: .* lacks libaio here .*libaio-dev"),
        ({"is_compatible": lambda self, verbose: True, "load": no_compiler}, "Ninja is required to load C.. ext"),
    ],
)
def test_a_disk_without_deepspeeds_operator_is_refused_in_one_line(
    parts: dict[str, Any], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from deepspeed.ops.op_builder import AsyncIOBuilder

    for name, part in parts.items():
        monkeypatch.setattr(AsyncIOBuilder, name, part)
    with pytest.raises(MachineError, match=said) as caught:
        engine.require_aio(tmp_path / "fast")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "fast").exists()


def test_trainers_own_reporting_and_cutting_are_off(tmp_path: Path) -> None:
    arguments = engine.training_arguments(tiny.sft(warmup_ratio=0.25, log_every=5), tiny.engine(), 10, tmp_path)
    assert arguments["warmup_steps"] == 3 and arguments["max_steps"] == 10 and arguments["logging_steps"] == 5
    assert arguments["logging_nan_inf_filter"] is False and arguments["report_to"] == "none"
    assert arguments["save_strategy"] == "no" and arguments["max_length"] is None
    assert os.path.isdir(arguments["output_dir"])
