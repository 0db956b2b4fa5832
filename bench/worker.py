"""One process of one arm. Orders come as lines of JSON on stdin, answers go to stdout; the other side is bench/pool.py.

It stays alive between orders, so that imports are paid once; while it waits for one it uses no CPU.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
import traceback
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, TextIO

import torch
import transformers
import trl

from bench.arms import Job, Setting, Unavailable, maker, weights
from bench.measure import Counter, flop_counter, model_flops, peak, peak_flops, start_peak
from bench.plan import ARMS
from bench.workloads import BETAS, SIZES, Workload, pairs, totals


class FirstStep(transformers.TrainerCallback):
    """When the first optimiser step had ended."""

    at: float | None = None

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.at is None:
            if torch.cuda.is_available():
                torch.cuda.synchronize()  # once a run: the queue holds the step's last kernels
            self.at = time.monotonic()


def hello(device: str) -> dict[str, Any]:
    name = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    return {
        "device": device,
        "device_name": name,
        "peak_flops": peak_flops(name),
        "threads": torch.get_num_threads(),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__, "trl": trl.__version__},
    }


def train(job: Job) -> dict[str, Any]:
    """Seconds are from train() to its end, with what had to be done in construction."""
    first = FirstStep()
    job.trainer.add_callback(first)
    began = time.monotonic()
    job.trainer.train()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    ended = time.monotonic()
    return {
        "seconds": job.before + ended - began,
        "first_step_seconds": job.before + (first.at or ended) - began,
        "losses": [row["loss"] for row in job.trainer.state.log_history if "loss" in row],
    }


def run(arm: str, order: dict[str, Any], device: str) -> dict[str, Any]:
    """One run of the arm; order is made by `order` in bench/group.py."""
    workload = Workload(**order["workload"])
    rows, counter = pairs(workload), Counter()
    before = start_peak(device)
    counting = flop_counter() if order["flops"] else nullcontext()
    with tempfile.TemporaryDirectory() as folder, counting:
        setting = Setting(
            workload=workload, device=device, precision=order["precision"], folder=Path(folder), counter=counter,
            options=order["options"], learning_rate=order["learning_rate"],
        )  # fmt: skip
        if workload.task == "sweep":
            result = sweep(arm, rows, setting)
        else:
            result = train(maker(arm)(workload.task, rows, setting))
    result.update(peak_bytes=peak(device), start_bytes=before, **counter.to_json())
    if order["flops"]:
        assert not isinstance(counting, nullcontext)
        result["executed_flops"], result["model_flops"] = counting.get_total_flops(), needed_flops(workload, rows)
    return result


def needed_flops(workload: Workload, rows: list[dict[str, list[int]]]) -> float:
    """The sweep's are those of its separate runs."""
    parts = ["sft", "dpo"] * len(BETAS) if workload.task == "sweep" else [workload.task]
    return sum(model_flops(SIZES[workload.size], totals(part, rows), part) for part in parts)


def sweep(arm: str, rows: list[dict[str, list[int]]], setting: Setting) -> dict[str, Any]:
    """SFT and DPO for each beta: TRL's with an SFT run a beta, ours with one. Losses: SFT's and DPO's, beta by beta."""
    make, parts, losses = maker(arm), [], []
    sft, state = None, None
    for beta in BETAS:
        if sft is None or not ARMS[arm].ours:
            job = make("sft", rows, setting)
            sft, state = train(job), weights(job.trainer)
            parts.append(sft)
            del job
        dpo = train(make("dpo", rows, replace(setting, beta=beta, state=state)))
        parts.append(dpo)
        losses += sft["losses"] + dpo["losses"]
    return {
        "seconds": sum(part["seconds"] for part in parts),
        "first_step_seconds": parts[0]["first_step_seconds"],
        "losses": losses,
    }


def answer(arm: str, order: dict[str, Any], device: str) -> dict[str, Any]:
    try:
        return hello(device) if order["kind"] == "hello" else run(arm, order, device)
    except Unavailable as reason:
        return {"unavailable": str(reason)}
    except Exception as error:  # an arm that fails must not end the others
        traceback.print_exc()
        return {"error": f"{type(error).__name__}: {error}"[:500]}


def main() -> None:
    arm = sys.argv[1]
    answers: TextIO = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print goes to the log, not between the answers
    device = "cuda" if torch.cuda.is_available() and os.environ.get("BENCH_DEVICE") != "cpu" else "cpu"
    # Every arm the same number: our engine sets it, TRL leaves it to PyTorch
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    for line in sys.stdin:
        print(json.dumps(answer(arm, json.loads(line), device)), file=answers, flush=True)


if __name__ == "__main__":
    main()
