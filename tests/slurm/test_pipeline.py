"""Whole pipelines on real nodes, each with a network of its own."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.conftest import tiny_stages
from tests.slurm.cluster import Cluster
from tests.slurm.project import ON_SLURM, Project, losses, weights

STAGES = tiny_stages("prepare_sft", "sft", "dpo", "evaluate", "compare")


def test_two_nodes_train_as_one_process_does(slurm_network: Cluster, tiny_settings: list[str], tmp_path: Path) -> None:
    """SFT -> DPO -> evaluation, ZeRO-2 over gloo. Losses agree to 1e-5: sums come in another order."""
    settings = [*tiny_settings, "pipeline=sft_dpo", *STAGES]
    here, there = Project(tmp_path / "here", settings, None), Project(tmp_path / "there", settings, slurm_network)
    out = there.run(*ON_SLURM, "engine=zero2", "launcher.nodes=2")
    assert re.search(r"^ *\d+ +dpo +1 +afterok:\d+ *$", out, re.M), "it returns at once, and says what it has queued"
    here.run()
    run = there.runs()[0]["run"]
    there.command("status", run, "--watch")
    assert [node["state"] for node in there.runs()[0]["nodes"]] == ["done"] * len(there.runs()[0]["nodes"])
    for stage in ("sft", "dpo"):
        assert losses(there.result(stage)) == pytest.approx(losses(here.result(stage)), abs=1e-5)
        record = there.record(stage)
        assert record["world_size"] == 2
        (attempt,) = record["attempts"]
        assert attempt["job"]["restarts"] == 0 and len(attempt["job"]["nodes"].split(",")) == 1
    assert there.record("evaluate_dpo")["metrics"] == pytest.approx(here.record("evaluate_dpo")["metrics"], abs=1e-4)
    there.until((there.store / "runs" / run / "report.html").is_file, "the last job writes it")
    assert "11 stages: 11 in the store" in there.run(*ON_SLURM, "engine=zero2", "launcher.nodes=2")
    assert slurm_network.run("squeue", "--noheader").stdout == ""
    assert weights(there.result("dpo")) != weights(there.result("sft"))
