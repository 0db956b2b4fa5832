"""What is told of stages that are jobs, by what SLURM and the store say of them."""

from __future__ import annotations

import json
import time
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from alignment import cli
from tests.reporting.fake_slurm import FakeSlurm, commit, note, write_run


def node(store: Path, capsys: pytest.CaptureFixture[str], name: str = "sft") -> dict[str, Any]:
    """Of the only run, as `alignment status --json` has it."""
    assert cli.main(["status", "--json", "--store", str(store)]) == 0
    (run,) = json.loads(capsys.readouterr().out)
    return next(node for node in run["nodes"] if node["name"] == name)


def ago(seconds: float) -> str:
    """As SLURM writes it."""
    return datetime.fromtimestamp(time.time() - seconds).isoformat(timespec="seconds")


@pytest.fixture
def store(tmp_path: Path, slurm: FakeSlurm) -> Path:
    """A run whose SFT is job 12."""
    write_run(tmp_path / "store", "run", {"rows": "reused", "sft": "queued"}, {"sft": "12"})
    commit(tmp_path / "store", "run", "rows")
    return tmp_path / "store"


# --- states ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("who", ["the controller", "the accounting"])
def test_a_result_may_be_late_but_not_for_ever(
    who: str, store: Path, slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    """A file system may show it later than SLURM ends its job. One that was removed later will never be there."""

    def ended(when: str) -> None:
        if who == "the controller":
            slurm.queue(("12", "COMPLETED", "None", "n1", when))
        else:
            slurm.accounts(("12", "COMPLETED", when))

    ended(ago(10))
    assert node(store, capsys)["state"] == "running"
    ended(ago(3600))
    told = node(store, capsys)
    assert (told["state"], "job 12" in told["error"]) == ("gone", True)
    assert cli.main(["status", "run", "--watch", "--store", str(store)]) == 1
    assert "gone" in capsys.readouterr().out
    commit(store, "run", "sft")
    assert node(store, capsys)["state"] == "done"


def test_a_job_that_only_the_accounting_believes_to_run_has_failed(
    store: Path, slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    slurm.accounts(("12", "RUNNING", "Unknown"))
    told = node(store, capsys)
    assert (told["state"], told["error"]) == ("failed", "job 12 has ended without a result")


def test_a_job_that_said_why_it_failed_is_quoted(
    store: Path, slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    note(store, "run", "sft", "12").write_text("begins\nalignment: error: no GPU\n")
    slurm.accounts(("12", "FAILED", ago(10)))
    assert node(store, capsys)["error"] == "no GPU"
    slurm.accounts(("12", "CANCELLED by 0", ago(10)))
    assert node(store, capsys)["state"] == "cancelled"
