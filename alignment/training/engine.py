"""How training is spread over processes: settings -> process group, TrainingArguments, DeepSpeed configuration.

Nothing here may change a result beyond rounding. The traps of DeepSpeed on CPU that are avoided here: a two-minute
compile at the first start, a hang on the lock of a killed compile, a batch size computed without the process group,
an optimiser of its own that must be compiled.
"""

from __future__ import annotations

import math
import os
import socket
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d
from transformers.utils.logging import disable_progress_bar

from alignment import imports
from alignment.config.execution import Engine
from alignment.config.stages.online import Online, Ppo
from alignment.config.stages.preference import Dpo
from alignment.config.stages.reward_model import RewardModel
from alignment.config.stages.training import Reference, Train
from alignment.cores import usable
from alignment.errors import ConfigError, MachineError
from alignment.files import cache_home
from alignment.life import LONGEST
from alignment.training import sequence
from alignment.training.activations import Device
from alignment.training.memory import Load, needs_checkpointing
from alignment.training.model import Sizes, count_parameters
from alignment.training.reference_pass import BLOCK
from alignment.training.room import available_bytes
from alignment.training.shape import adapter_parameters

ZERO_STAGE = {"zero1": 1, "zero2": 2, "zero3": 3}
CLIPPING = 1.0  # TrainingArguments' default, which a configuration of DeepSpeed must not contradict
# The schema's names for transformers' schedules; each warms up first.
SCHEDULES = {"constant": "constant_with_warmup", "linear": "linear", "cosine": "cosine"}


def start(engine: Engine, world_size: int) -> None:
    """Make this process ready to train: threads, environment, process group.

    Call before a TRL configuration or a model is made, and before deepspeed is imported. Raises ConfigError if
    the strategy does not fit the number of processes.
    """
    if engine.strategy == "single" and world_size > 1:
        raise ConfigError(
            f"engine.strategy=single runs one process, the launcher started {world_size}",
            where="engine.strategy",
            fix="engine=ddp, zero1, zero2 or zero3; or launcher=local",
        )
    if world_size % engine.sequence_parallel:
        raise ConfigError(
            f"{world_size} processes cannot share sequences {engine.sequence_parallel} by {engine.sequence_parallel}",
            where="engine.sequence_parallel",
            fix="a number that divides them, or 1",
        )
    take_device(world_size)
    on_gpu = torch.cuda.is_available()
    local_world = int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
    if not on_gpu:
        os.environ["DS_ACCELERATOR"] = "cpu"
        torch.set_num_threads(engine.threads or max(1, usable() // local_world))
    elif engine.threads:
        torch.set_num_threads(engine.threads)
    disable_progress_bar()  # of loading and writing weights: the stage has its own progress
    for library in ("torch", "transformers"):  # at every step; the versions are pinned
        warnings.filterwarnings("ignore", category=FutureWarning, module=library)
    if engine.strategy in ZERO_STAGE:
        _join_process_group()
        with imports.kept():
            _start_deepspeed(on_gpu, _patience(engine))
            if engine.nvme_path is not None:
                require_aio(Path(engine.nvme_path))
    elif world_size > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if on_gpu else "gloo", timeout=_patience(engine))
    sequence.form(engine.sequence_parallel, _patience(engine))


def take_device(world_size: int) -> None:
    """The GPU that is this process's own becomes the current one. Call before a model is loaded to be held beside the
    one that is trained; `start` does it itself."""
    if world_size == 1:  # Trainer would spread one process over all GPUs it sees (nn.DataParallel)
        os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    elif torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))


def _join_process_group() -> None:
    """Without a launcher this process is a group of one."""
    if "RANK" in os.environ:
        return
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    alone = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "LOCAL_WORLD_SIZE": 1, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in alone.items()}, MASTER_ADDR="127.0.0.1")


def _patience(engine: Engine) -> timedelta:
    """With processes that do not answer: longer than whoever watches over them has, for where nobody does, and than
    one process may be busy while the others wait."""
    return timedelta(seconds=max(LONGEST + engine.watchdog_s, 10 * engine.watchdog_s))


