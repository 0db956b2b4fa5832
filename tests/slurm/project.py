"""A user's project on a cluster: a store, small settings, and the command line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.conftest import SHORT
from tests.slurm.cluster import Cluster

# A job for every node of these; 2-node stages are two processes over gloo.
ON_SLURM = (
    "launcher=slurm", "launcher.processes=1", "launcher.gpus_per_node=null", "launcher.cpus_per_process=1",
    "launcher.memory=1500M", "launcher.time_limit=10:00",
)  # fmt: skip


class Project:
    """cluster: whose commands it finds; None: it has none, and stages run here."""

    def __init__(self, folder: Path, settings: list[str], cluster: Cluster | None):
        self.folder, self.settings, self.cluster = folder, settings, cluster
        self.store = folder / "store"
        (folder / "conf" / "pipeline").mkdir(parents=True, exist_ok=True)
        (folder / "conf" / "pipeline" / "only_sft.yaml").write_text(SHORT)

    def environment(self) -> dict[str, str]:
        ours = {name: value for name, value in os.environ.items() if not name.startswith("SLURM")}
        given = {"ALIGNMENT_STORE": str(self.store), "ALIGNMENT_CACHE": str(self.folder / "cache"), "COLUMNS": "160"}
        return {**ours, **(self.cluster.environment() if self.cluster else {}), **given}

    def command(self, *arguments: str, code: int = 0) -> str:
        """What `alignment <arguments>` prints; its exit code is checked."""
        done = subprocess.run(
            [sys.executable, "-m", "alignment.cli", *arguments],
            env=self.environment(), cwd=self.folder, capture_output=True, text=True, timeout=400, check=False,
        )  # fmt: skip
        assert done.returncode == code, f"{done.returncode}\n{done.stdout}\n{done.stderr}\n{self.said()}"
        return done.stdout + done.stderr

    def run(self, *settings: str, code: int = 0) -> str:
        return self._composed("run", *settings, code=code)

    def plan(self, *settings: str, code: int = 0) -> str:
        return self._composed("plan", *settings, code=code)

    def _composed(self, verb: str, *settings: str, code: int) -> str:
        flags = [setting for setting in settings if setting in ("-m", "--wait", "--check")]
        rest = [setting for setting in settings if setting not in flags]
        return self.command(verb, *flags, "--config-dir", str(self.folder / "conf"), *self.settings, *rest, code=code)

    def runs(self) -> list[dict[str, Any]]:
        return json.loads(self.command("status", "--json"))  # type: ignore[no-any-return]

    def node(self, name: str) -> dict[str, Any]:
        """Of the newest run."""
        return next(node for node in self.runs()[0]["nodes"] if node["name"] == name)

    def result(self, name: str) -> Path:
        return self.store / "store" / self.node(name)["key"][:16]

    def record(self, name: str) -> dict[str, Any]:
        return json.loads((self.result(name) / "record.json").read_text())  # type: ignore[no-any-return]

    def step(self, name: str) -> int:
        """How far a stage at work is."""
        return int((self.node(name).get("progress") or {}).get("step") or 0)

    def until(self, true: Callable[[], Any], what: str, seconds: float = 120.0) -> None:
        end = time.monotonic() + seconds
        while not true():
            assert time.monotonic() < end, f"not in {seconds} s: {what}\n{self.said()}"
            time.sleep(0.3)

    def said(self) -> str:
        """What its jobs have printed, and their stages."""
        found = [*self.store.glob("jobs/*/*.out"), *self.store.glob("work/*/log.txt")]
        tails = (f"==> {path}\n" + "\n".join(path.read_text(errors="replace").splitlines()[-25:]) for path in found)
        return "\n".join(tails)


def losses(result: Path) -> list[float]:
    """By step."""
    rows = [json.loads(line) for line in (result / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "loss" in row]


def weights(result: Path) -> bytes:
    return (result / "model" / "model.safetensors").read_bytes()
