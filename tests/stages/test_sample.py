from __future__ import annotations

import importlib.util
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from alignment import generation
from alignment.errors import InputError, MachineError, PreemptedError
from alignment.files import read_json, read_jsonl
from alignment.pipeline.store import SAMPLED
from alignment.stages import sample
from alignment.stages.context import StageContext
from tests.stages import fake_vllm
from tests.stages.conftest import QUESTIONS, MakeContext


def test_every_prompt_gets_its_completions_and_two_runs_the_same(
    make_context: MakeContext, models: dict[str, Path], rows: Path
) -> None:
    inputs = {"model": models["sft"], "data": rows}
    first, again = (
        make_context("sample", inputs, name=name, completions_per_prompt=3, max_new_tokens=8)
        for name in ("first", "again")
    )
    metrics = sample.run(first)
    timed = ("seconds", "tokens_per_s")
    assert {**sample.run(again), **{name: metrics[name] for name in timed}} == metrics
    written = list(read_jsonl(first.folder / "samples.jsonl"))
    assert written == list(read_jsonl(again.folder / "samples.jsonl"))
    assert [row["id"] for row in written] == [f"row-{i}" for i in range(5)]
    assert [row["prompt"][0]["content"] for row in written] == QUESTIONS
    every = [completion for row in written for completion in row["completions"]]
    assert len(every) == 15
    assert all(set(completion) == {"text", "tokens", "finished"} for completion in every)
    assert all(completion["finished"] or completion["tokens"] == 8 for completion in every)
    assert (metrics["prompts"], metrics["completions"]) == (5, 15)
    assert metrics["tokens"] == pytest.approx(sum(completion["tokens"] for completion in every) / 15)
    assert metrics["stop_rate"] == pytest.approx(sum(completion["finished"] for completion in every) / 15)
    assert metrics["tokens_per_s"] == pytest.approx(metrics["tokens"] * 15 / metrics["seconds"])
    progress = read_json(first.folder / "progress.json")
    assert (progress["step"], progress["total"], progress["note"]) == (1000, 1000, "sampling")
    assert progress["tokens_per_s"] > 0
    (logged,) = read_jsonl(first.folder / "metrics.jsonl")
    assert {name: logged[name] for name in metrics} == metrics


def test_without_prompts_the_stage_says_which_file_is_empty(
    make_context: MakeContext, models: dict[str, Path], rows: Path, tmp_path: Path
) -> None:
    (tmp_path / "prompts.jsonl").touch()
    with pytest.raises(InputError, match=r"prompts\.jsonl: prompts\.jsonl has no rows"):
        sample.run(make_context("sample", {"model": models["sft"], "data": tmp_path}))


HOW = {"completions_per_prompt": 3, "max_new_tokens": 8, "batch_size": 6}  # two prompts a batch: three batches
BACKENDS = ["loop", "continuous", "vllm"]


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> list[fake_vllm.LLM]:
    """A stub in the place of vLLM; the engines that it makes."""
    monkeypatch.setitem(sys.modules, "vllm", fake_vllm)
    monkeypatch.setattr(fake_vllm, "MADE", [])
    return fake_vllm.MADE


def asked_after(context: StageContext, batches: int) -> None:
    """The stage is asked to stop once so many batches are kept."""

    def tell_next(**facts: Any) -> None:
        told(**facts)
        seen.append(facts)
        if len(seen) == batches:
            context.stop.asked = "SIGTERM"

    told, seen = context.tell_next, list[dict[str, Any]]()
    context.tell_next = tell_next  # type: ignore[method-assign]


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """One batch a part, so that five prompts are three of them with every backend."""
    monkeypatch.setattr("alignment.stages.backends.PART", 1)


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_attempt_goes_on_after_the_answers_of_the_one_before_bit_for_bit(
    backend: str,
    make_context: MakeContext,
    models: dict[str, Path],
    rows: Path,
    small_parts: None,
    vllm: list[fake_vllm.LLM],
) -> None:
    inputs = {"model": models["sft"], "data": rows}
    whole, cut = (make_context("sample", inputs, name=name, backend=backend, **HOW) for name in ("whole", "cut"))
    sample.run(whole)
    asked_after(cut, 2)
    with pytest.raises(PreemptedError, match="SIGTERM: the answers to 4 of 5 prompts are kept") as told:
        sample.run(cut)
    assert told.value.kept is True
    assert cut.told() == {"sampled": 4}
    kept = (cut.folder / SAMPLED).read_text().splitlines()
    assert len(kept) == 2
    cut.stop.asked = None
    metrics = sample.run(cut)
    assert len((cut.folder / SAMPLED).read_text().splitlines()) == 3, "what was kept is not sampled again"
    assert (cut.folder / "samples.jsonl").read_bytes() == (whole.folder / "samples.jsonl").read_bytes()
    assert metrics["completions"] == 15


