"""The training stages in one process: equal to stock TRL given the same batches, loud where a result is worthless."""

from __future__ import annotations

import json
import math
import shutil
import threading
from functools import partialmethod
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import trl
from datasets import load_from_disk
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import alignment.stages.dpo as dpo_stage
import alignment.stages.kto as kto_stage
import alignment.stages.sft as sft_stage
from alignment.errors import AlignmentError, ConfigError, InputError, MachineError, TrainingError
from alignment.training import engine
from alignment.training.batching import GlobalBatches
from alignment.training.preference import DPO
from alignment.training.steps import Steps
from alignment.training.trainers import AlignedTrainer
from tests.training import tiny

STAGES = {"sft": sft_stage, "dpo": dpo_stage, "kto": kto_stage}


def run(folder: Path, settings: Any, setup: Any = None, inputs: dict[str, Path] | None = None) -> dict[str, Any]:
    inputs = inputs or tiny.write_inputs(folder, settings.kind)
    return STAGES[settings.kind].run(tiny.context(folder / "out", inputs, settings, setup or tiny.engine()))


def metrics(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "out" / "metrics.jsonl").read_text().splitlines()]


def changed(**changes: Any) -> Any:
    return tiny.LORA.model_copy(update=changes)


class Sequential:
    """Stock trainer that takes the rows in the order given: one batch of the loader is one global batch."""

    def _get_train_sampler(self, *arguments: Any) -> Any:
        return torch.utils.data.SequentialSampler(self.train_dataset)  # type: ignore[attr-defined]


class StockSFT(Sequential, trl.SFTTrainer):
    pass


class StockDPO(Sequential, trl.DPOTrainer):
    def _prepare_dataset(self, dataset: Any, *arguments: Any) -> Any:
        return dataset


def run_stock(folder: Path, settings: Any, inputs: dict[str, Path]) -> Any:
    rows, start = load_from_disk(str(inputs["data"] / "train")), inputs["model"] / "model"
    batches = GlobalBatches([1] * len(rows), [1] * len(rows), settings.global_batch_size, 10, settings.seed)
    rows = rows.select([row for step in range(10) for row in batches.rows(step)])
    arguments = engine.training_arguments(settings, tiny.engine(), 10, folder)
    arguments.update(per_device_train_batch_size=settings.global_batch_size)
    common = {
        "model": AutoModelForCausalLM.from_pretrained(start), "train_dataset": rows,
        "processing_class": AutoTokenizer.from_pretrained(start),
    }  # fmt: skip
    if settings.kind == "sft":
        trainer = StockSFT(args=trl.SFTConfig(**arguments), **common)
    else:
        config = trl.DPOConfig(
            **arguments, loss_type=[name.removesuffix("_mean") for name in settings.losses], beta=settings.beta,
            loss_weights=list(settings.losses.values()), label_smoothing=settings.label_smoothing,
            ld_alpha=settings.ld_alpha, use_weighting=settings.weighting == "wpo",
            **({} if (update := settings.reference_update) is None else {
                "sync_ref_model": True, "ref_model_sync_steps": update.every_steps,
                "ref_model_mixup_alpha": update.share,
            }),
        )  # fmt: skip
        trainer = StockDPO(ref_model=AutoModelForCausalLM.from_pretrained(start), args=config, **common)
    trainer.train()
    return trainer


