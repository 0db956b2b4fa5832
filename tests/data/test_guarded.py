"""Templates that loop for ever or eat memory, and those that reach for what they must not have."""

from __future__ import annotations

import signal
import threading
import time
from typing import Any

import pytest

from alignment.data import guarded
from alignment.data.chat import Chat
from alignment.data.guarded import TooLongError, bounded
from alignment.errors import InputError

from .conftest import assistant, make_tokenizer, user

TALK = [user("q"), assistant("a")]
LONG = "{% for a in range(99999) %}{% for b in range(99999) %}{% set c = a * b %}{% endfor %}{% endfor %}"
DOUBLED = "{% set ns = namespace(x='ab') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}{{ ns.x }}"
HOSTILE = {
    "loops": (LONG, "does not end within 0.5 s"),
    "multiplies a text": ("{{ 'a' * 10**11 }}", "takes more than 1.1 GB of memory"),
    "doubles a text": (DOUBLED, "takes more than 1.1 GB of memory|does not end within"),
    "raises a number": ("{{ 10**(10**10) }}", "does not end within|memory|refuses"),
    "pads a text": ("{{ 'a'.center(10**11) }}", "takes more than 1.1 GB of memory"),
    "calls itself": ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "refuses the conversation"),
    "reads a class": ("{{ messages.__class__.__mro__ }}", "refuses the conversation"),
    "changes what it is given": ("{{ messages.clear() }}", "refuses the conversation"),
    "divides by nothing": ("{{ 1 // 0 }}", "refuses the conversation: .*zero"),
    "is no template": ("a\n{% for %}", r"refuses the conversation: .*\(line 2 of it\)"),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_a_hostile_template_is_one_line_and_soon_over(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    template, said = HOSTILE[what]
    monkeypatch.setattr(guarded, "SECONDS", 0.5)
    monkeypatch.setattr("alignment.data.chat.SECONDS", 0.5)
    began = time.monotonic()
    with pytest.raises(InputError, match=f"rows.jsonl:3: the chat template ({said})"):
        Chat(make_tokenizer(template)).render(TALK, "rows.jsonl:3")
    assert time.monotonic() - began < 5


def test_an_alarm_that_was_set_before_goes_on_and_limits_are_as_they_were() -> None:
    import resource

    rung: list[int] = []
    theirs = signal.signal(signal.SIGALRM, lambda number, frame: rung.append(number))
    left, limits = signal.setitimer(signal.ITIMER_REAL, 0.3), resource.getrlimit(resource.RLIMIT_DATA)
    try:
        with pytest.raises(TooLongError), bounded(0.05):
            while True:
                pass
        assert not rung and signal.getitimer(signal.ITIMER_REAL)[0] <= 0.26
        end = time.monotonic() + 2
        while not rung and time.monotonic() < end:
            time.sleep(0.01)
        assert rung and resource.getrlimit(resource.RLIMIT_DATA) == limits
    finally:
        signal.signal(signal.SIGALRM, theirs)
        signal.setitimer(signal.ITIMER_REAL, *left)


def test_other_threads_have_the_bound_of_memory() -> None:
    found: list[Any] = []

    def work() -> None:
        try:
            with bounded(0.05):
                time.sleep(0.1)
                found.append(bytearray(2 << 30))
        except BaseException as error:
            found.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert isinstance(found[0], MemoryError)
