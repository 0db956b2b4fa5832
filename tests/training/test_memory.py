"""The estimate of memory against what autograd, decoding, DeepSpeed and PEFT take."""

from __future__ import annotations

import json
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, TaskType, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, LlamaConfig, Qwen2Config

from alignment import generation
from alignment.training import activations, engine, head, memory, reference
from alignment.training.activations import Arithmetic, activation_bytes, arithmetic, checkpointed_bytes
from alignment.training.memory import Load, decoding_bytes, state_bytes
from alignment.training.objective import Objective
from alignment.training.online_preference import OnlineDPOTrainer
from alignment.training.policy_gradient import PolicyGradientTrainer
from alignment.training.ppo import PPOTrainer
from alignment.training.preference import DPO
from alignment.training.reference_pass import References
from alignment.training.shape import adapter_parameters, attention_share
from alignment.training.trainers import BUDGET, Packing
from tests.forks import FORKING
from tests.training import held, online, tiny, trainers
from tests.training.held import Alive, Kept

GB = 10**9
DTYPES: tuple[Arithmetic, ...] = ("fp32", "bf16-autocast", "bf16-weights")


def llama(size: int) -> Any:
    return LlamaConfig(
        hidden_size=64 * size, intermediate_size=176 * size, num_hidden_layers=2 + size, num_attention_heads=4 * size,
        num_key_value_heads=2 * size, vocab_size=300, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip


def qwen2(size: int) -> Any:
    return Qwen2Config(
        hidden_size=112 * size, intermediate_size=608 * size, num_hidden_layers=2 + size, num_attention_heads=7 * size,
        num_key_value_heads=size, vocab_size=300, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip


def gpt2(size: int) -> Any:
    return GPT2Config(
        n_embd=64 * size, n_layer=2 + size, n_head=4 * size, vocab_size=300, n_positions=1024, attn_pdrop=0.0,
        resid_pdrop=0.0, embd_pdrop=0.0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip


def made(config: Any, dtype: Arithmetic) -> Any:
    """A model with its weights; what computes them is `casting`."""
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").train()
    return model.bfloat16() if dtype == "bf16-weights" else model  # as DeepSpeed does


def casting(dtype: Arithmetic) -> AbstractContextManager[Any]:
    return torch.autocast("cpu", torch.bfloat16) if dtype == "bf16-autocast" else nullcontext()


def measure(config: Any, tokens: int, dtype: Arithmetic, padded: bool = False) -> int:
    """What a forward of the layers keeps. padded: the first token is masked, so that there is a mask at all."""
    model = made(config, dtype)
    mask = torch.ones(1, tokens, dtype=torch.long)
    mask[0, 0] = not padded
    kept = Kept(model)
    with torch.autograd.graph.saved_tensors_hooks(kept.pack, lambda tensor: tensor), casting(dtype):
        model.base_model(input_ids=torch.ones(1, tokens, dtype=torch.long), attention_mask=mask, use_cache=False)
    return kept.bytes


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size, tokens", [(1, 300), (3, 700)])
@pytest.mark.parametrize("family", [llama, qwen2, gpt2])
def test_activations_are_what_autograd_keeps(family: Any, size: int, tokens: int, dtype: Arithmetic) -> None:
    config = family(size)
    measured, estimated = measure(config, tokens, dtype), activation_bytes(config, tokens, 0, dtype)
    assert 0.95 < estimated / measured < 1.2, (estimated, measured)


def test_activations_under_a_mask_are_what_autograd_keeps() -> None:
    tokens = 300
    measured = measure(llama(3), tokens, "fp32", padded=True)
    estimated = activation_bytes(llama(3), tokens, 0, "fp32")
    assert 0.8 < estimated / measured < 1.2, (estimated, measured)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size, tokens", [(1, 300), (3, 700)])
@pytest.mark.parametrize("family", [llama, qwen2, gpt2])
def test_checkpointing_keeps_inputs_and_computes_one_layer_again(
    family: Any, size: int, tokens: int, dtype: Arithmetic
) -> None:
    """Most bytes alive that were made in forward and backward; gradients of weights and activations are among them."""
    config = family(size)
    model = made(config, dtype)
    for parameter in model.parameters():
        parameter.requires_grad_(False)  # no gradients of weights; what is kept for them is kept for the inputs, too
    model.gradient_checkpointing_enable({"use_reentrant": False})
    embedded = torch.randn(1, tokens, config.hidden_size, dtype=model.dtype, requires_grad=True)
    with Alive() as alive:
        with casting(dtype):
            out = model.base_model(inputs_embeds=embedded, use_cache=False).last_hidden_state
        out.sum().backward()
    estimated = checkpointed_bytes(config, tokens, 0, dtype)
    assert 0.8 < estimated / alive.most < 1.5, (estimated, alive.most)


@pytest.mark.parametrize("kept", [True, False], ids=["kept", "computed again"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_head_takes_what_its_logits_take(dtype: Arithmetic, kept: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    scored, vocabulary = 512, 3000
    for module in (activations, head):
        monkeypatch.setattr(module, "BLOCK_BYTES", scored * vocabulary)  # a quarter of the logits
        monkeypatch.setattr(module, "KEPT_BYTES", head.KEPT_BYTES if kept else 0)
    config = LlamaConfig(hidden_size=64, vocab_size=vocabulary)
    own = torch.bfloat16 if dtype == "bf16-weights" else torch.float32
    hidden = torch.randn(scored, 64, dtype=own, requires_grad=True)
    weight = torch.randn(vocabulary, 64, dtype=own, requires_grad=True)
    targets = torch.zeros(scored, dtype=torch.long)
    with Alive() as alive:
        with casting(dtype):
            log_probs, *_ = head.score_tokens(hidden, weight, None, targets)
        log_probs.sum().backward()
    estimated = activation_bytes(config, 0, scored, dtype) - activation_bytes(config, 0, 0, dtype)
    assert 0.8 < estimated / alive.most < 1.5, (estimated, alive.most)


def test_on_a_gpu_the_tile_of_trls_head_is_all() -> None:
    from trl.kernels import chunked_logprob
    from trl.trainer import utils

    assert utils._CHUNKED_LOGPROB_CHUNK_SIZE == activations.VOCABULARY_TILE == head.VOCABULARY_TILE
    assert chunked_logprob.TOKEN_CHUNK_SIZE == activations.TOKEN_TILE

    def most(scored: int, dtype: Arithmetic = "fp32") -> int:
        with_head, without = (activation_bytes(llama(1), 0, count, dtype, "cuda") for count in (scored, 0))
        return with_head - without

    gradients = (300 + 100) * 64 * 4
    assert most(100) == 100 * 32768 * 4 + gradients
    assert most(100, "bf16-autocast") == 100 * 32768 * 2 + gradients + 300 * 64 * 2, "a tile of weights is cast"
    assert most(100, "bf16-weights") == 100 * 32768 * 2 + gradients + 400 * 64 * 2, "the gradients are, at the end"
    # no more tiles, only the gradient of the hidden states
    assert most(2 * activations.TOKEN_TILE) - most(activations.TOKEN_TILE) == activations.TOKEN_TILE * 64 * 4


def test_attentions_share_of_the_time_of_a_token_by_hand() -> None:
    """Hidden 64, 4 heads of 16, keys and values of 2: weights a layer 64 * (2 * 64 + 2 * 32) + 3 * 64 * 176 = 46,080;
    2 * 46,080 operations a token against 4 * 64 * L / 2: b / a = 128 / 92,160 = 1 / 720."""
    assert attention_share(llama(1)) == pytest.approx(1 / 720)


def test_zero_in_bf16_has_bf16_weights_and_nothing_else_has() -> None:
    engines = ("single", "ddp", "zero1", "zero2", "zero3")
    assert {arithmetic("fp32", one) for one in engines} == {"fp32"}
    assert [arithmetic("bf16", one) for one in engines] == ["bf16-autocast"] * 2 + ["bf16-weights"] * 3
    assert set(DTYPES) == set(get_args(Arithmetic)) == set(reference.DTYPES)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_state_is_shared_as_the_strategy_says(precision: Any) -> None:
    """80 weights, 4 processes. fp32, and bf16 without ZeRO: 4 bytes each of a weight, its gradient, two moments."""

    def state(strategy: str, offload: str = "none", trainable: int = 80, hpz: int = 1) -> int:
        return state_bytes(Load(1, precision, 80, trainable, strategy, 4, offload, hpz))

    assert state("single") == 320 * 4
    assert state("ddp") == 320 * 5
    assert state("single", trainable=10) == 320 + 3 * 40
    if precision == "fp32":
        assert state("zero1") == 320 + 320 + 320 * 3 // 4
        assert state("zero2") == 320 + 320 * 4 // 4
        assert state("zero3") == 320 * 5 // 4
        assert state("zero1", "optimizer") == 320 + 320
        assert state("zero2", "optimizer") == 320
        assert state("zero3", "optimizer") == 320 // 4
        assert state("zero3", hpz=2) == 320 * 5 // 4 + 320 // 2
    else:  # 160 of weights; gradients 320, in ZeRO-1 also 160 that are added to them and 160 that are sent
        assert state("zero1") == 160 + 640 + 320 * 3 // 4
        assert state("zero2") == 160 + 320 * 4 // 4
        assert state("zero3") == 160 // 4 + 320 * 4 // 4
        assert state("zero1", "optimizer") == 160 + 320 + 320 // 4
        assert state("zero2", "optimizer") == 160 + 320 // 4
        assert state("zero3", "optimizer") == 160 // 4
        assert state("zero3", hpz=2) == 160 // 4 + 320 * 4 // 4 + 160 // 2
        assert state("zero2", trainable=10) == 160 + 40 * 4 // 4, "frozen weights have neither copy nor gradient"
    assert state("zero3", "all") == 0


def test_a_reference_counts_that_is_kept_beside_the_policy() -> None:
    """80 weights, 4 processes. A frozen model: its weights, whole but in ZeRO-3. One that moves: as a third moment."""

    def more(strategy: str, precision: Any = "fp32", offload: str = "none", **reference: Any) -> int:
        load = Load(1, precision, 80, 80, strategy, 4, offload)
        return state_bytes(load._replace(**reference)) - state_bytes(load)

    assert [more(one, frozen=80) for one in ("single", "ddp", "zero1", "zero2", "zero3")] == [320] * 4 + [80]
    assert [more(one, "bf16", frozen=80) for one in ("ddp", "zero2", "zero3")] == [320, 160, 40]
    assert more("zero3", offload="optimizer", frozen=80) == 80 and more("zero3", offload="all", frozen=80) == 0
    assert [more(one, moving=True) for one in ("single", "ddp", "zero1", "zero2", "zero3")] == [320] * 2 + [80] * 3
    assert more("zero2", "bf16", moving=True) == 80 and more("zero2", offload="optimizer", moving=True) == 0


@pytest.mark.parametrize("kind", ["grpo", "grpo_lora", "online_dpo", "ppo", "no_kl", "tr_dpo", "dpo"])
def test_what_trainers_keep_beside_the_policy_is_what_is_estimated(kind: str, tmp_path: Path) -> None:
    """Weights that a trainer has, and those of its reference, against what the engine was chosen for."""
    settings: dict[str, Any] = {
        "grpo": online.grpo(), "grpo_lora": online.grpo(lora=tiny.LORA), "online_dpo": online.online_dpo(),
        "ppo": online.ppo(), "no_kl": online.rloo(kl=online.NO_KL), "dpo": tiny.dpo(),
        "tr_dpo": tiny.dpo(reference_update={"every_steps": 1, "share": 0.5}),
    }  # fmt: skip
    start = online.write_inputs(tmp_path)["model"] / "model"
    model = AutoModelForCausalLM.from_pretrained(start)
    load = engine.choose(settings[kind], tiny.engine(), start, model.config, 1, 30, 100).load
    classes = {"ppo": PPOTrainer, "online_dpo": OnlineDPOTrainer}
    if "dpo" in kind and kind != "online_dpo":
        rows = Dataset.from_list(tiny.pair_rows())
        given = {"objective": Objective(settings[kind]), "references": References(None), "train_dataset": rows}
        sizes = {"batches": trainers.batches_of("dpo", rows, 1, 120), "widths": [60] * len(rows)}
        args = trainers.configuration("dpo", 1, tmp_path, precompute_ref_log_probs=True)
        tokenizer = AutoTokenizer.from_pretrained(start)
        common = {"on_step": lambda *given: None, "packing": Packing(), "processing_class": tokenizer}
        made: Any = DPO(model=model, args=args, **given, **sizes, **common)
        made.train()
        kept = sum(weight.numel() for weight in made.anchor.values())
        assert kept == load.moving * load.trainable
    else:
        made = online.trainer(tmp_path, settings[kind], 1, kind=classes.get(kind, PolicyGradientTrainer))
        kept = 0 if made._reference is None else sum(one.numel() for one in made._reference.parameters())
        assert kept == load.frozen
    assert (kept > 0) == (kind not in ("grpo_lora", "no_kl", "dpo"))
    assert load.parameters == sum(one.numel() for one in made.model.parameters())
    assert load.trainable == sum(one.numel() for one in made.model.parameters() if one.requires_grad)


@pytest.mark.parametrize("dtype", DTYPES)
def test_decoding_takes_its_cache_and_its_logits(dtype: Arithmetic) -> None:
    """Most bytes alive while 8 prompts of 200 tokens get 4 answers of 20 each."""
    config, precision = llama(3), "fp32" if dtype == "fp32" else "bf16"
    model = made(config, dtype).eval()
    strategy = "zero2" if dtype == "bf16-weights" else "single"
    noise = torch.rand(8, 4, 20, generator=torch.Generator().manual_seed(0))
    with Alive() as alive, casting(dtype):
        list(generation.draw(model, [[5] * 200] * 8, noise, stop=[299], temperature=1.0, top_p=1.0, batch_size=32))
    estimated = decoding_bytes(config, Load(1, precision, 0, 0, strategy, decoding=(32, 220)))  # type: ignore[arg-type]
    assert 0.7 < estimated / alive.most < 1.5, (estimated, alive.most)


def test_answers_are_decoded_as_many_at_once_as_a_process_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 16 together 4 prompts with 4 answers each; of a rollout of 4 prompts on 2 processes each has 2. A record is a
    prompt of 10 tokens and 4 answers of 8."""
    monkeypatch.setattr(engine, "count_parameters", lambda *folder: 1000)
    load = [
        engine.choose(settings, tiny.engine("ddp"), tmp_path, llama(1), processes, 42, 100).load.decoding
        for settings, processes in (
            (online.grpo(), 1),
            (online.grpo(), 2),
            (online.grpo(sampling_batch_size=2), 1),
            (online.grpo(batches_per_rollout=2), 1),
        )
    ]
    assert load == [(16, 18), (8, 18), (4, 18), (16, 18)]
    assert engine.choose(online.online_dpo(), tiny.engine(), tmp_path, llama(1), 1, 26, 100).load.decoding == (16, 18)


ZERO: tuple[dict[str, Any], ...] = (
    {"strategy": "zero1"}, {"strategy": "zero2"}, {"strategy": "zero3"}, {"strategy": "zero3", "hpz": 2},
    {"strategy": "zero2", "lora": True}, {"strategy": "zero3", "lora": True},
    {"strategy": "zero1", "offload": "optimizer"}, {"strategy": "zero2", "offload": "optimizer"},
    {"strategy": "zero3", "offload": "optimizer"}, {"strategy": "zero3", "offload": "all"},
    {"strategy": "zero1", "precision": "fp32"}, {"strategy": "zero2", "precision": "fp32"},
    {"strategy": "zero3", "precision": "fp32"},
)  # fmt: skip


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, int]]:
    """What DeepSpeed takes in each case of ZERO."""
    folder = tmp_path_factory.mktemp("held")
    process = FORKING.Process(target=held.main, args=(ZERO, folder))
    process.start()
    process.join(300)
    assert process.exitcode == 0, (folder / "said.txt").read_text()[-6000:]
    return json.loads((folder / "found.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize("case", range(len(ZERO)), ids=[" ".join(map(str, case.values())) for case in ZERO])
def test_under_zero_state_and_activations_are_what_deepspeed_takes(case: int, measured: list[dict[str, int]]) -> None:
    """On a CPU the device's memory is the host's: what is offloaded is added by hand, as docs/clusters.md has it."""
    found, told = measured[case], {"precision": "bf16", "offload": "none", "hpz": 1, **ZERO[case]}
    told.pop("lora", None)
    sizes = {name: found[name] for name in ("parameters", "trainable")}
    load = Load(held.TOKENS, world_size=held.PROCESSES, **sizes, **told)
    state, forward = state_bytes(load), activation_bytes(held.llama(), held.TOKENS, 0, load.dtype)
    if load.offload != "none":
        state += (20 if load.strategy == "zero3" else 18) * load.trainable // held.PROCESSES
    if load.offload == "all":
        state += 2 * load.parameters // held.PROCESSES
    if load.hpz > 1:
        forward += 2 * load.parameters // load.hpz  # the second copy of the weights is made anew
    assert 0.999 < found["held"] / state < 1.04, (found, state)
    assert 0.999 < forward / found["kept"] < (1.15 if load.trainable < load.parameters else 1.001), (found, forward)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", [llama, qwen2, gpt2])
def test_a_reference_pass_takes_less_than_a_step(
    family: Any, dtype: Arithmetic, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Most bytes alive in a forward without gradients over BUDGET times the tokens, with two layers, the fewest."""
    config, tokens = family(3), 500
    config.num_hidden_layers = 2
    for module in (head, memory):  # several blocks of logits, as large heads have
        monkeypatch.setattr(module, "BLOCK_BYTES", tokens * config.vocab_size)
    model = made(config, dtype).eval()
    ids = torch.ones(1, BUDGET * tokens, dtype=torch.long)
    with Alive() as alive, torch.no_grad(), casting(dtype):
        hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state[0]
        head.score_tokens(hidden, model.get_output_embeddings().weight, None, ids[0], measure=False)
    assert tokens * config.hidden_size * 4 < alive.most < activation_bytes(config, tokens, tokens, dtype)


@pytest.mark.parametrize(
    "targets", ["all-linear", ["q_proj", "v_proj"], ["gate_proj", "down_proj", "k_proj", "o_proj"]]
)
@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("family", [llama, qwen2])
def test_adapters_are_as_large_as_pefts(family: Any, dora: bool, targets: Any) -> None:
    assert adapter_parameters(family(1), 3, targets, dora) == trainable(family(1), targets, dora)


def test_adapters_on_layers_of_other_names_are_not_larger_than_all() -> None:
    assert adapter_parameters(llama(1), 3, ["q_proj", "qkv_proj"]) == adapter_parameters(llama(1), 3, "all-linear")
    for targets in ("all-linear", ["c_attn"], ["c_proj"]):
        assert trainable(gpt2(1), targets) <= adapter_parameters(gpt2(1), 3, targets)


def trainable(config: Any, targets: Any, dora: bool = False) -> int:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    how = LoraConfig(task_type=TaskType.CAUSAL_LM, r=3, target_modules=targets, use_dora=dora)
    adapted = get_peft_model(model, how)
    return int(adapted.get_nb_trainable_parameters()[0])