def test_a_stop_before_the_first_batch_is_done_keeps_nothing(
    make_context: MakeContext, models: dict[str, Path], rows: Path
) -> None:
    context = make_context("sample", {"model": models["sft"], "data": rows}, **HOW)
    context.stop.asked = "SIGTERM"
    with pytest.raises(PreemptedError, match="0 of 5") as told:
        sample.run(context)
    assert told.value.kept is False
    assert not (context.folder / SAMPLED).exists()


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "cut": lambda text: text[:-20],
    "flipped": lambda text: text.replace(b'"finished": true', b'"finished": null', 1),
    "no line of ours": lambda text: b"[]\nnull\n" + text,
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_kept_answers_that_are_damaged_are_told_of_and_sampled_again(
    damage: str, make_context: MakeContext, models: dict[str, Path], rows: Path
) -> None:
    context = make_context("sample", {"model": models["sft"], "data": rows}, **{**HOW, "max_new_tokens": 30})
    sample.run(context)
    whole, kept = (context.folder / "samples.jsonl").read_bytes(), context.folder / SAMPLED
    damaged = DAMAGE[damage](kept.read_bytes())
    assert damaged != kept.read_bytes()
    kept.write_bytes(damaged)
    sample.run(context)
    assert (context.folder / "samples.jsonl").read_bytes() == whole
    assert "batches of answers in sampled.jsonl are damaged" in (context.folder / "warnings.txt").read_text()


def test_continuous_batching_draws_the_distribution_of_the_model(
    make_context: MakeContext, models: dict[str, Path], rows: Path
) -> None:
    """First tokens of 600 answers to one prompt, against the probabilities of a plain forward: of the most probable
    token, whose share has a standard deviation of sqrt(p (1 - p) / 600) <= 0.0205: within four of these."""
    import torch

    context = make_context(
        "sample", {"model": models["sft"], "data": rows}, backend="continuous", prompts=1, first_prompt=1,
        completions_per_prompt=600, max_new_tokens=1, batch_size=32, top_p=1.0,
    )  # fmt: skip
    sample.run(context)
    (row,) = read_jsonl(context.folder / "samples.jsonl")
    assert row["prompt"][0]["content"] == QUESTIONS[1]
    model, tokenizer = generation.load(models["sft"] / "model", "fp32")
    ids = generation.encode_prompt(tokenizer, row["prompt"])
    with torch.inference_mode():
        probs = model(torch.tensor([ids])).logits[0, -1].softmax(-1)
    best = int(probs.argmax())
    text = tokenizer.decode([best], skip_special_tokens=True)
    assert len(row["completions"]) == 600
    share = sum(completion["text"] == text for completion in row["completions"]) / 600
    assert share == pytest.approx(float(probs[best]), abs=4 * 0.0205)


