"""Online: rows arrive while training goes on; a server that fails in any way costs seconds and one warning, no row."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

Loop = Callable[..., dict[str, Any]]
ReadLog = Callable[[Path], dict[str, Any]]


def only_log(folder: Path) -> Path:
    (file,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    return file


@pytest.fixture(autouse=True)
def no_process_is_left(tmp_path: Path) -> Iterator[None]:
    yield
    until = time.monotonic() + 10
    while uploads_of(tmp_path) and time.monotonic() < until:
        time.sleep(0.1)
    assert uploads_of(tmp_path) == []


def steps_and_losses(rows: list[dict[str, Any]]) -> list[tuple[int, float]]:
    return [(row["_step"], row["loss"]) for row in rows]


def expected(last: int) -> list[tuple[int, float]]:
    return [(step, 1 / step) for step in range(1, last + 1)]


def assert_goes_on(said: dict[str, Any], finish_s: float) -> None:
    assert said["times"]["start"] < 10  # importing wandb; the server is not asked
    assert said["times"]["log"] < 1
    assert said["times"]["finish"] < finish_s


def uploads_of(folder: Path) -> list[str]:
    """Processes that upload from a folder, and their helpers."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            command = (process / "cmdline").read_text()
            environment = (process / "environ").read_text()
        except OSError:
            continue  # ended meanwhile
        if str(folder) in command + environment and ("alignment.tracking\0" in command or "wandb-core" in command):
            found.append(command.replace("\0", " "))
    return found


def wait_for_rows(loop: Any, server: Any) -> None:
    while not server.rows:
        assert loop.poll() is None, "it ended before anything had arrived"
        time.sleep(0.05)


@pytest.mark.slow
def test_rows_arrive_while_training_goes_on_and_lineage_with_them(
    tmp_path: Path, start_loop: Callable[..., Any], server: Any
) -> None:
    enough = tmp_path / "enough"
    parents = {"model": ["sft", "a" * 64]}
    loop = start_loop(base_url=server.url, mode="online", last=999, pause=0.05, until=str(enough), parents=parents)
    wait_for_rows(loop, server)
    enough.touch()
    out, err = loop.communicate(timeout=60)
    said = json.loads(out)

    assert err == "" and said["warnings"] == []
    assert steps_and_losses(server.history()) == expected(said["last"])
    assert server.complete.is_set()
    first = server.called("UpsertBucket")[0]
    assert (first["project"], first["groupName"], first["jobType"]) == ("alignment", "quickstart-1a2b", "dpo")
    assert first["name"] == (tmp_path / "stage" / "wandb_run_id").read_text().strip()
    made_or_used = [call["input"]["artifactCollectionName"] for call in server.called("CreateArtifact")]
    assert sorted(made_or_used) == ["dpo", "sft"]
    assert len(server.called("UseArtifact")) == 1  # sft
    assert list((tmp_path / "home").iterdir()) == []


@pytest.mark.slow
def test_a_restart_goes_on_with_the_servers_run(
    tmp_path: Path, start_loop: Callable[..., Any], run_loop: Loop, server: Any
) -> None:
    """The rows of both attempts, each once: the server holds lines 0.. of one run, whoever sent them."""
    loop = start_loop(base_url=server.url, mode="online", last=999, pause=0.05)
    wait_for_rows(loop, server)
    loop.kill()
    loop.communicate()
    reached = len((tmp_path / "stage" / "metrics.jsonl").read_text().splitlines())
    said = run_loop(base_url=server.url, mode="online", first=reached - 3, last=reached + 3)

    assert said["warnings"] == []
    assert steps_and_losses(server.history()) == expected(reached + 3)
    assert {call["name"] for call in server.called("UpsertBucket") if call["name"]} == {said["run_id"]}


@pytest.mark.slow
def test_a_closed_port_costs_a_warning_and_the_command_it_names_uploads_everything(
    tmp_path: Path, run_loop: Loop, read_log: ReadLog, closed_url: str, server: Any, environment: dict[str, str]
) -> None:
    said = run_loop(base_url=closed_url, mode="online", pause=0.1, final_folder=str(tmp_path / "store"))

    assert_goes_on(said, finish_s=10)
    assert steps_and_losses(read_log(only_log(tmp_path / "stage"))["history"]) == expected(6)
    (warning,) = said["warnings"]
    assert warning.startswith("W&B: the server did not answer. The stage goes on and nothing is lost")
    (tmp_path / "stage").rename(tmp_path / "store")  # as the store does with a stage that has succeeded
    command = warning.split("upload it with: ")[1]
    assert command == said["command"]
    subprocess.run(
        shlex.split(command), check=True, env=environment | {"WANDB_BASE_URL": server.url}, cwd=tmp_path, timeout=60
    )
    assert steps_and_losses(server.history()) == expected(6) and server.complete.is_set()