@pytest.mark.parametrize(
    "settings",
    [
        tiny.sft(),
        tiny.dpo(),
        tiny.dpo(loss="hinge"),
        tiny.dpo(loss="ipo_mean", beta=0.3),
        tiny.dpo(weighting="wpo"),
        tiny.dpo(ld_alpha=0.4),
        tiny.dpo(loss="aot", label_smoothing=0.1),  # which sorts the pairs of a batch: ours of all micro-batches
        tiny.dpo(loss={"sigmoid": 0.8, "bco_pair": 0.2, "sft": 1.0}),
        tiny.dpo(reference_update={"every_steps": 3, "share": 0.6}),
        tiny.dpo(reference_update={"every_steps": 4, "share": 1.0}),
    ],
    ids=["sft", "dpo", "hinge", "ipo_mean", "wpo", "ld_dpo", "aot", "mpo", "tr_dpo", "tr_dpo_hard"],
)
def test_losses_metrics_and_weights_equal_stock_trl_given_the_same_batches(settings: Any, tmp_path: Path) -> None:
    """Ours in several micro-batches of unequal size, scoring trained positions only; TRL's in one padded batch."""
    inputs = tiny.write_inputs(tmp_path, settings.kind)
    summary = run(tmp_path, settings, tiny.engine(tokens_per_micro_batch=120), inputs)
    if update := getattr(settings, "reference_update", None):  # of 10 steps: before the 4th, 7th, 10th; the 5th, 9th
        assert summary["reference_updates"] == {3: 3, 4: 2}[update.every_steps]
    stock = run_stock(tmp_path, settings, inputs)
    shared = ["loss", "grad_norm", "learning_rate", "entropy", "num_tokens"]
    if settings.kind == "sft":
        shared.append("mean_token_accuracy")
    else:
        shared += ["rewards/chosen", "rewards/rejected", "rewards/margins", "logps/chosen", "logps/rejected"]
        shared = [name for name in shared if settings.ld_alpha is None or "/" not in name]  # TRL weighs these too
    theirs = [row for row in stock.state.log_history if "loss" in row]
    for left, right in zip(metrics(tmp_path), theirs, strict=True):
        for name in shared:
            assert left[name] == pytest.approx(right[name], abs=1e-5, rel=1e-5), (name, right["step"])
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "model").state_dict()
    assert max(float((ours[name] - value).abs().max()) for name, value in stock.model.state_dict().items()) <= 1e-5


@pytest.mark.parametrize("loss", ["simpo", "cpo", "orpo", {"sft": 1.0, "nll": 0.5}], ids=str)
def test_a_loss_without_a_reference_computes_none_and_trains(loss: Any, tmp_path: Path) -> None:
    summary = run(tmp_path, tiny.dpo(loss=loss))
    rows = metrics(tmp_path)
    assert "reference_computed" not in summary and not any("kl" in row for row in rows)
    assert rows[-1]["loss"] < rows[0]["loss"]
    scale = 0.1 if isinstance(loss, str) else 1.0  # without a beta in the loss, and so in the key, metrics have none
    if loss in ("cpo", {"sft": 1.0, "nll": 0.5}):  # whose rewards are sums over tokens
        for row in rows:
            assert row["rewards/chosen"] == pytest.approx(scale * row["logps/chosen"])


def test_a_loss_of_answers_without_a_reference_point_looks_at_no_other_prompts_answer(tmp_path: Path) -> None:
    """Of the reference the log-probs of the answers' own tokens are kept, and no more; any budget is one result."""
    found = []
    for budget in (10_000, 1):
        settings, folder = tiny.kto(loss="apo_zero_unpaired", max_steps=7), tmp_path / str(budget)
        context = tiny.context(
            folder / "out", tiny.write_inputs(folder, "kto"), settings, tiny.engine(tokens_per_micro_batch=budget)
        )
        context.shared = folder
        assert kto_stage.run(context)["first_loss"] == pytest.approx(0.5, abs=1e-6)
        kept = [load_file(file)["log_probs"] for file in (folder / "reference").rglob("*.safetensors")]
        assert sum(map(len, kept)) == sum(len(row["completion_ids"]) for row in tiny.unpaired_rows())
        found.append(metrics(folder))
    assert all(row["reference_point"] == 0 for row in found[0])
    assert [row["loss"] for row in found[0]] == pytest.approx([row["loss"] for row in found[1]], abs=1e-5)
    assert found[0][-1]["loss"] < 0.499


def test_a_reference_that_would_never_move_is_refused_where_the_rows_are_known(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="the reference moves every 10 steps, and these rows are 10"):
        run(tmp_path, tiny.dpo(reference_update={"every_steps": 10, "share": 0.5}))


