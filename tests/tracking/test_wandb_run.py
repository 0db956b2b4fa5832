"""What a stage writes for W&B, read back from the file that the real wandb process wrote."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Command

PARENTS = {"model": ["sft", "a" * 64], "data": ["dpo", "c" * 64]}  # the second is also what the loop makes
CONFIG = {"beta": 0.1, "key": "c" * 64, "model": {"eos_token": "<|im_end|>", "hf_token": "hf_verysecret"}}

SECRETS = (b"verysecret", b"0f" * 20)  # the second is the user's API key, in the environment


def log_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("wandb/offline-run-*/run-*.wandb"))


def test_an_offline_run_holds_history_settings_group_and_lineage(
    tmp_path: Path, run_loop: Callable[..., dict[str, Any]], read_log: Callable[[Path], dict[str, Any]]
) -> None:
    said = run_loop(config=CONFIG, parents=PARENTS, final_folder=str(tmp_path / "store" / "cc"))

    (file,) = log_files(tmp_path / "stage")
    log = read_log(file)
    assert [(row["_step"], row["loss"], row["margin"]) for row in log["history"]] == [
        (1, 1.0, 0.5), (2, 1 / 2, 1.0), (3, 1 / 3, 1.5), (4, 1 / 4, 2.0), (5, 1 / 5, 2.5), (6, 1 / 6, 3.0)
    ]  # fmt: skip
    assert log["summary"]["reward_accuracy"] == "0.75"
    kept = {name: value for name, value in log["config"].items() if name != "_wandb"}
    assert kept == {
        "beta": 0.1, "key": "c" * 64, "model": {"eos_token": "<|im_end|>", "hf_token": "[removed]"}
    }  # fmt: skip
    for path in (tmp_path / "stage").rglob("*"):
        if not path.is_dir():  # a dangling link would be an error here
            assert not [secret for secret in SECRETS if secret in path.read_bytes()], path
    run = log["run"]
    assert (run.project, run.run_group) == ("alignment", "quickstart-1a2b")
    assert (run.display_name, run.job_type) == ("dpo", "dpo")
    assert run.run_id == said["run_id"] == (tmp_path / "stage" / "wandb_run_id").read_text().strip()
    assert [(used.name, json.loads(used.metadata)) for used in log["used"]] == [
        ("sft", {"key": "a" * 64, "role": "model"}),
        ("dpo", {"key": "c" * 64, "role": "data"}),
    ]
    (made,) = log["made"]
    assert (made.name, made.type, sorted(made.aliases)) == ("dpo", "stage", ["c" * 16, "latest"])
    assert json.loads(made.metadata) == {"key": "c" * 64}
    assert [(entry.path, entry.ref) for entry in made.manifest.contents] == [("stage", "alignment-stage:" + "c" * 64)]
    sft, dpo = log["used"]  # the server tells artifacts apart by name, type and digest
    assert (dpo.name, dpo.type, dpo.digest) == (made.name, made.type, made.digest) and sft.digest != dpo.digest
    assert log["exit"] == 0
    assert said["warnings"] == []
    assert said["command"] == f"wandb sync {tmp_path}/store/cc/wandb/{file.parent.name}"
    assert said["times"]["log"] < 1 and said["times"]["finish"] < 5
    assert sorted(path.name for path in tmp_path.iterdir()) == ["home", "stage"]  # nothing outside the stage's folder
    assert list((tmp_path / "home").iterdir()) == []
    assert sorted(path.name for path in (tmp_path / "stage").iterdir()) == ["metrics.jsonl", "wandb", "wandb_run_id"]


def test_a_restart_after_kill_9_keeps_the_run_and_its_file_is_whole(
    tmp_path: Path,
    start_loop: Callable[..., Any],
    run_loop: Callable[..., dict[str, Any]],
    read_log: Callable[[Path], dict[str, Any]],
) -> None:
    """Killed at step 5, taken up from the checkpoint of step 3: steps 4 and 5 happen twice and count once."""
    killed = start_loop(last=8, killed_at=5, pause=0.5)
    killed.communicate(timeout=60)
    assert killed.returncode == -signal.SIGKILL
    with open(tmp_path / "stage" / "metrics.jsonl", "a") as stream:
        stream.write('{"step": 6, "lo')  # the row that was being written
        stream.write("\n")

    said = run_loop(first=4, last=8)

    first, second = (read_log(file) for file in log_files(tmp_path / "stage"))
    assert first["run"].run_id == second["run"].run_id == said["run_id"]
    assert [row["_step"] for row in first["history"]][:2] == [1, 2]  # all but the last second is on disk
    assert [(row["_step"], row["loss"]) for row in second["history"]] == [(n, 1 / n) for n in range(1, 9)]
    assert [row["_timestamp"] for row in second["history"][:3]] == [1001.0, 1002.0, 1003.0]  # when they were trained
    assert said["warnings"] == []


def test_a_failed_stage_is_a_failed_run_and_its_command_names_the_work_folder(
    tmp_path: Path, run_loop: Callable[..., dict[str, Any]], read_log: Callable[[Path], dict[str, Any]]
) -> None:
    said = run_loop(ok=False, final_folder=str(tmp_path / "store"))

    (file,) = log_files(tmp_path / "stage")
    assert read_log(file)["exit"] == 1
    assert said["command"] == f"wandb sync {file.parent}"


def test_a_wandb_process_that_is_killed_does_not_stop_the_training(run_loop: Callable[..., dict[str, Any]]) -> None:
    said = run_loop(last=12, helper_at=4, helper_signal=signal.SIGKILL)

    (warning,) = said["warnings"]
    assert warning.startswith("W&B tracking has ended early") and "metrics.jsonl holds every row" in warning
    assert said["times"]["log"] < 3 and said["times"]["finish"] < 3


def test_a_wandb_process_that_hangs_does_not_hold_the_end(run_loop: Callable[..., dict[str, Any]]) -> None:
    said = run_loop(helper_at=4, helper_signal=signal.SIGSTOP, close_seconds=1.5)

    (warning,) = said["warnings"]
    assert warning.startswith("W&B's log file could not be closed")
    assert said["times"]["finish"] < 4 and said["seconds"] < 15


def test_a_folder_that_cannot_be_written_costs_a_warning(
    tmp_path: Path, run_loop: Callable[..., dict[str, Any]]
) -> None:
    (tmp_path / "stage").mkdir()
    (tmp_path / "stage" / "wandb").write_text("a file where the folder should be")

    said = run_loop()

    (warning,) = said["warnings"]
    assert warning.startswith("W&B tracking has ended early (FileExistsError")


@pytest.mark.parametrize("spec", [{"kind": "none"}, {"other_rank": True}])
def test_without_tracking_and_on_other_ranks_wandb_is_not_even_imported(
    tmp_path: Path, run_loop: Callable[..., dict[str, Any]], spec: dict[str, Any]
) -> None:
    said = run_loop(**spec)

    assert said["imported"] is False and said["run_id"] is None
    assert [path.name for path in (tmp_path / "stage").iterdir()] == ["metrics.jsonl"]


ONLY_A_MODEL = """# @package _global_
defaults:
  - /stage@stage.import_model: import_model
  - _self_
pipeline:
  nodes:
    start: {stage: import_model, inputs: {}}
  final: start
"""


def test_where_a_stage_runs_is_not_told(
    tmp_path: Path, command: Command, tiny_settings: list[str], read_log: Callable[[Path], dict[str, Any]]
) -> None:
    """How a cluster's jobs are set up is not for others."""
    (tmp_path / "conf" / "pipeline").mkdir(parents=True)
    (tmp_path / "conf" / "pipeline" / "model.yaml").write_text(ONLY_A_MODEL)
    own = ["--config-dir", str(tmp_path / "conf"), "pipeline=model"]
    command(tmp_path / "store", "run", *own, *tiny_settings, "tracking=wandb_offline")
    (file,) = (tmp_path / "store" / "store").glob("*/wandb/offline-run-*/run-*.wandb")
    told = read_log(file)["config"]["experiment"]
    assert "engine" in told and "launcher" not in told
