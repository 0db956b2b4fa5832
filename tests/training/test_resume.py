"""A stage that is stopped and goes on ends as one that was not: every bit of it, losses and weights."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
import shutil
import time
from concurrent.futures import wait
from pathlib import Path
from threading import Event
from types import SimpleNamespace
from typing import Any

import pytest
from safetensors.torch import load_file

from alignment.config.launchers import SlurmLauncher
from alignment.errors import PreemptedError, TrainingError
from alignment.files import sha256
from alignment.signals import Listener
from alignment.stages import dpo, sft
from alignment.training import engine, tensors, trainers
from alignment.training.checkpoints import Checkpoints
from alignment.training.keeper import SPARE, Keeper
from tests.training import tiny

STAGES = {"sft": sft.run, "dpo": dpo.run}
SAME_ALWAYS = ("time", "tokens_per_s")


class After(Listener):
    """Asked to stop once the stage has written so many rows of metrics."""

    def __init__(self, context: Any, step: int) -> None:
        super().__init__()
        self._context, self._step = context, step

    @property
    def asked(self) -> str | None:  # type: ignore[override]
        path = self._context.folder / "metrics.jsonl"
        rows = path.read_text().splitlines() if path.exists() else []
        return "SIGTERM" if len(rows) >= self._step else None

    @asked.setter
    def asked(self, value: str | None) -> None:
        pass


def attempt(
    folder: Path, kind: str, stop_after: int | None = None, setup: Any = None, saving: Any = None, **settings: Any
) -> Any:
    inputs = tiny.write_inputs(folder.parent, kind)
    context = tiny.context(folder, inputs, getattr(tiny, kind)(**settings), setup or tiny.engine(), saving=saving)
    context.shared = folder.parent
    if stop_after is not None:
        context.stop = After(context, stop_after)
    return STAGES[kind](context)


def rows(folder: Path) -> list[dict[str, float]]:
    read = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name not in SAME_ALWAYS} for row in read]


def weights(folder: Path) -> str:
    return hashlib.sha256((folder / "model" / "model.safetensors").read_bytes()).hexdigest()


@pytest.mark.parametrize(  # every two of them together
    ("kind", "lora", "precision"),
    [("sft", None, "fp32"), ("sft", tiny.LORA, "bf16"), ("dpo", None, "bf16"), ("dpo", tiny.LORA, "fp32")],
    ids=["sft-full-fp32", "sft-lora-bf16", "dpo-full-bf16", "dpo-lora-fp32"],
)
def test_interrupted_is_uninterrupted_bit_for_bit_wherever_it_stops(
    kind: str, lora: Any, precision: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    how = {"lora": lora, "precision": precision, "max_steps": 8}
    attempt(tmp_path / "whole", kind, **how)
    saved = []
    for stop in (1, 3, 5, 7):
        with pytest.raises(PreemptedError, match="SIGTERM: saved at step") as stopped:
            attempt(tmp_path / "parts", kind, stop_after=stop, **how)
        saved.append(str(stopped.value).rpartition(" ")[2])
        assert stopped.value.kept
    assert saved == ["2", "4", "6", "8"]  # asked as the row of a step is there: heeded after the next one
    summary = attempt(tmp_path / "parts", kind, **how)
    assert re.findall(r"going on from the checkpoint of step (\d+)$", capsys.readouterr().out, re.M) == saved
    assert rows(tmp_path / "parts") == rows(tmp_path / "whole")
    assert weights(tmp_path / "parts") == weights(tmp_path / "whole")
    assert summary["steps"] == 8


@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_killed_at_any_time_it_goes_on_from_the_newest_whole_checkpoint(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed while step 6 is computed, when checkpoints of steps 2 and 4 are there; then the newer one is damaged."""
    attempt(tmp_path / "whole", kind)
    for damage in (False, True):
        run, told = tmp_path / f"run{damage}", []
        with monkeypatch.context() as patched:
            killed_in(patched, step=6)
            with pytest.raises(Killed):
                attempt(run, kind, saving=tiny.checkpoint(every_steps=2, asynchronous=False))
        assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step-00000002", "step-00000004"]
        if damage:
            content = bytearray((run / "checkpoints" / "step-00000004" / "state.json").read_bytes())
            content[50] ^= 1
            (run / "checkpoints" / "step-00000004" / "state.json").write_bytes(content)
        monkeypatch.setattr(
            "alignment.stages.context.StageContext.warn", lambda self, text, told=told: told.append(text)
        )
        attempt(run, kind, saving=tiny.checkpoint(every_steps=2, asynchronous=False))
        assert [text.startswith("checkpoint of step 4: state.json is damaged") for text in told] == [True] * damage
        assert rows(run) == rows(tmp_path / "whole")
        assert weights(run) == weights(tmp_path / "whole")


class Killed(BaseException):
    pass