def test_vllm_gets_token_ids_with_settings_and_a_seed_for_each_and_its_answers_find_their_prompts(
    make_context: MakeContext, models: dict[str, Path], rows: Path, small_parts: None, vllm: list[fake_vllm.LLM]
) -> None:
    """With a stub: what vLLM itself draws is not looked at."""
    inputs = {"model": models["sft"], "data": rows}
    contexts = [make_context("sample", inputs, name=f"of {seed}", backend="vllm", seed=seed, **HOW) for seed in (1, 2)]
    metrics = [sample.run(context) for context in contexts]
    assert all(found["completions"] == 15 for found in metrics)
    engine, other = vllm
    folder = models["sft"] / "model"
    assert engine.options == {"model": str(folder), "dtype": "float32", "seed": 1, "max_num_seqs": 6}
    model, tokenizer = generation.load(folder, "fp32")
    written = list(read_jsonl(contexts[0].folder / "samples.jsonl"))
    assert [row["prompt"][0]["content"] for row in written] == QUESTIONS
    ids = [generation.encode_prompt(tokenizer, row["prompt"]) for row in written]
    assert [len(asked) for asked, _ in engine.asked] == sorted(map(len, ids), reverse=True)
    given = {tuple(asked): how for asked, how in engine.asked}
    assert set(given) == set(map(tuple, ids))
    settings: Any = contexts[0].settings
    stop = generation.stop_tokens(model, tokenizer)
    for how in given.values():
        assert (how.n, how.max_tokens, how.stop_token_ids, how.logprobs) == (3, 8, stop, 0)
        assert (how.temperature, how.top_p) == (settings.temperature, settings.top_p)
    seeds = [[how.seed for _, how in one.asked] for one in (engine, other)]
    assert len(set(seeds[0] + seeds[1])) == 10, "one for each prompt, and others with another seed of the stage"
    for row, prompt in zip(written, ids, strict=True):
        drawn = [engine._answer(prompt, given[tuple(prompt)], index).token_ids for index in range(3)]
        assert [completion["tokens"] for completion in row["completions"]] == list(map(len, drawn))
        assert [completion["finished"] for completion in row["completions"]] == [one[-1] in stop for one in drawn]
        texts = [tokenizer.decode(one, skip_special_tokens=True) for one in drawn]
        assert [completion["text"] for completion in row["completions"]] == texts and len(set(texts)) > 1


@pytest.fixture(scope="session")
def broken(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The result of a stage whose model has NaN in the embedding, and in the logit, of a token that no prompt has."""
    from safetensors.torch import load_file, save_file

    folder = tmp_path_factory.mktemp("broken")
    shutil.copytree(models["sft"] / "model", folder / "model")
    file = folder / "model" / "model.safetensors"
    weights = load_file(file)
    weights["model.embed_tokens.weight"][-1] = float("nan")
    save_file(weights, file, metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("backend", BACKENDS)
def test_log_probs_that_are_not_finite_are_an_error_and_no_answer_whatever_samples(
    backend: str, make_context: MakeContext, broken: Path, rows: Path, vllm: list[fake_vllm.LLM]
) -> None:
    context = make_context("sample", {"model": broken, "data": rows}, backend=backend, **HOW)
    with pytest.raises(InputError, match="log-probs that are NaN or infinite"):
        sample.run(context)
    assert not (context.folder / SAMPLED).exists()


def test_a_slice_of_the_prompts_is_sampled_and_too_few_are_told(
    make_context: MakeContext, models: dict[str, Path], rows: Path
) -> None:
    inputs = {"model": models["sft"], "data": rows}
    how = {"completions_per_prompt": 2, "max_new_tokens": 2}
    context = make_context("sample", inputs, first_prompt=1, prompts=3, **how)
    assert sample.run(context)["completions"] == 6
    assert [row["id"] for row in read_jsonl(context.folder / "samples.jsonl")] == ["row-1", "row-2", "row-3"]
    with pytest.raises(InputError, match="has 5 rows, and 3 are asked for from row 4 on"):
        sample.run(make_context("sample", inputs, name="beyond", first_prompt=3, prompts=3, **how))


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="it is installed")
def test_without_vllm_it_is_refused_in_one_line(make_context: MakeContext, models: dict[str, Path], rows: Path) -> None:
    context = make_context("sample", {"model": models["sft"], "data": rows}, backend="vllm")
    with pytest.raises(MachineError, match=r"stage\.sample\.backend: the package vllm is missing"):
        sample.run(context)