def _start_deepspeed(on_gpu: bool, patience: timedelta) -> None:
    try:
        # One folder a host: then a lock in it belongs to a process of this host, and its life can be checked.
        kernels = Path(
            os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(cache_home() / "kernels" / socket.gethostname()))
        )
        remove_stale_locks(kernels)
        import deepspeed
        import deepspeed.ops
    except ImportError as error:
        raise MachineError(
            f"deepspeed cannot be imported: {error}", fix="install it, or use engine=single|ddp"
        ) from None
    if not on_gpu:  # compiled at the first start (two minutes), used by tensor-parallel inference only
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # DeepSpeed clones the group, and says nothing of time then.
    distributed_c10d.default_pg_timeout = distributed_c10d.default_pg_nccl_timeout = patience
    # Before the configuration is made: it takes the number of processes from the group.
    deepspeed.init_distributed(dist_backend="nccl" if on_gpu else "gloo", timeout=patience, verbose=False)


def require_aio(folder: Path) -> None:
    """That DeepSpeed can read and write this folder past the kernel's cache. Raises MachineError, before any model is
    loaded: DeepSpeed finds out while it shards one."""
    from deepspeed.ops.op_builder import AsyncIOBuilder

    fix = "install libaio-dev and a C++ compiler; or engine.nvme_path=null"
    if not AsyncIOBuilder().is_compatible(verbose=False):
        raise MachineError("DeepSpeed's aio operator lacks libaio here", where="engine.nvme_path", fix=fix)
    try:
        AsyncIOBuilder().load(verbose=False)
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise MachineError(f"cannot be made: {error.strerror}", where=str(folder), fix="another folder") from error
    except Exception as error:  # of compiler, linker and loader
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise MachineError(f"DeepSpeed's aio operator: {first}", where="engine.nvme_path", fix=fix) from error


def remove_stale_locks(kernels: Path) -> list[Path]:
    """Remove the locks that killed kernel builds left behind; a later build would wait for them for ever.

    A lock is stale if no process of this machine has it open (torch's FileBaton keeps it open while it builds).
    """
    locks = [lock for lock in kernels.glob("**/lock") if lock.is_file()] if kernels.is_dir() else []
    if not locks or not Path("/proc/self/fd").is_dir():
        return []
    held = set()
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # gone meanwhile, or another user's
            for descriptor in (process / "fd").iterdir():
                with suppress(OSError):
                    held.add(os.readlink(descriptor))
    stale = [lock for lock in locks if str(lock.resolve()) not in held]
    for lock in stale:
        lock.unlink(missing_ok=True)
    return stale


def training_arguments(
    settings: Train, engine: Engine, steps: int, folder: Path, checkpointing: bool = False
) -> dict[str, Any]:
    """Keyword arguments of a TRL config: the optimiser as the settings say, Trainer's own reporting and saving off.

    checkpointing: engine.gradient_checkpointing, decided.
    """
    return {
        **forward_arguments(settings, engine, steps, folder, checkpointing),
        "learning_rate": settings.learning_rate,
        "lr_scheduler_type": SCHEDULES[settings.schedule],
        # It begins at rate 0, so it may never take all the steps.
        "warmup_steps": min(math.ceil(settings.warmup_ratio * steps), steps - 1),
        "weight_decay": settings.weight_decay,
        "adam_beta1": settings.adam_beta1,
        "adam_beta2": settings.adam_beta2,
        "adam_epsilon": settings.adam_epsilon,
        "max_grad_norm": settings.max_grad_norm,
        # TRL asks for it with adapters under ZeRO-3, by a name that Trainer no longer reads
        "activation_checkpointing_kwargs": {"use_reentrant": bool(settings.lora and engine.strategy == "zero3")},
        "logging_steps": settings.log_every,
        "logging_nan_inf_filter": False,
    }


