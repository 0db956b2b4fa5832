"""The figures of docs/clusters.md are those of bench/zero_arithmetic.py, and those are what the project's code says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from alignment.training import activations, engine, memory, shape
from alignment.training.memory import Load
from bench import zero_arithmetic as arithmetic
from bench import zero_tables as tables
from bench.zero_arithmetic import MODELS, STRATEGIES, Model, Strategy
from bench.zero_tables import TABLES
from tests.training import tiny

SMALL = Model("small", 4, 256, 704, 4, 4, 300)
both = pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)


def config(model: Model, layers: int | None = None) -> Any:
    return LlamaConfig(
        hidden_size=model.hidden, intermediate_size=model.inner, num_hidden_layers=layers or model.layers,
        num_attention_heads=model.heads, num_key_value_heads=model.key_heads, vocab_size=model.vocabulary,
    )  # fmt: skip


def settings(strategy: Strategy) -> dict[str, Any]:
    """strategy: of the engine, and what else the page sets for it."""
    name, *rest = strategy.engine.split(" engine.")
    values = dict(setting.split("=") for setting in rest)
    return {"strategy": name, **{key: int(value) if key == "hpz" else value for key, value in values.items()}}


@pytest.mark.parametrize("name", TABLES)
def test_the_pages_tables_are_what_is_worked_out(name: str) -> None:
    found = tables.marked(name).search(tables.PAGE.read_text(encoding="utf-8"))
    assert found is not None and found[1] == TABLES[name]() + "\n", "python -m bench.zero_tables --write"


@both
def test_weights_and_adapters_are_those_of_the_architecture(model: Model) -> None:
    with torch.device("meta"):
        whole = AutoModelForCausalLM.from_config(config(model))
    assert sum(weight.numel() for weight in whole.parameters()) == model.parameters
    assert shape.adapter_parameters(config(model), arithmetic.RANK, "all-linear") == model.adapters


@both
@pytest.mark.parametrize("dtype", ["bf16-autocast", "bf16-weights"])
def test_the_projects_estimate_of_activations_is_the_arithmetic(model: Model, dtype: Any) -> None:
    for tokens in arithmetic.TOKENS:
        for checkpointing, count in ((False, activations.activation_bytes), (True, activations.checkpointed_bytes)):
            by_hand = arithmetic.activations(model, tokens, checkpointing, autocast=dtype == "bf16-autocast")
            assert count(config(model), tokens, tokens, dtype, "cuda") == by_hand  # its head, not that of a CPU


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
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("strategy", STRATEGIES, ids=lambda strategy: strategy.name)
def test_the_projects_estimate_of_the_state_is_the_arithmetic(strategy: Strategy, model: Model, lora: bool) -> None:
    psi, trained = arithmetic.trained(model, lora)
    for gpus in arithmetic.GPUS:
        for precision, by_hand in (("fp32", strategy.fp32_state), ("bf16", strategy.state)):
            load = Load(1, precision, psi, trained, world_size=gpus, **settings(strategy))
            assert memory.state_bytes(load) == pytest.approx(by_hand(psi, trained, gpus), rel=0, abs=3), gpus
    assert tables.said(strategy, psi, trained, 32) == memory.state_bytes(load), "the page quotes it"


@both
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("strategy", STRATEGIES, ids=lambda strategy: strategy.name)
def test_auto_takes_what_the_page_says_that_fits(
    strategy: Strategy, model: Model, lora: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(engine, "available_bytes", lambda: int(arithmetic.CLUSTER.memory))
    monkeypatch.setattr(engine, "count_parameters", lambda folder: model.parameters)
    stage = tiny.sft(precision="bf16", lora=tiny.LORA.model_copy(update={"rank": arithmetic.RANK}) if lora else None)
    auto = {"tokens_per_micro_batch": "auto", "gradient_checkpointing": "auto"}
    setup = tiny.engine(**settings(strategy), **auto)
    for gpus in arithmetic.GPUS:
        choice = engine.choose(stage, setup, tmp_path, config(model), gpus, 2048, 10**9)
        by_hand = arithmetic.largest(model, strategy, gpus, lora)
        assert ("may not suffice" in choice.why) == (by_hand is None), (gpus, choice.why)
        if by_hand is not None:
            assert (choice.tokens_per_micro_batch, choice.checkpointing) == by_hand, (gpus, choice.why)


def test_the_arithmetic_needs_the_standard_library_alone() -> None:
    """The project's own estimate is asked for in one function of the tables, that the page can quote it."""
    lines = Path(arithmetic.__file__).read_text(encoding="utf-8").splitlines()
    assert {line.split()[1] for line in lines if line.lstrip().startswith(("import ", "from "))} <= {
        "__future__", "collections.abc", "dataclasses",
    }  # fmt: skip
    lines = Path(tables.__file__).read_text(encoding="utf-8").splitlines()
    assert [line.split()[1] for line in lines if line.startswith("    from ")] == ["alignment.training.memory"]
