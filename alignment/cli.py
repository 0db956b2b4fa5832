"""The `alignment` command. Nothing here imports torch: work is done by stages in processes of their own."""

from __future__ import annotations

import argparse
import io
import os
import signal
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from alignment import __version__
from alignment.errors import AlignmentError, ConfigError, MachineError, PreemptedError, unusable
from alignment.signals import SIGNALS, Listener, Stopped

EXIT_CODES = """\
exit codes:
  0    done
  1    something unforeseen; `--debug` shows the traceback
  2    a setting or the command line is wrong
  3    the data or the model given cannot be used
  4    the machine lacks something (disk, package, network, memory)
  5    training went wrong (NaN, wrong reference model, ...)
  6    processes of a stage were lost (killed, crashed, hung), and retries did not help
  75   stopped in order: a signal or a time limit; the same command goes on from there
  130  ended at once, by a second signal"""


def main(argv: list[str] | None = None) -> int:
    """Entry point of the console script."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    command = COMMANDS.get(arguments[0]) if arguments else None
    try:
        if command is None:
            return _top(arguments)
        return command(arguments[1:])
    except PreemptedError as stopped:
        print(f"alignment: {stopped}", file=sys.stderr)
        return stopped.exit_code
    except Stopped as asked:
        print(f"alignment: stopped ({asked}); the same command goes on from what is done and saved", file=sys.stderr)
        return PreemptedError.exit_code
    except AlignmentError as error:
        print(f"alignment: error: {error}", file=sys.stderr)
        if debug:
            traceback.print_exception(error)
        return error.exit_code
    except KeyboardInterrupt:
        print("alignment: interrupted; the same command goes on from what is done and saved", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        if debug:
            raise
        print(f"alignment: error: {unusable(error)}", file=sys.stderr)
        return MachineError.exit_code
    except Exception as error:
        if debug:
            raise
        first = " ".join(str(error).split())
        print(f"alignment: error: {type(error).__name__}: {first} (--debug shows the traceback)", file=sys.stderr)
        return 1


def _top(arguments: list[str]) -> int:
    lines = "\n".join(f"  {name:<10}{(function.__doc__ or '').splitlines()[0]}" for name, function in COMMANDS.items())
    about = "usage: alignment <command> [options]\n\nFrom a base model to an instruct model people can trust."
    usage = f"{about}\n\ncommands:\n{lines}\n\n{EXIT_CODES}"
    if arguments and arguments[0] == "--version":
        print(f"alignment {__version__}")
    elif not arguments or arguments[0] in ("-h", "--help"):
        print(usage)
    else:
        import difflib

        near = difflib.get_close_matches(arguments[0], list(COMMANDS), 1)
        raise ConfigError(
            f"unknown command {arguments[0]!r}",
            fix=f"did you mean {near[0]!r}?" if near else f"one of: {', '.join(COMMANDS)}",
        )
    return 0


def run(arguments: list[str]) -> int:
    """Run an experiment: every stage that the store lacks, then the report."""
    for name in ("stdout", "stderr"):
        _outlive_reader(name)
    stop = Listener().listen(again=_end_at_once)
    try:
        from alignment import hydra_app, runs

        session = runs.Session(stop, "--wait" in arguments, arguments)
        code = hydra_app.main([argument for argument in arguments if argument != "--wait"], session.execute)
        session.finish()
        return code
    except Exception as error:
        if stop.raised:  # a library has caught it: this error is what came of it
            raise Stopped(stop.asked) from error
        raise


class _Heard(io.FileIO):
    """A terminal, pipe or file that may go away, or be full, while there is work to watch over or to save: what it does
    not take is said to nobody. The run's results do not lie there."""

    def write(self, data: Any) -> int:
        try:
            written = super().write(data)
            return len(data) if written is None else written  # None: a pipe that does not wait is full
        except OSError:
            return len(data)


def _outlive_reader(name: str) -> None:
    """Of the standard stream of this name: no error if nobody takes what is written to it."""
    stream = getattr(sys, name)
    with suppress(OSError, ValueError):  # one that is no file
        raw = io.BufferedWriter(_Heard(stream.fileno(), "w", closefd=False))
        stream.flush()
        setattr(sys, name, io.TextIOWrapper(raw, stream.encoding, stream.errors, line_buffering=True))


