"""The driver inside a job, as far as it needs no cluster; tests/slurm has the rest."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from alignment import job
from alignment.config.compose import compose
from alignment.errors import MachineError
from alignment.files import read_json, write_json
from alignment.launchers import slurm
from alignment.pipeline import store
from alignment.pipeline.identity import difference
from alignment.pipeline.runner import Run
from alignment.pipeline.submission import Submission
from alignment.signals import Listener


def test_what_differs_on_the_node_is_named() -> None:
    submitted = {"kind": "sft", "packages": {"torch": "2.13.0", "trl": "1.16.0"}}
    here = {"kind": "sft", "packages": {"torch": "2.12.0", "trl": "1.16.0"}}
    assert difference(submitted, here) == ("packages.torch", "2.13.0", "2.12.0")
    assert difference(submitted, {**here, "packages": {}}) == ("packages.torch", "2.13.0", None)


def test_outside_of_a_job_there_is_nothing_to_drive(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    assert job.main(["x.json", "0"]) == 4
    assert "alignment: error: this is no job of a cluster" in capsys.readouterr().err


class Stage:
    """A job's order as a submission left it, of a stage whose parents are not there."""

    def __init__(self, store: Path, settings: list[str], monkeypatch: pytest.MonkeyPatch):
        self.sent: list[str] = []
        monkeypatch.setattr(slurm, "submit", lambda script: str(self.sent.append(script) or len(self.sent)))
        self.run = Run(compose([*settings, f"store={store}"]), "alignment run")
        self.submission = Submission([self.run], "mine", {})
        self.submission.submit()

    def of(self, name: str) -> list[str]:
        batch = next(batch for batch in self.submission.batches if batch.elements[0].name == name)
        return [str(next(self.submission.folder.glob(f"{batch.number:03d}-*.json"))), "0"]


@pytest.fixture
def stage(tmp_path: Path, tiny_settings: list[str], monkeypatch: pytest.MonkeyPatch) -> Stage:
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    monkeypatch.setenv("SLURM_JOB_NODELIST", "n1")
    settings = ["pipeline=sft", "launcher=slurm", "engine=single", "launcher.processes=1"]
    return Stage(tmp_path / "store", [*tiny_settings, *settings], monkeypatch)


def test_a_job_takes_the_settings_that_it_was_submitted_with(
    stage: Stage, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same run on this machine has written its own into run.json since."""
    state = stage.run.state
    write_json(stage.run.folder / "run.json", {**state, "config": {**state["config"], "launcher": {"kind": "local"}}})
    monkeypatch.setattr(store, "LATE", 0.0)
    assert job.main(stage.of("sft")) == 4
    said = capsys.readouterr().err
    assert "the result of start is not there" in said and said.endswith(" [code 4]\n"), "who waits learns it from this"


def test_a_job_that_its_cluster_starts_again_for_ever_ends(
    stage: Stage, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SLURM_RESTART_COUNT", "21")
    assert job.main(stage.of("sft")) == 6
    assert "launcher.max_restarts: the job has started again 21 times" in capsys.readouterr().err


def made(run: Run) -> None:
    """All its stages, as other jobs have left them."""
    for node in run.nodes:
        record = {"key": node.key, "files": {}, "seconds": 1.0, "metrics": {}, "run": run.id}
        write_json(run.store.result(node.key) / "record.json", record)


def test_the_last_job_of_a_run_leaves_it_its_time_and_that_it_was_pruned(stage: Stage) -> None:
    stage.run.submitted([node.key for node in stage.run.nodes])
    stage.run.note_pruned("hopeless")
    made(stage.run)
    time.sleep(0.01)
    assert job.main(stage.of("sft")) == 0
    told = read_json(stage.run.folder / "run.json")
    assert {node["state"] for node in told["nodes"]} == {"done"}
    assert told["created"] == stage.run.state["created"] < told["updated"]
    assert told["pruned"] == "hopeless"


@pytest.mark.parametrize("damage", ["", "[1]", '{"created": "yesterday", "pruned": 3}'])
def test_the_last_job_of_a_run_writes_a_damaged_run_again(stage: Stage, damage: str) -> None:
    made(stage.run)
    stage.run.folder.mkdir(parents=True)
    (stage.run.folder / "run.json").write_text(damage)
    assert job.main(stage.of("sft")) == 0
    told = read_json(stage.run.folder / "run.json")
    assert told["created"] > stage.run.state["created"] and "pruned" not in told


def test_a_result_that_another_machine_has_just_stored_may_be_seen_late(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = store.Store(tmp_path)
    began = time.monotonic()
    assert place.awaited("0123456789abcdef") is None
    assert time.monotonic() - began < 1, "elsewhere what is not there is not waited for"
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    looks = iter([None, None, {"key": "0123456789abcdef"}])
    monkeypatch.setattr(store.Store, "record", lambda self, key: next(looks))
    assert place.awaited("0123456789abcdef") == {"key": "0123456789abcdef"}


def test_a_controller_that_does_not_answer_is_asked_again(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    answers = iter([MachineError("scontrol refuses: Socket timed out"), "RUNNING"])

    def ask() -> str:
        answer = next(answers)
        if isinstance(answer, MachineError):
            raise answer
        return answer

    assert job.insist(ask) == "RUNNING"
    assert "Socket timed out; asked again in 1 s" in capsys.readouterr().out
    monkeypatch.setattr(job, "INSISTENT", 0.5)
    answers = iter([MachineError("still not")] * 2)
    with pytest.raises(MachineError, match="still not"):
        job.insist(ask)


@pytest.mark.parametrize(
    ("limit", "signal", "why"),
    [(60.0, "SIGUSR1", "SIGUSR1"), (0.2, "SIGUSR1", "launcher.time_limit"), (0.2, "SIGTERM", "SIGTERM")],
)
def test_slurms_signal_shortly_before_the_end_is_the_time_limit(limit: float, signal: str, why: str) -> None:
    listener = Listener()
    request = job.Request(listener, limit)
    assert request.asked is None
    time.sleep(0.15)
    listener.asked = signal
    assert request.asked == why
    time.sleep(0.1)
    assert request.asked == why, "it does not change any more"