def killed_in(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    real = trainers.AlignedTrainer.training_step

    def training_step(self: Any, *arguments: Any, **named: Any) -> Any:
        if self.state.global_step + 1 == step:
            raise Killed
        return real(self, *arguments, **named)

    monkeypatch.setattr(trainers.AlignedTrainer, "training_step", training_step)


def test_a_checkpoint_holds_all_that_training_goes_on_from(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "wandb_run_id").write_text("abc\n")
    with pytest.raises(PreemptedError):
        attempt(tmp_path / "run", "dpo", stop_after=3)
    folder = tmp_path / "run" / "checkpoints" / "step-00000004"
    assert sorted(path.name for path in folder.iterdir()) == [
        "manifest.json", "rank-00000-of-00001.safetensors", "state.json",
    ]  # fmt: skip
    state = json.loads((folder / "state.json").read_text())
    assert state["step"] == 4
    layout = {"strategy": "single", "world_size": 1, "precision": "fp32"}
    assert state["layout"] == {**layout, "tokens_per_micro_batch": 120, "gradient_checkpointing": False}
    assert state["record"]["wandb_run_id"] == "abc"
    assert len(state["trainer"]["reference"]) == 64
    kinds = {key.split(":")[0] for key in load_file(folder / "rank-00000-of-00001.safetensors")}
    assert kinds == {"weight", "exp_avg", "exp_avg_sq", "updates", "rng"}


@pytest.mark.parametrize("harm", ["gone", "cut", "none"])
def test_rows_of_metrics_that_are_gone_are_told_of(harm: str, tmp_path: Path) -> None:
    with pytest.raises(PreemptedError):
        attempt(tmp_path / "run", "sft", stop_after=3)
    path, told = tmp_path / "run" / "metrics.jsonl", tmp_path / "run" / "warnings.txt"
    if harm != "none":
        path.write_text("" if harm == "gone" else "".join(path.read_text().splitlines(keepends=True)[1:]))
    attempt(tmp_path / "run", "sft")
    assert ("has not the rows that it had at step 4" in told.read_text()) if harm != "none" else not told.exists()


def test_a_stop_leaves_as_many_checkpoints_as_are_asked_for(tmp_path: Path) -> None:
    saving = tiny.checkpoint(every_steps=1, keep_last=1, asynchronous=False)
    with pytest.raises(PreemptedError):
        attempt(tmp_path / "run", "sft", stop_after=4, saving=saving)
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000005"]


@pytest.fixture
def slow_saves(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """What begins to be written stays so until step 5 is computed. written: the steps. at: called as a step is."""
    made = SimpleNamespace(written=[], at=lambda step: None)
    real, real_write, gate, steps = Keeper.wishes, tensors.write, Event(), itertools.count(1)

    def wishes(self: Any) -> Any:
        made.at(step := next(steps))
        if step == 5:
            gate.set()
            wait([self._write.part])
        return real(self)

    def write(path: Path, *arguments: Any) -> Any:
        made.written.append(int(path.parent.name[-2:]))
        assert gate.wait(60)
        return real_write(path, *arguments)

    monkeypatch.setattr(Keeper, "wishes", wishes)
    monkeypatch.setattr(tensors, "write", write)
    return made


def test_a_save_that_comes_while_another_is_written_follows_it(tmp_path: Path, slow_saves: SimpleNamespace) -> None:
    attempt(tmp_path / "run", "sft", saving=tiny.checkpoint(every_steps=2), max_steps=6)
    assert slow_saves.written == [2, 5], "that of step 4 was due; step 6 is the last"


def test_a_save_by_the_clock_that_outlives_its_step_is_made_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, slow_saves: SimpleNamespace
) -> None:
    """Time stands still but for ten minutes before step 2."""
    now = [1000.0]
    slow_saves.at = lambda step: now.append(now[-1] + 601 * (step == 2))
    monkeypatch.setattr("alignment.training.keeper.time", SimpleNamespace(monotonic=lambda: now[-1]))
    attempt(tmp_path / "run", "sft", saving=tiny.checkpoint(every_minutes=10), max_steps=8)
    assert slow_saves.written == [2]


def test_a_checkpoint_whose_reference_was_another_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PreemptedError):
        attempt(tmp_path / "run", "dpo", stop_after=3)
    own = Checkpoints(tmp_path / "run" / "checkpoints", "0" * 64, tiny.checkpoint(), print)
    part, state = own.at(4) / "rank-00000-of-00001.safetensors", own.state(4)
    state["trainer"]["reference"] = "f" * 64
    file = {"bytes": part.stat().st_size, "sha256": sha256(part)}
    shutil.copytree(own.at(4), own.aside(4))
    (own.aside(4) / "manifest.json").unlink()
    own.commit(4, {part.name: file}, state, None)
    with pytest.raises(TrainingError, match="reference is another model"):
        attempt(tmp_path / "run", "dpo")


def test_it_saves_before_its_time_is_over(tmp_path: Path) -> None:
    """Steps of half a second, and time for some of them."""
    inputs = tiny.write_inputs(tmp_path, "sft")
    context = tiny.context(tmp_path / "run", inputs, tiny.sft(max_steps=500), tiny.engine())
    context.listeners.append(lambda step, metrics: time.sleep(0.3))
    context.deadline = time.monotonic() + SPARE + 4
    with pytest.raises(PreemptedError, match=r"launcher.time_limit: saved at step \d+"):
        sft.run(context)
    assert time.monotonic() < context.deadline


