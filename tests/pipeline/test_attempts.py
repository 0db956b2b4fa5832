"""Causes and retries: what counts as what, how often and after how long."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from alignment import life
from alignment.errors import InputError, LostError, MachineError, PreemptedError, StageFailed, TrainingError
from alignment.life import BEATS
from alignment.pipeline import attempts

ORDER = {
    "attempt": 1, "started": 100.0, "host": "here", "distributed": True, "world_size": 4,
    "job": {"id": "12_3", "restarts": 1, "nodes": "n[1-2]"}, "experiment": {"engine": {"strategy": "ddp"}},
}  # fmt: skip
NOT_SAID = "its driver was killed, or the disk too full to say why"


def tell(folder: Path, name: str, code: int, what: str, **more: Any) -> None:
    told = {"code": code, "what": what, "where": None, "fix": None, "traceback": "", **more}
    (folder / name).write_text(json.dumps(told))


def cause(folder: Path, code: int = 1, asked: str | None = None, fault: Any = None) -> Any:
    return attempts.cause("sft", folder, code, SimpleNamespace(asked=asked, fault=fault))


def test_the_first_cause_counts_more_than_who_lost_contact(tmp_path: Path) -> None:
    tell(tmp_path, "lost.json", 6, "lost contact")
    assert (type(cause(tmp_path)), cause(tmp_path).retry) == (LostError, True)
    assert cause(tmp_path, fault=LostError("rank 1 was killed")).what == "rank 1 was killed"
    tell(tmp_path, "error.json", 3, "bad rows")
    error = cause(tmp_path, fault=LostError("rank 1 was killed"), asked="SIGTERM")
    assert (type(error), error.what, error.retry) == (InputError, "bad rows", False)


def test_any_error_may_ask_for_another_attempt(tmp_path: Path) -> None:
    tell(tmp_path, "error.json", 5, "the loss is NaN", retry=True)
    assert (type(cause(tmp_path)), cause(tmp_path).retry) == (TrainingError, True)
    assert isinstance(cause(tmp_path, asked="SIGTERM"), PreemptedError)


@pytest.mark.parametrize(
    ("code", "kind", "text"),
    [
        (-9, LostError, "sft was killed by signal 9 (see "),
        (-11, LostError, "sft was killed by signal 11 (see "),
        (137, LostError, "sft was killed by signal 9"),
        (1, LostError, "sft ended without a word (see "),
        (3, InputError, "the stage sft ended with exit code 3"),
    ],
)
def test_without_a_word_the_exit_code_speaks(tmp_path: Path, code: int, kind: type, text: str) -> None:
    error = cause(tmp_path, code)
    assert type(error) is kind
    assert str(error).startswith(text)
    assert isinstance(cause(tmp_path, code, asked="SIGTERM"), PreemptedError), "it had no time to say so"


STEP = "--- attempt 2\nslurmstepd{}: error: execve(): {}: {}\nsrun: error: n{}: task{}: Exited with exit code {}\n"


@pytest.mark.parametrize(
    ("step", "said"),
    [
        (("", "apptainer", "No such file or directory", 3, " 0", 2),
         "launcher.container: apptainer is not installed on node n3 (install it there, "),
        (("-n2", "/opt/my python", "Permission denied", "[2-3]", "s 0-1", 13),
         "launcher.python: /opt/my python cannot be started on node n[2-3]: Permission denied (install it there, "),
    ],
)  # fmt: skip
def test_what_a_node_could_not_execute_is_the_cause_whatever_code_srun_makes_of_it(
    tmp_path: Path, step: tuple[Any, ...], said: str
) -> None:
    """2 is the system's word for a file that is not there, not ours for a setting."""
    (tmp_path / "log.txt").write_text("--- attempt 1\n" + STEP.format(*step))
    error = cause(tmp_path, step[-1])
    assert (type(error), error.retry) == (MachineError, False)
    assert str(error).startswith(said)
    (tmp_path / "log.txt").write_text(STEP.format(*step) + "--- attempt 2\nloading\n")
    assert "ended with exit code" in str(cause(tmp_path, step[-1])), "that was the attempt before"