def test_labels_that_are_one_sided_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(tmp_path, tiny.kto(max_steps=1))
    told = "26 rows are wanted and 14 are not: with their weights 1.86 to 1, where KTO's paper advises 1 to 1.5"
    assert f"{told}; stage.kto.desirable_weight=0.538 would make it even" in capsys.readouterr().out
    run(tmp_path / "even", tiny.kto(max_steps=1, desirable_weight=0.538))
    assert "advises" not in capsys.readouterr().out


def test_the_first_loss_in_the_summary_is_that_of_the_first_step_whatever_is_logged(tmp_path: Path) -> None:
    summary = run(tmp_path, tiny.dpo(log_every=5))
    assert summary["first_loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert metrics(tmp_path)[0]["loss"] != pytest.approx(math.log(2), abs=1e-4), "the mean of five steps is another"


def test_a_run_of_one_step_moves_the_model_though_it_warms_up(tmp_path: Path) -> None:
    run(tmp_path, tiny.sft(max_steps=1, warmup_ratio=0.1))
    assert metrics(tmp_path)[0]["learning_rate"] == pytest.approx(1e-3)


def test_a_disk_without_room_for_the_model_is_said_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=100_000))
    with pytest.raises(MachineError, match=r"MB of weights do not fit"):
        run(tmp_path, tiny.sft())
    assert not (tmp_path / "out" / "metrics.jsonl").exists()


@pytest.mark.parametrize(
    "settings",
    [
        tiny.sft(),
        tiny.dpo(),
        tiny.dpo(loss="beta_dpo"),
        tiny.dpo(loss="aot_unpaired"),
        tiny.dpo(loss="simpo"),
        tiny.kto(),
    ],
    ids=lambda settings: getattr(settings, "loss", "sft"),
)
def test_the_token_budget_does_not_change_the_result(settings: Any, tmp_path: Path) -> None:
    for name, budget in (("one", 10_000), ("many", 1)):
        run(tmp_path / name, settings, tiny.engine(tokens_per_micro_batch=budget))
    one, many = metrics(tmp_path / "one"), metrics(tmp_path / "many")
    assert [row["loss"] for row in one] == pytest.approx([row["loss"] for row in many], abs=1e-5)
    assert one[-1].keys() == many[-1].keys()


@pytest.mark.parametrize(
    ("loss", "beta", "expected"), [("sigmoid", 0.1, math.log(2)), ("hinge", 0.1, 1.0), ("ipo_mean", 0.5, 1.0)]
)
def test_the_first_dpo_loss_is_that_of_zero_margins(loss: str, beta: float, expected: float, tmp_path: Path) -> None:
    summary = run(tmp_path, tiny.dpo(loss=loss, beta=beta, max_steps=2, lora=tiny.LORA))
    assert summary["first_loss"] == pytest.approx(expected, abs=1e-5)
    first = metrics(tmp_path)[0]
    assert first["rewards/accuracies"] == 0
    assert abs(first["kl"]) <= 1e-6 and abs(first["rewards/margins"]) <= 1e-5


def test_the_first_dpo_loss_in_bf16_is_within_its_tolerance(tmp_path: Path) -> None:
    summary = run(tmp_path, tiny.dpo(precision="bf16", max_steps=2))
    assert summary["first_loss"] == pytest.approx(math.log(2), abs=5e-3)


