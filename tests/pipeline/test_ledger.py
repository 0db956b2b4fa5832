"""What counts as queued already. SLURM's answers are given here; tests/slurm asks a real one."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

import pytest

from alignment.config.compose import compose
from alignment.errors import MachineError
from alignment.files import LATE
from alignment.launchers import slurm
from alignment.launchers.slurm import JobState
from alignment.pipeline import claims, ledger, submission
from alignment.pipeline.runner import Run
from alignment.signals import Listener, Stopped


@pytest.fixture
def submitted(tmp_path: Path, tiny_settings: list[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """A run of three stages, jobs 1, 2 and 3."""
    settings = ["pipeline=sft", "launcher=slurm", "engine=single", "launcher.processes=1", f"store={tmp_path}"]
    run, numbers = Run(compose([*tiny_settings, *settings]), "alignment run"), iter("12345678")
    monkeypatch.setattr(slurm, "submit", lambda script: next(numbers))
    monkeypatch.setattr(slurm, "states", lambda jobs: {})
    monkeypatch.setattr(slurm, "largest_array", lambda: 1001)
    submission.submit([run], "mine")
    return run


def says(monkeypatch: pytest.MonkeyPatch, *answers: dict[str, tuple[str, str]]) -> None:
    """SLURM's answers, one after the other: job -> state and reason."""
    left = list(answers)

    def states(jobs: Any) -> dict[str, JobState]:
        told = left.pop(0) if len(left) > 1 else left[0]
        return {job: JobState(job, state, reason, "", None) for job, (state, reason) in told.items()}

    monkeypatch.setattr(slurm, "states", states)


