"""What SLURM's commands answer, as other versions and set-ups do: recorded, for none of these can run here. tests/slurm
asks a real one."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path

import pytest

from alignment.allocation import allocation
from alignment.errors import MachineError
from alignment.launchers import facts, slurm
from alignment.pipeline.batches import AFTEROK, Task, Wait, batches


def answer(folder: Path, command: str, text: str, code: int = 0, error: str = "") -> None:
    path = folder / command
    path.write_text(f"#!/bin/sh\ncat <<'EOF'\n{text}\nEOF\necho '{error}' >&2\nexit {code}\n")
    path.chmod(0o755)


@pytest.fixture
def bin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    return tmp_path


def test_elements_of_an_array_are_told_apart(bin: Path) -> None:
    lines = "12_0|RUNNING|None|n[1-2]|2026-11-26T10:00:00|2026-11-26T08:00:00\n12_1|PENDING|JobArrayTaskLimit||N/A|N/A"
    answer(bin, "squeue", lines)
    found = slurm.states(["12_0", "12_1", "7"])
    assert {job: (state.state, state.lives, state.waits) for job, state in found.items()} == {
        "12_0": ("RUNNING", True, False),
        "12_1": ("PENDING", True, True),
    }
    assert (found["12_0"].nodes, found["12_1"].reason) == ("n[1-2]", "JobArrayTaskLimit")
    assert (found["12_0"].start, found["12_1"].start) == (datetime(2026, 11, 26, 8).timestamp(), None)


def test_elements_of_an_array_that_was_cancelled_as_a_whole_are_cancelled(bin: Path) -> None:
    """Slurm 22.05 has one line for it once none of its elements is left in the queue."""
    answer(bin, "squeue", "12|CANCELLED|None||2026-11-26T10:00:00|N/A")
    found = slurm.states(["12_0", "12_1"])
    assert {job: (state.job, state.state) for job, state in found.items() if job != "12"} == {
        "12_0": ("12_0", "CANCELLED"),
        "12_1": ("12_1", "CANCELLED"),
    }


def test_a_forgotten_job_is_no_error(bin: Path) -> None:
    answer(bin, "squeue", "", 1, "slurm_load_jobs error: Invalid job id specified")
    assert slurm.states(["12"]) == {}


def test_what_the_controller_has_forgotten_the_accounting_may_know(bin: Path) -> None:
    lines = "12_0|CANCELLED by 1000|n1|2026-11-26T10:00:00\n13|OUT_OF_MEMORY|n2|Unknown\n13.batch|FAILED|n2|"
    answer(bin, "sacct", lines)
    found = slurm.accounted(["12_0", "13"])
    assert found["12_0"].end == datetime(2026, 11, 26, 10).timestamp() and found["13"].end is None
    assert (found["12_0"].state, found["13"].state, found["13"].lives) == ("CANCELLED", "OUT_OF_MEMORY", False)
    answer(bin, "sacct", "", 1, "Slurm accounting storage is disabled")
    assert slurm.accounted(["12_0"]) == {}


def test_the_time_is_read_however_a_user_has_it_shown(bin: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answer(bin, "squeue", "12|COMPLETED|None|n1|2026-11-26T10:00:00|N/A")
    script = (bin / "squeue").read_text()
    (bin / "squeue").write_text(script.replace("cat", '[ -z "$SLURM_TIME_FORMAT" ] || exit 1\ncat', 1))
    monkeypatch.setenv("SLURM_TIME_FORMAT", "relative")
    assert slurm.states(["12"])["12"].end == datetime(2026, 11, 26, 10).timestamp()


def test_a_refusal_is_one_line_in_slurm_s_words(bin: Path) -> None:
    answer(bin, "sbatch", "", 1, "sbatch: error: Batch job submission failed: Invalid account")
    with pytest.raises(MachineError, match=r"sbatch refuses: sbatch: error: .* Invalid account$") as caught:
        slurm.submit("#!/bin/sh\n")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "said",
    [
        "1234",
        "sbatch: your account is nearly empty\n1234;cluster2",
        "1234;a\n*** 12 nodes are down ***",
        "hello\n\n1234\n\n",
    ],
)
def test_the_number_of_a_job_is_found_among_a_site_s_words(said: str, bin: Path) -> None:
    answer(bin, "sbatch", said)
    assert slurm.submit("#!/bin/sh\n") == "1234"


@pytest.mark.parametrize(("said", "told"), [("", "nothing"), ("*** 12 nodes\nare down", r"\*\*\* 12 nodes are down")])
def test_an_answer_without_the_number_of_a_job_is_no_job(said: str, told: str, bin: Path) -> None:
    answer(bin, "sbatch", said)
    with pytest.raises(MachineError, match=rf": sbatch names no job: {told} \(give the command again"):
        slurm.submit("#!/bin/sh\n")


def test_words_of_an_administrator_in_another_encoding_are_no_error(bin: Path) -> None:
    """A Reason is kept as it was typed: here e acute in Latin-1, which is no UTF-8."""
    node = (
        r"NodeName=n1 CPUTot=8 RealMemory=1000 State=DOWN Partitions=p Reason=d\351fectueux [root@2026-11-26T10:00:00]"
    )
    (bin / "scontrol").write_text(f"#!/bin/sh\nprintf '{node}\\n'\n")
    (bin / "scontrol").chmod(0o755)
    assert list(facts.ask().machines) == ["n1"]
    (bin / "sbatch").write_text("#!/bin/sh\nprintf 'refus\\351\\n' >&2; exit 1\n")
    (bin / "sbatch").chmod(0o755)
    with pytest.raises(MachineError, match="sbatch refuses: refus\ufffd"):
        slurm.submit("#!/bin/sh\n")


def test_where_there_is_no_slurm_the_fix_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(MachineError, match=r"no sbatch here.*launcher=torchrun or launcher=local"):
        slurm.submit("#!/bin/sh\n")


def test_neither_a_job_around_the_command_nor_a_profile_changes_what_is_submitted(
    bin: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs = {
        "SLURM_JOB_ID": "7", "SLURM_CPUS_PER_TASK": "3", "SLURM_CPU_BIND": "quiet,mask_cpu:1", "SLURM_MEM_PER_CPU": "9",
        "SLURMD_NODENAME": "n1", "SRUN_CPUS_PER_TASK": "3", "SBATCH_NO_REQUEUE": "1", "SALLOC_ACCOUNT": "lab",
    }  # fmt: skip
    kept = {"SLURM_CONF": "/etc/slurm.conf", "SLURM_JWT": "me"}
    for name, value in {**theirs, **kept}.items():
        monkeypatch.setenv(name, value)
    (bin / "sbatch").write_text(f"#!/bin/sh\nenv > {bin}/environment\necho 8\n")
    (bin / "sbatch").chmod(0o755)
    assert slurm.submit("#!/bin/sh\n") == "8"
    names = {line.partition("=")[0] for line in (bin / "environment").read_text().splitlines()}
    assert {name for name in names if name.startswith(("SLURM", "SRUN", "SBATCH", "SALLOC"))} == set(kept)


def test_where_arrays_are_off_each_job_stands_alone(bin: Path) -> None:
    answer(bin, "scontrol", "MaxArraySize            = 0\nMaxJobCount             = 10000")
    tasks = [Task(f"dpo{number}", "dpo", "dpo", ()) for number in range(3)]
    tasks += [Task(f"eval{number}", "evaluate", "e", (f"dpo{number}",)) for number in range(3)]
    made = batches(tasks, {}, slurm.largest_array())
    assert [(batch.array, *batch.elements) for batch in made] == [(False, 0)] * 6
    assert [batch.waits for batch in made[3:]] == [(Wait(AFTEROK, batch=number),) for number in range(3)]
    answer(bin, "scontrol", "MaxArraySize            = 2\n")
    assert [batch.array for batch in batches(tasks[:3], {}, slurm.largest_array())] == [True, False]


def test_nodes_that_do_not_answer_are_named(bin: Path) -> None:
    answer(bin, "sinfo", "n1 allocated\nn2 allocated*\nn3 down\nn4 draining\nn5 mixed")
    assert slurm.silent_nodes("n[1-5]") == ["n2", "n3", "n4"]


def test_the_last_element_of_an_array_is_not_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """SLURM_JOB_ID of that one is the array's own number."""
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    assert allocation() is None
    for name, value in {"JOB_ID": "12", "ARRAY_JOB_ID": "12", "ARRAY_TASK_ID": "3", "RESTART_COUNT": "2"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    here = allocation()
    assert here is not None and (here.job, here.restarts) == ("12_3", 2)
