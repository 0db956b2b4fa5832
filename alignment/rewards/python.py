"""python: a function that the user names, in a file that the user names. It runs with all that the worker may do.

def reward(prompts: list[list[dict]], answers: list[str], rows: list[dict]) -> list[float]
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from types import ModuleType
from typing import Any

from alignment.config.reward_terms import Python
from alignment.errors import InputError
from alignment.rewards.term import Answer, Failed, Term, Value

UNORDERED = (str, bytes, Mapping, Set)  # what can be gone through, but is no list of numbers
BATCH = 32  # answers that it is given at once


def python(settings: Python, name: str, alive: Callable[[], None], code: Mapping[Path, bytes]) -> Term:
    """name: of the term. alive is called after each batch. code: files that were read already. Raises InputError if the
    file cannot be run, or does not define the function."""
    path = Path(settings.source.path)
    function = _load(path, settings.function, name, code.get(path))

    def some(answers: Sequence[Answer]) -> list[Value]:
        rows = [deepcopy(answer.row) for answer in answers]  # what it does to them is forgotten
        try:
            with _as_it_was():
                given = function([row["prompt"] for row in rows], [answer.text for answer in answers], rows)
                values = list(given) if isinstance(given, Iterable) and not isinstance(given, UNORDERED) else None
        except MemoryError:
            raise
        except (Exception, SystemExit) as error:
            if len(answers) == 1:
                return [Failed(_told(error, path))]
            return [value for answer in answers for value in batch([answer])]  # for whom does it raise?
        where = f"{path}: {settings.function}"
        if values is None:
            raise InputError(f"returned {type(given).__name__}, not a list of numbers", where=where)
        if len(values) != len(answers):
            raise InputError(f"returned {len(values)} values for {len(answers)} answers", where=where)
        return [_number(value) for value in values]

    def batch(answers: Sequence[Answer]) -> list[Value]:
        values = some(answers)
        alive()
        return values

    return lambda answers: [
        value for start in range(0, len(answers), BATCH) for value in batch(answers[start : start + BATCH])
    ]


@contextmanager
def _as_it_was() -> Iterator[None]:
    """Gradients, type and device of new tensors are the process's, in which a model may be training: what code for
    inference often switches for itself stays so for itself."""
    if "torch" not in sys.modules:  # of which nothing here needs to know
        yield
        return
    import torch

    gradients, kind, device = torch.is_grad_enabled(), torch.get_default_dtype(), torch.get_default_device()
    try:
        yield
    finally:
        torch.set_grad_enabled(gradients)
        torch.set_default_dtype(kind)
        if torch.get_default_device() != device:  # None for the CPU: a mode would have all calls go through it
            torch.set_default_device(None if device.type == "cpu" else device)


def _number(value: Any) -> Value:
    try:
        return Failed(f"its value is {value!r}, which is no number") if isinstance(value, str | bytes) else float(value)
    except Exception:  # of a class of the user's own, too
        return Failed(f"its value is {_text(repr, value)}, which is no number")


def _text(how: Callable[[Any], str], value: Any) -> str:
    """How it would have itself written, or its class where it cannot even say that."""
    try:
        return how(value)
    except Exception:
        return type(value).__name__


def _load(path: Path, function: str, name: str, text: bytes | None) -> Callable[..., Any]:
    """Runs the file, from its text: nothing is written beside it, and no older compiled one is taken."""
    module = ModuleType(f"alignment_reward_{name}")
    module.__file__ = str(path)
    sys.modules[module.__name__] = module  # dataclasses look themselves up there
    try:
        text = path.read_bytes() if text is None else text
        with _as_it_was():
            exec(compile(text, str(path), "exec", dont_inherit=True), module.__dict__)
        made: Callable[..., Any] = getattr(module, function)
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror or error}", where=str(path)) from error
    except (Exception, SystemExit) as error:
        raise InputError(f"cannot be run: {_told(error, path)}", where=f"reward.terms.{name}") from error
    return made


def _told(error: BaseException, path: Path) -> str:
    """File and line, of that file where it is in it, and the error."""
    frames = traceback.extract_tb(error.__traceback__)
    line = next((frame.lineno for frame in reversed(frames) if frame.filename == str(path)), None)
    if isinstance(error, SyntaxError):
        line = error.lineno
    return f"{path}:{line or '?'}: {type(error).__name__}: {_text(str, error)}"
