"""What machines that are joined by hand believe of each other."""

from __future__ import annotations

import json
import os
import socket
import time
from pathlib import Path
from typing import Any

import pytest

from alignment.config.compose import compose
from alignment.errors import ConfigError, MachineError, PreemptedError
from alignment.files import write_json
from alignment.launchers import joined
from alignment.launchers.joined import Board, Presence, Watched, can_listen, leave_lost
from alignment.pipeline import following, leading
from alignment.pipeline.following import Follower
from alignment.pipeline.leading import Leader
from alignment.pipeline.runner import Run
from alignment.signals import Listener

HEAD = "somewhere:29500"


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def beat(board: Board, rank: int, text: str, **facts: Any) -> None:
    write_json(board.facts(rank), {"start": text.split()[0], **facts})
    board.beat(rank).write_text(text)


def test_only_a_beat_that_changes_is_life(tmp_path: Path) -> None:
    board, clock = Board(tmp_path, HEAD), Clock()
    beat(board, 1, "old 7")  # it may lie there since yesterday
    other = Watched(board, 1, clock)
    assert other.look() is None
    clock.now += 5
    assert other.look() is None
    assert other.silent == 5
    beat(board, 1, "old 8", host="a")
    assert other.look() == {"start": "old", "host": "a"}
    assert other.silent == 0
    board.beat(1).write_text("new 1")  # its facts are still to come
    assert other.look() is None
    beat(board, 1, "new 2")
    assert other.look() == {"start": "new"}
    clock.now += joined.SILENCE
    assert other.look() is None


def test_a_machine_shows_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(joined, "EVERY", 0.01)
    board = Board(tmp_path, HEAD)
    other = Watched(board, 1)
    assert other.look() is None
    mine = Presence(board, 1, run="a")
    assert other.look() == {"start": mine.start, **mine.here(), "run": "a"}
    mine.say(run="b")
    time.sleep(0.1)
    told = other.look()
    assert told is not None and told["run"] == "b"
    assert other.silent < 0.1
    assert board.beat(1).stat().st_size == joined.SIZE


def test_the_first_word_about_a_loss_stays(tmp_path: Path) -> None:
    for rank, what in ((1, "a"), (2, "b")):
        leave_lost(tmp_path, rank, what)
    said = json.loads((tmp_path / "lost.json").read_text())
    assert (said["rank"], said["what"], said["code"], said["retry"]) == (1, "a", 6, True)
    leave_lost(tmp_path / "moved", 1, "a")


def test_a_port_is_free_once_nobody_listens() -> None:
    with socket.socket(socket.AF_INET6) as other:
        other.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)  # as PyTorch's store
        other.bind(("", 0))
        other.listen()
        port = other.getsockname()[1]
        assert not can_listen(port)
    assert can_listen(port)


# --- rank 0 and those that follow it ----------------------------------------------------------------------------------


@pytest.fixture
def settings(tmp_path: Path, tiny_settings: list[str], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setattr(joined, "EVERY", 0.02)
    with socket.socket() as free:
        free.bind(("", 0))
        head = f"127.0.0.1:{free.getsockname()[1]}"
    several = ["launcher=torchrun", "launcher.nodes=2", "launcher.processes=1", f"launcher.head={head}"]
    return [*tiny_settings, *several, "experiment=quickstart", "engine=zero2", f"store={tmp_path / 'store'}"]


def a_run(settings: list[str], *more: str) -> Run:
    return Run(compose([*settings, *more]), "alignment run")


def follower(run: Run, said: list[str], stop: Listener | None = None) -> Follower:
    launcher: Any = run.experiment.launcher
    return Follower(run.store, launcher.model_copy(update={"rank": 1}), stop or Listener(), said.append)


def leader(run: Run) -> Leader:
    launcher: Any = run.experiment.launcher
    return Leader(run.store, launcher, print)


def test_rank_0_says_what_became_of_a_run(settings: list[str]) -> None:
    run = a_run(settings)
    leads, follows = leader(run), follower(run, said := [])
    leads.expect([run])
    time.sleep(0.1)
    follows._head.look()
    with pytest.raises(PreemptedError), leads.at(run):
        raise PreemptedError("sft has stopped (SIGTERM)", fix="x")
    with pytest.raises(PreemptedError, match="sft has stopped"):
        follows.follow(run)
    with leads.at(run):
        pass
    follows.follow(run)
    assert said[-1] == f"{run.id}  done"


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ("stage.sft.learning_rate=0.5", "sft: settings.learning_rate is 0.5 here, and .* there"),
        ("name=other", "its name is 'quickstart'"),
        ("launcher.processes=2", "`launcher.processes` is 2 here, and 1 on rank 0"),
    ],
)
def test_another_run_may_not_follow(more: str, said: str, settings: list[str]) -> None:
    run, other = a_run(settings), a_run(settings, more)
    leads = leader(run)
    leads.expect([run])
    with leads.at(run), pytest.raises(ConfigError, match=said):
        follower(other, []).follow(other)


