"""Runs that are stopped and go on; docs/pains.md, 19, 20, 23 and 24."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import transformers
from datasets import Dataset
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from transformers import AutoModelForCausalLM
from transformers.trainer_utils import get_last_checkpoint

from alignment.config.compose import compose
from alignment.errors import PreemptedError
from alignment.files import read_jsonl
from alignment.pipeline import graph
from tests.conftest import Command, environment
from tests.faults.runs import start, until
from tests.forks import FORKING, say_into
from tests.tracking.conftest import _read_log
from tests.training import tiny
from tests.training.test_checkpoints import cut
from tests.training.test_resume import attempt, rows, weights


def stock(start_model: Path, folder: Path, size: int = 4, seen: list[int] | None = None, **settings: Any) -> Any:
    """transformers' Trainer on 16 rows; their numbers are noted in the order in which they are trained on."""
    data = Dataset.from_list([{"input_ids": [5 + number] * 8, "labels": [5 + number] * 8} for number in range(16)])

    def collate(given: list[dict[str, Any]]) -> Any:
        numbers = [row["input_ids"][0] - 5 for row in given]
        (seen if seen is not None else []).extend(numbers)
        return transformers.default_data_collator(given)

    own = {"save_strategy": "steps", "save_steps": 1, "report_to": "none", "use_cpu": True, "disable_tqdm": True}
    args = transformers.TrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=size, **{**own, **settings}
    )
    model = AutoModelForCausalLM.from_pretrained(start_model)
    return transformers.Trainer(model=model, args=args, train_dataset=data, data_collator=collate)


