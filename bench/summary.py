"""From the workers' answers to numbers: medians and spread, loss curves compared, ratios between arms. No torch."""

from __future__ import annotations

import math
import statistics
from dataclasses import replace
from typing import Any

from bench.plan import ABLATION_REPEATS, ARMS, Group
from bench.workloads import BETAS, SIZES, Totals, pairs, totals

LOSS_TOLERANCE = 1e-4  # of two loss curves in fp32, at any step
BF16_TOLERANCE = 2e-2  # of the timed runs in bf16, whose arms were compared in fp32 before
OURS, THEIRS = "ours", ("trl_default", "trl_tuned")


def loss_difference(losses: list[float], reference: list[float]) -> float:
    """The largest difference at any step; infinite where the curves have unequal lengths or are not numbers."""
    if len(losses) != len(reference) or not losses:
        return float("inf")
    differences = [abs(left - right) for left, right in zip(losses, reference, strict=True)]
    return max(float("inf") if difference != difference else difference for difference in differences)


def spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}


def work(group: Group) -> Totals:
    """What the arms of a group have to do in one repeat. Of the sweep: what its separate runs do, SFT and DPO."""
    workload = group.workload
    rows = pairs(workload)
    if workload.task != "sweep":
        return totals(workload.task, rows)
    sft, dpo = totals("sft", rows), totals("dpo", rows)
    times = len(BETAS)
    both = replace(dpo, tokens=dpo.tokens + sft.tokens, scored=dpo.scored + sft.scored)
    return Totals(both.rows * times, both.tokens * times, both.scored * times, (dpo.squares + sft.squares) * times)


def arm_summary(
    runs: list[dict[str, Any]], warm_up: dict[str, Any], group: Group, difference: float, tolerance: float,
    peak: float | None = None, curve_difference: float | None = None,
) -> dict[str, Any]:  # fmt: skip
    """A row of the tables. No speed is in it where the losses differ: `refused` says so instead.

    runs: the answers of the repeats. warm_up: the answer with FLOPs, or one without. peak: the device's FLOP/s.
    difference: of the runs' losses; curve_difference: of the tiny model's, None where there is no such curve.
    """
    needed = work(group)
    policy = {name: runs[0][name]["policy"] for name in ("positions", "attended")}
    row: dict[str, Any] = {
        "loss_difference": difference if math.isfinite(difference) else None,
        "curve_difference": curve_difference if curve_difference is None or math.isfinite(curve_difference) else None,
        "padding_ratio": policy["positions"] / max(policy["attended"], 1),
        "sharing_ratio": needed.tokens / max(policy["attended"], 1),
        "peak_bytes": spread([run["peak_bytes"] for run in runs]),
        "start_bytes": spread([run["start_bytes"] for run in runs]),
        "refused": None,
    }
    for what, apart in (("losses", difference), ("loss curves", curve_difference or 0.0)):
        if not math.isfinite(apart):
            return {**row, "refused": f"{what} cannot be compared"}
        if apart > tolerance:
            return {**row, "refused": f"{what} differ by {apart:.1e}"}
    seconds = spread([run["seconds"] for run in runs])
    row.update(
        seconds=[run["seconds"] for run in runs],
        time=seconds,
        rows_per_s=needed.rows / seconds["median"],
        rows_per_s_low=needed.rows / seconds["high"],
        rows_per_s_high=needed.rows / seconds["low"],
        tokens_per_s=needed.tokens / seconds["median"],
        first_step_s=spread([run["first_step_seconds"] for run in runs]),
    )
    if "model_flops" in warm_up:
        row.update(_flops(warm_up, group.workload.steps, seconds["median"], peak))
    return row


def _flops(warm_up: dict[str, Any], steps: int, seconds: float, peak: float | None) -> dict[str, float]:
    speed = warm_up["model_flops"] * (steps / max(warm_up["steps"], 1)) / seconds
    executed = warm_up["executed_flops"] / warm_up["model_flops"]
    found = {
        "executed_over_model_flops": executed, "model_flops_per_s": speed, "executed_flops_per_s": speed * executed,
    }  # fmt: skip
    if peak:
        found |= {"mfu": speed / peak, "executed_utilisation": speed * executed / peak}
    return found


def ratios(group: Group, arms: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Ours against TRL's two arms: speedup, theirs / ours in median seconds; memory, ours / theirs in peak bytes.

    speedup_low and speedup_high: the extremes over the repeats, each against the other arm's run of its round.
    """
    rows: list[dict[str, Any]] = []
    ours = arms.get(OURS, {})
    for against in THEIRS:
        other = arms.get(against, {})
        if not ours.get("seconds") or not other.get("seconds"):
            continue
        rounds = [theirs / mine for theirs, mine in zip(other["seconds"], ours["seconds"], strict=True)]
        rows.append(
            {
                "task": group.workload.task,
                "lengths": group.workload.lengths,
                "against": against,
                "speedup": other["time"]["median"] / ours["time"]["median"],
                "speedup_low": min(rounds),
                "speedup_high": max(rounds),
                "memory": ours["peak_bytes"]["median"] / other["peak_bytes"]["median"],
            }
        )
    return rows


def group_summary(group: Group, arms: dict[str, dict[str, Any]], options: dict[str, Any]) -> dict[str, Any]:
    needed, size = work(group), SIZES[group.workload.size]
    return {
        **group.workload.to_json(),
        "repeats": group.repeats,
        "repeats_of_ablations": min(group.repeats, ABLATION_REPEATS),
        "rows_a_repeat": needed.rows,
        "tokens_a_repeat": needed.tokens,
        "body_parameters": size.body_parameters(),
        "tuned": options,
        "arms": {name: arms[name] for name in ARMS if name in arms},
        "ratios": ratios(group, arms),
    }