def test_asked_before_the_first_step_nothing_is_trained(tmp_path: Path) -> None:
    inputs = tiny.write_inputs(tmp_path, "dpo")
    context = tiny.context(tmp_path / "run", inputs, tiny.dpo(), tiny.engine())
    context.stop.asked = "SIGUSR1"
    with pytest.raises(PreemptedError, match="SIGUSR1: nothing was made yet") as stopped:
        dpo.run(context)
    assert stopped.value.kept is False
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.parametrize(("grace", "said"), [(0.0, 1), (600.0, 0)])
def test_a_write_that_takes_longer_than_a_scheduler_gives_is_said_once(grace: float, said: int, tmp_path: Path) -> None:
    saving = tiny.checkpoint(every_steps=2, asynchronous=False)
    context = tiny.context(
        tmp_path / "run", tiny.write_inputs(tmp_path, "sft"), tiny.sft(), tiny.engine(), saving=saving
    )
    launcher = SlurmLauncher.model_construct(kind="slurm", grace=grace)
    context.experiment = context.experiment.model_copy(update={"launcher": launcher})
    sft.run(context)
    warnings = tmp_path / "run" / "warnings.txt"
    lines = [line for line in warnings.read_text().splitlines() if "grace" in line] if warnings.exists() else []
    assert len(lines) == said
    found = r"launcher.grace is 0 s, and the checkpoint of step 2 took 0 s to write: .* \(launcher.grace=1, or a faster"
    assert all(re.match(found, line) for line in lines)


def test_the_best_ones_are_named_to_stay_beside_the_result(tmp_path: Path) -> None:
    saving = tiny.checkpoint(every_steps=1, keep_last=1, keep_best=2, asynchronous=False)
    context = tiny.context(
        tmp_path / "run", tiny.write_inputs(tmp_path, "sft"), tiny.sft(), tiny.engine(), saving=saving
    )
    sft.run(context)
    losses = {row["step"]: row["loss"] for row in rows(tmp_path / "run")[:-1]}  # the last step is the result itself
    best = sorted(losses, key=losses.__getitem__)[:2]
    assert context.checkpoints == [f"step-{step:08d}" for step in best]
    newest = max(losses)  # stays until the result is stored: whoever is killed before goes on from there
    there = {path.name for path in (tmp_path / "run" / "checkpoints").iterdir()}
    assert there == {*context.checkpoints, f"step-{newest:08d}"}


@pytest.mark.parametrize(
    ("by", "every", "why"), [("reward", 1, "no row of metrics has reward"), ("loss", None, "no ch")]
)
def test_a_wish_for_the_best_that_cannot_be_met_is_said(by: str, every: Any, why: str, tmp_path: Path) -> None:
    saving = tiny.checkpoint(every_steps=every, keep_best=1, best_by=by)
    context = tiny.context(
        tmp_path / "run", tiny.write_inputs(tmp_path, "sft"), tiny.sft(), tiny.engine(), saving=saving
    )
    sft.run(context)
    assert f"checkpoint.keep_best=1 keeps nothing: {why}" in (tmp_path / "run" / "warnings.txt").read_text()
    assert context.checkpoints == []


def test_what_auto_came_to_stays_when_memory_is_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Micro-batches and checkpointing of the first attempt hold for the next one, or sums would differ by rounding."""
    setup = tiny.engine(tokens_per_micro_batch="auto", gradient_checkpointing="auto")
    monkeypatch.setattr(engine, "CPU_TOKENS", 90)
    attempt(tmp_path / "whole", "sft", setup=setup)
    with pytest.raises(PreemptedError):
        attempt(tmp_path / "parts", "sft", stop_after=3, setup=setup)
    monkeypatch.setattr(engine, "CPU_TOKENS", 200)
    monkeypatch.setattr(engine, "available_bytes", lambda: 1)
    attempt(tmp_path / "parts", "sft", setup=setup)
    assert rows(tmp_path / "parts") == rows(tmp_path / "whole")
    assert weights(tmp_path / "parts") == weights(tmp_path / "whole")


def test_a_checkpoint_of_another_version_of_the_program_is_used_and_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(PreemptedError):
        attempt(tmp_path / "run", "sft", stop_after=3)
    monkeypatch.setattr("alignment.stages.train.code_digest", lambda: "0" * 64)
    attempt(tmp_path / "run", "sft")
    assert "step 4 was written by another version of this program" in (tmp_path / "run" / "warnings.txt").read_text()


def test_the_first_save_before_a_time_limit_is_reckoned_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a disk that is taken to be slow nothing has been saved yet, and the whole time is needed for it."""
    monkeypatch.setattr("alignment.training.keeper.SLOW_DISK", 1.0)
    context = tiny.context(tmp_path / "run", tiny.write_inputs(tmp_path, "sft"), tiny.sft(), tiny.engine())
    context.deadline = time.monotonic() + 3600
    with pytest.raises(PreemptedError, match=r"launcher.time_limit: saved at step 1"):
        sft.run(context)
