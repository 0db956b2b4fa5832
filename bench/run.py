"""The driver, python -m bench: starts the workers, interleaves the arms, writes results, tables and plot."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any, NoReturn

from bench import startup
from bench.group import Session, measure
from bench.pages import between_markers
from bench.plan import ARMS, Clock, Group, groups
from bench.pool import ROOT, Pool
from bench.report import MARKED, page_of, text_table, write_docs, write_results
from bench.workloads import SHAPES, SIZES, TASKS

# What matters most first. A group for which the time left is too short is left out; a smaller one after it may fit.
FIRST = ("dpo", "sweep", "sft", "reward", "startup")
LENGTHS = ("hh", "ultrafeedback", "tldr", "equal")
SECONDS_A_UNIT = {"cpu": 6.8e-4}  # of plan.Clock: the 31 minutes that DPO's groups took on two cores, over their units


def main(argv: list[str] | None = None) -> int:
    """Exit code 0, also if groups were left out for want of time; 1 if an arm's losses differ or an arm failed; 2 for
    options that cannot be; 130 if interrupted. Whatever was measured until then is in the results and the docs."""
    try:
        return bench(parse(argv))
    except KeyboardInterrupt:
        say("interrupted")
        return 130


def bench(options: argparse.Namespace) -> int:
    out, docs = _targets(options)
    with tempfile.TemporaryDirectory(prefix="bench-") as folder, Pool(options.logs or Path(folder)) as pool:
        machine = pool.ask(options.arms[0] if options.arms else "trl_default", {"kind": "hello"})
        size = options.size or ("gpu" if machine["device"] == "cuda" else "cpu")
        plan = planned(options, size)
        results: dict[str, Any] = {
            "machine": machine,
            "settings": {
                "size": size, "rows": options.pairs, "steps": options.steps, "repeats": options.repeats,
                "tasks": list(options.tasks), "lengths": list(options.lengths),
                "arms": options.arms and list(options.arms), "ablations": list(options.ablations),
            },
            "runs": 1, "minutes": 0.0, "ratios": [], "groups": [],
            "not_measured": [_name(group) for group in plan] + ["startup"] * ("startup" in options.tasks),
        }  # fmt: skip
        if options.missing:
            try:
                results = continued(out, results)
            except (OSError, ValueError) as error:
                print(f"bench: error: --missing: {error}", file=sys.stderr)
                return 2
        waiting = list(results["not_measured"])
        try:
            run([group for group in plan if _name(group) in waiting], pool, results, options, out)
        finally:
            finish(results, waiting, out, docs)
    return exit_code(results)


def continued(path: Path, fresh: dict[str, Any]) -> dict[str, Any]:
    """The results of a run that left groups out. Raises ValueError if that run was not like this one."""
    former = json.loads(path.read_text())
    if not isinstance(former, dict) or not {"groups", "ratios", "not_measured", "minutes", "runs"} <= former.keys():
        raise ValueError(f"{path} is not a bench's results.json")
    for name in ("machine", "settings"):
        if former.get(name) != fresh[name]:
            raise ValueError(f"{path} is of another {name}: {former.get(name)}, not {fresh[name]}")
    return {**former, "runs": former["runs"] + 1}


def planned(options: argparse.Namespace, size: str) -> list[Group]:
    tasks = tuple(task for task in options.tasks if task != "startup")
    return groups(
        tasks, options.lengths, options.arms, options.ablations, size, options.pairs, options.steps, options.repeats
    )


def finish(results: dict[str, Any], waiting: list[str], out: Path, docs: Path | None) -> None:
    """waiting: what had to be measured. Where nothing of it was, results and docs of a former run stay; else results
    were written after each group."""
    if results["not_measured"]:
        say(f"not measured: {', '.join(results['not_measured'])}")
    if results["not_measured"] == waiting:
        say("nothing was measured, nothing is written")
        return
    say(f"wrote {out}")
    if docs is not None:
        write_docs(docs, results)
        say(f"wrote {docs / 'performance.md'}")


def run(plan: list[Group], pool: Pool, results: dict[str, Any], options: argparse.Namespace, out: Path) -> None:
    """Fills the results in, and writes them after each group."""
    machine, limit, former = results["machine"], 60 * options.minutes, results["minutes"]
    with_startup = "startup" in results["not_measured"]
    clock = Clock(
        plan,
        startup.reserved(options.repeats) if with_startup else 0.0,
        SECONDS_A_UNIT.get(results["settings"]["size"]),
    )
    session = Session(pool, clock, say, machine, machine.get("peak_flops"), limit - clock.reserved)
    say_left(clock)
    for number, group in enumerate(plan):
        needed = clock.left_of(number)
        if needed is not None and clock.seconds() + needed > session.limit:
            say(f"{_name(group)}: left out, it would take about {needed / 60:.0f} min of {options.minutes:g} in all")
            clock.done(number)
            continue
        say(f"{_name(group)}: {', '.join(group.arms)}")
        measured = measure(session, number, group)
        results["groups"].append(measured)
        results["ratios"] += measured["ratios"]
        _measured(results, _name(group), former + clock.seconds() / 60, out)
        say(text_table(measured))
        say_left(clock)
    if with_startup and clock.seconds() + clock.reserved <= limit:
        say("launch to first step")
        precision = "bf16" if machine["device"] == "cuda" else "fp32"
        with tempfile.TemporaryDirectory(prefix="bench-") as folder:
            results["startup"] = startup.measure(options.logs or Path(folder), options.repeats, precision, say)
        _measured(results, "startup", former + clock.seconds() / 60, out)


def _measured(results: dict[str, Any], name: str, minutes: float, out: Path) -> None:
    results["not_measured"].remove(name)
    results["minutes"] = minutes
    write_results(out, results)


def _name(group: Group) -> str:
    return f"{group.workload.task} {group.workload.lengths}"


def say_left(clock: Clock) -> None:
    left = clock.left()
    if left is not None:
        say(f"{clock.seconds() / 60:.1f} min gone, about {left / 60:.0f} min left")


def exit_code(results: dict[str, Any]) -> int:
    if any("failed" in row for row in results.get("startup", [])):
        return 1
    for group in results["groups"]:
        refused = [row["refused"] for row in group["arms"].values() if row["refused"]]
        if refused or any(reason.startswith("failed") for reason in group["missing"].values()):
            return 1
    return 0


class Parser(argparse.ArgumentParser):
    """Errors take one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (--help has all options)\n")


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog="bench", description=__doc__)
    listed: dict[str, Any] = {"type": lambda text: tuple(text.split(",")), "metavar": "A,B"}
    parser.add_argument("--tasks", default=FIRST, help=f"of {', '.join((*TASKS, 'startup'))}", **listed)
    parser.add_argument("--lengths", default=LENGTHS, help=f"of {', '.join(LENGTHS)}", **listed)
    parser.add_argument("--arms", default=None, help=f"of {', '.join(ARMS)}", **listed)
    parser.add_argument("--ablations", default=("hh",), help="lengths on which pieces are switched off", **listed)
    parser.add_argument("--repeats", type=int, default=5, help="of each arm (the sweep has 3 at most)")
    parser.add_argument(
        "--steps", type=int, default=2, help="optimiser steps a repeat (the sweep has half, but 2 at least)"
    )
    parser.add_argument("--pairs", type=int, default=16, help="pairs, for sft rows, of a global batch; reward has half")
    parser.add_argument("--minutes", type=float, default=60, help="groups that would end later are left out")
    parser.add_argument("--size", choices=tuple(SIZES), default=None, help="of the model; default by the device")
    parser.add_argument(
        "--out", type=Path, default=None, help="folder of results.json; default bench/, of a part of the whole in /tmp"
    )
    parser.add_argument(
        "--docs", type=Path, default=None, help="folder of performance.md; default docs/, of a part of the whole none"
    )
    parser.add_argument("--logs", type=Path, default=None, help="keep the workers' output in this folder")
    parser.add_argument(
        "--smoke", action="store_true", help="a minute: tiny model, dpo and sft, hh; docs stay as they are"
    )
    parser.add_argument(
        "--missing", action="store_true", help="only what results.json has left out for want of time, added to it"
    )
    options = parser.parse_args(argv)
    choices = ("tasks", "lengths", "arms", "ablations", "repeats", "steps", "pairs", "minutes", "size", "smoke")
    options.whole = all(getattr(options, name) == parser.get_default(name) for name in choices)
    if options.smoke:
        options.tasks = ("dpo", "sft") if options.tasks == FIRST else options.tasks
        options.lengths, options.ablations = ("hh",), ()
        options.size, options.pairs, options.steps, options.repeats = "tiny", 4, 2, 2
    for name, known in (("tasks", (*TASKS, "startup")), ("lengths", SHAPES), ("ablations", SHAPES), ("arms", ARMS)):
        unknown = set(getattr(options, name) or ()) - set(known)
        if unknown:
            parser.error(f"--{name}: unknown {', '.join(map(repr, sorted(unknown)))}; known: {', '.join(known)}")
    for name in ("repeats", "steps", "pairs"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} must be 1 or more, not {getattr(options, name)}")
    if not options.minutes > 0:
        parser.error(f"--minutes must be more than 0, not {options.minutes:g}")
    if options.missing and not options.whole and options.out is None:
        parser.error("--missing: of which results? name their folder with --out, or drop the other options")
    if options.whole:
        options.out, options.docs = options.out or ROOT / "bench", options.docs or ROOT / "docs"
    if "startup" not in options.tasks and not planned(options, "tiny"):
        parser.error(f"none of the arms {', '.join(options.arms)} has a task of {', '.join(options.tasks)} here")
    _check_folders(parser, options)
    return options


def _check_folders(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """What cannot be written after an hour is refused before it."""
    for name in ("out", "docs", "logs"):
        folder = getattr(options, name)
        try:
            if folder is not None:
                folder.mkdir(parents=True, exist_ok=True)
                tempfile.TemporaryFile(dir=folder).close()
        except OSError as error:
            parser.error(f"--{name}: {folder} cannot be written to: {error.strerror}")
    if options.docs is not None:
        try:
            between_markers(page_of(options.docs), MARKED, "")
        except (OSError, ValueError) as error:
            parser.error(f"--docs: {options.docs / 'performance.md'}: {error}")


def _targets(options: argparse.Namespace) -> tuple[Path, Path | None]:
    """results.json and the docs' folder. A part of the whole replaces the repository's only where it is told to."""
    return (options.out or Path(tempfile.mkdtemp(prefix="bench-results-"))) / "results.json", options.docs


def say(words: str) -> None:
    print(words, flush=True)


if __name__ == "__main__":
    sys.exit(main())
