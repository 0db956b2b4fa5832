"""What is told of stages that are jobs, by what SLURM and the store say of them."""

from __future__ import annotations

import json
import os
import time
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from alignment import cli
from alignment.life import Beat
from tests.reporting.fake_slurm import FakeSlurm, commit, key_of, note, write_run


def node(store: Path, capsys: pytest.CaptureFixture[str], name: str = "sft") -> dict[str, Any]:
    """Of the only run, as `alignment status --json` has it."""
    assert cli.main(["status", "--json", "--store", str(store)]) == 0
    (run,) = json.loads(capsys.readouterr().out)
    return next(node for node in run["nodes"] if node["name"] == name)


def ago(seconds: float) -> str:
    """As SLURM writes it."""
    return datetime.fromtimestamp(time.time() - seconds).isoformat(timespec="seconds")


@pytest.fixture
def store(tmp_path: Path, slurm: FakeSlurm) -> Path:
    """A run whose SFT is job 12."""
    write_run(tmp_path / "store", "run", {"rows": "reused", "sft": "queued"}, {"sft": "12"})
    commit(tmp_path / "store", "run", "rows")
    return tmp_path / "store"


# --- states ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("who", ["the controller", "the accounting"])
def test_a_result_may_be_late_but_not_for_ever(
    who: str, store: Path, slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    """A file system may show it later than SLURM ends its job. One that was removed later will never be there."""

    def ended(when: str) -> None:
        if who == "the controller":
            slurm.queue(("12", "COMPLETED", "None", "n1", when))
        else:
            slurm.accounts(("12", "COMPLETED", when))

    ended(ago(10))
    assert node(store, capsys)["state"] == "running"
    ended(ago(3600))
    told = node(store, capsys)
    assert (told["state"], "job 12" in told["error"]) == ("gone", True)
    assert cli.main(["status", "run", "--watch", "--store", str(store)]) == 1
    assert "gone" in capsys.readouterr().out
    record = commit(store, "run", "sft") / "record.json"
    record.write_text("{")
    assert node(store, capsys)["error"] == f"damaged: record.json cannot be read (in {record.parent})"
    commit(store, "run", "sft")
    assert node(store, capsys)["state"] == "done"


def test_a_job_that_only_the_accounting_believes_to_run_has_failed(
    store: Path, slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    slurm.accounts(("12", "RUNNING", "Unknown"))
    told = node(store, capsys)
    assert (told["state"], told["error"]) == ("failed", "job 12 has ended without a result")


def test_a_job_that_slurm_does_not_know_and_that_never_printed_was_cancelled_while_it_waited(
    store: Path, slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    """An element of an array whose others still wait. One that has begun has failed."""
    told = node(store, capsys)
    assert (told["state"], "job 12 has never begun: it was cancelled" in told["error"]) == ("cancelled", True)
    (store / "jobs" / "once" / "sft-12.out").write_text("job 12 on n1\n")
    assert node(store, capsys)["state"] == "failed"


@pytest.mark.parametrize(("later", "why"), [(60.0, "SLURM starts it again in a moment"), (7200.0, "not before 20")])
def test_a_job_that_waits_for_a_time_says_which_if_it_is_far(
    later: float, why: str, store: Path, slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    slurm.queue(("12", "PENDING", "BeginTime", "", "N/A", ago(-later)))
    assert node(store, capsys)["why"].startswith(why)


def test_what_was_cancelled_stays_so_when_slurm_has_forgotten_it(
    store: Path, slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    slurm.queue(("12", "RUNNING"))
    out = note(store, "run", "sft", "12")
    out.write_text("alignment: stopped (SIGTERM: saved at step 7)\n")
    assert cli.main(["cancel", "run", "--store", str(store)]) == 0
    capsys.readouterr()
    for known in [[("12", "CANCELLED")], [("12", "FAILED")], []]:
        slurm.queue(*known)
        told = node(store, capsys)
        assert (told["state"], told["error"]) == ("cancelled", "by alignment cancel")
    note(store, "run", "sft", "13").write_text("")
    assert node(store, capsys)["state"] == "failed", "of one that was submitted later nobody has said that"


def test_a_job_that_said_why_it_failed_is_quoted(
    store: Path, slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    out = note(store, "run", "sft", "12")
    out.write_text("begins\nalignment: error: no GPU\n")
    slurm.accounts(("12", "FAILED", ago(10)))
    assert (told := node(store, capsys))["error"] == "no GPU" and "code" not in told
    out.write_text("begins\nalignment: error: no GPU [code 4]\n")
    assert ((told := node(store, capsys))["error"], told["code"]) == ("no GPU", 4)
    slurm.accounts(("12", "CANCELLED by 0", ago(10)))
    assert node(store, capsys)["state"] == "cancelled"


def test_the_attempt_at_work_counts_with_the_restarts_of_its_job(
    store: Path, slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    slurm.queue(("12", "RUNNING"))
    rows = [{"attempt": number, "cause": f"lost {number}", "job": {"restarts": number - 1}} for number in (1, 2, 3)]
    log_of(store).with_name("attempts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:2]))
    order = log_of(store).with_name("stage.json")
    told = {name: value for name, value in rows[2].items() if name != "cause"}
    for stage, attempts, restarts in ((None, 2, 1), (rows[1], 2, 1), (told, 3, 2), ([], 2, 1)):
        if stage is not None:
            order.write_text(json.dumps(stage))
        of = node(store, capsys)
        assert (of["attempts"], of["restarts"], of["causes"]) == (attempts, restarts, ["lost 1", "lost 2"])
    order.write_text(json.dumps(told))
    assert cli.main(["status", "run", "--store", str(store)]) == 0
    assert "queued again 2 times; 3 attempts (lost 1; lost 2)" in " ".join(capsys.readouterr().out.split())


def test_a_job_at_work_says_on_which_nodes(store: Path, slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]) -> None:
    slurm.queue(("12", "RUNNING", "None", "n[3-4]"))
    assert node(store, capsys)["on"] == "n[3-4]"
    assert cli.main(["status", "run", "--store", str(store)]) == 0
    assert "job 12 on n[3-4]" in capsys.readouterr().out
    for number in range(9):
        write_run(store, f"run-{number}", {"sft": "queued"}, {"sft": "12"})
    assert cli.main(["status", "run-", "--store", str(store)]) == 0
    assert "job 12  on n[3-4]" in capsys.readouterr().out


def beat(store: Path, before: float, rank: int = 0, ended: bool = False) -> None:
    """The last sign of life of a rank of SFT, so many seconds ago."""
    file = log_of(store).with_name("beats") / f"rank-{rank:05d}.json"
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(asdict(Beat(rank, 7, 7, "n3", 9, 4, ended))))
    os.utime(file, (time.time() - before, time.time() - before))


def test_a_job_that_is_silent_for_long_says_so(
    store: Path, slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    slurm.queue(("12", "RUNNING", "None", "n3", "N/A", ago(3600)))
    beat(store, 100)
    assert node(store, capsys)["silent"] is None, "a network's file system may be as late"
    beat(store, 185)
    beat(store, 400, rank=1, ended=True)
    assert cli.main(["status", "run", "--store", str(store)]) == 0
    assert "no sign of life for 3:05: its node may be gone" in " ".join(capsys.readouterr().out.split())
    beat(store, 5, rank=1)
    assert node(store, capsys)["silent"] is None


def test_of_many_runs_the_silent_stages_come_first(
    store: Path, slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(20):
        write_run(store, f"a-{number}", {"sft": "queued"}, {"sft": f"13_{number}"})
    slurm.queue(("12", "RUNNING", "None", "n3"), *((f"13_{number}", "RUNNING") for number in range(20)))
    beat(store, 185)
    assert cli.main(["status", "a-", "run", "--store", str(store)]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "job 12 on n3 no sign of life for 3:05: its node may be gone" in said and "and 9 more" in said


@pytest.mark.parametrize("state", ["SUSPENDED", "CONFIGURING", "STOPPED", "COMPLETING"])
def test_a_job_that_is_not_running_just_now_may_be_silent(
    state: str, store: Path, slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    slurm.queue(("12", state, "None", "n3"))
    beat(store, 7200)
    told = node(store, capsys)
    assert (told["state"], told["silent"]) == ("running", None)


def test_signs_of_life_from_before_a_job_was_queued_again_do_not_count(
    store: Path, slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    """Until its driver begins another attempt the work folder is as the lost node has left it."""
    beat(store, 7200)
    slurm.queue(("12", "RUNNING", "None", "n3", "N/A", ago(20)))
    assert node(store, capsys)["silent"] is None


def test_between_two_attempts_nobody_shows_life(
    store: Path, slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    slurm.queue(("12", "RUNNING", "None", "n3", "N/A", ago(3600)))
    beat(store, 250, ended=True)
    assert node(store, capsys)["silent"] is None, "all have left in order"
    beat(store, 250, rank=1)
    log_of(store).with_name("stage.json").write_text(json.dumps({"attempt": 2}))
    attempts = log_of(store).with_name("attempts.jsonl")
    attempts.write_text('{"attempt": 1}\n')
    assert node(store, capsys)["silent"] == pytest.approx(250, abs=10)
    attempts.write_text('{"attempt": 1}\n{"attempt": 2}\n')
    assert node(store, capsys)["silent"] is None, "it was killed when another had failed"


# --- why -------------------------------------------------------------------------------------------------------------


def log_of(store: Path) -> Path:
    folder = store / "work" / key_of("run", "sft")[:16]
    folder.mkdir(parents=True, exist_ok=True)
    return folder / "log.txt"


def test_a_failed_stage_shows_the_end_of_its_log(
    store: Path, slurm: FakeSlurm, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    bar = "".join(f"\rstep {step}" for step in range(50))
    text = f"--- attempt 1, now\nfirst\n\x1b[31mred\x1b[0m\n{bar}\n\n{'long ' * 40}\nRuntimeError: \tmat1 and mat2\n"
    log_of(store).write_text(text)
    commit(store, "run", "rows")
    slurm.accounts(("12", "FAILED", ago(1)))
    assert node(store, capsys)["log"] == ["red", "step 49", ("long " * 40).rstrip(), "RuntimeError:   mat1 and mat2"]
    assert "log" not in node(store, capsys, "rows")
    monkeypatch.setenv("COLUMNS", "70")
    for command in (["status"], ["status", "run"]):
        assert cli.main([*command, "--store", str(store)]) == 0
        lines = capsys.readouterr().out.splitlines()
        (at,) = [number for number, line in enumerate(lines) if " failed " in line and "sft" in line]
        assert lines[at - 1].split()[:2] == ["rows", "reused"] and lines[at - 1].index("reused") == lines[at].index(
            "fail"
        )
        long = next(line for line in lines if "long" in line)
        assert len(long) <= 70 and long.endswith("…")
        assert [line.strip() for line in lines if "RuntimeError" in line] == ["RuntimeError:   mat1 and mat2"]
    assert cli.main(["status", "run", "--watch", "--store", str(store)]) == 1
    assert "    RuntimeError" in capsys.readouterr().out


def test_a_job_that_never_came_to_an_attempt_shows_what_it_printed(
    store: Path, slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    """Beside what an earlier job has left, which failed of something else."""
    (log_of(store).with_name("error.json")).write_text(json.dumps({"code": 5, "what": "loss is NaN"}))
    log_of(store).write_text("ValueError: of the job before\n")
    slurm.accounts(("12", "FAILED", ago(1)))
    assert node(store, capsys)["error"] == "loss is NaN"
    out = note(store, "run", "sft", "13", ago=-5.0)
    out.write_text("begins\nalignment: error: sft is not what was submitted\n")
    slurm.accounts(("13", "FAILED", ago(1)))
    told = node(store, capsys)
    assert told["error"] == "sft is not what was submitted"
    assert told["log"] == ["begins", "alignment: error: sft is not what was submitted"]
    many = "".join(f"srun: error: node{n:03}: task {n}: Exited with exit code 1\n" for n in range(384))
    out.write_text(f"begins\nalignment: error: sft is not what was submitted\n{many}")
    assert node(store, capsys)["log"] == told["log"], "srun has a line for each of many tasks"
    out.unlink()
    slurm.accounts(("13", "OUT_OF_MEMORY", ago(1)))
    told = node(store, capsys)
    assert (told["error"], told["log"]) == ("out of memory", [])
    slurm.accounts(("13", "CANCELLED", ago(1)))
    told = node(store, capsys)
    assert told["error"].startswith("cancelled") and "log" not in told


def test_a_stage_that_failed_here_shows_the_end_of_its_log(
    store: Path, slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    write_run(store, "run", {"sft": "failed"})
    log_of(store).write_text("KeyError: 'text'\n")
    assert node(store, capsys)["log"] == ["KeyError: 'text'"]


def test_an_error_with_a_known_cause_is_shown_without_its_traceback(
    store: Path, slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    """That of each rank is in the log, which may begin anywhere and which keeps them. Of a bug it says where."""
    last = "pydantic.Error: 1 row:\n  text\nhas no text"
    trace = f'Traceback (most recent call last):\n  File "a.py", line 3, in read\n    row["text"]\n{last}\n'
    trace += "\nThe above exception was the direct cause of the following exception:\n\n"
    trace += 'Traceback (most recent call last):\n  File "b.py", line 4, in main\n'
    trace += "    read()\n    ^^^^^^\nInputError: no text\n"
    log_of(store).write_text(f"reads rows\n{trace}{trace.replace('line 4', 'line 5')}ends\n")
    told = {"code": 3, "what": "no text", "traceback": trace}
    log_of(store).with_name("error.json").write_text(json.dumps(told))
    for state, jobs in (("failed", None), ("queued", {"sft": "12"})):
        write_run(store, "run", {"sft": state}, jobs)
        slurm.accounts(("12", "FAILED", ago(1)))
        log_of(store).with_name("error.json").write_text(json.dumps(told))
        assert node(store, capsys)["log"] == ["reads rows", "ends"]
        log_of(store).with_name("error.json").write_text(json.dumps({**told, "code": 1}))
        assert node(store, capsys)["log"] == ["    read()", "    ^^^^^^", "InputError: no text", "ends"]
    note(store, "run", "sft", "12", ago=-5.0).write_text("")
    os.utime(log_of(store), (time.time() + 9, time.time() + 9))
    log_of(store).with_name("error.json").write_text(json.dumps(told))
    assert "InputError: no text" in node(store, capsys)["log"], "it is the error of the job before"


def test_of_many_runs_the_first_that_failed_show_theirs(
    store: Path, slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(10):
        write_run(store, f"run-{number}", {"sft": "failed"})
        folder = store / "work" / key_of(f"run-{number}", "sft")[:16]
        folder.mkdir(parents=True)
        (folder / "log.txt").write_text(f"KeyError: {number}\n")
    assert cli.main(["status", "run-", "--store", str(store)]) == 0
    assert capsys.readouterr().out.count("KeyError") == 3
