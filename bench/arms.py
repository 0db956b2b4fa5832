"""The arms: TRL as it comes, TRL tuned, ours, and ours with a piece off. Runs inside a worker.

All arms start from the same weights, see the same rows in the same global batches and use AdamW at the same constant
rate, clipping gradients at 1. `make_ours` is the one place that knows our trainers.
"""

from __future__ import annotations

import atexit
import functools
import importlib.util
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import trl
from datasets import Dataset
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedTokenizerFast

from bench.measure import Counter
from bench.plan import ARMS, TRL_BATCH
from bench.workloads import BETA, EOS, LEARNING_RATE, PAD, SIZES, Workload, rows_for

CUDA_TOKENS = 16_384  # what engine.tokens_per_micro_batch=auto comes to with this model and 80 GB; on a CPU it is fixed


class Unavailable(Exception):
    """This arm cannot run here; the text says why."""


@dataclass
class Setting:
    """What one training run is given. state: weights to start from instead of the seed's (the sweep's second stage)."""

    workload: Workload
    device: str
    precision: str
    folder: Path  # scratch, empty
    counter: Counter
    options: dict[str, dict[str, Any]] = field(default_factory=dict)  # of trl_tuned, by task, see group.Options
    beta: float = BETA
    learning_rate: float = LEARNING_RATE
    state: dict[str, Any] | None = None


@dataclass
class Job:
    """A trainer ready to train. before: seconds of measured work that its construction had to contain."""

    trainer: Any
    before: float = 0.0


# --- what all arms share ----------------------------------------------------------------------------------------------


def tokenizer() -> PreTrainedTokenizerFast:
    """Only its padding and end tokens are looked at: rows are token ids already."""
    words = Tokenizer(models.WordLevel({"<pad>": PAD, "<eos>": EOS, "<unk>": 2}, unk_token="<unk>"))
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


def make_model(task: str, setting: Setting, attention: str = "sdpa") -> Any:
    """The start model in fp32, the same numbers in every arm: its weights follow from the seed."""
    size = SIZES[setting.workload.size]
    numbers: dict[str, Any] = {
        "vocab_size": size.vocabulary, "hidden_size": size.hidden, "intermediate_size": size.intermediate,
        "num_hidden_layers": size.layers, "num_attention_heads": size.heads, "num_key_value_heads": size.heads,
        "max_position_embeddings": size.positions, "tie_word_embeddings": False, "num_labels": 1,
        "pad_token_id": PAD, "eos_token_id": EOS, "bos_token_id": None, "attn_implementation": attention,
    }  # fmt: skip
    config = LlamaConfig(**numbers)
    torch.manual_seed(setting.workload.seed)
    with torch.device(setting.device):
        model = LlamaForSequenceClassification(config) if task == "reward" else LlamaForCausalLM(config)
    if setting.state is not None:
        model.load_state_dict(setting.state)
    setting.counter.watch(model)
    return model


def weights(trainer: Any) -> dict[str, Any]:
    return {name: value.detach().clone() for name, value in trainer.model.state_dict().items()}


# --- TRL --------------------------------------------------------------------------------------------------------------


class _Prepared:
    """Before a TRL trainer: the rows are token ids already, and nothing is told to anybody."""

    def _prepare_dataset(self, dataset: Any, *arguments: Any, **kwargs: Any) -> Any:
        return dataset

    def _send_telemetry(self) -> None:
        pass


class TrlSFT(_Prepared, trl.SFTTrainer):
    pass


class TrlReward(_Prepared, trl.RewardTrainer):
    pass


class TrlDPO(_Prepared, trl.DPOTrainer):
    precompute_seconds = 0.0

    def _precompute_ref_logps(self, dataset: Any, name: str, batch_size: int) -> Any:
        """TRL's own, timed; a new fingerprint each time, or the second repeat would find the first one's file."""
        dataset._fingerprint = uuid.uuid4().hex
        began = time.monotonic()
        dataset = super()._precompute_ref_logps(dataset, name, batch_size)
        self.precompute_seconds += time.monotonic() - began
        return dataset


TRL: dict[str, tuple[Any, Any]] = {
    "dpo": (TrlDPO, trl.DPOConfig),
    "sft": (TrlSFT, trl.SFTConfig),
    "reward": (TrlReward, trl.RewardConfig),
}