def test_what_waits_or_is_at_work_is_queued(submitted: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    says(monkeypatch, {"1": ("RUNNING", "None"), "2": ("PENDING", "Dependency"), "3": ("FAILED", "NonZeroExitCode")})
    first, second, *_ = submitted.nodes
    assert ledger.queued([submitted]) == {first.key: "1", second.key: "2"}


def test_what_slurm_will_never_start_is_not(submitted: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    says(monkeypatch, {"1": ("PENDING", "DependencyNeverSatisfied"), "2": ("PENDING", "Resources")})
    assert ledger.queued([submitted]) == {submitted.nodes[1].key: "2"}


def test_what_waits_for_a_job_that_is_gone_is_not_though_slurm_has_not_looked_yet(
    submitted: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What waits for what it waits for is not, either; unless the result is there after all."""
    dependent = ("PENDING", "Dependency")
    says(monkeypatch, {"1": ("CANCELLED", "None"), "2": dependent, "3": dependent})
    first, second, third, *_ = submitted.nodes
    assert ledger.queued([submitted]) == {}
    record = submitted.store.result(first.key) / "record.json"
    record.parent.mkdir(parents=True)
    record.write_text(json.dumps({"key": first.key, "files": {}}))
    assert ledger.queued([submitted]) == {second.key: "2", third.key: "3"}


def test_a_job_that_is_ending_is_waited_for_till_it_is_known_what_it_was(
    submitted: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    ending = {"1": ("COMPLETING", "None"), "2": ("COMPLETING", "None")}
    says(monkeypatch, ending, {"1": ("CANCELLED", "None"), "2": ("PENDING", "BeginTime")})
    said: list[str] = []
    assert ledger.queued([submitted], said.append) == {submitted.nodes[1].key: "2"}
    assert said == ["waits for what is ending: job 1, 2"]


def test_a_job_that_never_ends_its_end_is_not_waited_for_for_ever(
    submitted: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    says(monkeypatch, {"1": ("COMPLETING", "None")})
    assert ledger.queued([submitted], patience=0.5) == {}


@pytest.mark.parametrize("ago", [1.0, 300.0])
def test_what_a_job_has_just_made_need_not_be_seen_yet(
    ago: float, submitted: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where a file system shows late what another machine has written: what waits for it is no orphan."""
    first, second, *_ = submitted.nodes
    record = submitted.store.result(first.key) / "record.json"
    looks: list[int] = []

    def states(jobs: Any) -> dict[str, JobState]:
        looks.append(len(looks))
        if len(looks) == 2:
            record.parent.mkdir(parents=True)
            record.write_text(json.dumps({"key": first.key, "files": {}}))
        made = JobState("1", "COMPLETED", "None", "", time.time() - ago)
        return {"1": made, "2": JobState("2", "PENDING", "Dependency", "", None)}

    monkeypatch.setattr(slurm, "states", states)
    found = ledger.queued([submitted])
    assert (found.get(second.key), len(looks)) == (("2", 2) if ago < LATE else (None, 1))


def test_who_is_asked_to_stop_while_jobs_are_sent_sends_no_more_and_the_same_command_the_rest(
    tmp_path: Path, tiny_settings: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = ["pipeline=sft", "launcher=slurm", "engine=single", "launcher.processes=1", f"store={tmp_path}"]
    run, stop, numbers = Run(compose([*tiny_settings, *settings]), "alignment run"), Listener(), list[str]()

    def send(script: str) -> str:
        stop.asked = "SIGINT"
        numbers.append(str(len(numbers) + 1))
        return numbers[-1]

    monkeypatch.setattr(slurm, "submit", send)
    monkeypatch.setattr(slurm, "largest_array", lambda: 1001)
    monkeypatch.setattr(slurm, "outputs", dict)
    with pytest.raises(Stopped, match=f"SIGINT, 1 of {len(run.nodes)} submissions of mine are queued"):
        submission.submit([run], "mine", stop=stop)
    assert numbers == ["1"]
    says(monkeypatch, {"1": ("RUNNING", "None")})
    sent = submission.submit([run], "mine", stop=Listener())
    assert len(numbers) == len(run.nodes) == len(sent.jobs)
    claimed = claims.read(run.store)["mine"]
    assert {name: sorted(jobs) for name, jobs in claimed.items()} == {run.id: sorted(numbers)}


def test_what_a_refusal_half_way_leaves_in_the_queue_is_said(
    tmp_path: Path, tiny_settings: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = ["pipeline=sft", "launcher=slurm", "engine=single", "launcher.processes=1", f"store={tmp_path}"]
    run, answers = Run(compose([*tiny_settings, *settings]), "alignment run"), [None, "1", "2", None]

    def send(script: str) -> str:
        if (number := answers.pop(0)) is None:
            raise MachineError("sbatch refuses: Socket timed out")
        return number

    monkeypatch.setattr(slurm, "submit", send)
    monkeypatch.setattr(slurm, "largest_array", lambda: 1001)
    monkeypatch.setattr(slurm, "outputs", dict)
    with pytest.raises(MachineError, match=r"^sbatch refuses: Socket timed out$"):
        submission.submit([run], "mine")
    with pytest.raises(MachineError, match=r"; 2 of \d submissions are queued .*alignment cancel mine ends these"):
        submission.submit([run], "mine")


def test_of_two_jobs_for_a_stage_the_later_is_remembered(submitted: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where all notes were removed: squeue names those that live before those that have ended."""
    key = submitted.nodes[0].key
    (first,) = submitted.store.root.glob("jobs/*/000-*.sbatch")
    shutil.copytree(first.parent, again := first.parent.with_name("again"))
    shutil.rmtree(submitted.store.root / "jobs" / "keys")
    found = {again: "20", first.parent: "9"}
    monkeypatch.setattr(slurm, "outputs", lambda: {f"{at}/{first.stem}-%j.out": job for at, job in found.items()})
    ledger.remember(submitted.store)
    told = ledger.job_of(submitted.store, key)
    assert told is not None and told["job"] == "20"
    assert told["submitted"] == (again / first.name).with_suffix(".json").stat().st_mtime


def test_jobs_of_a_submission_that_was_killed_are_found(submitted: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed after SLURM had taken its second script, and before that was noted."""
    keys = [node.key for node in submitted.nodes]
    (folder,) = {Path(ledger.job_of(submitted.store, key)["out"]).parent for key in keys}  # type: ignore[index]
    notes = {key: ledger.job_of(submitted.store, key) for key in keys}
    for path in (submitted.store.root / "jobs" / "keys").iterdir():
        path.unlink()
    (folder / ledger.BEGUN).touch()
    files = {
        script.with_name(f"{script.stem}-%j.out"): str(n) for n, script in enumerate(sorted(folder.glob("*.sbatch")), 1)
    }
    others = {"/elsewhere/000-sft-%j.out": "99", f"{folder}/other.out": "98"}
    monkeypatch.setattr(slurm, "outputs", lambda: {str(path): number for path, number in files.items()} | others)
    ledger.remember(submitted.store)
    for key in keys:
        assert {**ledger.job_of(submitted.store, key), "submitted": 0} == {**notes[key], "submitted": 0}  # type: ignore[dict-item]
    assert not (folder / ledger.BEGUN).exists()
