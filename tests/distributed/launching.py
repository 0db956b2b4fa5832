"""Stages that train on several ranks, and what they come to."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch.multiprocessing import start_processes

from tests.conftest import write_tiny_model
from tests.distributed import run_stages
from tests.forks import free_port
from tests.training import models, online, tiny
from tests.training.test_trial import UNPACKABLE

STRATEGIES = ("ddp", "zero1", "zero2", "zero3")
PATIENCE = 500  # seconds


def launch(folder: Path, world_size: int, plan: list[dict[str, Any]]) -> None:
    """See tests/distributed/run_stages.py. The ranks are forks; under torchrun itself are others (test_joined.py)."""
    write_plan(folder, plan)
    began = time.monotonic()
    ranks = start_processes(
        run_stages.work, (folder, world_size, free_port()), world_size, join=False, start_method="forkserver"
    )
    try:
        while not ranks.join(timeout=1):  # raises what a rank has raised, and ends the others
            assert time.monotonic() - began < PATIENCE, "they hang"
    except Exception as error:
        said = "".join(path.read_text()[-3000:] for path in sorted(folder.glob("said-*.txt")))
        raise AssertionError(f"{error}\n{said}") from None
    finally:
        for process in ranks.processes:
            process.kill()


def write_plan(folder: Path, plan: list[dict[str, Any]]) -> None:
    for kind in ("sft", "dpo", "kto", "reward_model"):
        tiny.write_inputs(folder, kind)
    online.write_inputs(folder)
    write_starts(folder)
    (folder / "plan.json").write_text(json.dumps(plan))


def write_starts(folder: Path) -> None:
    """Start models beside the usual one: "sinks"; "small", whose parameters no number of ranks divides; and "untied",
    whose head has weights of its own."""
    small = {**models.SMALL, "hidden_size": 10, "intermediate_size": 13, "head_dim": 2}  # q_norm and k_norm have 2
    untied = "llama", {**models.SMALL, "tie_word_embeddings": False}
    starts = {"sinks": UNPACKABLE["gpt_oss"][:2], "small": ("qwen3", small), "untied": untied}
    for name, (architecture, settings) in starts.items():
        if not (folder / name).exists():
            write_tiny_model(folder / name / "model")
            models.make(architecture, settings, scale=2.0).save_pretrained(folder / name / "model")


def rows_of(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def weights_of(folder: Path) -> dict[str, Any]:
    return load_file(folder / "model.safetensors")