@pytest.mark.parametrize(("precision", "off", "said"), [("fp32", 5e-4, "0.000[45]"), ("bf16", 0.1, r"0\.(09\d*|1)")])
def test_a_reference_that_is_not_the_start_model_is_fatal_before_the_first_update(
    precision: str, off: float, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The log-probs kept are a little too low at every other token and too high at the others. With beta 0.01 the loss
    does not show it."""
    real, wave = DPO.score, np.resize(np.float32([off, -off]), 99)
    monkeypatch.setattr(DPO, "score", lambda *given: [row + wave[: len(row)] for row in real(*given)])
    message = f"the reference is not the start model: before the first update .* {said} nats a token apart"
    with pytest.raises(TrainingError, match=message):
        run(tmp_path, tiny.dpo(precision=precision, beta=0.01))
    assert not (tmp_path / "out" / "metrics.jsonl").exists() and not (tmp_path / "out" / "model").exists()


def test_a_loss_that_is_nan_is_fatal_names_its_step_and_is_never_logged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The weights turn NaN before step 4 (a hand in the optimiser); logged are steps 1-3, of which none is 0."""
    real = torch.optim.AdamW.step
    calls = []

    def broken(self: Any, *arguments: Any, **named: Any) -> Any:
        calls.append(real(self, *arguments, **named))
        if len(calls) == 3:
            with torch.no_grad():
                self.param_groups[0]["params"][0].fill_(float("nan"))

    monkeypatch.setattr(torch.optim.AdamW, "step", broken)
    with pytest.raises(TrainingError, match=r"step 4, rows .*: the loss is nan"):
        run(tmp_path, tiny.sft())
    assert [row["step"] for row in metrics(tmp_path)] == [1, 2, 3]
    assert all(row["loss"] > 5 for row in metrics(tmp_path))
    assert not (tmp_path / "out" / "model").exists()


def test_a_gradient_that_is_infinite_is_fatal_before_the_update(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def loaded(start: Path, *adapters: Any) -> Any:
        model = AutoModelForCausalLM.from_pretrained(start)
        model.model.norm.weight.register_hook(lambda gradient: gradient * float("inf"))
        return model

    monkeypatch.setattr(sft_stage, "load", loaded)
    with pytest.raises(TrainingError, match=r"step 1, rows .*: the gradient's norm is (inf|nan)"):
        run(tmp_path, tiny.sft())
    assert not (tmp_path / "out" / "metrics.jsonl").exists()


def test_rows_of_metrics_cover_the_steps_between_them_and_the_last_step(tmp_path: Path) -> None:
    run(tmp_path / "each", tiny.sft())
    run(tmp_path / "some", tiny.sft(log_every=4))
    each, some = metrics(tmp_path / "each"), metrics(tmp_path / "some")
    assert [row["step"] for row in some] == [4, 8, 10]
    assert some[0]["loss"] == pytest.approx(sum(row["loss"] for row in each[:4]) / 4, abs=1e-5)
    assert [row["num_tokens"] for row in some] == [each[step - 1]["num_tokens"] for step in (4, 8, 10)]
    assert json.loads((tmp_path / "some" / "out" / "progress.json").read_text())["step"] == 10


def test_lora_writes_the_adapter_and_the_merged_model_and_trains_nothing_else(tmp_path: Path) -> None:
    """Rank 4 on q, o (32x32), k, v (32 to 16), gate, up (32 to 64), down (64 to 32) of 2 layers:
    4 * (2 * 64 + 2 * 48 + 3 * 96) * 2 = 4096 parameters."""
    summary = run(tmp_path, tiny.sft(lora=tiny.LORA))
    assert summary["trained_parameters"] == 4096
    files = {path.name for path in (tmp_path / "out" / "adapter").iterdir()}
    assert files == {"adapter_config.json", "adapter_model.safetensors"}
    before = AutoModelForCausalLM.from_pretrained(tmp_path / "start" / "model").state_dict()
    after = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "model").state_dict()
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if "proj" in name}


def test_the_result_is_a_plain_folder_that_knows_its_template_and_caches_while_generating(tmp_path: Path) -> None:
    run(tmp_path, tiny.sft(max_steps=1))
    folder, start = tmp_path / "out" / "model", tmp_path / "start" / "model"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert model.dtype == torch.float32 and model.config.use_cache
    assert model.lm_head.weight is model.model.embed_tokens.weight, "tied weights stay tied"
    assert tokenizer.chat_template == AutoTokenizer.from_pretrained(start).chat_template
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "checkpoints", "metrics.jsonl", "model", "progress.json",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        (tiny.sft(lora=changed(target_modules=["q_porj"])), ConfigError, "no linear layer `q_porj`"),
        (tiny.sft(lora=changed(target_modules=["lm_head"])), ConfigError, "no linear layer `lm_head`"),
    ],
)  # fmt: skip
def test_impossible_adapters_are_one_clear_line(
    settings: Any, error: type[AlignmentError], message: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=message):
        run(tmp_path, settings)