def make_trl(task: str, tuned: bool, pairs: list[dict[str, list[int]]], setting: Setting) -> Job:
    """TRL with its defaults but for what equal work needs, or tuned.

    Equal work: the global batch (by accumulation), the steps, the rate, rows in the order given, no row cut, the loss
    logged at each step; nothing saved or reported.
    """
    trainer_class, config_class = TRL[task]
    options = setting.options.get(task, {}) if tuned else {}
    arguments = _trl_arguments(setting, options.get("micro_batch", TRL_BATCH))
    if task == "dpo":
        arguments["beta"] = setting.beta
    attention = "sdpa"
    if tuned:
        arguments["gradient_checkpointing"] = False
        if task == "dpo":
            arguments["precompute_ref_log_probs"] = True
            arguments["precompute_ref_batch_size"] = options.get("reference_batch")
        if task == "sft":
            arguments["padding_free"] = options.get("padding_free", False)
        flash = setting.device == "cuda" and setting.precision == "bf16"  # the kernel has no fp32
        if flash and importlib.util.find_spec("flash_attn") is not None:
            attention = "flash_attention_2"
    model = make_model(task, setting, attention)
    extra = {"ref_model": make_model(task, setting, attention)} if task == "dpo" and not tuned else {}
    trainer = trainer_class(
        model=model, args=config_class(**arguments), processing_class=tokenizer(),
        train_dataset=Dataset.from_list(rows_for(task, pairs)), **extra,
    )  # fmt: skip
    return Job(trainer, before=getattr(trainer, "precompute_seconds", 0.0))


def _trl_arguments(setting: Setting, micro_batch: int) -> dict[str, Any]:
    workload = setting.workload
    micro = min(micro_batch, workload.rows)
    if workload.rows % micro:
        raise Unavailable(f"a global batch of {workload.rows} is not a multiple of the micro-batch of {micro}")
    return {
        "output_dir": str(setting.folder),
        "max_steps": workload.steps,
        "per_device_train_batch_size": micro,
        "gradient_accumulation_steps": workload.rows // micro,
        "learning_rate": setting.learning_rate,
        "lr_scheduler_type": "constant",
        "train_sampling_strategy": "sequential",
        "max_length": None,
        "logging_steps": 1,
        "report_to": "none",
        "disable_tqdm": True,
        "save_strategy": "no",
        "bf16": setting.precision == "bf16",
        "use_cpu": setting.device == "cpu",
        "dataloader_pin_memory": setting.device == "cuda",
        "seed": workload.seed,
    }


# --- ours -------------------------------------------------------------------------------------------------------------


def make_ours(task: str, pieces: frozenset[str], pairs: list[dict[str, list[int]]], setting: Setting) -> Job:
    """Our trainer with `pieces` off (names in plan.ARMS). Raises Unavailable for what our trainers do not have.

    The reference store lies in the run's own folder, so each run pays for its reference pass, and a sweep for one.
    """
    from alignment.training import engine
    from alignment.training.objective import Objective
    from alignment.training.preference import DPO
    from alignment.training.reward_model import Reward
    from alignment.training.trainers import SFT, Packing

    if pieces - {"sharing", "packing", "head", "last_layer", "reference_pass"}:
        raise Unavailable(f"our trainers cannot switch off: {', '.join(sorted(pieces))}")
    settings, setup = _our_settings(task, setting)
    engine.start(setup, world_size=1)
    arguments = engine.training_arguments(settings, setup, setting.workload.steps, setting.folder)
    model = make_model(task, setting)
    common = {
        **_our_rows(task, pairs, setting, setup, model.config),
        "on_step": lambda step, total, metrics: None,
        "processing_class": tokenizer(),
        "model": model,
        "packing": Packing(on="packing" not in pieces, share="sharing" not in pieces),
    }
    _choose(head="head" not in pieces, last_layer="last_layer" not in pieces)
    if task == "sft":
        return Job(SFT(args=trl.SFTConfig(**arguments), **common))
    if task == "reward":
        return Job(Reward(args=trl.RewardConfig(**arguments), **common))
    config = trl.DPOConfig(**arguments, beta=setting.beta, disable_dropout=True, precompute_ref_log_probs=True)
    kept = warm_store() if "reference_pass" in pieces else setting.folder / "reference"
    return Job(DPO(args=config, objective=Objective(settings), references=_references(kept, setting), **common))


