"""Signs of life: written in place, read by the driver, true of one process only."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from alignment import life

PROCESS = """
import sys, time
from pathlib import Path
from alignment.life import Pulse
pulse = Pulse(Path(sys.argv[1]), 3)
pulse.got_on = zip(range(7, 1000), range(2, 1000)).__next__
sys.stdin.readline()
pulse.end()
"""


@pytest.fixture
def process(tmp_path: Path) -> subprocess.Popen[str]:
    started = subprocess.Popen([sys.executable, "-c", PROCESS, str(tmp_path)], stdin=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 10
    while not life.beats(tmp_path):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return started


def test_a_folder_that_moves_on_while_it_is_read_has_no_beats(tmp_path: Path) -> None:
    """A worker commits its result, and the folder with it, while the driver looks."""
    work, over = tmp_path / "work", threading.Event()

    def come_and_go() -> None:
        while not over.is_set():
            (work / "beats").mkdir(parents=True)
            work.rename(tmp_path / "result")
            shutil.rmtree(tmp_path / "result")

    mover = threading.Thread(target=come_and_go)
    mover.start()
    try:
        assert all(life.beats(work) == {} for _ in range(5000))
    finally:
        over.set()
        mover.join()


def test_a_process_beats_in_place_until_it_ends_in_order(tmp_path: Path, process: subprocess.Popen[str]) -> None:
    path = tmp_path / "beats" / "rank-00003.json"
    first, inode = life.beats(tmp_path)[3], path.stat().st_ino
    assert (first.pid, first.beat, first.ended, first.here, first.gone) == (process.pid, 1, False, True, False)
    time.sleep(1.3)
    second = life.beats(tmp_path)[3]
    assert second.beat > first.beat
    assert (second.ticks, second.alone) == (7, 2)
    process.communicate("end\n", timeout=10)
    last = life.beats(tmp_path)[3]
    assert last.ended
    assert last.gone
    assert (path.stat().st_size, path.stat().st_ino) == (life.SIZE, inode)


def test_a_killed_process_is_gone_as_a_zombie_already_and_never_taken_for_a_later_one(
    tmp_path: Path, process: subprocess.Popen[str]
) -> None:
    beat = life.beats(tmp_path)[3]
    later = replace(beat, born=beat.born + 1)
    assert later.gone, "another process has that number now"
    later.signal(signal.SIGKILL)
    time.sleep(0.1)
    assert not beat.gone
    beat.signal(signal.SIGKILL)
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    assert beat.gone
    assert not life.beats(tmp_path)[3].ended
    elsewhere = replace(beat, host="elsewhere")
    assert not elsewhere.gone, "nobody here can know"
    process.communicate()


def test_a_process_that_is_stopped_in_c_writes_its_stacks(tmp_path: Path, process: subprocess.Popen[str]) -> None:
    beat, path = life.beats(tmp_path)[3], life.stacks(tmp_path, 3)
    beat.signal(signal.SIGSTOP)
    beat.signal(signal.SIGUSR2)
    assert not path.read_text()
    beat.signal(signal.SIGCONT)
    deadline = time.monotonic() + 5
    while "most recent call first" not in path.read_text():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.communicate("end\n", timeout=10)


def test_a_torn_beat_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "beats").mkdir()
    (tmp_path / "beats" / "rank-00000.json").write_text('{"rank": 0, "pi')
    (tmp_path / "beats" / "rank-00001.json").write_text('{"rank": 1}')
    assert life.beats(tmp_path) == {}
