"""What room there is for training, and what is chosen to fit into it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig

from alignment.training import engine, room
from alignment.training.memory import Load, needs_checkpointing
from alignment.training.room import available_bytes, host_bytes
from tests.training import tiny

GB = 10**9


def write(folder: Path, **files: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)


def test_room_is_what_the_tightest_of_machine_and_groups_leaves(tmp_path: Path) -> None:
    proc, groups = tmp_path / "proc", tmp_path / "cgroup"
    write(proc, meminfo="MemTotal:  900 kB\nMemAvailable:  500 kB\n")
    assert host_bytes(proc, groups) == 500 * 1024
    write(proc / "self", cgroup="0::/job/step\n")
    write(groups / "job" / "step", memory__max="max\n", memory__current="1000\n", memory__stat="")
    assert host_bytes(proc, groups) == 500 * 1024
    write(groups / "job", memory__max="9000\n", memory__current="7000\n", memory__stat="anon 1\ninactive_file 500\n")
    assert host_bytes(proc, groups) == 2500  # the group above limits, its cache is given back
    write(groups, memory__max="900\n", memory__current="1000\n", memory__stat="")
    assert host_bytes(proc, groups) == 0


def test_room_in_a_group_of_the_first_version(tmp_path: Path) -> None:
    proc, groups = tmp_path / "proc", tmp_path / "cgroup"
    write(proc, meminfo="MemAvailable:  500 kB\n")
    write(proc / "self", cgroup="3:cpu,cpuacct:/other\n2:memory:/job\n0::/\n")
    write(groups / "memory", memory__limit_in_bytes=str(2**63 - 4096), memory__usage_in_bytes="5", memory__stat="")
    assert host_bytes(proc, groups) == 500 * 1024
    stat = "inactive_file 1\ntotal_inactive_file 30\n"
    write(groups / "memory" / "job", memory__limit_in_bytes="900", memory__usage_in_bytes="100", memory__stat=stat)
    assert host_bytes(proc, groups) == 830


def test_processes_of_a_machine_share_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    monkeypatch.setattr(room, "host_bytes", lambda *_: 1200)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert available_bytes() == 1200
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert available_bytes() == 300
    monkeypatch.undo()
    assert available_bytes() > 0


def decide(setting: Any, available: int, **changes: Any) -> tuple[bool, str, bool]:
    config = LlamaConfig(hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32)
    load = Load(tokens=4096, precision="fp32", parameters=GB, trainable=GB)._replace(**changes)
    return needs_checkpointing(setting, config, load, available)


def test_checkpointing_is_on_where_all_would_not_fit() -> None:
    on, line, _ = decide("auto", 30 * GB)
    assert on and line.startswith("gradient checkpointing on (by itself): about 16.0 GB of weights")
    assert "30.0 GB free" in line and "suffice" not in line and "\n" not in line
    off, line, _ = decide("auto", 100 * GB)
    assert not off and line.startswith("gradient checkpointing off (by itself)")
    assert decide("auto", 30 * GB, tokens=100)[0] is False
    assert decide("auto", 10 * GB)[1].endswith("; memory may not suffice")


def test_a_setting_is_obeyed() -> None:
    on, line, _ = decide(True, 1000 * GB)
    assert on is True and line.startswith("gradient checkpointing on (as set)")
    off, line, _ = decide(False, 20 * GB)
    assert off is False and line.endswith("memory may not suffice")


def test_too_many_answers_at_once_are_told() -> None:
    """16 layers with keys and values of 2048 numbers each: 262,144 bytes a token in fp32; 64 answers of 1000 tokens."""
    line = decide("auto", 100 * GB, decoding=(64, 1000))[1]
    assert "not suffice" not in line, line
    on, line, fits = decide("auto", 40 * GB, tokens=100, decoding=(64, 1000))
    assert line.endswith(
        "memory may not suffice to decode 64 answers at once, about 16.8 GB: lower sampling_batch_size"
    ), line
    assert fits and not on


def test_offloading_to_the_same_memory_frees_nothing() -> None:
    assert "20.0 GB of weights" in decide("auto", GB, strategy="zero3", offload="all")[1]
    assert " 0.0 MB of weights" in decide("auto", GB, strategy="zero3", offload="all", device="cuda")[1]


@pytest.mark.parametrize(
    ("setting", "free", "tokens", "checkpointing"),
    [
        ("auto", 100 * GB, 16_384, False), ("auto", 15 * GB, 8192, False), ("auto", 2.5 * GB, 8192, True),
        (False, 100 * GB, 16_384, False), (False, 15 * GB, 8192, False), (True, 100 * GB, 16_384, True),
        (False, GB, 2048, False), (True, GB, 2048, True),
    ],
)  # fmt: skip
def test_as_many_tokens_as_fit_and_checkpointing_only_where_none_do(
    setting: Any, free: int, tokens: int, checkpointing: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU, for a model of 16 layers, hidden size 512: 14.7 GB of activations for 16,384 tokens."""
    config = LlamaConfig(hidden_size=512, intermediate_size=2048, num_hidden_layers=16, num_attention_heads=8)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(engine, "available_bytes", lambda: free)
    monkeypatch.setattr(engine, "count_parameters", lambda folder: 10_000_000)
    settings = tiny.sft()
    setup = tiny.engine(tokens_per_micro_batch="auto", gradient_checkpointing=setting)
    choice = engine.choose(settings, setup, tmp_path, config, 1, 700, 10**6)
    assert (choice.tokens_per_micro_batch, choice.checkpointing) == (tokens, checkpointing), choice.why