@functools.cache
def warm_store() -> Path:
    """Of this process, for the arm that finds it full."""
    folder = tempfile.mkdtemp(prefix="bench-reference-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


def _references(folder: Path, setting: Setting) -> Any:
    from alignment.training.reference import ReferenceStore
    from alignment.training.reference_pass import References

    # The rows differ between workloads and are in the store's keys; weights here are one of two kinds.
    weights = "seed" if setting.state is None else "sft"
    dtype = "bf16-autocast" if setting.precision == "bf16" else "fp32"
    return References(ReferenceStore(folder, weights=weights, adapter=None, dtype=dtype))


def _choose(head: bool, last_layer: bool) -> None:
    """head: ours, or TRL's kernel for the same positions. last_layer: where an answer is read, or everywhere. Before a
    model is taught to compute packs."""
    from alignment.training import head as heads
    from alignment.training import last_layer as last_layers
    from alignment.training import shared_prefix

    shared_prefix.score_tokens = heads.score_tokens if head else functools.partial(heads.score_tokens, trl=True)
    shared_prefix.narrow = last_layers.narrow if last_layer else lambda layer: None


def _our_rows(
    task: str, pairs: list[dict[str, list[int]]], setting: Setting, setup: Any, config: Any
) -> dict[str, Any]:
    """Rows, batches and widths. Ours take the rows in an order drawn from the seed: put them where that order finds
    them in the common one."""
    from alignment.training import rows
    from alignment.training.batching import GlobalBatches
    from alignment.training.shape import attention_share

    dataset = Dataset.from_list(rows_for("sft" if task == "sft" else "dpo", pairs))  # reward's pairs are DPO's
    sizes = {"sft": rows.sft_sizes, "dpo": rows.pair_sizes, "reward": rows.pair_sizes}[task](dataset)

    def batches_of(lengths: list[int], divisors: list[int]) -> GlobalBatches:
        return GlobalBatches(
            lengths=lengths, weights=divisors, global_batch_size=setting.workload.rows, steps=setting.workload.steps,
            seed=setting.workload.seed, tokens_per_micro_batch=setup.tokens_per_micro_batch,
            quadratic=attention_share(config),
        )  # fmt: skip

    drawn = batches_of(sizes.lengths.tolist(), sizes.weights.tolist())
    order = [row for step in range(setting.workload.steps) for row in drawn.rows(step)]
    place = sorted(range(len(order)), key=order.__getitem__)  # place[row] is when it is drawn
    return {
        "batches": batches_of(sizes.lengths[place].tolist(), sizes.weights[place].tolist()),
        "widths": sizes.widths[place].tolist(),
        "train_dataset": dataset.select(place).flatten_indices(),
    }


def _our_settings(task: str, setting: Setting) -> tuple[Any, Any]:
    """The stage's and the engine's settings: conf/engine/single.yaml, and TRL's optimiser."""
    from alignment.config.execution import Engine
    from alignment.config.stages.preference import Dpo
    from alignment.config.stages.training import Sft
    from alignment.training.engine import CPU_TOKENS

    common: dict[str, Any] = {
        "global_batch_size": setting.workload.rows, "epochs": 1.0, "max_steps": setting.workload.steps,
        "learning_rate": setting.learning_rate, "schedule": "constant", "warmup_ratio": 0.0, "weight_decay": 0.0,
        "adam_beta1": 0.9, "adam_beta2": 0.999, "adam_epsilon": 1e-8, "max_grad_norm": 1.0,
        "precision": setting.precision, "lora": None, "seed": setting.workload.seed, "log_every": 1,
        "nonfinite": "halt", "max_nonfinite": 1, "spike_alarm": None,
    }  # fmt: skip
    setup = Engine(
        strategy="single", tokens_per_micro_batch=CUDA_TOKENS if setting.device == "cuda" else CPU_TOKENS,
        gradient_checkpointing="auto", compile=False, offload="none", nvme_path=None,
        param_persistence_threshold=None, hpz=1, quantized_weights=False, quantized_gradients=False,
        sequence_parallel=1, threads=torch.get_num_threads(), adapt=False, watchdog_s=600.0,
    )  # fmt: skip
    if task == "sft":
        return Sft(kind="sft", **common), setup
    plain = {
        "reference_update": None,
        "label_smoothing": 0.0,
        "divergence": "reverse_kl",
        "divergence_alpha": 0.5,
        "weighting": "none",
    }
    loss = {
        "loss": "sigmoid",
        "beta": setting.beta,
        "ld_alpha": None,
        "reference_update": None,
        **plain,
    }  # other keys are of other losses
    return Dpo.model_construct(kind="dpo", **loss, **common), setup


# --- by name ----------------------------------------------------------------------------------------------------------

Make = Callable[[str, list[dict[str, list[int]]], Setting], Job]


def maker(name: str) -> Make:
    """(task dpo|sft|reward, pairs, setting) -> the arm's job."""
    arm = ARMS[name]
    if arm.ours:
        return lambda task, pairs, setting: make_ours(task, arm.pieces_off, pairs, setting)
    return lambda task, pairs, setting: make_trl(task, arm.tuned, pairs, setting)
