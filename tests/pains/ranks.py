"""What ranks of stock libraries come to: functions that run in forks."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing import start_processes

from tests.forks import free_port, rank_environment, say_into
from tests.training import models

PATIENCE = timedelta(seconds=2)  # of the process group, where half an hour is the default


def start(what: Callable[[int, Path], Any], folder: Path, world_size: int) -> list[Any]:
    """what(rank, folder) on so many ranks; what each found, None for one that said nothing."""
    folder.mkdir(exist_ok=True)
    port = free_port()
    ranks = start_processes(_work, (what, folder, world_size, port), world_size, join=False, start_method="forkserver")
    deadline = time.monotonic() + 60
    while not ranks.join(timeout=1):
        assert time.monotonic() < deadline, "they hang"
    paths = [folder / f"found-{what.__name__}-{rank}.json" for rank in range(world_size)]
    return [json.loads(path.read_text()) if path.exists() else None for path in paths]


def _work(rank: int, what: Callable[[int, Path], Any], folder: Path, world_size: int, port: int) -> None:
    say_into(folder / f"said-{rank}.txt")
    os.environ.update(rank_environment(rank, world_size, port))
    torch.set_num_threads(1)
    found = what(rank, folder)
    (folder / f"found-{what.__name__}-{rank}.json").write_text(json.dumps(found))
    os._exit(0)  # a group that has timed out cannot be left in order


def engine(stage: int, bf16: bool = False) -> Any:
    """DeepSpeed's, of a tiny Llama."""
    import deepspeed
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # it would be compiled, for two minutes
    if not dist.is_initialized():
        dist.init_process_group("gloo", timeout=PATIENCE)
        deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    model = models.make("llama", {**models.SMALL, "tie_word_embeddings": True}, scale=2.0)
    settings = {
        "train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 4, "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False, "bf16": {"enabled": bf16},
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
    }  # fmt: skip
    adam = torch.optim.AdamW(model.parameters(), lr=1e-3)
    return deepspeed.initialize(model=model, optimizer=adam, config=settings)[0]


def steps(made: Any, count: int) -> list[float]:
    """Of four micro-batches each; their mean losses."""
    random, losses = torch.Generator().manual_seed(0), []
    for _ in range(4 * count):
        ids = torch.randint(3, models.VOCABULARY, (2, 24), generator=random)
        loss = made(input_ids=ids, labels=ids, use_cache=False).loss
        made.backward(loss)
        made.step()
        losses.append(loss.item())
    return torch.tensor(losses).view(-1, 4).mean(1).tolist()


def two(rank: int, folder: Path) -> Any:
    """Two processes: a model under ZeRO-3 saved as any other (elements of its tensors in the file), a checkpoint of
    ZeRO-2, and weights that are gathered to be saved by the main process alone, as `if is_main_process:` has it."""
    import deepspeed
    from safetensors.torch import load_file

    sharded, whole = engine(3), engine(2)
    steps(whole, 1)
    whole.save_checkpoint(str(folder / "two"))
    if rank:
        wait_for(folder / "gathered")
        return None
    sharded.module.save_pretrained(folder / "plain")
    sizes = [value.numel() for value in load_file(folder / "plain" / "model.safetensors").values()]
    error, began = None, time.monotonic()
    try:
        with deepspeed.zero.GatheredParameters(list(sharded.module.parameters())):
            pass
    except RuntimeError as raised:
        error = str(raised)
    (folder / "gathered").touch()
    return {"sizes": sizes, "error": error, "seconds": time.monotonic() - began}


def wait_for(path: Path, seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.05)


def alone(rank: int, folder: Path) -> Any:
    """One process: the checkpoint of two; the losses of ZeRO-0 and ZeRO-2 in bf16."""
    made = engine(2)
    error = None
    try:
        made.load_checkpoint(str(folder / "two"))
    except Exception as raised:  # of DeepSpeed's own kind
        error = str(raised)
    return {"error": error, "losses": {stage: steps(engine(stage, bf16=True), 4) for stage in (0, 2)}}


def tokenised_by_one(rank: int, folder: Path) -> Any:
    """The first process tokenises for longer than the group's patience; the others wait for it at a barrier, as all of
    TRL's trainers have them."""
    from accelerate import PartialState
    from trl.trainer.sft_trainer import global_then_local_main_first

    PartialState(cpu=True, timeout=PATIENCE)
    try:
        with global_then_local_main_first():
            if rank == 0:
                time.sleep(PATIENCE.total_seconds() + 2)
    except RuntimeError as raised:
        return str(raised)
    return None
