"""The command line: quick, without torch, help and errors for people."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

HEAVY = ("torch", "transformers", "trl", "deepspeed", "accelerate", "peft", "datasets", "wandb", "numpy")


def alignment(*arguments: str, cwd: Path, code: int = 0) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "ALIGNMENT_CACHE": str(cwd / "cache"), "ALIGNMENT_STORE": str(cwd / "store")}
    done = subprocess.run(
        [sys.executable, "-m", "alignment.cli", *arguments],
        cwd=cwd, env=environment, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == code, done.stdout + done.stderr
    return done


@pytest.mark.parametrize(
    "arguments",
    [["plan", "experiment=quickstart"], ["status"], ["--help"], ["run", "--help"], ["chat", "--help"]],
    ids=" ".join,
)
def test_the_control_plane_never_imports_torch_and_plan_and_status_answer_in_a_second_and_a_half(
    arguments: list[str], tmp_path: Path
) -> None:
    program = (
        "import sys, runpy\n"
        f"sys.argv = ['alignment', *{arguments!r}]\n"
        "try:\n    runpy.run_module('alignment.cli', run_name='__main__')\n"
        "except SystemExit as end:\n    assert not end.code, end.code\n"
        f"assert not set({HEAVY!r}) & set(sys.modules), set({HEAVY!r}) & set(sys.modules)\n"
    )
    environment = {**os.environ, "ALIGNMENT_CACHE": str(tmp_path / "cache"), "ALIGNMENT_STORE": str(tmp_path / "store")}
    times = []
    # The best of five: the promise is about the program, not about a busy machine.
    for _ in range(5 if arguments[0] in ("plan", "status") else 1):
        start = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )
        times.append(time.perf_counter() - start)
        assert done.returncode == 0, done.stderr
    if arguments[0] in ("plan", "status"):
        assert min(times) < 1.5


def test_plan_names_every_stage_and_leaves_nothing_behind(tmp_path: Path) -> None:
    out = alignment("plan", "experiment=quickstart", cwd=tmp_path).stdout
    for name in ("start", "rows", "sft", "samples", "judged", "pairs", "dpo", "evaluate_dpo", "verdict"):
        assert name in out
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize(
    ("arguments", "code", "line"),
    [
        (["run", "stage.dpo.betta=1"], 2, "did you mean `stage.dpo.beta`?"),
        (["plan", "engine=zero4"], 2, "did you mean engine=zero3?"),
        (["rum"], 2, "unknown command 'rum' (did you mean 'run'?)"),
        (["run", "model=path", "model.source.path=/nowhere/model"], 3, "/nowhere/model: no such file or folder"),
        (["run", "model.chat_template=chatmll"], 3, "no chat template 'chatmll'"),
        (["run", "--experimental-rerun=x.pickle"], 2, "it loads a pickle"),
        (["chat", "nothing"], 2, "no run is called 'nothing'"),
        (["status", "nothing"], 2, "no run is called nothing"),
    ],
)
def test_an_error_is_one_line_with_its_exit_code_and_no_traceback(
    arguments: list[str], code: int, line: str, tmp_path: Path
) -> None:
    done = alignment(*arguments, cwd=tmp_path, code=code)
    assert line in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "store").exists()


def test_a_disk_without_room_is_said_before_anything_is_stored(tmp_path: Path) -> None:
    done = alignment("run", "experiment=quickstart", "min_free_gb=1e9", cwd=tmp_path, code=4)
    assert "GB of disk are free" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not list((tmp_path / "store").glob("store/*"))


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    assert "Traceback" in alignment("run", "--debug", "stage.dpo.betta=1", cwd=tmp_path, code=2).stderr


def test_hydras_own_flags_keep_working(tmp_path: Path) -> None:
    shown = alignment("run", "experiment=quickstart", "stage.dpo.beta=0.25", "--cfg", "job", cwd=tmp_path).stdout
    assert "beta: 0.25" in shown
    assert "quickstart" in alignment("run", "--help", cwd=tmp_path).stdout
    assert "conf" in alignment("run", "--info", "searchpath", cwd=tmp_path).stdout
