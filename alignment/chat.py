"""Talk to a model in the terminal: `python -m alignment.chat --model NAME=FOLDER [--model NAME=FOLDER ...]`.

With several models each answers every turn, one under the other, and remembers its own answers. Without a terminal on
standard input every line of it is a turn; with --prompt there is one turn and nothing is asked.
"""

from __future__ import annotations

import argparse
import secrets
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from alignment.errors import AlignmentError, ConfigError, InputError

COMMANDS = "/reset forgets the conversation, /system TEXT sets the system turn (and forgets), /exit leaves"
TOP_P = 0.95

Message = dict[str, str]
Answer = Callable[[list[Message]], Iterator[str]]


@dataclass
class Speaker:
    """A model and its own memory of the conversation."""

    name: str
    answer: Answer
    system: str = ""
    turns: list[Message] = field(default_factory=list)

    def reset(self, system: str | None = None) -> None:
        """Forget the turns; a system text replaces the old one, an empty one removes it."""
        self.system = self.system if system is None else system
        self.turns.clear()

    def reply(self, text: str, write: Callable[[str], None]) -> tuple[int, float]:
        """Answer a user's turn, writing as it comes; (tokens, seconds). Ctrl-C ends the answer, what was said stays.

        An error or an interrupt before the first word leaves the memory as it was.
        """
        start = [{"role": "system", "content": self.system}] if self.system else []
        asked = {"role": "user", "content": text}
        said, tokens, started = "", 0, time.monotonic()
        try:
            for piece in self.answer([*start, *self.turns, asked]):
                said, tokens = said + piece, tokens + 1
                write(piece)
        except KeyboardInterrupt:
            write(" [stopped]")
        if said:
            self.turns += [asked, {"role": "assistant", "content": said}]
        return tokens, time.monotonic() - started


def main(argv: list[str] | None = None) -> int:
    given = _parser().parse_args(argv)
    try:
        speakers = _load(given)
        if given.prompt is not None:
            _turn(speakers, given.prompt)
        else:
            _converse(speakers)
    except AlignmentError as error:
        print(f"alignment: error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:  # while loading
        return 130
    except BrokenPipeError:  # the reader of our output has gone, as with `| head`
        sys.stderr.close()
        return 0
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m alignment.chat", description=__doc__, epilog=COMMANDS)
    parser.add_argument("--model", action="append", required=True, metavar="NAME=FOLDER", help="repeat to compare")
    parser.add_argument("--prompt", help="answer this once and leave")
    parser.add_argument("--max-new-tokens", type=int, default=256, metavar="N")
    parser.add_argument("--temperature", type=float, default=0.7, metavar="T", help="0 = greedy")
    return parser


def _load(given: argparse.Namespace) -> list[Speaker]:
    if given.max_new_tokens < 1 or not 0 <= given.temperature < float("inf"):
        raise ConfigError("--max-new-tokens must be at least 1 and --temperature at least 0")
    named = []
    for text in given.model:
        name, equals, folder = text.partition("=")
        if not (name and equals and folder):
            raise ConfigError(f"--model {text}: expected NAME=FOLDER")
        if not Path(folder).is_dir():
            raise InputError("no such model folder", where=folder)
        named.append((name, Path(folder)))
    if _interactive():
        print(f"loading {', '.join(name for name, _ in named)} ...", file=sys.stderr)
    return [Speaker(name, _answerer(folder, given.max_new_tokens, given.temperature)) for name, folder in named]


def _answerer(folder: Path, max_new_tokens: int, temperature: float) -> Answer:
    import torch

    from alignment import generation

    model, tokenizer = generation.load(folder, "bf16" if torch.cuda.is_available() else "fp32")
    how: dict[str, Any] = {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_p": TOP_P}

    def answer(messages: list[Message]) -> Iterator[str]:
        try:
            yield from generation.stream(model, tokenizer, messages, seed=secrets.randbits(32), **how)
        except InputError as error:
            raise InputError(error.what, where=error.where or str(folder), fix=error.fix) from error

    return answer


def _converse(speakers: list[Speaker]) -> None:
    """Turn after turn until /exit or the end of the input. What goes wrong in a turn is said, and the talk goes on."""
    if _interactive():
        import readline  # noqa: F401  input() gains editing and history by its import

        print(f"{COMMANDS}; Ctrl-C stops an answer, Ctrl-D leaves", file=sys.stderr)
    while (line := _ask()) is not None:
        command, _, rest = line.strip().partition(" ")
        if command == "/exit":
            return
        if command in ("/reset", "/system"):
            for speaker in speakers:
                speaker.reset(rest.strip() if command == "/system" else None)
        elif command.startswith("/"):
            print(f"unknown command {command}: {COMMANDS}", file=sys.stderr)
        elif command:
            try:
                _turn(speakers, line.strip())
            except InputError as error:
                print(f"error: {error}; /reset forgets the conversation", file=sys.stderr)


def _turn(speakers: list[Speaker], text: str) -> None:
    """Every model's answer; with several, each under its name and with its speed."""
    for speaker in speakers:
        if len(speakers) > 1:
            print(f"[{speaker.name}]", flush=True)
        tokens, seconds = speaker.reply(text, lambda piece: print(piece, end="", flush=True))
        speed = f"\n({tokens} tokens, {tokens / max(seconds, 1e-9):.1f} tokens/s)\n" if len(speakers) > 1 else ""
        print(speed, flush=True)


def _interactive() -> bool:
    return sys.stdin.isatty()


def _ask() -> str | None:
    """The next line of a person or a file; None at the end (Ctrl-D). Ctrl-C only starts a new line."""
    while True:
        try:
            return input("> " if _interactive() else "")
        except EOFError:
            if _interactive():
                print()
            return None
        except KeyboardInterrupt:
            print()


if __name__ == "__main__":
    sys.exit(main())
