"""The driver inside a job, as far as it needs no cluster; tests/slurm has the rest."""

from __future__ import annotations

import pytest

from alignment import job
from alignment.pipeline.identity import difference


def test_what_differs_on_the_node_is_named() -> None:
    submitted = {"kind": "sft", "packages": {"torch": "2.13.0", "trl": "1.16.0"}}
    here = {"kind": "sft", "packages": {"torch": "2.12.0", "trl": "1.16.0"}}
    assert difference(submitted, here) == ("packages.torch", "2.13.0", "2.12.0")
    assert difference(submitted, {**here, "packages": {}}) == ("packages.torch", "2.13.0", None)


def test_outside_of_a_job_there_is_nothing_to_drive(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    assert job.main(["x.json", "0"]) == 4
    assert "alignment: error: this is no job of a cluster" in capsys.readouterr().err