def test_a_record_longer_than_the_budget_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = LlamaConfig(hidden_size=512, intermediate_size=2048, num_hidden_layers=16)
    monkeypatch.setattr(engine, "available_bytes", lambda: 4 * GB)
    monkeypatch.setattr(engine, "count_parameters", lambda folder: 10_000_000)
    setup = tiny.engine(tokens_per_micro_batch="auto", gradient_checkpointing="auto")
    short, long = (engine.choose(tiny.sft(), setup, tmp_path, config, 1, length, 10**6) for length in (400, 8000))
    assert not short.checkpointing and long.checkpointing


def test_no_forward_is_estimated_larger_than_there_can_be_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = LlamaConfig(hidden_size=512, intermediate_size=2048, num_hidden_layers=16)
    monkeypatch.setattr(engine, "available_bytes", lambda: 4 * GB)
    monkeypatch.setattr(engine, "count_parameters", lambda folder: 10_000_000)
    setup = tiny.engine(tokens_per_micro_batch=10**12, gradient_checkpointing="auto")
    few = engine.choose(tiny.sft(), setup, tmp_path, config, 1, longest=50, largest=150)
    assert (few.tokens_per_micro_batch, few.checkpointing) == (10**12, False), few.why
    many = engine.choose(tiny.sft(), setup, tmp_path, config, 1, longest=50, largest=10**5)
    assert many.checkpointing, many.why


def test_the_largest_forward_by_hand() -> None:
    assert engine.largest_forward([10, 40, 20, 30], [10, 40, 20, 30], global_batch_size=2) == 100  # a block has all
    assert engine.largest_forward([10, 40, 20], [10, 40, 20], global_batch_size=4) == 160  # four padded rows of 40
    assert engine.largest_forward([10, 40, 20], [1, 1, 1], global_batch_size=4) == 140  # all of them, twice at most
    assert engine.largest_forward([9] * 1000, [9] * 1000, global_batch_size=8) == 256 * 9


def test_adapters_need_less_than_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """250 million parameters of 4 bytes, or of 16 with gradient and moments; rank 4 on 16 layers adds 0.01 GB."""
    config = LlamaConfig(hidden_size=512, intermediate_size=2048, num_hidden_layers=16, num_attention_heads=8)
    monkeypatch.setattr(engine, "available_bytes", lambda: 100 * GB)
    monkeypatch.setattr(engine, "count_parameters", lambda folder: 250_000_000)
    why = engine.choose(tiny.sft(lora=tiny.LORA), tiny.engine(), tmp_path, config, 1, 10, 10**6).why
    assert "about 1.0 GB of weights" in why
    assert "about 4.0 GB of weights" in engine.choose(tiny.sft(), tiny.engine(), tmp_path, config, 1, 10, 10**6).why