def _end_at_once() -> None:
    """After a second signal: the stage at work is killed on the way out. A third one does not even wait for that."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_DFL)
    raise KeyboardInterrupt


def plan(arguments: list[str]) -> int:
    """Show what `run` would do and what it would reuse; takes the same settings, and -m."""
    parser = _parser("plan", "alignment plan [-m] [setting=value ...]", plan)
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
        _print_json({"run": prepared.id, "nodes": rows})
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
        _print_json({"sweep": name, "runs": [run.id for run in prepared], "stages": rows, "scripts": scripts})
        return 0
    queue.say_unread(unread)
    queue.show_plan(name, len(prepared), rows)
    print("\n".join(scripts), end="\n" if scripts else "")
    return 0


def status(arguments: list[str]) -> int:
    """List runs, or those of a sweep: stages, states, durations, keys; of failed ones why, and the end of the log."""
    parser = _parser("status", "alignment status [run or sweep ...] [--watch]", status)
    parser.add_argument("runs", nargs="*", help="names of runs or sweeps, or their beginnings; none = all runs")
    parser.add_argument("--json", action="store_true", help="machine-readable")
    parser.add_argument("--watch", action="store_true", help="look again every few seconds until all have ended")
    _add_store(parser)
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
        _print_json(runs)
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
    parser = _parser("logs", "alignment logs <run> [stage] [--follow]", logs)
    parser.add_argument("run", help="a run's name, its beginning, or its folder; or the whole name of a sweep")
    parser.add_argument("stage", nargs="?", help="a stage of it; none = the one that is at work, failed, or was last")
    parser.add_argument("--lines", type=int, default=100, metavar="N", help="the last N (default 100); 0 = all")
    parser.add_argument("--follow", action="store_true", help="go on until the stage has ended")
    _add_store(parser)
    given = parser.parse_args(arguments)
    if given.lines < 0:
        raise ConfigError(f"--lines is {given.lines}", where="command line", fix="0 or more; 0 = all")
    from alignment.reporting import logs as reading

    return reading.show(given.run, given.stage, given.store, given.lines, given.follow)


def cancel(arguments: list[str]) -> int:
    """Cancel the jobs of runs or sweeps; those that other runs wait for stay."""
    parser = _parser("cancel", "alignment cancel <run or sweep ...>", cancel)
    what = "names of runs or sweeps, or beginnings that only one has of those that wait or run"
    parser.add_argument("runs", nargs="+", help=what)
    _add_store(parser)
    given = parser.parse_args(arguments)
    from alignment.reporting import cancelling

    return cancelling.cancel(given.runs, given.store)


def report(arguments: list[str]) -> int:
    """Write a run's report.html anew from the store."""
    parser = _parser("report", "alignment report <run>", report)
    parser.add_argument("run", help="a run's name, its beginning, or its folder")
    _add_store(parser)
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
    parser = _parser("compare", "alignment compare [sweep | run run ...]", compare)
    what = "a sweep's name, its beginning, or its folder; or two runs or more; none = list the sweeps"
    parser.add_argument("names", nargs="*", metavar="sweep", help=what)
    parser.add_argument("--metric", help="compare by this one instead of the sweep's objective: NAME or NAME:minimize")
    parser.add_argument("--json", action="store_true", help="machine-readable; writes no page")
    _add_store(parser)
    given = parser.parse_args(arguments)
    from alignment.pipeline.store import Store
    from alignment.reporting import compare_page, compare_terminal, comparison, jobs, queue, sweep_files, sweeps

    if not given.names:
        known = sweep_files.list_sweeps(given.store)
        _print_json(known) if given.json else compare_terminal.show_list(known, given.store)
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
        _print_json(comparison.plain(content))
    else:
        compare_terminal.show(content)
        compare_terminal.show_page(compare_page.write_page(content, folder))
    return 0


def chat(arguments: list[str]) -> int:
    """Talk to the model of a run, or to any model folder; --compare asks start, SFT and DPO models alike."""
    parser = _parser("chat", "alignment chat <run or model folder> [--compare] [--prompt TEXT]", chat)
    parser.add_argument("target", help="a run's name or its beginning, a run folder, or a model folder")
    parser.add_argument("--compare", action="store_true", help="answers of every model of the run next to each other")
    parser.add_argument("--prompt", help="answer this once and leave")
    parser.add_argument("--max-new-tokens", type=int, default=256, metavar="N")
    parser.add_argument("--temperature", type=float, default=0.7, metavar="T", help="0 = greedy")
    _add_store(parser)
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
    parser = _parser("export", "alignment export <run> <folder> [--stage STAGE] [--adapter]", export)
    parser.add_argument("run", help="a run's name, its beginning if no other run has it, or its folder")
    parser.add_argument("folder", type=Path, help="where to: a folder that is not there yet, or is empty")
    parser.add_argument("--stage", help="of which stage; none = the run's final model")
    parser.add_argument("--adapter", action="store_true", help="PEFT's adapter in the place of the merged model")
    _add_store(parser)
    given = parser.parse_args(arguments)
    from alignment.reporting import exporting

    start = exporting.export(given.run, given.folder, given.store, given.stage, given.adapter)
    print(f"{given.folder}: an adapter on the model in {start}" if given.adapter else given.folder)
    return 0


def _parser(name: str, usage: str, command: Callable[..., Any]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"alignment {name}", usage=usage, description=command.__doc__, epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
    )  # fmt: skip
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def _add_store(parser: argparse.ArgumentParser) -> None:
    default = os.environ.get("ALIGNMENT_STORE", "outputs")
    parser.add_argument(
        "--store",
        type=_named_store,
        default=_store(default),
        help="the store (default: $ALIGNMENT_STORE, else outputs)",
    )


def _named_store(text: str) -> Path:
    """Of --store: it is there. The usual one may be still to come, with the first run."""
    if not Path(text).exists():
        raise ConfigError("there is no such folder", where=f"--store {text}", fix="name the one that holds the runs")
    return _store(text)


def _store(text: str) -> Path:
    if Path(text).exists() and not Path(text).is_dir():
        raise ConfigError(
            "the store is no folder", where=text, fix="--store names the folder that holds store/ and runs/"
        )
    return Path(text)


def _print_json(value: Any) -> None:
    import json

    print(json.dumps(value, indent=1))


COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "run": run,
    "plan": plan,
    "status": status,
    "logs": logs,
    "cancel": cancel,
    "report": report,
    "compare": compare,
    "chat": chat,
    "export": export,
}

if __name__ == "__main__":
    sys.exit(main())
