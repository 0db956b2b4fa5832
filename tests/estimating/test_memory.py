"""The estimate of a stage's memory: its parts by hand, its rows, and the same choice that training makes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaConfig, MambaConfig

from alignment.config.compose import compose
from alignment.config.schema import Experiment
from alignment.estimating.machine import Machine, machine_of
from alignment.estimating.memory import MemoryEstimate, of_stage
from alignment.estimating.rewards import held_bytes
from alignment.estimating.seen import Lengths
from alignment.estimating.sizes import Footprints, footprints_of, is_estimated, tensors_of
from alignment.training import memory
from alignment.training.activations import activation_bytes
from alignment.training.memory import parts_of
from alignment.training.shape import adapter_parameters

CPU, GPU = Machine("cpu", None), Machine("cuda", None)
PIPELINES = {"reward_model": "sft_reward_model", "dpo": "sft_dpo", "reference": "sft_dpo", "grpo": "sft_grpo"}


def llama(**changes: Any) -> Any:
    sizes = {"hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaConfig(**{**sizes, "vocab_size": 300, "bos_token_id": 1, "eos_token_id": 2, **changes})


def experiment(stage: str, *overrides: str) -> Experiment:
    return compose([f"pipeline={PIPELINES.get(stage, stage)}", f"stage.{stage}.precision=fp32", *overrides])


def rows(count: int = 40, length: int = 50, answer: int = 20) -> Footprints:
    whole, scored = np.full(count, length), np.full(count, answer)
    return Footprints(whole, whole, whole, scored, known=True)


def estimate(
    stage: str, *overrides: str, machine: Machine = CPU, config: Any = None, seen: Any = None
) -> MemoryEstimate:
    made = experiment(stage, *overrides)
    node = next(name for name, one in made.pipeline.nodes.items() if one.stage == stage)
    sample = rows() if seen is None else footprints_of(made, node, {made.pipeline.nodes[node].inputs["data"]: seen})
    return of_stage(made, node, config or llama(), sample, machine)


FULL = ("stage.sft.lora=null", "engine.tokens_per_micro_batch=100", "engine.gradient_checkpointing=false")


def test_parts_of_one_process_by_hand() -> None:
    """fp32: 4 bytes a weight, its gradient, and 8 of moments; 100 tokens a micro-batch, of which two fifths go through
    the head; on a CPU a copy of the model as it is written."""
    weights = sum(weight.numel() for weight in AutoModelForCausalLM.from_config(llama()).parameters())
    found = estimate("sft", *FULL)
    parts = found.parts
    assert parts[:4] == (4 * weights, 4 * weights, 8 * weights, 0)
    assert parts.activations == activation_bytes(llama(), 100, 0, "fp32")
    assert parts.logits == activation_bytes(llama(), 100, 40, "fp32") - parts.activations
    assert found.load.scored == 40 and not found.checkpointing
    assert parts.total == sum(parts) and parts.runtime == memory.RUNTIME["cpu"]
    assert found.fits, "nobody knows the room"


def test_reward_models_are_held_beside_the_policy(tmp_path: Path) -> None:
    """One of the pipeline, and one of a folder with 3 * 5 numbers; what is fetched is not counted."""
    made = compose(["experiment=rlhf"])
    one = sum(tensors_of(llama(), made.stage["reward_model"]).values())
    assert held_bytes(made, "rloo", llama()) == 4 * one and held_bytes(made, "sft", llama()) == 0
    save_file({"w": torch.zeros(3, 5)}, tmp_path / "model.safetensors")
    members = f"+reward.terms.preference.members.own={{kind: path, path: {tmp_path}}}"
    given = compose(["pipeline=sft_grpo", "reward=model", members])
    node = next(name for name, one in given.pipeline.nodes.items() if one.stage == "grpo")
    assert held_bytes(given, node, llama()) == 4 * 15
    assert of_stage(given, node, llama(), rows(), CPU).parts.rewards == 4 * 15


def test_processes_share_the_state_as_the_strategy_says() -> None:
    weights = sum(tensors_of(llama(), experiment("sft").stage["sft"]).values())
    several = ("launcher=torchrun", "launcher.processes=4")
    ddp, zero3 = (estimate("sft", *FULL, f"engine={one}", *several).parts for one in ("ddp", "zero3"))
    assert ddp[:3] == (4 * weights, 8 * weights, 8 * weights), "buckets beside the gradients"
    assert zero3[:3] == (weights, weights, 3 * weights)
    assert zero3.buffers == 3 * 4 * weights, "one bucket, and all weights gathered, out of one buffer"
    on_gpu = estimate("sft", *FULL, "engine=zero2", *several, machine=GPU).parts
    assert on_gpu.buffers == 2 * 5e8 * 4 and on_gpu.writing == on_gpu.allocator == 0


def test_adapters_and_a_head_of_one_number_are_counted_as_they_are() -> None:
    adapters = adapter_parameters(llama(), 8, "all-linear")
    assert estimate("sft", *FULL, "stage.sft.lora={rank: 8}").load.trainable == adapters
    classifier = AutoModelForSequenceClassification.from_config(llama(num_labels=1, pad_token_id=0))
    found = estimate("reward_model", "stage.reward_model.lora=null", "engine.tokens_per_micro_batch=100")
    assert found.load.parameters == sum(weight.numel() for weight in classifier.parameters())
    assert found.parts.logits == 0


def test_a_reference_pass_has_neither_gradients_nor_moments() -> None:
    parts = estimate("reference").parts
    assert parts.gradients == parts.optimiser == parts.writing == 0
    assert 0 < parts.activations < activation_bytes(llama(), 512, 0, "fp32")


def test_online_stages_hold_a_reference_and_decode() -> None:
    parts = estimate("grpo", "stage.grpo.lora=null", seen=lengths("sft")).parts
    assert parts.reference == parts.weights
    many = ("stage.grpo.sampling_batch_size=4096", "stage.grpo.batches_per_rollout=200")
    parts = estimate("grpo", *many, seen=lengths("sft")).parts
    assert parts.decoding > 0 == parts.activations, "they are not there together"


def test_a_gpu_takes_more_tokens_and_checkpoints_where_all_would_not_fit() -> None:
    large = llama(hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32)
    auto = ("stage.sft.lora=null", "stage.sft.global_batch_size=1000")
    wide, narrow = (
        estimate("sft", *auto, machine=Machine("cuda", int(gigabytes * 1e9)), config=large) for gigabytes in (200, 24)
    )
    assert wide.load.tokens > narrow.load.tokens or narrow.checkpointing > wide.checkpointing
    assert wide.fits and wide.least < wide.parts.total
    assert wide.parts == parts_of(large, wide.load, wide.checkpointing)


def lengths(task: str) -> Lengths:
    """Two rows: prompts of 10 and 20, the longer answers of 5 and 6; of pairs 8 and 9 answer tokens in all."""
    trained = {"preference": [8, 9]}.get(task, [5, 6])
    return Lengths(task, np.array([10, 20]), np.array([15, 26]), np.array(trained))


def test_rows_are_as_long_as_what_is_computed_of_them() -> None:
    made = experiment("dpo", "pipeline=sft_dpo")
    pairs = footprints_of(made, "dpo", {"pairs": lengths("preference")})
    assert pairs.lengths.tolist() == [18, 29] and pairs.widths.tolist() == [30, 52], "the prompt once, if packed"
    assert pairs.scored.tolist() == [8, 9] and pairs.known
    plain = footprints_of(made, "sft", {"rows": lengths("sft")})
    assert plain.lengths.tolist() == plain.widths.tolist() == [15, 26]
    kto = experiment("kto")
    node = kto.pipeline.nodes["kto"].inputs["data"]
    both = footprints_of(kto, "kto", {node: lengths("unpaired")})
    assert both.lengths.tolist() == [21, 31], "beside each answer that of another prompt"
    assert both.trained.tolist() == [15, 26] and both.scored.tolist() == [5, 6], "which has no gradient"


def test_rows_that_are_not_there_yet_are_as_long_as_they_may_become() -> None:
    changes = ("stage.prepare_preference.max_length=100", "stage.prepare_preference.max_prompt_length=60")
    sample = footprints_of(experiment("dpo", *changes), "dpo", {})
    assert (sample.lengths.tolist(), sample.widths.tolist(), sample.known) == ([140], [200], False)


def test_what_is_no_decoder_with_attention_is_not_estimated() -> None:
    assert is_estimated(llama()) and not is_estimated(MambaConfig())


def test_a_cluster_is_judged_by_what_the_settings_say_of_it() -> None:
    gpus = experiment("sft", "engine=ddp", "launcher=slurm", "launcher.processes=2")
    assert machine_of(gpus, "sft") == Machine("cuda", None)
    known = experiment("sft", "engine=ddp", "launcher=slurm", "launcher.processes=2", "hardware=h100")
    assert machine_of(known, "sft") == Machine("cuda", 80 * 10**9)
    here = machine_of(experiment("sft"), "sft")
    halves = machine_of(experiment("sft", "engine=ddp", "launcher=torchrun", "launcher.processes=2"), "sft")
    assert here.room and halves.room and halves.room == pytest.approx(here.room / 2, rel=0.2)