def forward_arguments(
    settings: Train | Reference, engine: Engine, steps: int, folder: Path, checkpointing: bool
) -> dict[str, Any]:
    """Those without which no engine computes anything, also where no step is made."""
    on_gpu = torch.cuda.is_available()
    return {
        "output_dir": str(folder),
        "max_steps": steps,
        "per_device_train_batch_size": 1,  # the loader's items are whole optimiser steps
        "gradient_accumulation_steps": 1,
        "optim": "adamw_torch_fused",
        "seed": settings.seed,
        "data_seed": settings.seed,
        "bf16": settings.precision == "bf16",
        "fp16": False,
        "use_cpu": not on_gpu,
        "ddp_backend": dist.get_backend() if dist.is_initialized() else None,
        "ddp_find_unused_parameters": False,
        "activation_checkpointing": checkpointing,
        "deepspeed": deepspeed_config(engine, settings, on_gpu),
        "max_length": None,  # the rows are cut by nobody: too long ones were dropped, and counted, before
        "report_to": "none",
        "disable_tqdm": True,
        "save_strategy": "no",
        "eval_strategy": "no",
        "remove_unused_columns": False,
        "dataloader_pin_memory": on_gpu,
    }


class Choice(NamedTuple):
    """What `auto` came to. why: a line for the log. load: what a process has to hold by the estimate."""

    tokens_per_micro_batch: int
    checkpointing: bool
    why: str
    load: Load

    def layout(self) -> dict[str, Any]:
        """What a checkpoint keeps of it for `as_before`."""
        return {"tokens_per_micro_batch": self.tokens_per_micro_batch, "gradient_checkpointing": self.checkpointing}


def as_before(engine: Engine, layout: Mapping[str, Any]) -> Engine:
    """The settings with what `auto` came to when the checkpoint was written that training goes on from: whatever memory
    is free now, sums are added up in the same order. layout: of that checkpoint; empty if it has another one."""
    automatic = ("tokens_per_micro_batch", "gradient_checkpointing")
    known = {name: layout[name] for name in automatic if name in layout and getattr(engine, name) == "auto"}
    return engine.model_copy(update=known)


# A micro-batch of more tokens makes a step of a CPU no faster (docs/performance.md) and takes more memory; on a GPU the
# largest of these is taken that fits without gradient checkpointing.
CPU_TOKENS = 512
GPU_TOKENS = (16_384, 8192, 4096, 2048)


