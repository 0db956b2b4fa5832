"""`alignment run --wait` on a cluster that answers what a test says. tests/slurm waits for real jobs."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from alignment.config.compose import compose
from alignment.errors import AlignmentError, ConfigError, InputError, LostError, MachineError, word_of_a_job
from alignment.hydra_app import Point
from alignment.launchers import slurm as launching
from alignment.pipeline import runner, sanity
from alignment.pipeline.runner import Run
from alignment.reporting import queue, watching
from alignment.runs import Session
from alignment.signals import Listener, Stopped
from tests.reporting.fake_slurm import FakeSlurm, write

SETTINGS = ["pipeline=sft", "launcher=slurm", "launcher.processes=1"]
SUBMITTING = 2  # times that squeue is asked before a command waits


class Waiting:
    """A run all of whose stages but SFT, which is job 12, are in the store; and SLURM's answers, the last for ever."""

    def __init__(self, store: Path, slurm: FakeSlurm):
        self.store, self._slurm = store, slurm
        self.run = Run(compose([*SETTINGS, f"store={store}"]), "")
        self.sft = self.run.node("sft")
        for node in self.run.nodes:
            if node.key != self.sft.key:
                record = {"key": node.key, "seconds": 1.0, "metrics": {}, "files": {}, "run": self.run.id}
                write(store / "store" / node.key[:16] / "record.json", record)
        self.note = store / "jobs" / "keys" / f"{self.sft.key[:16]}.json"
        write(self.note, {"job": "12", "submitted": 0, "run": self.run.id, "node": "sft", "out": str(store / "out")})
        slurm.script("scontrol", "echo 'MaxArraySize = 1001'")

    def ends(self, *answers: str, then: str = "") -> AlignmentError | None:
        """What the command ends with. answers: of squeue while it waits. then: a command of the shell with the last."""
        lines = ["12|PENDING|Priority||N/A|N/A"] * SUBMITTING + list(answers)
        cases = [f"{number}) echo '{line}';;" for number, line in enumerate(lines[:-1], start=1)]
        last = f"*) echo '{lines[-1]}'; {then} ;;"
        calls = self._slurm.folder / "squeue.calls"
        self._slurm.script("squeue", f"case $(wc -l < {calls}) in {' '.join(cases)} {last} esac")
        session = Session(Listener(), True, [])
        session.execute([Point(self.run.experiment, [])], None)
        try:
            session.finish()
        except AlignmentError as error:
            return error
        return None


@pytest.fixture
def waiting(tmp_path: Path, slurm: FakeSlurm, monkeypatch: pytest.MonkeyPatch) -> Waiting:
    monkeypatch.setattr(watching, "EVERY", 0.05)
    return Waiting(tmp_path / "store", slurm)


FAILED = "12|FAILED|NonZeroExitCode|n1|2026-11-26T10:00:00|N/A"


@pytest.mark.parametrize(("code", "kind"), [(5, "TrainingError"), (1, "StageFailed"), (None, "LostError")])
def test_the_code_is_the_failed_stage_s(code: int | None, kind: str, waiting: Waiting) -> None:
    if code is not None:
        error: dict[str, Any] = {"code": code, "what": "loss is NaN", "where": None, "fix": None}
        write(waiting.store / "work" / waiting.sft.key[:16] / "error.json", error)
    ended = waiting.ends(FAILED)
    assert ended is not None
    assert (type(ended).__name__, ended.exit_code) == (kind, code or 6)
    assert str(ended).startswith(
        f"{waiting.run.id}: sft has failed: {'loss is NaN' if code else 'failed without a word'}"
    )


@pytest.mark.parametrize(
    "error",
    [
        InputError("sft is not what was submitted", where="on n1", fix="submit it again"),
        MachineError("the result of start is not there"),
        LostError("the job has started again 21 times", where="launcher.max_restarts"),
        ConfigError("sft has come to its time limit 2 times", fix="raise it"),
    ],
)
def test_a_job_that_left_no_word_in_its_work_folder_is_believed_what_it_printed(
    error: AlignmentError, waiting: Waiting
) -> None:
    (waiting.store / "out").write_text(f"begins\n{word_of_a_job(error)}\nslurmstepd: error: x\n")
    ended = waiting.ends(FAILED)
    assert type(ended) is type(error)
    assert str(ended) == f"{waiting.run.id}: sft has failed: {error}"


