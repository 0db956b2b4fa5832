"""A stage that was stopped and went on is one run in W&B, with every step once; all else is as if it was not."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Command, environment
from tests.faults.runs import start, until
from tests.test_kills import keys

pytestmark = pytest.mark.slow
TIMES = {"time", "tokens_per_s"}


def test_the_history_of_a_stage_that_went_on_is_whole(
    tmp_path: Path,
    command: Command,
    forked: Command,
    short_settings: list[str],
    read_log: Callable[[Path], dict[str, Any]],
) -> None:
    more = ["tracking=wandb_offline", "stage.sft.max_steps=80", "stage.sft.log_every=2"]
    settings = [*short_settings, *more]
    store, other = tmp_path / "store", tmp_path / "whole" / "store"
    forked(store, "run", *short_settings, "stage.sft.max_steps=1")  # what is before is the same
    shutil.copytree(store, other)
    key = keys(command, store, settings)["sft"]
    work = store / "work" / key
    driver = start(tmp_path, ["run", *settings], environment(store))
    until(lambda: len(rows(work)) >= 3, 120)
    driver.kill(signal.SIGTERM)
    assert driver.wait(60) == 75
    outcome = json.loads((work / "outcome.json").read_text())
    assert outcome["why"].startswith("its driver: saved at step")
    before = (work / "wandb_run_id").read_text()
    forked(store, "run", *settings)
    forked(other, "run", *settings)

    done = store / "store" / key
    assert (done / "wandb_run_id").read_text() == before
    steps = list(range(2, 81, 2))
    assert [row["step"] for row in rows(done)] == steps
    newest = max(done.glob("wandb/*/run-*.wandb"), key=lambda path: path.stat().st_mtime)
    log = read_log(newest)
    assert log["run"].run_id == before.strip()
    assert [row["_step"] for row in log["history"]] == steps
    assert log["exit"] == 0
    plain = [{name: value for name, value in row.items() if name not in TIMES} for row in rows(done)]
    assert plain == [
        {name: value for name, value in row.items() if name not in TIMES} for row in rows(other / "store" / key)
    ]
    model = "model/model.safetensors"
    assert (done / model).read_bytes() == (other / "store" / key / model).read_bytes()
    attempts = json.loads((done / "record.json").read_text())["attempts"]
    assert [attempt["outcome"] for attempt in attempts] == ["preempted", "done"]


def rows(folder: Path) -> list[dict[str, Any]]:
    path = folder / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
