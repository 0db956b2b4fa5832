"""The driver, python -m bench: starts the workers, interleaves the arms, writes results, tables and plot."""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

from bench import startup
from bench.group import Session, measure
from bench.plan import ARMS, Clock, Group, groups
from bench.pool import ROOT, Pool
from bench.report import text_table, write_docs, write_results
from bench.workloads import SHAPES, SIZES, TASKS

# What matters most first: the last may be left out.
FIRST = ("dpo", "sweep", "sft", "reward", "startup")
LENGTHS = ("hh", "ultrafeedback", "tldr", "equal")


def main(argv: list[str] | None = None) -> int:
    """Exit code 0; 1 if an arm's losses differ or an arm failed; 2 if groups were left out for want of time."""
    options = parse(argv)
    out, docs = _targets(options)
    with tempfile.TemporaryDirectory(prefix="bench-") as logs, Pool(options.logs or Path(logs)) as pool:
        machine = pool.ask(options.arms[0] if options.arms else "trl_default", {"kind": "hello"})
        size = options.size or ("gpu" if machine["device"] == "cuda" else "cpu")
        plan = groups(
            tuple(task for task in options.tasks if task != "startup"), options.lengths, options.arms,
            options.ablations, size, options.pairs, options.steps, options.repeats,
        )  # fmt: skip
        results = run(plan, pool, machine, options, size, out)
        if "startup" in options.tasks:
            say("launch to first step")
            results["startup"] = startup.measure(
                options.logs or Path(logs), options.repeats, "bf16" if machine["device"] == "cuda" else "fp32", say
            )
            write_results(out, results)
    if docs is not None:
        write_docs(docs, results)
        say(f"wrote {docs / 'performance.md'}")
    say(f"wrote {out}")
    return exit_code(results)


def run(
    plan: list[Group], pool: Pool, machine: dict[str, Any], options: argparse.Namespace, size: str, out: Path
) -> dict[str, Any]:
    clock = Clock(plan)
    session = Session(pool, clock, say, machine, machine.get("peak_flops"), 60 * options.minutes)
    results: dict[str, Any] = {
        "machine": machine,
        "settings": {
            "size": size, "rows": options.pairs, "steps": options.steps, "repeats": options.repeats,
            "tasks": options.tasks, "lengths": options.lengths,
        },
        "minutes": 0.0, "ratios": [], "groups": [], "not_measured": [],
    }  # fmt: skip
    for number, group in enumerate(plan):
        name = f"{group.workload.task} {group.workload.lengths}"
        needed = clock.left_of(number)
        if needed is not None and clock.seconds() + needed > 60 * options.minutes:
            say(f"{name}: not measured, it would take about {needed / 60:.0f} min and the limit is {options.minutes:g}")
            results["not_measured"].append(name)
            clock.done(number)
            continue
        say(f"{name}: {', '.join(group.arms)}")
        measured = measure(session, number, group)
        results["groups"].append(measured)
        results["ratios"] += measured["ratios"]
        results["minutes"] = clock.seconds() / 60
        write_results(out, results)
        say(text_table(measured))
        left = clock.left()
        if left is not None:
            say(f"{clock.seconds() / 60:.1f} min gone, about {left / 60:.0f} min left")
    write_results(out, results)
    return results


def exit_code(results: dict[str, Any]) -> int:
    for group in results["groups"]:
        refused = [row["refused"] for row in group["arms"].values() if row["refused"]]
        if refused or any(reason.startswith("failed") for reason in group["missing"].values()):
            return 1
    return 2 if results["not_measured"] else 0


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    listed: dict[str, Any] = {"type": lambda text: tuple(text.split(",")), "metavar": "A,B"}
    parser.add_argument("--tasks", default=FIRST, help=f"of {', '.join((*TASKS, 'startup'))}", **listed)
    parser.add_argument("--lengths", default=LENGTHS, help=f"of {', '.join(LENGTHS)}", **listed)
    parser.add_argument("--arms", default=None, help=f"of {', '.join(ARMS)}", **listed)
    parser.add_argument("--ablations", default=("hh",), help="lengths on which pieces are switched off", **listed)
    parser.add_argument("--repeats", type=int, default=5, help="of each arm (the sweep has 3 at most)")
    parser.add_argument(
        "--steps", type=int, default=2, help="optimiser steps a repeat (the sweep has half, but 2 at least)"
    )
    parser.add_argument("--pairs", type=int, default=16, help="pairs, for sft rows, of a global batch")
    parser.add_argument("--minutes", type=float, default=60, help="groups that would end later are left out")
    parser.add_argument("--size", choices=tuple(SIZES), default=None, help="of the model; default by the device")
    parser.add_argument("--out", type=Path, default=None, help="folder of results.json (default: bench/)")
    parser.add_argument("--docs", type=Path, default=None, help="folder of performance.md (default: docs/)")
    parser.add_argument("--logs", type=Path, default=None, help="keep the workers' output in this folder")
    parser.add_argument(
        "--smoke", action="store_true", help="a minute: tiny model, dpo and sft, hh; docs stay as they are"
    )
    options = parser.parse_args(argv)
    if options.smoke:
        options.tasks = ("dpo", "sft") if options.tasks == FIRST else options.tasks
        options.lengths, options.ablations = ("hh",), ()
        options.size, options.pairs, options.steps, options.repeats = "tiny", 4, 2, 2
    for name, known in (("tasks", (*TASKS, "startup")), ("lengths", SHAPES), ("ablations", SHAPES), ("arms", ARMS)):
        unknown = set(getattr(options, name) or ()) - set(known)
        if unknown:
            parser.error(f"--{name}: unknown {', '.join(sorted(unknown))}")
    if min(options.repeats, options.steps, options.pairs) < 1:
        parser.error("--repeats, --steps and --pairs must be 1 or more")
    return options


def _targets(options: argparse.Namespace) -> tuple[Path, Path | None]:
    """results.json and the docs' folder. A smoke run writes docs only where it is told to."""
    if options.smoke:
        folder = options.out or Path(tempfile.mkdtemp(prefix="bench-smoke-"))
        return folder / "results.json", options.docs
    return (options.out or ROOT / "bench") / "results.json", options.docs or ROOT / "docs"


def say(words: str) -> None:
    print(words, flush=True)


if __name__ == "__main__":
    sys.exit(main())