def largest_forward(lengths: Sequence[int], widths: Sequence[int], global_batch_size: int) -> int:
    """Tokens of the largest forward there can be, however many are allowed: of a whole global batch, packed or padded,
    or of the rows whose reference log-probs are stored together."""
    ordered = sorted(lengths, reverse=True)
    times = -(-global_batch_size // len(ordered))  # a batch of more rows than there are holds them several times
    packed = max(times * sum(ordered[:global_batch_size]), sum(ordered[:BLOCK]))
    return max(packed, global_batch_size * max(widths))


def choose(
    settings: Train | Reference,
    engine: Engine,
    start: Path | Sizes,
    config: Any,
    world_size: int,
    longest: int,
    largest: int,
    available: int | None = None,
    device: Device | None = None,
) -> Choice:
    """Tokens of a micro-batch and gradient checkpointing, the same on every process.

    start: the model's folder, or its sizes; config: what it says of the model. longest: tokens of the longest record,
    which may be a micro-batch of its own. largest: see `largest_forward`; a budget beyond it takes no more memory.
    available: bytes; device: what has them. Both are this process's, unless an estimate is made for another machine.
    """
    available = available_bytes() if available is None else available
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    least = _load(settings, engine, start, config, world_size, longest)._replace(device=device)

    def choice(tokens: int) -> tuple[Choice, bool, bool]:
        load = least._replace(tokens=max(min(tokens, largest), longest))
        on, why, fits = needs_checkpointing(engine.gradient_checkpointing, config, load, available)
        return Choice(tokens, on, f"{tokens} tokens a micro-batch; {why}", load), on, fits

    if engine.tokens_per_micro_batch != "auto":
        candidates = [choice(engine.tokens_per_micro_batch)]
    else:
        candidates = [choice(tokens) for tokens in (GPU_TOKENS if device == "cuda" else (CPU_TOKENS,))]
    fitting = [one for one in candidates if one[2]]
    by_itself = engine.gradient_checkpointing == "auto"  # rather fewer tokens than computing twice
    best = next((one for one in fitting if not (by_itself and one[1])), (fitting or candidates[-1:])[0])
    answer = [best[0]]
    if dist.is_initialized():  # free memory differs from process to process
        dist.broadcast_object_list(answer, src=0)
    return answer[0]


def _load(
    settings: Train | Reference, engine: Engine, start: Path | Sizes, config: Any, world_size: int, longest: int
) -> Load:
    """What a process has to hold if no micro-batch has more than the longest record."""
    plain = parameters = count_parameters(start)
    trainable = parameters if isinstance(settings, Train) else 0
    if isinstance(settings, Train) and settings.lora is not None:
        lora = settings.lora
        trainable = adapter_parameters(config, lora.rank, lora.target_modules, lora.dora)
        trainable += count_parameters(start, lora.modules_to_save) if lora.modules_to_save else 0
        parameters += trainable
    if isinstance(settings, Ppo):  # the value head
        head = config.get_text_config().hidden_size + 1
        trainable, parameters = trainable + head, parameters + head
    how = engine.strategy, world_size, engine.offload, engine.hpz
    load = Load(longest, settings.precision, parameters, trainable, *how)
    if isinstance(settings, RewardModel):  # its head gives one number a row
        return load._replace(scored=0)
    if isinstance(settings, Dpo):
        return load._replace(moving=settings.reference_update is not None)
    if not isinstance(settings, Online):
        return load
    copies, prompts = settings.completions_per_prompt, settings.batches_per_rollout * settings.global_batch_size
    prompts = min(max(1, settings.sampling_batch_size // copies), -(-prompts // world_size))
    longest -= (settings.answers_trained_on() - 1) * settings.max_new_tokens  # of a prompt with one answer
    return load._replace(frozen=plain * settings.holds_reference, decoding=(prompts * copies, longest))


def deepspeed_config(engine: Engine, settings: Train | Reference, on_gpu: bool) -> dict[str, Any] | None:
    """DeepSpeed's configuration, or None. The optimiser and the schedule are the client's: the same for all engines."""
    stage = ZERO_STAGE.get(engine.strategy)
    if stage is None:
        return None
    zero: dict[str, Any] = {
        "stage": stage,
        "overlap_comm": on_gpu,
        "contiguous_gradients": True,
    }
    if stage == 3 and engine.param_persistence_threshold is not None:
        zero["stage3_param_persistence_threshold"] = engine.param_persistence_threshold
    if engine.hpz > 1:
        zero["zero_hpz_partition_size"] = engine.hpz
    if engine.offload != "none":
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": on_gpu}
    if engine.offload == "all":
        if stage != 3:
            raise ConfigError(
                "offload=all needs ZeRO-3", where="engine.offload", fix="engine=zero3, or offload=optimizer"
            )
        where = {"device": "cpu"} if engine.nvme_path is None else {"device": "nvme", "nvme_path": engine.nvme_path}
        zero["offload_param"] = {**where, "pin_memory": on_gpu}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": settings.max_grad_norm if isinstance(settings, Train) else CLIPPING,
        "bf16": {"enabled": settings.precision == "bf16"},
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 2**31 - 1,
    }


@contextmanager
def uncounted(engine: Any) -> Iterator[None]:
    """Forwards of DeepSpeed's module that are no steps of its engine.

    Under ZeRO-3 a hook before a forward begins a step, and compares steps between processes until it has seen a whole
    one. TRL leaves it on in decoding, where one process may make fewer forwards than another, or none."""
    offload = getattr(getattr(engine, "optimizer", None), "parameter_offload", None)
    if offload is None:
        yield
        return
    hooks, number = offload.module._forward_pre_hooks, offload.fwd_pre_hook.id
    hook = hooks.pop(number)
    try:
        yield
    finally:
        hooks[number] = hook
        hooks.move_to_end(number, last=False)  # before those of the layers, where it was