def test_a_refused_key_is_said_while_training_goes_on(
    tmp_path: Path, run_loop: Loop, read_log: ReadLog, refusing_server: Any
) -> None:
    said = run_loop(base_url=refusing_server.url, mode="online", last=999, pause=0.05, until_warned=True)

    assert_goes_on(said, finish_s=3)
    assert steps_and_losses(read_log(only_log(tmp_path / "stage"))["history"]) == expected(said["last"])
    early, late = said["warnings"]
    for warning in (early, late):
        assert warning.startswith("W&B: the upload failed: user is not logged in. The stage goes on")
        assert f"upload it with: wandb sync {only_log(tmp_path / 'stage').parent}" in warning


def test_a_missing_key_is_said_and_nobody_is_asked_for_it(
    tmp_path: Path, run_loop: Loop, read_log: ReadLog, server: Any, environment: dict[str, str]
) -> None:
    del environment["WANDB_API_KEY"]
    said = run_loop(base_url=server.url, mode="online", pause=0.1)

    assert_goes_on(said, finish_s=10)
    assert "No API key configured" in said["warnings"][-1]
    assert steps_and_losses(read_log(only_log(tmp_path / "stage"))["history"]) == expected(6)


@pytest.mark.slow
def test_a_server_that_dies_in_the_middle_costs_seconds_at_the_end_and_no_row(
    tmp_path: Path, start_loop: Callable[..., Any], read_log: ReadLog, server: Any
) -> None:
    loop = start_loop(
        base_url=server.url, mode="online", last=999, pause=0.05, until=str(tmp_path / "dead"), drain_seconds=3.0
    )
    wait_for_rows(loop, server)
    server.die()
    arrived = len(server.rows)
    (tmp_path / "dead").touch()
    out, err = loop.communicate(timeout=60)
    said = json.loads(out)

    assert err == ""
    assert_goes_on(said, finish_s=5)
    assert 0 < arrived < said["last"]
    assert steps_and_losses(read_log(only_log(tmp_path / "stage"))["history"]) == expected(said["last"])
    assert said["warnings"][-1].startswith("W&B: the server stopped answering")
    assert not list(tmp_path.rglob("*.synced"))  # or the command would skip this run


@pytest.mark.slow
def test_a_server_that_never_answers_holds_the_end_for_seconds_only(
    tmp_path: Path, run_loop: Loop, read_log: ReadLog, silent_url: str
) -> None:
    said = run_loop(base_url=silent_url, mode="online", pause=0.1)

    assert_goes_on(said, finish_s=10)
    assert steps_and_losses(read_log(only_log(tmp_path / "stage"))["history"]) == expected(6)
    assert said["warnings"][0].startswith("W&B: the server did not answer")


def test_a_server_that_answers_nonsense_costs_a_warning(
    tmp_path: Path, run_loop: Loop, read_log: ReadLog, server: Any
) -> None:
    """An empty answer to CreateRunFiles crashes wandb's helper: in the upload, not in the training process."""
    server.graphql = lambda body: {}
    said = run_loop(base_url=server.url, mode="online", pause=0.1)

    assert_goes_on(said, finish_s=12)
    assert steps_and_losses(read_log(only_log(tmp_path / "stage"))["history"]) == expected(6)
    assert said["warnings"][-1].startswith("W&B: the upload failed: ")


@pytest.mark.slow
def test_the_upload_ends_when_its_training_process_is_killed(
    tmp_path: Path, start_loop: Callable[..., Any], server: Any
) -> None:
    loop = start_loop(base_url=server.url, mode="online", last=50, pause=0.2)
    while not server.called("UpsertBucket"):
        time.sleep(0.05)
    assert any("alignment.tracking" in command for command in uploads_of(tmp_path))
    os.kill(loop.pid, signal.SIGKILL)
    loop.communicate()  # then the fixture: no process is left


pytestmark = pytest.mark.timeout(120)