def test_a_line_of_the_set_up_that_fails_ends_with_its_code(waiting: Waiting) -> None:
    """By the script itself, as it is submitted."""
    run = Run(compose([*SETTINGS, "launcher.setup=['source /nowhere']", f"store={waiting.store}"]), "")
    script = queue.scripts([run], "x")[0]
    with open(waiting.store / "out", "w") as out:
        subprocess.run(["bash"], input=script, text=True, stdout=out, stderr=out, check=False)
    ended = waiting.ends(FAILED)
    assert isinstance(ended, MachineError)
    assert f"{waiting.run.id}: sft has failed: launcher.setup: `source /nowhere` has ended with code 1 (" in str(ended)
    assert str(ended).endswith("such as true)")


@pytest.mark.parametrize(
    ("answer", "then", "what"),
    [
        ("12|CANCELLED|None|n1|2026-11-26T10:00:00|N/A", "", "sft was cancelled: "),
        ("12|COMPLETED|None|n1|2020-11-20T10:00:00|N/A", "", "sft is gone: job 12 has made it"),
        ("12|RUNNING|None|n1|N/A|N/A", "rm -f NOTE", "sft was not made: no job is known that makes it"),
    ],
)
def test_what_is_not_there_is_no_success(answer: str, then: str, what: str, waiting: Waiting) -> None:
    ended = waiting.ends(answer, then=then.replace("NOTE", str(waiting.note)))
    assert isinstance(ended, LostError)
    assert what in str(ended)


def test_a_run_that_cannot_be_read_any_more_is_no_success(waiting: Waiting) -> None:
    ended = waiting.ends("12|RUNNING|None|n1|N/A|N/A", then=f"echo '{{' > {waiting.run.folder}/run.json")
    assert ended is not None and "run.json cannot be read" in str(ended)


def test_what_is_there_is_a_success_whatever_its_job_came_to(waiting: Waiting) -> None:
    folder = waiting.store / "store" / waiting.sft.key[:16]
    aside = waiting.store / "aside"
    record = {"key": waiting.sft.key, "seconds": 1.0, "metrics": {}, "files": {}, "run": waiting.run.id}
    write(aside / "record.json", record)
    assert waiting.ends("12|RUNNING|None|n1|N/A|N/A", then=f"mv {aside} {folder} 2>&1") is None
    assert json.loads((folder / "record.json").read_text())["key"] == waiting.sft.key


def test_who_is_asked_to_stop_with_the_last_job_hears_that_the_jobs_go_on(
    waiting: Waiting, slurm: FakeSlurm, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop = Listener()
    waiting.note.unlink()
    monkeypatch.setattr(sanity, "check", lambda *given, **more: None)

    def send(script: str) -> str:
        stop.asked = "SIGINT"
        return "12"

    monkeypatch.setattr(launching, "submit", send)
    with pytest.raises(Stopped, match="SIGINT: the jobs go on, alignment cancel ends them"):
        Session(stop, False, []).execute([Point(waiting.run.experiment, [])], None)
    assert json.loads(waiting.note.read_text())["job"] == "12"


def test_a_plan_knows_what_is_queued(waiting: Waiting, slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]) -> None:
    def planned() -> dict[str, str]:
        rows = queue.plan([waiting.run])
        return {row["name"]: next(state for state in queue.PLANNED if row[state]) for row in rows}

    slurm.queue(("12", "PENDING"))
    assert planned() == {node.name: "queued" if node.name == "sft" else "reused" for node in waiting.run.nodes}
    alone = {row["name"]: row for row in runner.plan(waiting.run, queue.queued([waiting.run]))}
    assert alone["sft"]["action"] == "wait" and alone["sft"]["why"] == "job 12 makes it"
    assert {row["action"] for name, row in alone.items() if name != "sft"} == {"reuse"}
    slurm.script("squeue", "echo down >&2; exit 1")
    assert planned()["sft"] == "new"
    assert "what is queued counts as new: " in capsys.readouterr().err
