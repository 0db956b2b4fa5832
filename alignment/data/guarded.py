"""Bounds of time and memory around code that comes with a model: its chat template.

transformers renders templates in Jinja's ImmutableSandboxedEnvironment, which lets them read and change nothing; but a
loop over loops may last for ever, and a text may be multiplied until no memory is left.
"""

from __future__ import annotations

import os
import resource
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from types import FrameType
from typing import Any

SECONDS = 10.0
BYTES = 1 << 30  # more than the process has when it begins
PAGE = resource.getpagesize()


class TooLongError(BaseException):
    """Not an Exception: what is stopped must not be able to catch it."""


@contextmanager
def bounded(seconds: float | None = None, size: int = BYTES) -> Iterator[None]:
    """In here TooLongError is raised after `seconds` of time, and MemoryError where `size` bytes more are asked for.

    Time is bounded in the main thread only, where all templates are rendered: signals come to no other. An alarm that
    was set before goes on after. About ten microseconds.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    most = _data_bytes() + size
    resource.setrlimit(resource.RLIMIT_DATA, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))
    try:
        if threading.current_thread() is threading.main_thread():
            with _alarm(SECONDS if seconds is None else seconds):
                yield
        else:
            yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


def _data_bytes() -> int:
    """What counts against RLIMIT_DATA: private memory that can be written."""
    return int(os.pread(_statm(os.getpid()), 128, 0).split()[5]) * PAGE


@cache
def _statm(pid: int) -> int:
    """Opened once, which takes longer than to read it; by a fork again, whose numbers these are not."""
    return os.open("/proc/self/statm", os.O_RDONLY | os.O_CLOEXEC)


@contextmanager
def _alarm(seconds: float) -> Iterator[None]:
    def ring(number: int, frame: FrameType | None) -> None:
        raise TooLongError

    before: Any = signal.signal(signal.SIGALRM, ring)
    began = time.monotonic()
    left, every = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        if left:
            signal.setitimer(signal.ITIMER_REAL, max(left - (time.monotonic() - began), 1e-3), every)
