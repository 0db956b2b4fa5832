"""Losses and gradients that are no numbers, memory that is short, a disk that is full: what training makes of them."""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from alignment.errors import MachineError, PreemptedError, TrainingError
from alignment.stages import sft
from alignment.stages import train as train_stage
from alignment.training import preference, trainers
from alignment.training.health import DisplacementAlarm, NonFinite, SpikeAlarm
from tests.conftest import fill
from tests.training import poison, tiny
from tests.training.test_resume import attempt, rows, weights

KINDS = ("sft", "dpo")


# --- NaN --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["loss", "gradient"])
@pytest.mark.parametrize("kind", KINDS)
def test_halt_names_step_and_rows_and_logs_and_saves_nothing_of_it(
    kind: str, where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison.into(monkeypatch, where, steps=[3])
    saving = tiny.checkpoint(every_steps=1, asynchronous=False)
    with pytest.raises(TrainingError) as caught:
        attempt(tmp_path / "run", kind, saving=saving)
    what = "the loss is nan" if where == "loss" else "the gradient's norm is nan"
    assert re.match(rf"step 3, rows? [\d, ]+ of the training split, from 0: {what} ", str(caught.value))
    assert [row["step"] for row in rows(tmp_path / "run")] == [1, 2]
    assert all(row["loss"] > 0 for row in rows(tmp_path / "run"))
    found = sorted(path.name for path in (tmp_path / "run" / "checkpoints").glob("step-*"))
    assert found == ["step-00000001", "step-00000002"]
    assert not (tmp_path / "run" / "model").exists()


def test_a_loss_names_only_the_rows_that_it_is_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    poison.into(monkeypatch, "loss", steps=[2])
    with pytest.raises(TrainingError, match=r"step 2, row \d+ of the training split"):
        attempt(tmp_path / "run", "sft", setup=tiny.engine(tokens_per_micro_batch=1))


@pytest.mark.parametrize("where", ["loss", "gradient"])
@pytest.mark.parametrize("kind", KINDS)
def test_skip_leaves_weights_moments_and_counters_as_they_were(
    kind: str, where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A constant rate and no decay: skipping the last step of four is having made three."""
    how = {"schedule": "constant", "warmup_ratio": 0.0, "nonfinite": "skip"}
    attempt(tmp_path / "three", kind, max_steps=3, **how)
    poison.into(monkeypatch, where, steps=[4])
    summary = attempt(tmp_path / "four", kind, max_steps=4, **how)
    assert weights(tmp_path / "four") == weights(tmp_path / "three")
    last = rows(tmp_path / "four")[-1]
    assert (last["step"], last["skipped_steps"], summary["skipped_steps"]) == (4, 1, 1)
    assert ("loss" in last) == (where == "gradient"), "never as a number that it was not"
    assert "grad_norm" not in last
    json.dumps(rows(tmp_path / "four"), allow_nan=False)


def test_skipping_goes_on_with_the_schedule_and_through_a_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison.into(monkeypatch, "gradient", steps=[3])
    attempt(tmp_path / "whole", "sft", nonfinite="skip", max_steps=8)
    assert [row["learning_rate"] for row in rows(tmp_path / "whole")][3] > 0
    for stop in (1, 3):
        with pytest.raises(BaseException, match="saved at step"):
            attempt(tmp_path / "parts", "sft", stop_after=stop, nonfinite="skip", max_steps=8)
    attempt(tmp_path / "parts", "sft", nonfinite="skip", max_steps=8)
    assert rows(tmp_path / "parts") == rows(tmp_path / "whole")
    assert weights(tmp_path / "parts") == weights(tmp_path / "whole")


def test_so_many_steps_may_be_skipped_and_no_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    poison.into(monkeypatch, "gradient", steps=[2, 3, 5])
    with pytest.raises(TrainingError, match=r"step 5, .* after 2 skipped steps"):
        attempt(tmp_path / "run", "sft", nonfinite="skip", max_nonfinite=2)


@pytest.mark.parametrize("where", ["loss", "gradient"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_first_step_that_is_skipped_leaves_the_check_of_the_start_to_the_next(
    kind: str, where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checked: list[int] = []
    trainer = {"sft": trainers.SFT, "dpo": preference.DPO}[kind]
    real = trainer._check_start

    def check(self: Any) -> None:
        checked.append(self.state.global_step + 1)
        real(self)

    monkeypatch.setattr(trainer, "_check_start", check)
    poison.into(monkeypatch, where, steps=[1])
    with pytest.raises(PreemptedError):
        attempt(tmp_path / "run", kind, stop_after=1, nonfinite="skip")
    summary = attempt(tmp_path / "run", kind, nonfinite="skip")
    assert checked == [2 if where == "loss" else 1]
    assert summary["skipped_steps"] == 1
    if kind == "dpo":
        assert summary["first_loss"] == pytest.approx(math.log(2), abs=1e-6)


@pytest.mark.parametrize("again", [False, True])
def test_rollback_goes_back_and_skips_only_what_happens_again(
    again: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    how = {"nonfinite": "rollback", "max_steps": 7}
    with monkeypatch.context() as patched:
        if again:
            poison.into(patched, "loss", steps=[5])
        attempt(tmp_path / "whole", "sft", **{**how, "nonfinite": "skip"})
    poisoned = pytest.MonkeyPatch()
    poison.into(poisoned, "loss", steps=[5])
    with pytest.raises(TrainingError, match=r"step 5, .*: the loss is nan: back to the last checkpoint") as caught:
        attempt(tmp_path / "back", "sft", saving=tiny.checkpoint(every_steps=2), **how)
    assert caught.value.retry
    if not again:
        poisoned.undo()
    attempt(tmp_path / "back", "sft", saving=tiny.checkpoint(every_steps=2), **how)
    poisoned.undo()
    assert rows(tmp_path / "back") == rows(tmp_path / "whole")
    assert weights(tmp_path / "back") == weights(tmp_path / "whole")


def test_the_policy_in_words() -> None:
    with pytest.raises(TrainingError, match=r"step 9, rows 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11 and 8 more of the"):
        NonFinite("halt").meet(9, "the loss is nan", range(20))


# --- spikes -----------------------------------------------------------------------------------------------------------


def test_a_spike_is_heard_once_and_noise_is_not() -> None:
    random = torch.Generator().manual_seed(0)
    alarm = SpikeAlarm(6.0)
    noise = (2.0 + 0.1 * torch.randn(400, generator=random)).tolist()
    assert [told for loss in noise if (told := alarm.hear(loss))] == []
    assert alarm.hear(5.0) is not None
    assert alarm.hear(5.0) is None, "it was said"
    again = SpikeAlarm(6.0)
    again.load_state_dict(json.loads(json.dumps(alarm.state_dict())))
    assert again == alarm
    assert SpikeAlarm(None).hear(1e9) is None


def test_nothing_is_heard_before_there_is_a_mean() -> None:
    alarm = SpikeAlarm(3.0)
    assert [alarm.hear(loss) for loss in (1.0, 50.0, 1.0)] == [None] * 3


def test_a_spike_in_training_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = trainers.SFT._scale

    def spiked(self: Any, *arguments: Any) -> float:
        return float(real(self, *arguments)) * (10 if self.state.global_step == 24 else 1)

    monkeypatch.setattr(trainers.SFT, "_scale", spiked)
    attempt(tmp_path / "run", "sft", max_steps=26, spike_alarm=6.0)
    (told,) = (tmp_path / "run" / "warnings.txt").read_text().splitlines()
    assert told.startswith("step 25: the loss is ")


def pair_row(fall: float, margin: float) -> dict[str, float]:
    """beta 0.1, -50 nats under the reference."""
    return {"logps/chosen": -50.0 - fall, "rewards/chosen": -0.1 * fall, "rewards/margins": 0.1 * margin}


def test_chosen_answers_that_become_unlikely_are_told_of_once() -> None:
    """A fall of 5 nats of 50 is a tenth."""
    assert not any(DisplacementAlarm().hear(pair_row(4.9, 20.0), 0.1) for _ in range(20))
    assert not any(DisplacementAlarm().hear(pair_row(9.0, -1.0), 0.1) for _ in range(20))
    alarm = DisplacementAlarm()
    heard = [alarm.hear(pair_row(6.0, 20.0), 0.1) for _ in range(20)]
    assert [number for number, told in enumerate(heard) if told] == [DisplacementAlarm.SPAN - 1]
    assert "log-prob is -56 nats in the recent mean, -50 under the reference" in str(heard[DisplacementAlarm.SPAN - 1])
    assert DisplacementAlarm(**json.loads(json.dumps(alarm.state_dict()))) == alarm


# --- memory -----------------------------------------------------------------------------------------------------------


def refuse(monkeypatch: pytest.MonkeyPatch, above: int) -> list[int]:
    """The allocator of this process refuses what a forward of more tokens would take. Returns the forwards' tokens."""
    real, seen = trainers.AlignedTrainer.compute_loss, []

    def limited(self: Any, model: Any, inputs: Any, *arguments: Any, **named: Any) -> Any:
        tokens = int(inputs["attention_mask"].sum()) if "pack" not in inputs else inputs["pack"].tokens
        seen.append(tokens)
        if tokens > above:
            torch.empty(1 << 50)
        return real(self, model, inputs, *arguments, **named)

    monkeypatch.setattr(trainers.AlignedTrainer, "compute_loss", limited)
    return seen


def test_out_of_memory_gives_advice_in_order_with_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse(monkeypatch, above=40)
    with pytest.raises(MachineError) as caught:
        attempt(tmp_path / "run", "sft")
    order = ["engine.tokens_per_micro_batch=60", "engine.gradient_checkpointing=true", "engine=zero3", "LoRA of rank 8"]
    places = [str(caught.value).index(f"{what}") for what in order]
    assert places == sorted(places)
    assert len(re.findall(r"about [\d.]+ [MG]B", str(caught.value))) == 5
    assert not caught.value.retry


def test_with_adapt_the_budget_is_halved_until_it_fits_and_the_result_is_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    attempt(tmp_path / "whole", "sft", setup=tiny.engine(tokens_per_micro_batch=250))
    seen = refuse(monkeypatch, above=90)
    setup, saving = tiny.engine(tokens_per_micro_batch=250, adapt=True), tiny.checkpoint(every_steps=1)
    for budget in (125, 62):
        with pytest.raises(MachineError) as caught:
            attempt(tmp_path / "less", "sft", setup=setup, saving=saving)
        assert caught.value.retry
        assert json.loads((tmp_path / "less" / "next_attempt.json").read_text()) == {"tokens_per_micro_batch": budget}
    attempt(tmp_path / "less", "sft", setup=setup, saving=saving)
    assert max(seen[-20:]) <= 62
    for one, other in zip(rows(tmp_path / "whole"), rows(tmp_path / "less"), strict=True):
        assert other["loss"] == pytest.approx(one["loss"], abs=1e-5)


# --- disk -------------------------------------------------------------------------------------------------------------


def test_a_full_disk_costs_checkpoints_with_a_warning_and_training_goes_on(small_disk: Path, tmp_path: Path) -> None:
    attempt(tmp_path / "whole", "sft")
    inputs = tiny.write_inputs(tmp_path, "sft")
    context = tiny.context(
        small_disk / "run", inputs, tiny.sft(), tiny.engine(), saving=tiny.checkpoint(every_steps=1, max_failures=99)
    )
    told: list[str] = []
    context.warn = told.append  # type: ignore[method-assign]

    def fill_then_free(step: int, metrics: dict[str, float]) -> None:
        if step == 2:
            fill(small_disk)
        if step == 7:
            (small_disk / "filler").unlink()

    context.listeners.append(fill_then_free)
    sft.run(context)
    assert any("could not be written" in line and "No space left" in line for line in told)
    assert rows(small_disk / "run") == rows(tmp_path / "whole")
    assert weights(small_disk / "run") == weights(tmp_path / "whole")


def test_after_so_many_failures_in_a_row_it_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: Any, **named: Any) -> Any:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("alignment.training.tensors.write", full)
    saving = tiny.checkpoint(every_steps=1, asynchronous=False, max_failures=2)
    with pytest.raises(MachineError, match=r"2 saves in a row failed: .*No space left on device"):
        attempt(tmp_path / "run", "sft", saving=saving)
    assert [row["step"] for row in rows(tmp_path / "run")] == [1, 2, 3]
    assert list((tmp_path / "run" / "checkpoints").iterdir()) == []


@pytest.mark.parametrize("saves", [False, True])
def test_checkpoints_that_will_not_fit_are_said_before_training(
    saves: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model that fits is trained all the same."""
    model = tiny.write_inputs(tmp_path, "sft")["model"] / "model" / "model.safetensors"
    usage = shutil.disk_usage(tmp_path)._replace(free=2 * model.stat().st_size)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    saving = tiny.checkpoint(every_minutes=10) if saves else tiny.checkpoint()
    attempt(tmp_path / "run", "sft", saving=saving, lora=None)
    told = tmp_path / "run" / "warnings.txt"
    assert ("saves will fail unless some is freed" in told.read_text()) if saves else not told.exists()


def test_a_reference_that_moves_makes_checkpoints_a_third_larger(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights, two moments, and the reference's weights: what is told beforehand is what is written."""
    model = tiny.write_inputs(tmp_path, "dpo")["model"] / "model" / "model.safetensors"
    usage = shutil.disk_usage(tmp_path)._replace(free=2 * model.stat().st_size)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    monkeypatch.setattr(train_stage, "size_text", str)
    found = {}
    for name, update in (("dpo", None), ("tr_dpo", {"every_steps": 1, "share": 0.5})):
        saving = tiny.checkpoint(every_steps=1, keep_last=1, asynchronous=False)
        attempt(tmp_path / name, "dpo", saving=saving, reference_update=update, max_steps=2)
        found[name] = int(re.findall(r"checkpoints of (\d+)", (tmp_path / name / "warnings.txt").read_text())[0])
    assert found["tr_dpo"] == found["dpo"] * 4 // 3
