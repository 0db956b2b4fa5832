"""The parts of the `alignment` command that look at what is in the store. Nothing here imports torch."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from alignment.commands.options import add_store, parser_of, print_json
from alignment.errors import ConfigError


def status(arguments: list[str]) -> int:
    """List runs, or those of a sweep: stages, states, durations, keys; of failed ones why, and the end of the log."""
    parser = parser_of("status", "alignment status [run or sweep ...] [--watch]", status)
    parser.add_argument("runs", nargs="*", help="names of runs or sweeps, or their beginnings; none = all runs")
    parser.add_argument("--json", action="store_true", help="machine-readable")
    parser.add_argument("--watch", action="store_true", help="look again every few seconds until all have ended")
    add_store(parser)
    given = parser.parse_args(arguments)
    from rich.console import Console

    from alignment.pipeline.store import Store
    from alignment.reporting import queue, targets, terminal, watching

    store = Store(given.store)
    folders, sweeps = targets.meant(given.runs, store.root)
    if given.watch:
        return watching.watch(store, lambda: targets.meant(given.runs, store.root))
    runs = watching.look(store, folders, sweeps)
    if given.json:
        print_json(runs)
    elif folders:
        Console(highlight=False).print(queue.table(runs))
    elif store.root.is_dir():
        terminal.show_runs(runs, store.root)
    else:
        print(
            f"no runs: there is no folder {store.root} (the first run makes it; --store, $ALIGNMENT_STORE name another)"
        )
    return 0


def logs(arguments: list[str]) -> int:
    """Print what a stage of a run has written, and what its job has."""
    parser = parser_of("logs", "alignment logs <run> [stage] [--follow]", logs)
    parser.add_argument("run", help="a run's name, its beginning, or its folder; or the whole name of a sweep")
    parser.add_argument("stage", nargs="?", help="a stage of it; none = the one that is at work, failed, or was last")
    parser.add_argument("--lines", type=int, default=100, metavar="N", help="the last N (default 100); 0 = all")
    parser.add_argument("--follow", action="store_true", help="go on until the stage has ended")
    add_store(parser)
    given = parser.parse_args(arguments)
    if given.lines < 0:
        raise ConfigError(f"--lines is {given.lines}", where="command line", fix="0 or more; 0 = all")
    from alignment.reporting import logs as reading

    return reading.show(given.run, given.stage, given.store, given.lines, given.follow)


def cancel(arguments: list[str]) -> int:
    """Cancel the jobs of runs or sweeps; those that other runs wait for stay."""
    parser = parser_of("cancel", "alignment cancel <run or sweep ...>", cancel)
    what = "names of runs or sweeps, or beginnings that only one has of those that wait or run"
    parser.add_argument("runs", nargs="+", help=what)
    add_store(parser)
    given = parser.parse_args(arguments)
    from alignment.reporting import cancelling

    return cancelling.cancel(given.runs, given.store)


def report(arguments: list[str]) -> int:
    """Write a run's report.html anew from the store."""
    parser = parser_of("report", "alignment report <run>", report)
    parser.add_argument("run", help="a run's name, its beginning, or its folder")
    add_store(parser)
    given = parser.parse_args(arguments)
    from alignment.pipeline.store import Store
    from alignment.reporting import page, queue, targets, watching

    folder = targets.run_folder(given.run, given.store, queue.note)
    store = Store(folder.parent.parent)
    (run,) = watching.look(store, [folder])
    print(page.write_report(folder, store.root, run if run["state"] != "unreadable" else None))
    return 0


def compare(arguments: list[str]) -> int:
    """Show what a sweep, or several runs, have taught: table here, compare.html in the sweep's folder."""
    parser = parser_of("compare", "alignment compare [sweep | run run ...]", compare)
    what = "a sweep's name, its beginning, or its folder; or two runs or more; none = list the sweeps"
    parser.add_argument("names", nargs="*", metavar="sweep", help=what)
    parser.add_argument("--metric", help="compare by this one instead of the sweep's objective: NAME or NAME:minimize")
    parser.add_argument("--json", action="store_true", help="machine-readable; writes no page")
    add_store(parser)
    given = parser.parse_args(arguments)
    from alignment.pipeline.store import Store
    from alignment.reporting import compare_page, compare_terminal, comparison, jobs, queue, sweep_files, sweeps

    if not given.names:
        known = sweep_files.list_sweeps(given.store)
        print_json(known) if given.json else compare_terminal.show_list(known, given.store)
        return 0
    if len(given.names) > 1:
        sweep, folder = sweeps.sweep_of_runs(given.names, given.store)
    else:
        say = (lambda text: None) if given.json else queue.say
        folder = sweep_files.sweep_folder(given.names[0], given.store, say)
        sweep = sweep_files.read_sweep(folder)
    store = Store(folder.parent.parent)
    content = comparison.compare(
        sweep, sweeps.read_points(sweep, store.root, store.is_held, jobs.Jobs(store).read), given.metric
    )
    if given.json:
        print_json(comparison.plain(content))
    else:
        compare_terminal.show(content)
        compare_terminal.show_page(compare_page.write_page(content, folder))
    return 0


def chat(arguments: list[str]) -> int:
    """Talk to the model of a run, or to any model folder; --compare asks start, SFT and DPO models alike."""
    parser = parser_of("chat", "alignment chat <run or model folder> [--compare] [--prompt TEXT]", chat)
    parser.add_argument("target", help="a run's name or its beginning, a run folder, or a model folder")
    parser.add_argument("--compare", action="store_true", help="answers of every model of the run next to each other")
    parser.add_argument("--prompt", help="answer this once and leave")
    parser.add_argument("--max-new-tokens", type=int, default=256, metavar="N")
    parser.add_argument("--temperature", type=float, default=0.7, metavar="T", help="0 = greedy")
    add_store(parser)
    given = parser.parse_args(arguments)
    from alignment.reporting import queue, targets

    models = targets.models(given.target, given.store, given.compare, queue.note)
    command = [sys.executable, "-m", "alignment.chat"]
    for name, folder in models.items():
        command += ["--model", f"{name}={folder}"]
    command += ["--max-new-tokens", str(given.max_new_tokens), "--temperature", str(given.temperature)]
    if given.prompt is not None:
        command += ["--prompt", given.prompt]
    os.execv(sys.executable, command)


def export(arguments: list[str]) -> int:
    """Copy a run's model, or the adapter that made it, out of the store, to a folder that any tool can load."""
    parser = parser_of("export", "alignment export <run> <folder> [--stage STAGE] [--adapter]", export)
    parser.add_argument("run", help="a run's name, its beginning if no other run has it, or its folder")
    parser.add_argument("folder", type=Path, help="where to: a folder that is not there yet, or is empty")
    parser.add_argument("--stage", help="of which stage; none = the run's final model")
    parser.add_argument("--adapter", action="store_true", help="PEFT's adapter in the place of the merged model")
    add_store(parser)
    given = parser.parse_args(arguments)
    from alignment.reporting import exporting

    start = exporting.export(given.run, given.folder, given.store, given.stage, given.adapter)
    print(f"{given.folder}: an adapter on the model in {start}" if given.adapter else given.folder)
    return 0
