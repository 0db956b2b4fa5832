"""What a template can do to the process that renders it: nothing."""

from __future__ import annotations

import resource
import signal
import sys
import threading
import time
from collections.abc import Iterator
from subprocess import PIPE, Popen
from typing import Any

import pytest

from alignment import guarded
from alignment.data.chat import Chat
from alignment.errors import InputError

from .conftest import PLAIN, make_tokenizer, user
from .preparing import qa, run

HI = [user("Hi")]
REFUSED = "here: the chat template refuses the conversation: "


def refused(template: str) -> str:
    with pytest.raises(InputError) as caught:
        Chat(make_tokenizer(template)).render(HI, "here")
    return str(caught.value)


@pytest.fixture
def soon(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A second is as good as ten to show a limit of time."""
    whole = guarded.guarded
    monkeypatch.setattr(guarded, "guarded", lambda work, where: whole(work, where, seconds=1.0))
    yield


@pytest.mark.parametrize(
    "template",
    [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{{ 10 ** (10 ** 10) }}",
        "{{ (9 + messages | length) ** (10 ** 9) % 7 }}",
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    ],
)
def test_a_template_that_does_not_end_is_ended(template: str, soon: None) -> None:
    started = time.process_time()
    assert refused(template) == (
        "here: the chat template does not end within 1 s of CPU time (set model.chat_template to a simpler one)"
    )
    assert time.process_time() - started < 3


@pytest.mark.parametrize(
    "template",
    [
        "{{ 'a' * 10 ** 10 }}",
        "{{ messages[0]['content'] * 10 ** 10 }}",
        "{{ 'a'.center(10 ** 10) }}",
        "{{ '%10000000000d' % 1 }}",
        "{% set ns = namespace(s='a') %}{% for i in range(60) %}{% set ns.s = ns.s + ns.s %}{% endfor %}",
        "{{ [0] * 10 ** 10 }}",
    ],
)
def test_a_template_that_takes_the_memory_is_ended(template: str) -> None:
    assert "here: the chat template takes more than 1 GB of memory (set model.chat_template" in refused(template)
    assert "a" * 10**6, "the process goes on"


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "unsafe"),
        ("{{ messages.__init__.__globals__ }}", "unsafe"),
        ("{{ '{0.__class__.__mro__}'.format('') }}", "unsafe"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{{ range(100001) }}", "OverflowError"),
    ],
)
def test_the_sandbox_holds(template: str, said: str) -> None:
    assert (message := refused(template)).startswith(REFUSED) and said in message


@pytest.mark.parametrize(
    "template", ["{{ raise_exception.__globals__ }}", "{{ ''|attr('__class__')|attr('__mro__') }}"]
)
def test_what_the_sandbox_hides_is_as_if_undefined(template: str) -> None:
    assert Chat(make_tokenizer(template)).render(HI, "here") == ""


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("a\n{{ messages[0]['content'] + 1 }}", 'TypeError: can only concatenate str (not "int") to str'),
        ("a\n{{ 1 // 0 }}", "ZeroDivisionError: integer division or modulo by zero"),
        ("a\n{{ messages.nothing.at_all }}", "'list object' has no attribute 'nothing'"),
        ("a\n{{ raise_exception('alternate!') }}", "alternate!"),
        ("a\n{% if %}", "Expected an expression, got 'end of statement block'"),
        ("a\n{{ 'a'.encode('utf-8').decode('utf-16') }}", "UnicodeDecodeError: "),
        ("a\n{{ '{'.format(1) }}", "ValueError: "),
    ],
)
def test_errors_of_a_template_tell_its_line(template: str, message: str) -> None:
    told = refused(template)
    assert told.startswith(REFUSED + message) and told.endswith("(line 2 of the template)")


def test_a_process_that_is_stopped_loses_no_time() -> None:
    """As by a busy machine: the wall's clock goes on, and nothing is rendered."""
    script = (
        "import sys, time; from alignment import guarded\n"
        "print('began', flush=True)\n"
        "guarded.guarded(lambda: sys.stdin.readline(), 'here', seconds=0.3)\n"
        "print('ended')"
    )
    started = Popen([sys.executable, "-c", script], stdin=PIPE, stdout=PIPE, text=True)
    with started as process:
        assert process.stdin is not None and process.stdout is not None
        assert process.stdout.readline() == "began\n"
        process.send_signal(signal.SIGSTOP)
        time.sleep(0.6)
        process.send_signal(signal.SIGCONT)
        print("go on", file=process.stdin, flush=True)
        assert process.stdout.readline() == "ended\n"
    assert process.returncode == 0


@pytest.mark.parametrize("template", ["{{ (9 + messages | length) ** (10 ** 9) % 7 }}", "{{ 'a' * 10 ** 10 }}"])
def test_no_row_is_dropped_for_a_limit(template: str, soon: None) -> None:
    """Which depends on the machine, while a key says what its rows are."""
    chat = Chat(make_tokenizer(PLAIN + "{% if 'long' in messages[0]['content'] %}" + template + "{% endif %}"))
    with pytest.raises(guarded.OverLimit, match=r"^rows\.jsonl:2: the chat template (does not end|takes more than)"):
        run(chat, [qa("q", "a"), qa("long", "a")], checks={"template": "drop"})


def test_an_earlier_timer_its_handler_and_the_limits_are_restored() -> None:
    rung: list[Any] = []
    limits = resource.getrlimit(resource.RLIMIT_DATA)
    handler = signal.signal(signal.SIGPROF, lambda *_: rung.append(1))
    timer = signal.setitimer(signal.ITIMER_PROF, 0.3)  # that of a profiler, say
    try:
        Chat(make_tokenizer()).render(HI, "here")
        assert 0 < signal.getitimer(signal.ITIMER_PROF)[0] < 0.35, "to the tick"
        refused("{{ 'a' * 10 ** 10 }}")
        assert resource.getrlimit(resource.RLIMIT_DATA) == limits
        with pytest.raises(InputError, match=r"does not end within 0\.5 s"):
            guarded.guarded(lambda: 10 ** int("1" + "0" * 10), "here", seconds=0.5)
        until = time.process_time() + 0.1
        while time.process_time() < until:
            pass
        assert rung == [1], "one that was due meanwhile rings at once"
    finally:
        signal.setitimer(signal.ITIMER_PROF, *timer)
        signal.signal(signal.SIGPROF, handler)


def test_beside_the_main_thread_memory_is_limited() -> None:
    said: list[str] = []
    thread = threading.Thread(target=lambda: said.extend([refused("{{ 'a' * 10 ** 10 }}"), refused("{{ 1 // 0 }}")]))
    thread.start()
    thread.join()
    assert "takes more than 1 GB" in said[0] and "ZeroDivisionError" in said[1]


def test_the_guard_costs_microseconds() -> None:
    Chat(make_tokenizer(PLAIN)).render(HI, "here")
    best = min(_seconds(200) for _ in range(20)) / 200
    assert best < 100e-6, f"{best * 1e6:.0f} us; 20 where nothing else runs"


def _seconds(times: int) -> float:
    started = time.perf_counter()
    for _ in range(times):
        guarded.guarded(int, "here")
    return time.perf_counter() - started