def test_other_packages_are_named(settings: list[str]) -> None:
    run = a_run(settings)
    plan = {"name": run.experiment.name, "nodes": {n.name: {"key": n.key, "identity": n.identity} for n in run.nodes}}
    theirs = json.loads(json.dumps(plan))
    theirs["nodes"]["sft"]["key"] = "another"
    theirs["nodes"]["sft"]["identity"]["packages"]["torch"] = "1.0"
    assert following._unlike(theirs, run).startswith("sft: packages.torch is '")
    assert following._unlike(theirs, run).endswith("here, and '1.0' there")


def test_two_machines_of_one_name_are_refused(settings: list[str]) -> None:
    run = a_run(settings)
    leads = leader(run)
    leads.expect([run])
    leads._presence.say(boot="another")
    with leads.at(run), pytest.raises(MachineError, match=r"is called .*, too"):
        follower(run, []).follow(run)


def test_one_rank_is_one_machine(settings: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(following, "BEFORE", 0.1)
    run = a_run(settings)
    first = follower(run, [])
    with pytest.raises(ConfigError, match=f"rank 1 has joined already: process {os.getpid()} on "):
        follower(run, [])
    assert first._lock.holds()


def test_an_order_that_was_not_for_this_one_is_left(settings: list[str]) -> None:
    """By a rank 0 that was killed, or for another command that has had this rank."""
    run = a_run(settings)
    leads, follows = leader(run), follower(run, [])
    order = {"head": leads._presence.start, "members": {"1": "another"}, "folder": "x", "attempt": 1, "name": "sft"}
    write_json(follows._board.order, order)
    follows._begin(run, {"start": leads._presence.start})
    write_json(follows._board.order, {**order, "head": "another", "members": {"1": follows._presence.start}})
    follows._begin(run, {"start": leads._presence.start})
    assert follows._part is None and follows._waits_since is None
    write_json(follows._board.order, {**order, "members": {"1": follows._presence.start}})
    follows._begin(run, {"start": leads._presence.start})  # its stage.json is not seen yet
    assert follows._part is None and follows._waits_since is not None


def test_rank_0_waits_until_all_are_there_and_idle(settings: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    run, said = a_run(settings, "launcher.join_s=1"), list[str]()
    monkeypatch.setattr(leading, "QUIET", 0.0)
    leads = leader(run)
    with pytest.raises(MachineError, match="rank 1 has not joined within 1 s"):
        leading.gather(run, 2, lambda: None, said.append)
    assert said == [
        "waits 1 s at most: rank 1 has not joined: run the same command with launcher.rank=1 on its machine"
    ]
    there = Presence(Board(run.store.root, run.experiment.launcher.head), 1)  # type: ignore[union-attr, arg-type]
    there.say(head=leads._presence.start, run=run.id, at=["sft", 1], left=None)
    with pytest.raises(PreemptedError):
        leading.gather(run, 2, lambda: "SIGTERM", said.append)
    with pytest.raises(MachineError, match="has not ended its part"):
        leading.gather(run, 2, lambda: None, said.append)
    there.say(at=None)
    leading.gather(run, 2, lambda: None, said.append)
