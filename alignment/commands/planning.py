"""The parts of the `alignment` command that look at what a run would do. Nothing here imports torch."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from alignment.commands.options import parser_of, print_json
from alignment.errors import ConfigError

if TYPE_CHECKING:  # what --help need not wait for
    from alignment.config.schema import Experiment

SHOWN = 5  # rows of each stage, unless --rows says how many


def check(arguments: list[str]) -> int:
    """Look for what would stop a run, from its settings to its memory, and tell how long it will take.

    Settings, packages, store and tracker; the start model's template, vocabulary, window and adapters; reward models;
    rows of each data set; time, memory and disk of the stages that train, and DPO's first loss."""
    parser = parser_of("check", "alignment check [setting=value ...] [--suggest | --calibrate]", check)
    what = "run some steps of each stage that trains, on this machine, and estimate its time by them"
    parser.add_argument("--calibrate", action="store_true", help=what)
    parser.add_argument("--suggest", action="store_true", help="settings with which it fits into memory, one a line")
    return _check(parser, arguments, data_only=False)


def data(arguments: list[str]) -> int:
    """`data check`: what of all rows would be dropped, and why; `data show`: rows as the model sees them."""
    parser = parser_of(
        "data", "alignment data check [--dropped FILE] | show [--rows N] [--html FILE] [setting=value ...]", data
    )
    parser.add_argument("what", choices=["check", "show"], help="check: all rows, without a run; show: some, by tokens")
    parser.add_argument("--rows", type=int, metavar="N", help=f"show: of each stage (default {SHOWN})")
    what = "check: write all rows that would be dropped, whole, with their reasons, to a file that is not there yet"
    parser.add_argument("--dropped", type=Path, metavar="FILE", help=what)
    parser.add_argument("--html", type=Path, metavar="FILE", help="show: write a page, with lengths, drops and sources")
    return _check(parser, arguments, data_only=True)


def _check(parser: argparse.ArgumentParser, arguments: list[str], *, data_only: bool) -> int:
    parser.add_argument("overrides", nargs="*", metavar="setting=value")
    parser.add_argument("--config-dir", type=Path, action="append", default=[], help="a further folder of configs")
    parser.add_argument("--json", action="store_true", help="machine-readable")
    given = parser.parse_intermixed_args(arguments)
    from alignment import checking

    if not data_only:
        if given.suggest and (given.json or given.calibrate):
            what = "--suggest takes neither --json nor --calibrate: it prints overrides, one a line"
            raise ConfigError(what, where="command line", fix="without --suggest both can be had")
        experiment = _composed(given)
        if given.suggest:
            return checking.suggest(experiment)
        return checking.check(experiment, as_json=given.json, calibrate=given.calibrate)
    if given.what == "check":
        if given.rows is not None or given.html:
            raise ConfigError("check takes no --rows and no --html", where="command line", fix="show does")
        return checking.check_data(_composed(given), as_json=given.json, dropped=given.dropped)
    rows = SHOWN if given.rows is None else given.rows
    if rows < 1 or given.json or given.dropped:
        raise ConfigError("show takes --rows N of 1 or more, no --json and no --dropped", where="command line")
    return checking.show(_composed(given), rows, given.html)


def _composed(given: argparse.Namespace) -> Experiment:
    from alignment.config.compose import compose

    return compose(given.overrides, tuple(given.config_dir))


def plan(arguments: list[str]) -> int:
    """Show what `run` would do and what it would reuse; takes the same settings, and -m."""
    parser = parser_of("plan", "alignment plan [-m] [setting=value ...]", plan)
    parser.add_argument("overrides", nargs="*", metavar="setting=value")
    parser.add_argument(
        "-m", "--multirun", action="store_true", help="a sweep, as one graph: how many stages of each name"
    )
    parser.add_argument("--config-dir", type=Path, action="append", default=[], help="a further folder of configs")
    parser.add_argument("--json", action="store_true", help="machine-readable")
    parser.add_argument("--show-scripts", action="store_true", help="launcher=slurm: the jobs as they would be sent")
    parser.add_argument(
        "--check", action="store_true", help="launcher=slurm: ask the cluster whether it could start them"
    )
    given = parser.parse_intermixed_args(arguments)
    from alignment.config.given import lost, unread
    from alignment.reporting import queue, terminal

    queue.note_lost(lost(given.overrides, alone=not given.multirun))
    if given.multirun:
        return _plan_sweep(given)
    from alignment.config.compose import compose
    from alignment.pipeline import runner

    prepared = runner.Run(compose(given.overrides, tuple(given.config_dir)), "")
    if given.show_scripts:
        print("\n".join(queue.scripts([prepared], prepared.id)))
        return 0
    if given.check:
        queue.check([prepared], prepared.id)
    rows = runner.plan(prepared, queue.queued([prepared]))
    if given.json:
        print_json({"run": prepared.id, "nodes": rows})
    else:
        queue.say_unread([unread(prepared.experiment, given.overrides)])
        terminal.announce(prepared.id, prepared.folder, rows, table=True)
    return 0


def _plan_sweep(given: argparse.Namespace) -> int:
    from alignment import runs
    from alignment.reporting import queue

    if len(given.config_dir) > 1:
        raise ConfigError("a sweep takes one --config-dir", where="command line", fix="put all of it into one folder")
    name, prepared, unread = runs.plan_sweep(given.overrides, *given.config_dir)
    if given.check:
        queue.check(prepared, name)
    scripts = queue.scripts(prepared, name) if given.show_scripts else []
    rows = queue.plan(prepared)
    if given.json:
        print_json({"sweep": name, "runs": [run.id for run in prepared], "stages": rows, "scripts": scripts})
        return 0
    queue.say_unread(unread)
    queue.show_plan(name, len(prepared), rows)
    print("\n".join(scripts), end="\n" if scripts else "")
    return 0
