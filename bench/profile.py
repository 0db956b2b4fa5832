"""Where the time of an arm goes: python -m bench.profile --help. One thread, the operators by their own time.

The first run warms up, the second is profiled. Shares are of the time in operators; profiling itself costs a few per
cent. GFLOP/s of matrix products is counted by PyTorch's profiler.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

from bench.plan import ALL, ARMS, WARM
from bench.pool import ENVIRONMENT
from bench.run import Parser
from bench.workloads import SHAPES, Workload, pairs

KINDS = (
    ("matrix products", ("aten::mm", "aten::addmm", "aten::addmm_", "aten::bmm", "aten::baddbmm")),
    ("attention, forward", ("aten::_scaled_dot_product_flash_attention_for_cpu",)),
    ("attention, backward", ("aten::_scaled_dot_product_flash_attention_for_cpu_backward",)),
    (
        "filling, copying, adding up",
        ("aten::fill_", "aten::copy_", "aten::cat", "aten::add", "aten::add_", "aten::zero_"),
    ),
)


def profiled(arm: str, task: str, lengths: str, size: str) -> Any:
    """The operators of one run, as torch.profiler averages them."""
    import torch

    from bench.arms import Setting, maker
    from bench.measure import Counter

    torch.set_num_threads(1)
    workload = Workload(task=task, lengths=lengths, size=size, rows=16, steps=2)
    for last in (False, True):
        with tempfile.TemporaryDirectory() as folder:
            setting = Setting(workload=workload, device="cpu", precision="fp32", folder=Path(folder), counter=Counter(),
                              options={task: {"micro_batch": 1}})  # fmt: skip
            job = maker(arm)(task, pairs(workload), setting)
            torch.set_num_threads(1)
            if not last:
                job.trainer.train()
                continue
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], with_flops=True) as profile:
                job.trainer.train()
    return profile.key_averages()


def table(operators: Any) -> str:
    total = sum(one.self_cpu_time_total for one in operators)
    lines = ["| operators | share of the time | GFLOP/s |", "|---|---|---|"]
    left = total
    for kind, names in KINDS:
        mine = [one for one in operators if one.key in names]
        time, flops = sum(one.self_cpu_time_total for one in mine), sum(one.flops or 0 for one in mine)
        left -= time
        rate = f"{flops / time / 1e3:.0f}" if kind == "matrix products" and time else ""
        lines.append(f"| {kind} | {time / total:.0%} | {rate} |")
    return "\n".join([*lines, f"| all else | {left / total:.0%} | |"])


def main(arguments: list[str] | None = None) -> None:
    parser = Parser(prog="bench.profile", description="Where the time of an arm goes.")
    parser.add_argument("--arm", choices=[name for name in ARMS if name not in WARM], default="ours")
    parser.add_argument("--task", choices=ALL, default="dpo")
    parser.add_argument("--lengths", choices=tuple(SHAPES), default="tldr")
    parser.add_argument("--size", choices=("cpu", "tiny"), default="cpu")
    chosen = parser.parse_args(arguments)
    if chosen.task not in ARMS[chosen.arm].tasks:
        parser.error(f"{chosen.arm} has no task {chosen.task}: {', '.join(ARMS[chosen.arm].tasks)}")
    os.environ.update(ENVIRONMENT)
    operators = profiled(chosen.arm, chosen.task, chosen.lengths, chosen.size)
    print(f"{chosen.arm}, {chosen.task}, {chosen.lengths} lengths\n\n{table(operators)}")


if __name__ == "__main__":
    main()
