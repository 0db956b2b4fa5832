"""The workers as the driver sees them: one process an arm, one order at a time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",  # nothing is fetched
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TQDM_DISABLE": "1",
}


class WorkerError(Exception):
    """A worker died; the text has the end of its log."""


class Pool:
    """arm -> process, started at its first order. logs: folder for what the workers print."""

    def __init__(self, logs: Path) -> None:
        self._logs = logs
        self._workers: dict[str, subprocess.Popen[str]] = {}
        logs.mkdir(parents=True, exist_ok=True)

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for worker in self._workers.values():
            if worker.stdin:
                worker.stdin.close()  # the end of its orders ends it
        for worker in self._workers.values():
            try:
                worker.wait(timeout=5)
            except subprocess.TimeoutExpired:
                worker.kill()

    def ask(self, arm: str, order: dict[str, Any]) -> dict[str, Any]:
        """Waits for the answer. Raises WorkerError if the worker died, which the next order would start anew."""
        worker = self._workers.get(arm) or self._start(arm)
        assert worker.stdin and worker.stdout
        try:
            worker.stdin.write(json.dumps(order) + "\n")
            worker.stdin.flush()
            line = worker.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            worker.wait()
            del self._workers[arm]
            raise WorkerError(f"the worker of {arm} ended with code {worker.returncode}: {self._end_of_log(arm)}")
        return dict(json.loads(line))

    def _start(self, arm: str) -> subprocess.Popen[str]:
        with self._log(arm).open("a") as log:
            self._workers[arm] = subprocess.Popen(
                [sys.executable, "-m", "bench.worker", arm],
                cwd=ROOT, env={**os.environ, **ENVIRONMENT}, text=True,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log,
            )  # fmt: skip
        return self._workers[arm]

    def _log(self, arm: str) -> Path:
        return self._logs / f"{arm}.log"

    def _end_of_log(self, arm: str) -> str:
        return " | ".join(self._log(arm).read_text().splitlines()[-3:])
