"""What nothing-is-lost costs: python -m bench.recovery [--repeats 5] [--out FILE].

Through the command line, on the quickstart's model and rows, both arms of a comparison in turns:

resume    launch of `alignment run` to the first new step on disk, cold against going on from a checkpoint after kill -9
saving    steps with a checkpoint at every third of them against the same steps without; LoRA, and all weights

Losses must be equal where arms do equal work. Prints a table in Markdown; --out keeps every number.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

BASE = ["pipeline=sft", "model=smollm2_135m", "data=quickstart", "tracking=none", "min_free_gb=0", "retries=0"]
BASE += ["stage.prepare_sft.max_length=80", "stage.prepare_sft.max_prompt_length=56"]  # as experiment=quickstart
BASE += ["stage.prepare_sft.splits={heldout: 60, prompts: 0, train: 160}", "stage.sft.global_batch_size=8"]
STEPS, EVERY = 9, 3  # of the arms of saving, and the steps between two saves
DEFAULT_MINUTES = 10  # conf/checkpoint/default.yaml


def start(store: Path, *settings: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "alignment.cli", "run", *BASE, *settings]
    environment = {**os.environ, "ALIGNMENT_STORE": str(store)}
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.STDOUT}
    return subprocess.Popen(command, env=environment, **quiet)  # type: ignore[call-overload, no-any-return]


def key(store: Path, *settings: str) -> str:
    command = [sys.executable, "-m", "alignment.cli", "plan", "--json", *BASE, *settings]
    told = subprocess.run(command, env={**os.environ, "ALIGNMENT_STORE": str(store)}, capture_output=True, check=True)
    nodes = json.loads(told.stdout)["nodes"]
    return str(next(node["key"] for node in nodes if node["name"] == "sft"))[:16]


def rows(folder: Path) -> list[dict[str, Any]]:
    path = folder / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def until_step(folder: Path, step: int, driver: subprocess.Popen[bytes], since: float = 0.0) -> None:
    """Until this step, computed after `since` (unix seconds), is on disk."""
    while not any(row["step"] >= step and row["time"] > since for row in rows(folder)):
        if driver.poll() is not None:
            raise SystemExit(f"the run ended with {driver.returncode}: see {folder / 'log.txt'}")
        time.sleep(0.02)


def kill(driver: subprocess.Popen[bytes]) -> None:
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    time.sleep(1.0)  # its workers die with it


def resume_once(store: Path, repeat: int) -> dict[str, float]:
    """Seconds from launch to the first new step: cold, and going on."""
    settings = [f"stage.sft.seed={1000 + repeat}", "checkpoint.every_steps=1"]
    work = store / "work" / key(store, *settings)
    began = time.monotonic()
    driver = start(store, *settings)
    until_step(work, 1, driver)
    cold = time.monotonic() - began
    until_step(work, 3, driver)
    kill(driver)
    whole = max(int(path.parent.name[5:]) for path in work.glob("checkpoints/step-*/manifest.json"))
    began, launched = time.monotonic(), time.time()
    driver = start(store, *settings)
    until_step(work, whole + 1, driver, since=launched)
    resumed = time.monotonic() - began
    kill(driver)
    return {"cold": cold, "resumed": resumed, "from_step": whole}


def saving_once(store: Path, repeat: int, full: bool, saves: bool) -> dict[str, Any]:
    """Seconds of the steps after the first, and their losses."""
    settings = [f"stage.sft.max_steps={STEPS + 1}"]
    settings += ["stage.sft.lora=null", "stage.sft.learning_rate=1e-5"] if full else []
    settings += [f"checkpoint.every_steps={EVERY}" if saves else "checkpoint.every_minutes=null"]
    arm = store.parent / f"{store.name}-{repeat}-{int(full)}-{int(saves)}"
    subprocess.run(["cp", "-r", str(store), str(arm)], check=True)
    work = arm / "work" / key(arm, *settings)
    driver = start(arm, *settings)
    until_step(work, STEPS + 1, driver)
    told = rows(work)
    kill(driver)
    subprocess.run(["rm", "-rf", str(arm)], check=True)
    return {"seconds": told[-1]["time"] - told[0]["time"], "losses": [row["loss"] for row in told]}


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f}-{max(values):.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder) / "store"
        driver = start(store, "stage.sft.max_steps=1")  # start model and rows are there for all
        work = store / "work" / key(store, "stage.sft.max_steps=1")
        until_step(work, 1, driver)
        kill(driver)
        resumes = [resume_once(store, repeat) for repeat in range(given.repeats)]
        savings: dict[str, list[dict[str, Any]]] = {"LoRA": [], "all weights": []}
        for name, arms in savings.items():
            for repeat in range(given.repeats):
                order = (False, True) if repeat % 2 else (True, False)
                both = {saves: saving_once(store, repeat, name != "LoRA", saves) for saves in order}
                assert both[True]["losses"] == both[False]["losses"], "saving has changed a loss"
                arms.append({"with": both[True]["seconds"], "without": both[False]["seconds"]})
    print(table(resumes, savings))
    if given.out:
        given.out.write_text(json.dumps({"resume": resumes, "saving": savings}, indent=1) + "\n")


def table(resumes: list[dict[str, float]], savings: dict[str, list[dict[str, Any]]]) -> str:
    lines = ["| what | median (least-most) |", "|---|---|"]
    for name in ("cold", "resumed"):
        lines.append(f"| launch to the first new step, {name}, s | {spread([one[name] for one in resumes])} |")
    lines.append(f"| resumed / cold | {spread([one['resumed'] / one['cold'] for one in resumes])} |")
    for name, arms in savings.items():
        a_save = [(arm["with"] - arm["without"]) / (STEPS // EVERY) for arm in arms]
        lines.append(f"| {name}: a step without saves, s | {spread([arm['without'] / STEPS for arm in arms])} |")
        lines.append(f"| {name}: a save costs, s | {spread(a_save)} |")
        share = [100 * one / (60 * DEFAULT_MINUTES) for one in a_save]
        lines.append(f"| {name}: of training, a save every {DEFAULT_MINUTES} minutes, % | {spread(share)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