def test_a_bug_is_not_taken_for_an_end_in_order(tmp_path: Path) -> None:
    tell(tmp_path, "error.json", 1, "KeyError: x")
    assert isinstance(cause(tmp_path, asked="SIGTERM"), StageFailed)


def test_the_reason_is_what_the_driver_was_asked_by_or_the_stages_own_words(tmp_path: Path) -> None:
    (tmp_path / "outcome.json").write_text(json.dumps({"outcome": "preempted", "why": "SIGTERM", "rank": 0}))
    assert cause(tmp_path, 75, asked="launcher.time_limit").what == "sft has stopped (launcher.time_limit)"
    assert cause(tmp_path, 75).what == "sft has stopped (SIGTERM)"
    (tmp_path / "outcome.json").write_text(
        json.dumps({"outcome": "preempted", "why": "SIGTERM: saved step 9", "rank": 0})
    )
    assert cause(tmp_path, 75, asked="SIGINT").what == "sft has stopped (SIGINT: saved step 9)"
    assert cause(tmp_path, 75).what == "sft has stopped (SIGTERM: saved step 9)"


def test_a_second_signal_to_who_has_saved_and_said_so_is_no_loss(tmp_path: Path) -> None:
    (tmp_path / "outcome.json").write_text(json.dumps({"outcome": "preempted", "why": "SIGTERM: saved", "rank": 0}))
    assert cause(tmp_path, -15).what == "sft has stopped (SIGTERM: saved)"


AT_LIMIT, ASKED = ("preempted", "sft has stopped (launcher.time_limit: as you see)"), "sft has stopped (SIGTERM)"


@pytest.mark.parametrize(
    ("ends", "code"),  # each: outcome, cause, newest checkpoint, whether anything new was left, seconds that it had
    [
        ([("preempted", ASKED, -1, False, 6.0)], None),
        ([(*AT_LIMIT, 3, True, 6.0)], None),
        ([(*AT_LIMIT, -1, True, 6.0)] * 3, None),  # log-probs of a reference
        ([(*AT_LIMIT, 3, None, 6.0)] * 3, None),  # a full disk
        ([(*AT_LIMIT, -1, False, 6.0)], 75),
        ([(*AT_LIMIT, 3, True, 6.0), (*AT_LIMIT, 3, False, 6.0)], 75),
        ([("lost", "killed", 3, None, 6.0), (*AT_LIMIT, 3, False, 6.0)], 75),
        ([(*AT_LIMIT, -1, False, 6.0), (*AT_LIMIT, -1, False, 60.0)], 75),
        (
            [(*AT_LIMIT, -1, False, 6.0), ("lost", "killed", 3, None, 6.0), (*AT_LIMIT, 3, False, 6.0)],
            75,
        ),
        ([(*AT_LIMIT, -1, False, 6.0), ("failed", "bad rows", -1, None, 6.0)], None),
        ([(*AT_LIMIT, -1, False, 6.0), (*AT_LIMIT, -1, False, 5.9)], 2),
        ([("lost", "killed", -1, None, 60.0), (*AT_LIMIT, -1, False, 6.0)] * 2, 2),
        ([(*AT_LIMIT, 3, False, 6.0)] * 3, 2),
    ],
)
def test_a_time_limit_that_lets_nothing_be_done_is_said_and_then_an_error(
    ends: list[tuple[str, str, int, bool | None, float]], code: int | None
) -> None:
    names = ("outcome", "cause", "checkpoint", "kept", "time_left")
    error = attempts.in_vain("sft", [{}, *(dict(zip(names, end, strict=True)) for end in ends)])
    assert (error and error.exit_code) == code
    assert error is None or "raise" in str(error)


def test_who_was_asked_by_torchrun_after_a_failure_is_not_preempted(tmp_path: Path) -> None:
    (tmp_path / "outcome.json").write_text(json.dumps({"outcome": "preempted", "why": "SIGTERM", "rank": 0}))
    assert isinstance(cause(tmp_path, 0), PreemptedError)
    assert isinstance(cause(tmp_path, 1), LostError)


