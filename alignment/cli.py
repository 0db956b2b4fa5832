"""The `alignment` command. Nothing here imports torch: work is done by stages in processes of their own."""

from __future__ import annotations

import io
import os
import signal
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from alignment import __version__
from alignment.commands import looking, planning
from alignment.errors import EXIT_CODES, AlignmentError, ConfigError, MachineError, PreemptedError, unusable
from alignment.signals import SIGNALS, Listener, Stopped


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
        further = "; the same command goes on from what is done and saved" if command is run else ""
        print(f"alignment: interrupted{further}", file=sys.stderr)
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

        session = runs.Session(stop, "--wait" in arguments, arguments, "--force" in arguments)
        flags = ("--wait", "--force")
        code = hydra_app.main([argument for argument in arguments if argument not in flags], session.execute)
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


COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "run": run,
    "check": planning.check,
    "data": planning.data,
    "plan": planning.plan,
    "status": looking.status,
    "logs": looking.logs,
    "cancel": looking.cancel,
    "report": looking.report,
    "compare": looking.compare,
    "chat": looking.chat,
    "export": looking.export,
}

if __name__ == "__main__":
    sys.exit(main())
