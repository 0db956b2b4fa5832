"""Operations that are estimated against those that PyTorch counts in the forward and backward of a real model's
packs."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

from alignment.estimating import operations
from alignment.estimating.operations import Counts, Trained
from alignment.training.attention import PACKED
from alignment.training.packing import pack
from alignment.training.shape import adapter_parameters, shape_of
from bench.measure import flop_counter
from tests.training import models

PROMPTS, ANSWERS = (40, 90, 25), ((60, 30), (35, 80), (120, 20))
LLAMA = LlamaConfig(
    hidden_size=128, intermediate_size=352, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
    vocab_size=500, max_position_embeddings=512,
)  # fmt: skip
GPT = GPT2Config(
    n_embd=128, n_layer=3, n_head=4, vocab_size=500, n_positions=512, attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0,
    bos_token_id=1, eos_token_id=1,
)  # fmt: skip

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def rows(branches: int) -> dict[str, torch.Tensor]:
    """All first answers, then all second ones, behind their prompts; answers are scored."""
    random = np.random.default_rng(0)
    prompts = [random.integers(3, 500, n).tolist() for n in PROMPTS]
    made = [
        (prompt, random.integers(3, 500, answers[branch]).tolist())
        for branch in range(branches)
        for prompt, answers in zip(prompts, ANSWERS, strict=True)
    ]
    width = max(len(prompt) + len(answer) for prompt, answer in made)

    def padded(values: Sequence[list[int]], pad: int) -> torch.Tensor:
        return torch.tensor([one + [pad] * (width - len(one)) for one in values])

    return {
        "input_ids": padded([prompt + answer for prompt, answer in made], 0),
        "attention_mask": padded([[1] * (len(prompt) + len(answer)) for prompt, answer in made], 0),
        "labels": padded([[-100] * len(prompt) + answer for prompt, answer in made], -100),
    }


def estimated(branches: int) -> Counts:
    prompts, answers = np.array(PROMPTS), np.array(ANSWERS)[:, :branches]
    if branches == 1:
        return operations.of_rows(prompts + answers[:, 0], answers[:, 0])
    return operations.of_branches(prompts, answers)


def whole_squares(branches: int) -> int:
    """Pairs of queries and keys as PyTorch counts them, also those that a causal mask leaves out."""
    both = np.array(PROMPTS) + np.array(ANSWERS)[:, 0]
    others = np.array(ANSWERS)[:, 1:branches]
    return int((both**2).sum() + (others * (np.array(PROMPTS)[:, None] + others)).sum())


def counted(model: Any, branches: int, backward: bool) -> int:
    plain = model.get_base_model() if hasattr(model, "peft_config") else model
    models.ready(plain)
    plain.set_attn_implementation(PACKED)
    batch = rows(branches)
    packed = pack(batch["input_ids"], batch["attention_mask"], batch["labels"], branches=branches)
    with flop_counter() as counter, nullcontext() if backward else torch.no_grad():
        out = model(**batch, use_cache=False, fused_lm_head=True, pack=packed)
        if backward:
            out.log_probs.sum().backward()
    return counter.get_total_flops()


def made(config: Any) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).train()


def of_total(config: Any, branches: int) -> Counts:
    work = estimated(branches).sum()
    return work._replace(seen=np.int64(whole_squares(branches)))


@pytest.mark.parametrize("branches", [1, 2], ids=["rows", "pairs"])
@pytest.mark.parametrize("config", [LLAMA, GPT], ids=["llama", "gpt2"])
def test_a_forward_has_the_operations_that_pytorch_counts(config: Any, branches: int) -> None:
    total = float(operations.forward(shape_of(config), of_total(config, branches)))
    assert total == pytest.approx(counted(made(config), branches, backward=False), rel=0.03)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointed"])
@pytest.mark.parametrize("branches", [1, 2], ids=["rows", "pairs"])
@pytest.mark.parametrize("config", [LLAMA, GPT], ids=["llama", "gpt2"])
def test_an_update_has_the_operations_that_pytorch_counts(config: Any, branches: int, checkpointing: bool) -> None:
    model = made(config)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    trained = Trained(checkpointing=checkpointing)
    total = float(operations.update(shape_of(config), of_total(config, branches), trained))
    assert total == pytest.approx(counted(model, branches, backward=True), rel=0.03)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointed"])
def test_frozen_weights_have_no_gradients_of_their_own(checkpointing: bool) -> None:
    model = get_peft_model(made(LLAMA), LoraConfig(r=8, target_modules="all-linear"))
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    adapters = adapter_parameters(LLAMA, 8, "all-linear") / LLAMA.num_hidden_layers
    trained = Trained(whole=False, adapters=adapters, checkpointing=checkpointing)
    total = float(operations.update(shape_of(LLAMA), of_total(LLAMA, 2), trained))
    assert total == pytest.approx(counted(model, 2, backward=True), rel=0.03)
    whole = operations.update(shape_of(LLAMA), of_total(LLAMA, 2), Trained(checkpointing=checkpointing))
    assert total < 0.95 * float(whole)


def test_counts_are_those_of_the_packs() -> None:
    for branches in (1, 2):
        batch = rows(branches)
        packed = pack(batch["input_ids"], batch["attention_mask"], batch["labels"], branches=branches)
        work = estimated(branches).sum()
        assert (work.tokens, work.scored) == (packed.tokens, len(packed.scored))
        assert packed.layout.read is not None and abs(work.read - len(packed.layout.read)) <= 3 * branches
        seen = sum(s.prefix * (s.end - s.start) + sum(range(s.end - s.start + 1)) for s in packed.layout.segments)
        assert work.seen == seen


def test_a_weight_and_token_are_six_operations_where_all_is_trained() -> None:
    """Kaplan et al. 2020, table 1: of a long model of short rows, whose tokens are all scored."""
    config = LlamaConfig(hidden_size=256, intermediate_size=704, num_hidden_layers=48, vocab_size=1000)
    shape, lengths = shape_of(config), np.full(10, 64)
    total = float(operations.update(shape, operations.of_rows(lengths, lengths).sum(), Trained()))
    weights = 48 * (4 * 256 * 256 + 3 * 256 * 704) + 1000 * 256  # of the layers' matrices, and the head
    assert total == pytest.approx(6 * weights * lengths.sum(), rel=0.05)
