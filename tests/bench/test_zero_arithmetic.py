"""The figures of docs/clusters.md are those of bench/zero_arithmetic.py, and those are what the project's code says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from alignment.training import memory
from bench import zero_arithmetic as arithmetic
from bench.zero_arithmetic import MODELS, STRATEGIES, TABLES, Model

SMALL = Model("small", 4, 256, 704, 4, 4, 300)
both = pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)


def config(model: Model, layers: int | None = None) -> Any:
    return LlamaConfig(
        hidden_size=model.hidden, intermediate_size=model.inner, num_hidden_layers=layers or model.layers,
        num_attention_heads=model.heads, num_key_value_heads=model.key_heads, vocab_size=model.vocabulary,
    )  # fmt: skip


@pytest.mark.parametrize("name", TABLES)
def test_the_pages_tables_are_what_is_worked_out(name: str) -> None:
    found = arithmetic.marked(name).search(arithmetic.PAGE.read_text(encoding="utf-8"))
    assert found is not None and found[1] == TABLES[name]() + "\n", "python -m bench.zero_arithmetic --write"


@both
def test_weights_and_adapters_are_those_of_the_architecture(model: Model) -> None:
    with torch.device("meta"):
        whole = AutoModelForCausalLM.from_config(config(model))
    assert sum(weight.numel() for weight in whole.parameters()) == model.parameters
    assert memory.adapter_parameters(config(model), arithmetic.RANK, "all-linear") == model.adapters


@both
def test_activations_under_autocast_are_the_projects_estimate(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)  # its head, not that of a CPU
    for tokens in arithmetic.TOKENS:
        for checkpointing, count in ((False, memory.activation_bytes), (True, memory.checkpointed_bytes)):
            expected = count(config(model), tokens, tokens, "bf16")
            assert arithmetic.activations(model, tokens, checkpointing, autocast=True) == expected


def test_with_bf16_weights_a_layer_keeps_what_autograd_keeps() -> None:
    def kept(layers: int, tokens: int = 128) -> int:
        model = AutoModelForCausalLM.from_config(config(SMALL, layers)).bfloat16()
        weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
        seen: dict[int, Any] = {}

        def keep(value: torch.Tensor) -> torch.Tensor:
            storage = value.untyped_storage()
            if storage.data_ptr() not in weights:
                seen[storage.data_ptr()] = storage
            return value

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value):
            model.model(input_ids=torch.arange(tokens)[None])
        return sum(storage.nbytes() for storage in seen.values()) // tokens

    assert (kept(4) - kept(2)) / 2 == arithmetic.layer_activations(SMALL, autocast=False)


@both
@pytest.mark.parametrize("lora", [False, True])
def test_the_projects_estimate_of_the_state_is_quoted_rightly(model: Model, lora: bool) -> None:
    psi, trained = arithmetic.trained(model, lora)
    for strategy in STRATEGIES:
        engine, _, rest = strategy.engine.partition(" ")
        offload = rest.removeprefix("engine.offload=") if "offload" in rest else "none"
        hpz = int(rest.removeprefix("engine.hpz=")) if "hpz" in rest else 1
        said = memory.state_bytes(psi, trained, engine, 32, offload, hpz)
        assert arithmetic.estimated_state(strategy, psi, trained, 32) == pytest.approx(said, abs=8), strategy.name


@pytest.mark.parametrize("strategy", STRATEGIES, ids=lambda strategy: strategy.name)
def test_in_fp32_the_estimate_of_the_state_is_the_arithmetic(strategy: arithmetic.Strategy) -> None:
    psi, trained = arithmetic.trained(MODELS[0], True)
    assert strategy.fp32_state(psi, trained, 32) == pytest.approx(
        arithmetic.estimated_state(strategy, psi, trained, 32), abs=8
    )


def test_the_script_needs_the_standard_library_alone() -> None:
    lines = Path(arithmetic.__file__).read_text(encoding="utf-8").splitlines()
    imports = [line for line in lines if line.startswith(("import ", "from "))]
    assert {line.split()[1] for line in imports} <= {
        "__future__", "argparse", "re", "collections.abc", "dataclasses", "pathlib",
    }  # fmt: skip