def test_retries_wait_longer_each_time_and_start_anew_with_a_newer_whole_checkpoint(tmp_path: Path) -> None:
    lost, retries = LostError("rank 1 was killed"), attempts.Retries(tmp_path, 3, 100.0)
    assert retries.start() is None
    assert [retries.next(lost), retries.next(lost)] == [100.0, 200.0]
    assert retries.says(lost, 2, 200.0) == "rank 1 was killed; attempt 3 of up to 4 in 200 s, from its beginning"
    newer = tmp_path / "checkpoints" / "step-00000120"
    newer.mkdir(parents=True)
    (newer / "manifest.json").write_text(json.dumps({"step": 120, "files": {"state.json": {"bytes": 2}}}))
    assert retries.next(lost) == 300.0, "no whole checkpoint, and the longest wait"
    (newer / "state.json").write_text("{}")
    assert retries.next(lost) == 100.0
    assert retries.says(lost, 4, 100.0) == "rank 1 was killed; attempt 5 of up to 7 in 100 s, from step 120"
    assert [retries.next(lost) for _ in range(3)] == [200.0, 300.0, None]
    for error in (TrainingError("NaN"), PreemptedError("stopped")):
        assert attempts.Retries(tmp_path, 3, 1.0).next(error) is None
    assert attempts.Retries(tmp_path, 3, 1.0).start() == "from step 120", "of another command"
    assert attempts.Retries(tmp_path, 0, 1.0).next(lost) is None


def test_what_an_attempt_leaves_to_the_next_starts_the_count_anew(tmp_path: Path) -> None:
    lost, retries = LostError("rank 1 was killed"), attempts.Retries(tmp_path, 1, 100.0)
    for tokens in (512, 256, 128):
        (tmp_path / "next_attempt.json").write_text(json.dumps({"tokens_per_micro_batch": tokens}))
        assert retries.next(lost) == 100.0
    assert retries.next(lost) is None
    (tmp_path / "next_attempt.json").write_text(json.dumps({"sampled": 40}))
    assert retries.next(lost) == 100.0
    assert retries.says(lost, 2, 1.0).endswith("in 1 s, after the answers to 40 prompts")


def test_an_error_of_a_library_may_be_what_came_of_a_dead_rank_and_one_with_a_cause_is_not(tmp_path: Path) -> None:
    dead = LostError("rank 1 was killed by signal 9")
    tell(tmp_path, "error.json", 1, "RuntimeError: connect failed", retry=False)
    assert cause(tmp_path, fault=dead) is dead
    tell(tmp_path, "error.json", 1, "RuntimeError: connect failed", retry=False, asked="SIGTERM")
    assert cause(tmp_path, fault=dead) is dead, "torchrun asks those whom the dead one has left"
    tell(tmp_path, "error.json", 4, "out of memory", retry=False)
    assert str(cause(tmp_path, fault=dead)) == "out of memory"


def test_a_request_that_a_rank_got_before_an_error_that_would_be_tried_again_is_heeded(tmp_path: Path) -> None:
    tell(tmp_path, "error.json", 5, "went back", retry=True, asked="SIGUSR1")
    assert str(cause(tmp_path)).startswith("sft has stopped (SIGUSR1)")
    tell(tmp_path, "error.json", 5, "NaN", retry=False, asked="SIGUSR1")
    assert str(cause(tmp_path)) == "NaN"


def test_rows_that_no_attempt_has_written_are_left_out(tmp_path: Path) -> None:
    rows = ['{"attempt": "x"}', '{"attempt": null}', "[1]", '{"attempt": 2}']
    (tmp_path / "attempts.jsonl").write_text("\n".join(rows) + "\n")
    assert attempts.read(tmp_path) == [{"attempt": 2}]


def test_a_folder_that_has_moved_on_says_nothing_of_a_disk(tmp_path: Path) -> None:
    assert str(attempts.silent("rank 1", 0, tmp_path / "gone" / "log.txt", 1)).startswith("rank 1 ended without a word")


