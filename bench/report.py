"""results.json, the tables of docs/performance.md and the plot beside it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bench import startup
from bench.pages import between_markers, markers
from bench.plan import ARMS, CURVE_STEPS
from bench.plot import svg

MARKED = "bench"
BEGIN, END = markers(MARKED)
NOT_MEASURED = "Not measured yet."
PLOT = "performance.svg"


def write_results(path: Path, results: dict[str, Any]) -> None:
    """Written anew after each group, so that an interrupted run keeps what it measured."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_suffix(".part")
    fresh.write_text(json.dumps(results, indent=1) + "\n")
    fresh.replace(path)


def write_docs(folder: Path, results: dict[str, Any]) -> None:
    """folder: with performance.md, whose text between the markers is replaced, or without."""
    (folder / "performance.md").write_text(between_markers(page_of(folder), MARKED, tables(results)))
    (folder / PLOT).write_text(svg(results["groups"]))


def page_of(folder: Path) -> str:
    page = folder / "performance.md"
    return page.read_text() if page.exists() else f"{BEGIN}\n{END}\n"


def tables(results: dict[str, Any]) -> str:
    if not results["groups"] and not results.get("startup"):
        return NOT_MEASURED
    parts = [_machine(results), _ratio_table(results["ratios"])]
    for group in results["groups"]:
        parts.append(f"#### {group['task']}, {group['lengths']} lengths\n\n{arm_table(group)}")
    if results.get("startup"):
        head = "#### From launch to the first step, seconds, median (low to high)"
        parts.append(f"{head}\n\n{startup.table(results['startup'])}")
    if results["not_measured"]:
        parts.append("Not measured: " + ", ".join(results["not_measured"]) + ".")
    return "\n\n".join(parts)


def _machine(results: dict[str, Any]) -> str:
    machine = results["machine"]
    name = machine["device_name"] if machine["device"] == "cuda" else f"CPU, {machine['threads']} threads"
    versions = ", ".join(f"{library} {version}" for library, version in machine["versions"].items())
    size, took = results["settings"]["size"], f"{results['minutes']:.0f} minutes"
    took += f" in {results['runs']} runs, each group in one" if results["runs"] > 1 else ""
    return f"Measured on: {name}; {versions}; model `{size}`; {took}.\n\n![Speed]({PLOT})"


def _ratio_table(ratios: list[dict[str, Any]]) -> str:
    if not ratios:
        return "No ratio between ours and TRL's: an arm is missing or was refused."
    lines = [
        "| task | lengths | against | speedup (of medians) | lowest to highest repeat | peak memory, ours / theirs |",
        "|---|---|---|---|---|---|",
    ]
    for row in ratios:
        extremes = f"{row['speedup_low']:.2f} to {row['speedup_high']:.2f}"
        lines.append(
            f"| {row['task']} | {row['lengths']} | {row['against']} "
            f"| {row['speedup']:.2f} | {extremes} | {row['memory']:.2f} |"
        )
    return "\n".join(lines)


def arm_table(group: dict[str, Any]) -> str:
    """The arms of one group; a refused arm's row says why, and has no speed."""
    with_mfu = any("mfu" in row for row in group["arms"].values())
    unit = "rows/s" if group["task"] == "sft" else "pairs/s"
    heads = [
        "arm", "s a repeat (low to high)", unit, "tokens/s", "first step s", "padding", "sharing",
        "peak GB (over start)", "executed / model FLOPs", *(["MFU", "executed"] if with_mfu else []), "loss difference",
        f"in {CURVE_STEPS} steps",
    ]  # fmt: skip
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for arm, row in group["arms"].items():
        lines.append("| " + " | ".join(_cells(arm, row, with_mfu)) + " |")
    for arm, reason in group["missing"].items():
        lines.append(f"| {arm} | {reason} |" + " |" * (len(heads) - 2))
    notes = [f"{group['repeats']} repeats of {group['steps']} steps of {group['rows']}."]
    if any(ARMS[arm].ablation for arm in group["arms"]):
        notes.append(f"Arms with a piece off: {group['repeats_of_ablations']} repeats.")
    for task, found in group["tuned"].items():
        free = ", padding-free" if found["padding_free"] else ""
        apart = f", of the reference pass {found['reference_batch']}" if "reference_batch" in found else ""
        notes.append(f"TRL tuned ({task}): micro-batch {found['micro_batch']}{apart}{free}.")
    return "\n".join(lines) + "\n\n" + " ".join(notes)


def _cells(arm: str, row: dict[str, Any], with_mfu: bool) -> list[str]:
    memory = f"{row['peak_bytes']['median'] / 1e9:.2f}"
    over = f"({(row['peak_bytes']['median'] - row['start_bytes']['median']) / 1e9:.2f})"
    ratios = [f"{row['padding_ratio']:.2f}", f"{row['sharing_ratio']:.2f}", f"{memory} {over}"]
    differences = [row[name] for name in ("loss_difference", "curve_difference")]
    apart = ["" if difference is None else f"{difference:.1e}" for difference in differences]
    if row["refused"]:
        return [arm, row["refused"], "", "", "", *ratios, "", *(["", ""] if with_mfu else []), *apart]
    time = row["time"]
    speeds = [
        f"{time['median']:.2f} ({time['low']:.2f} to {time['high']:.2f})",
        f"{row['rows_per_s']:.3g}", f"{row['tokens_per_s']:.0f}", f"{row['first_step_s']['median']:.2f}",
    ]  # fmt: skip
    use = []
    if with_mfu:
        use = [f"{row[name]:.1%}" if name in row else "" for name in ("mfu", "executed_utilisation")]
    executed = f"{row['executed_over_model_flops']:.2f}" if "executed_over_model_flops" in row else ""
    return [arm, *speeds, *ratios, executed, *use, *apart]


def text_table(group: dict[str, Any]) -> str:
    """For the terminal."""
    lines = [f"{group['task']} {group['lengths']}"]
    for arm in ARMS:
        row = group["arms"].get(arm)
        if row is None:
            continue
        memory = row["peak_bytes"]["median"] / 1e9
        said = row["refused"] or (
            f"{row['time']['median']:8.2f} s  {row['rows_per_s']:8.3g} rows/s  {row['tokens_per_s']:8.0f} tokens/s"
        )
        within = "" if row["refused"] else f"losses within {row['loss_difference']:.1e}"
        lines.append(f"  {arm:20s} {said}  {memory:5.2f} GB  {within}")
    for row in group["ratios"]:
        lines.append(
            f"  against {row['against']}: {row['speedup']:.2f} times as fast, {row['memory']:.2f} of the memory"
        )
    return "\n".join(lines)
