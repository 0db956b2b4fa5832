"""Chat templates come with models from anywhere: they are rendered within limits of time and memory.

transformers renders in Jinja's immutable sandbox, so a template reaches no attribute that it should not and writes to
nothing. The sandbox bounds neither time nor memory: `{{ 'a' * 10 ** 10 }}` would take the machine down. Time is that of
the processor: a process that is stopped, or waits for a busy machine, has not rendered anything meanwhile.
"""

from __future__ import annotations

import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any, TypeVar

from alignment.errors import InputError

SECONDS = 10.0  # of CPU time
MEMORY = 1 << 30  # bytes over what the process has
AGAIN = 0.5  # seconds of CPU time; what interrupts a computation may be swallowed by the code around it: it comes anew
PAGE = resource.getpagesize()
NO_CLOCK = "there_is_no_clock"  # the name that data.chat.without_clock has a template call for today's date
REFUSES = "the chat template refuses the conversation"
SIMPLER = "set model.chat_template to a simpler one"

T = TypeVar("T")
Message = Mapping[str, Any]


class OverLimit(InputError):
    """A template took too much time or memory. What it takes depends on the machine, too: no policy drops a row for it,
    or the same settings could make other rows."""


class _TooLong(BaseException):
    """No Exception: Jinja swallows these while it folds constants."""


def render(tokenizer: Any, messages: Sequence[Message], where: str | None, *, prompt: bool = False) -> str:
    """The conversation as the tokenizer's template writes it; prompt: with the words that ask the model for its turn.

    Raises InputError, whatever the template does.
    """
    return renderings(tokenizer, [(messages, prompt)], where)[0]


def renderings(tokenizer: Any, asked: Sequence[tuple[Sequence[Message], bool]], where: str | None) -> list[str]:
    """Of several (messages, prompt), as `render`, within the limits of one. The first message may have `tools`."""

    def write(turns: Sequence[Message], prompt: bool) -> str:
        tools, turns = turns[0].get("tools") if turns else None, [_with_thinking(turn) for turn in turns]
        return str(tokenizer.apply_chat_template(turns, tools, tokenize=False, add_generation_prompt=prompt))

    return guarded(lambda: [write(turns, prompt) for turns, prompt in asked], where)


def _with_thinking(turn: Message) -> Message:
    """With its reasoning under the other name, too, by which gpt-oss' template asks for it."""
    return {**turn, "thinking": turn["reasoning_content"]} if "reasoning_content" in turn else turn


def marked(tokenizer: Any, messages: Sequence[Message], where: str | None) -> tuple[str, list[tuple[int, int]]]:
    """The conversation as text, and what of it the template's {% generation %} blocks mark: from where to where, in
    characters. Raises InputError.
    """
    from transformers.utils.chat_template_utils import render_jinja_template

    asked: dict[str, Any] = {"chat_template": str(tokenizer.chat_template), "return_assistant_tokens_mask": True}
    asked |= tokenizer.special_tokens_map
    render: Any = render_jinja_template  # its annotation speaks of the text alone
    texts, spans = guarded(lambda: render([list(messages)], **asked), where)
    return str(texts[0]), [(start, end) for start, end in spans[0]]


def guarded(work: Callable[[], T], where: str | None, *, seconds: float = SECONDS, memory: int = MEMORY) -> T:
    """What `work`, which compiles or renders a template, returns. Raises InputError for all that it raises, OverLimit
    where it breaks a limit.

    seconds: CPU time of the process. Beside the main thread, where no signal comes, there is no limit of time: a
    model's template is tried in the main thread when the model is imported. memory: bytes; no limit where the system
    does not say how much is used.
    """
    try:
        with _time_limit(seconds), _memory_limit(memory):
            return work()
    except _TooLong:
        what = f"the chat template does not end within {seconds:g} s of CPU time"
        raise OverLimit(what, where=where, fix=SIMPLER) from None
    except MemoryError:
        what = f"the chat template takes more than {memory / (1 << 30):g} GB of memory"
        raise OverLimit(what, where=where, fix=SIMPLER) from None
    except Exception as error:
        if NO_CLOCK in str(error):
            what = "the chat template prints today's date, so it would change from day to day"
            fix = "set model.chat_template to a .jinja file with a fixed date"
            raise InputError(what, where=where, fix=fix) from error
        what = f"{REFUSES}: {_cause(error)}"
        raise InputError(what, where=where) from error


def _cause(error: Exception) -> str:
    """What a template's error says, of which kind if that is not plain from it, and the template's line if known."""
    from jinja2.exceptions import TemplateError, TemplateSyntaxError

    said = str(error) if isinstance(error, TemplateError) and str(error) else f"{type(error).__name__}: {error}"
    line = error.lineno if isinstance(error, TemplateSyntaxError) else None
    trace = error.__traceback__
    while trace is not None:  # Jinja gives the frames of a template the numbers of the template's own lines
        if trace.tb_frame.f_code.co_filename == "<template>":
            line = trace.tb_lineno
        trace = trace.tb_next
    return f"{said} (line {line} of the template)" if line else said


@contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    """Raises _TooLong in the main thread, after so much CPU time of the process. A timer and handler that were set go
    on, later at worst by `seconds`."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    armed = True

    def ring(number: int, frame: FrameType | None) -> None:
        if armed:
            raise _TooLong

    started = time.process_time()
    handler = signal.signal(signal.SIGPROF, ring)
    left, interval = signal.setitimer(signal.ITIMER_PROF, seconds, AGAIN)
    try:
        yield
    finally:
        armed = False  # a signal that has come, and is not yet handled, must not leave the old timer unrestored
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, signal.SIG_DFL if handler is None else handler)
        if left:
            rest = left - (time.process_time() - started)
            signal.setitimer(signal.ITIMER_PROF, max(rest, 1e-6), interval)


@contextmanager
def _memory_limit(size: int) -> Iterator[None]:
    """The process, all of its threads, gets at most `size` bytes more than it has: MemoryError beyond."""
    used = _used()
    if used is None:
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    limits = [limit for limit in (soft, hard, used + size) if limit != resource.RLIM_INFINITY]
    resource.setrlimit(resource.RLIMIT_DATA, (min(limits), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


def _used() -> int | None:
    """Bytes of the process's data, as RLIMIT_DATA counts them; None where it does not count mappings."""
    if sys.platform != "linux":
        return None
    try:
        file = os.open("/proc/self/statm", os.O_RDONLY)
    except OSError:
        return None
    try:
        return int(os.read(file, 200).split()[5]) * PAGE
    finally:
        os.close(file)
