"""Being asked to stop. The first signal asks for an end in order, a second one for an end at once."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from types import FrameType
from typing import Protocol

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
PASSED_ON = signal.SIGRTMIN  # a driver's to its processes: it asks once, so it is never a second request
TIME_LIMIT = "launcher.time_limit"  # why a stage stops that was not asked by a signal
PRUNED = "pruned"  # the same, of a hopeless trial of a sweep
CANCELLED = "alignment cancel"  # why a command stops whose sweep was cancelled
# One request may arrive as several signals: a terminal or a launcher sends it to the group, and torchrun passes it on.
ECHO = 2.0


class Stopped(KeyboardInterrupt):
    """Raised in the main thread where nothing better can be done with a request to stop."""


class Asked(Protocol):
    """Who knows whether a run is to stop: a Listener, or one that has further reasons."""

    @property
    def asked(self) -> str | None: ...
    def deferred(self) -> AbstractContextManager[None]: ...


class Either:
    """As a Listener hears, or another who may ask this process to stop."""

    def __init__(self, stop: Asked, other: Callable[[], str | None]):
        self._stop, self._other = stop, other

    @property
    def asked(self) -> str | None:
        return self._stop.asked or self._other()

    def deferred(self) -> AbstractContextManager[None]:
        return self._stop.deferred()


class Listener:
    """Hears the signals of one process.

    asked: the first signal's name, "its driver" for one that was passed on, or None. While `deferred`, a request is
    noted for those who look at `asked`; otherwise it is raised as Stopped. raised: whether it was; libraries may catch
    it, and fail otherwise because of it. again: called for a further signal; by itself it must end the process.
    """

    def __init__(self) -> None:
        self.asked: str | None = None
        self.raised = False
        self._again: Callable[[], None] | None = None
        self._deferred = 0
        self._since: float | None = None  # when somebody else than a driver first asked

    def listen(self, again: Callable[[], None]) -> Listener:
        """SIGHUP stays ignored where it is (nohup). Signals that have waited for this process to listen come now."""
        self._again = again
        for number in SIGNALS:
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self._hear)
        signal.signal(PASSED_ON, self._hear)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        return self

    @contextmanager
    def deferred(self) -> Iterator[None]:
        self._deferred += 1
        try:
            yield
        finally:
            self._deferred -= 1

    def _hear(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        second = self._since is not None and now - self._since > ECHO
        if number != PASSED_ON and self._since is None:
            self._since = now
        if self.asked is None:
            self.asked = "its driver" if number == PASSED_ON else signal.Signals(number).name
            if not self._deferred:
                self.raised = True
                raise Stopped(self.asked)
        elif number != PASSED_ON and second and self._again is not None:
            self._again()