def test_rows_that_do_not_teach_to_stop_are_fatal_before_training(tmp_path: Path) -> None:
    inputs = tiny.write_inputs(tmp_path, "dpo")
    rows = load_from_disk(str(inputs["data"] / "train"))
    rows.map(lambda row: {"chosen_ids": row["chosen_ids"][:-1]}).save_to_disk(str(tmp_path / "bad" / "train"))
    with pytest.raises(InputError, match="end-of-turn token"):
        run(tmp_path, tiny.dpo(), inputs={**inputs, "data": tmp_path / "bad"})


@pytest.mark.slow
def test_compiled_layers_train_as_plain_ones_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One shape of pack: every micro-batch is filled up to one bucket of 256 tokens. DPO, without what writes code, is
    in tests/distributed/test_engines_agree.py."""
    from torch._inductor import config

    monkeypatch.setattr(config, "compile_threads", 1)  # else processes that import torch first
    for name, compiled in (("plain", False), ("compiled", True)):
        run(tmp_path / name, tiny.sft(max_steps=3), tiny.engine(compile=compiled, tokens_per_micro_batch=256))
    plain, compiled = metrics(tmp_path / "plain"), metrics(tmp_path / "compiled")
    assert [row["loss"] for row in compiled] == pytest.approx([row["loss"] for row in plain], abs=1e-5)
    assert [row["computed_share"] for row in compiled] != [row["computed_share"] for row in plain]


def test_steps_made_ahead_by_a_thread_are_the_same_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU. A fault while a step is made surfaces at that step."""
    run(tmp_path / "plain", tiny.dpo())
    monkeypatch.setattr(Steps, "__init__", partialmethod(made_ahead, Steps.__init__))
    run(tmp_path / "ahead", tiny.dpo())
    for left, right in zip(metrics(tmp_path / "plain"), metrics(tmp_path / "ahead"), strict=True):
        assert {**left, "time": 0, "tokens_per_s": 0} == {**right, "time": 0, "tokens_per_s": 0}

    def broken(self: Any, step: int) -> Any:
        if step == 4:
            raise RuntimeError("a fault in the thread")
        return made(self, step)

    made = AlignedTrainer.make_step
    monkeypatch.setattr(AlignedTrainer, "make_step", broken)
    with pytest.raises(RuntimeError, match="a fault in the thread"):
        run(tmp_path / "broken", tiny.dpo())
    assert [row["step"] for row in metrics(tmp_path / "broken")] == [1, 2, 3, 4]
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("collate")]


def made_ahead(self: Any, real: Any, make: Any, count: int, ahead: bool, first: int) -> None:
    assert not ahead, "on a CPU they are not"
    real(self, make, count, True, first)


@pytest.mark.parametrize("setting", [True, "auto"])
def test_gradient_checkpointing_changes_nothing_but_memory(
    setting: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    run(tmp_path / "off", tiny.dpo())
    monkeypatch.setattr(engine, "available_bytes", lambda: 1_000_000)
    run(tmp_path / "on", tiny.dpo(), tiny.engine(gradient_checkpointing=setting))
    off, on = metrics(tmp_path / "off"), metrics(tmp_path / "on")
    assert [row["loss"] for row in on] == pytest.approx([row["loss"] for row in off], abs=1e-6)
    said = "on (as set)" if setting is True else "on (by itself)"
    assert f"gradient checkpointing {said}: about" in capsys.readouterr().out


def test_checkpointing_by_itself_comes_on_where_memory_is_short(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(engine, "available_bytes", lambda: 1_000_000)
    run(tmp_path, tiny.sft(max_steps=1), tiny.engine(gradient_checkpointing="auto"))
    assert "gradient checkpointing on (by itself)" in capsys.readouterr().out