def test_transformers_35782_half_written_checkpoint(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The newest checkpoint's weights end in the middle."""
    stock(tiny_model, tmp_path / "stock", max_steps=2).train()
    cut(tmp_path / "stock" / "checkpoint-2" / "model.safetensors")
    assert get_last_checkpoint(str(tmp_path / "stock")) == str(tmp_path / "stock" / "checkpoint-2"), "it is taken"
    with pytest.raises(Exception, match=r"(?i)safetensor|incomplete|header|metadata"):
        stock(tiny_model, tmp_path / "stock", max_steps=3).train(resume_from_checkpoint=True)

    saving = tiny.checkpoint(every_steps=1, asynchronous=False)
    attempt(tmp_path / "whole", "sft", max_steps=6)
    with pytest.raises(PreemptedError):
        attempt(tmp_path / "parts", "sft", stop_after=3, saving=saving, max_steps=6)
    before, newest = sorted((tmp_path / "parts" / "checkpoints").glob("step-*"))[-2:]
    cut(next(newest.glob("rank-*.safetensors")))
    capsys.readouterr()
    attempt(tmp_path / "parts", "sft", saving=saving, max_steps=6)
    assert f"checkpoint of step {int(newest.name[5:])}: " in (tmp_path / "parts" / "warnings.txt").read_text()
    assert f"going on from the checkpoint of step {int(before.name[5:])}\n" in capsys.readouterr().out
    assert rows(tmp_path / "parts") == rows(tmp_path / "whole")
    assert weights(tmp_path / "parts") == weights(tmp_path / "whole"), "bit for bit"


def test_verl_7401_data_order_lost(tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """transformers skips as many batches as were trained on, of whatever size: with half the batch, rows come twice."""
    seen: list[int] = []
    stock(tiny_model, tmp_path / "stock", size=4, seen=seen, max_steps=2).train()
    first = seen[:8]
    seen.clear()
    stock(tiny_model, tmp_path / "stock", size=2, seen=seen, max_steps=4).train(resume_from_checkpoint=True)
    assert {*seen[:4]} <= {*first}, "the third and fourth batch are of rows that were trained on before"

    batch, epoch = 8, 5  # 40 rows
    how = {"global_batch_size": batch, "max_steps": 2 * epoch}
    attempt(tmp_path / "whole", "sft", **how)
    for stop in (epoch - 1, 2 * epoch - 3):  # after the last step of an epoch, and within one
        with pytest.raises(PreemptedError):
            attempt(tmp_path / "parts", "sft", stop_after=stop, **how)
    assert f"going on from the checkpoint of step {epoch}" in capsys.readouterr().out
    attempt(tmp_path / "parts", "sft", setup=tiny.engine(tokens_per_micro_batch=120), **how)
    assert rows(tmp_path / "parts") == rows(tmp_path / "whole")
    assert weights(tmp_path / "parts") == weights(tmp_path / "whole")
    keys = [
        {node.name: node.key for node in graph.build(compose([*settings]))}["sft"]
        for settings in ((), ("stage.sft.global_batch_size=2",))
    ]
    assert keys[0] != keys[1], "with another batch it is another stage, which takes no checkpoint of this one"


class Interrupted(NamedTuple):
    """A run that was told to stop (SIGTERM to its command), and the same command again."""

    code: int
    saved: list[int]  # steps of the checkpoints that lay there in between
    folders: list[list[str]]  # of runs, in between and in the end
    ids: list[str]  # of W&B, likewise
    result: Path


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory: pytest.TempPathFactory, forked: Command, short_settings: list[str]) -> Interrupted:
    folder = tmp_path_factory.mktemp("interrupted")
    store = folder / "store"
    settings = [*short_settings, "tracking=wandb_offline", "stage.sft.max_steps=60", "checkpoint.every_minutes=null"]
    driver = start(folder, ["run", *settings], environment(store))
    until(lambda: any(len([*read_jsonl(path)]) > 2 for path in store.glob("work/*/metrics.jsonl")), 120)
    driver.kill(signal.SIGTERM)
    code, (work,) = driver.wait(60), [path for path in store.glob("work/*") if (path / "checkpoints").exists()]
    saved = [int(path.parent.name[-8:]) for path in work.glob("checkpoints/step-*/manifest.json")]
    folders, ids = [names(store)], [(work / "wandb_run_id").read_text()]
    forked(store, "run", *settings)
    result = store / "store" / work.name
    ids.append((result / "wandb_run_id").read_text())
    return Interrupted(code, saved, [*folders, names(store)], ids, result)


def names(store: Path) -> list[str]:
    return sorted(path.name for path in (store / "runs").iterdir())


def train_for_long(start_model: Path, folder: Path) -> None:
    """Of a fork."""
    say_into(folder / "said.txt")
    trainer = stock(start_model, folder / "out", max_steps=100_000, save_steps=50_000, logging_steps=1)
    trainer.add_callback(Told(folder / "begun"))
    trainer.train()


class Told(transformers.TrainerCallback):
    def __init__(self, path: Path):
        self.path = path

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 5:
            self.path.touch()


@pytest.mark.slow
def test_accelerate_3400_killed_job_loses_work(tiny_model: Path, tmp_path: Path, interrupted: Interrupted) -> None:
    process = FORKING.Process(target=train_for_long, args=(tiny_model, tmp_path))
    process.start()
    until(lambda: (tmp_path / "begun").exists(), 60)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGTERM)
    process.join(60)
    assert process.exitcode == -signal.SIGTERM and not list(tmp_path.glob("out/checkpoint-*")), "nothing was saved"
    with initialize_config_dir(str(tmp_path), version_base=None):
        run_folder = hydra_compose(overrides=[], return_hydra_config=True).hydra.run
    assert "${now:" in str(run_folder._get_node("dir")._value()), "and the next start has a folder of its own"

    assert interrupted.code == 75 and len(interrupted.saved) == 1 and interrupted.saved[0] > 2
    assert (
        f"going on from the checkpoint of step {interrupted.saved[0]}\n" in (interrupted.result / "log.txt").read_text()
    )
    assert [row["step"] for row in read_jsonl(interrupted.result / "metrics.jsonl")] == [*range(1, 61)]
    assert len(interrupted.folders[0]) == 1 and interrupted.folders[0] == interrupted.folders[1]


def track(start_model: Path, folder: Path, attempt: int) -> None:
    """Of a fork: transformers' Trainer with W&B offline."""
    say_into(folder / "said.txt")
    os.environ.update(WANDB_MODE="offline", WANDB_DIR=str(folder), HOME=str(folder))
    trainer = stock(start_model, folder / "out", max_steps=attempt, report_to="wandb", logging_steps=1)
    trainer.train(resume_from_checkpoint=attempt > 1)


@pytest.mark.slow
def test_verl_2783_restart_opens_a_new_run(tiny_model: Path, tmp_path: Path, interrupted: Interrupted) -> None:
    for number in (1, 2):
        process = FORKING.Process(target=track, args=(tiny_model, tmp_path, number))
        process.start()
        process.join(120)
        assert process.exitcode == 0, (tmp_path / "said.txt").read_text()[-2000:]
    runs = [path.name.rpartition("-")[2] for path in tmp_path.glob("wandb/offline-run-*")]
    assert len(set(runs)) == 2, "two runs, by their ids"

    assert interrupted.ids[0] == interrupted.ids[1]
    newest = max(interrupted.result.glob("wandb/*/run-*.wandb"), key=lambda path: path.stat().st_mtime)
    told, steps = _read_log(newest), [row["step"] for row in read_jsonl(interrupted.result / "metrics.jsonl")]
    assert told["run"].run_id == interrupted.ids[0].strip()
    assert [row["_step"] for row in told["history"]] == steps, "one history, each row once"