def test_a_full_disk_is_the_cause_only_where_a_process_had_no_room_for_a_word(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    (tmp_path / BEATS).mkdir()
    assert str(attempts.silent("rank 1", 0, tmp_path / "log.txt", 1)).startswith(f"{tmp_path}: no space left")
    life.word(tmp_path, 1).write_bytes(b" " * life.WORD)
    assert str(attempts.silent("rank 1", 0, tmp_path / "log.txt", 1)).startswith("rank 1 ended without a word")


def test_an_attempt_that_a_full_disk_kept_from_being_noted_is_known_by_its_processes_words(tmp_path: Path) -> None:
    (tmp_path / "stage.json").write_text(json.dumps(ORDER))
    (tmp_path / "outcome.json").write_text(json.dumps({"why": "SIGTERM: saved at step 4"}))
    attempts.note_unnoted(tmp_path)
    (tmp_path / "stage.json").write_text(json.dumps({**ORDER, "attempt": 2}))
    tell(tmp_path, "error.json", 5, "NaN")
    attempts.note_unnoted(tmp_path)
    told = [(row["outcome"], row["cause"]) for row in attempts.read(tmp_path)]
    assert told == [("preempted", "SIGTERM: saved at step 4"), ("failed", "NaN")]


@pytest.mark.parametrize(
    ("job", "restart", "cause"),
    [
        ("12", 2, "its job was ended by SLURM without a word: a node has failed, most likely (job 12_3, restart 2)"),
        ("12", 1, NOT_SAID),
        ("13", 2, NOT_SAID),
        (None, 2, NOT_SAID),
    ],
)
def test_a_job_that_slurm_has_started_again_without_a_word_has_lost_a_node(
    job: str | None, restart: int, cause: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    if job is not None:
        monkeypatch.setenv("SLURM_JOB_ID", job)
        monkeypatch.setenv("SLURM_ARRAY_JOB_ID", job)
        monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
        monkeypatch.setenv("SLURM_RESTART_COUNT", str(restart))
    (tmp_path / "stage.json").write_text(json.dumps(ORDER))
    attempts.note_unnoted(tmp_path)
    assert [(row["outcome"], row["cause"]) for row in attempts.read(tmp_path)] == [("interrupted", cause)]


def test_a_line_that_a_kill_has_cut_spoils_none_of_the_next(tmp_path: Path) -> None:
    attempts.note(tmp_path, {"attempt": 1})
    with open(tmp_path / "attempts.jsonl", "a") as stream:
        stream.write('{"attempt": 2, "outc')
    attempts.note(tmp_path, {"attempt": 3})
    assert attempts.read(tmp_path) == [{"attempt": 1}, {"attempt": 3}]


def test_memory_is_the_hint_for_a_kill_only() -> None:
    told = {number: attempts.silent("rank 0", number, Path("log.txt")) for number in (0, 9, 11)}
    assert "out of memory" in (told[0].fix or "") and "out of memory" in (told[9].fix or "")
    assert str(told[11]) == "rank 0 was killed by signal 11 (see log.txt)"


def test_a_wait_between_attempts_ends_at_a_signal() -> None:
    attempts.pause(0.0, lambda: None)
    with pytest.raises(PreemptedError, match="between two attempts"):
        attempts.pause(300.0, lambda: "SIGTERM")


def test_the_attempt_of_a_killed_driver_is_noted_once_by_the_next(tmp_path: Path) -> None:
    (tmp_path / "stage.json").write_text(json.dumps(ORDER))
    (tmp_path / "progress.json").write_text(json.dumps({"step": 7, "at": 160.0}))
    attempts.note_unnoted(tmp_path)
    attempts.note_unnoted(tmp_path)
    assert attempts.read(tmp_path) == [
        {
            "attempt": 1, "started": 100.0, "ended": 160.0, "outcome": "interrupted", "cause": NOT_SAID,
            "step": 7, "checkpoint": -1, "kept": None, "time_left": None,
            "host": "here", "job": {"id": "12_3", "restarts": 1, "nodes": "n[1-2]"}, "processes": 4, "strategy": "ddp",
        }
    ]  # fmt: skip
    with open(tmp_path / "attempts.jsonl", "a") as stream:
        stream.write('{"attempt": 2, "sta')
    assert len(attempts.read(tmp_path)) == 1
