"""What counts as queued already. SLURM's answers are given here; tests/slurm asks a real one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from alignment.config.compose import compose
from alignment.launchers import slurm
from alignment.launchers.slurm import JobState
from alignment.pipeline import ledger, submission
from alignment.pipeline.runner import Run


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
