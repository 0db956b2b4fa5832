"""What a worker makes of an error that comes out of a library."""

from __future__ import annotations

import errno
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import SafetensorError

from alignment import worker
from alignment.config.compose import compose
from alignment.config.schema import Experiment
from alignment.errors import InputError, LostError, MachineError, PreemptedError
from alignment.files import digest
from alignment.pipeline.identity import stage_identity
from alignment.pipeline.store import Store
from alignment.signals import PASSED_ON, SIGNALS, Listener, Stopped
from alignment.stages.context import StageContext
from alignment.stages.parts import judge_of
from tests.conftest import fill

# What safetensors 0.8 raises on a full disk: a class of its own, the system's error number only in its text.
SAFETENSORS = SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), SAFETENSORS], ids=["os", "rust"])
def test_a_full_disk_is_said_as_such_whichever_library_meets_it(error: Exception) -> None:
    told = worker._known(error, Path("work/ab"))
    assert (type(told), told.exit_code) == (MachineError, 4)
    assert str(told).startswith("work/ab: no space left on the disk")


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer [::1]:4"),
        RuntimeError(
            "[../third_party/gloo/gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 1800000ms for recv"
        ),
        type("DistBackendError", (RuntimeError,), {})("NCCL error: remote process exited or there was a network error"),
    ],
    ids=["gloo", "timeout", "nccl"],
)
def test_that_another_process_is_gone_does_not_hide_why(error: Exception, tmp_path: Path) -> None:
    told = worker._known(error, tmp_path)
    assert isinstance(told, LostError)
    (tmp_path / "beats").mkdir()
    worker._tell(tmp_path, told, "", retry=True)
    worker._tell(tmp_path, MachineError("out of memory"), "", retry=False)
    worker._tell(tmp_path, MachineError("later"), "", retry=False)
    assert "lost contact" in (tmp_path / "lost.json").read_text()
    assert "out of memory" in (tmp_path / "error.json").read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["beats", "error.json", "lost.json"]


def test_the_last_word_needs_no_disk_and_a_long_one_keeps_its_end(small_disk: Path) -> None:
    (small_disk / "beats").mkdir()
    worker._reserve(small_disk)
    fill(small_disk)
    trace = "".join(f'  File "x.py", line {number}, in f"\n' for number in range(5000))
    worker._tell(small_disk, MachineError("no space left on the disk"), trace, retry=False)
    told = json.loads((small_disk / "error.json").read_text())
    assert told["what"] == "no space left on the disk"
    assert told["traceback"].endswith('line 4999, in f"\n')


def test_a_server_that_hangs_up_is_not_a_lost_process(tmp_path: Path) -> None:
    assert not isinstance(worker._known(ConnectionResetError("Connection reset by peer"), tmp_path), LostError)


@pytest.fixture
def own_signals() -> Iterator[None]:
    """The process's own handlers come back afterwards."""
    theirs = {number: signal.getsignal(number) for number in (*SIGNALS, PASSED_ON)}
    yield
    for number, handler in theirs.items():
        signal.signal(number, handler)


@pytest.fixture
def work(tmp_path: Path, own_signals: None) -> Iterator[Path]:
    """A work folder whose key is locked."""
    store, key = Store(tmp_path / "store"), "ab" * 32
    folder = store.begin(key)
    (folder / "stage.json").write_text(json.dumps({"store": str(store.root), "key": key, "host": socket.gethostname()}))
    lock = store.lock(key)
    assert lock.acquire("test")
    yield folder
    lock.release()


@pytest.mark.parametrize("rename", [False, True])
def test_a_word_is_left_on_a_file_system_without_hard_links(
    rename: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: object) -> None:
        raise OSError(errno.ENOTSUP, "Operation not supported")

    if rename:
        monkeypatch.setattr(os, "link", refuse)
    (tmp_path / "beats").mkdir()
    worker._reserve(tmp_path)
    worker._tell(tmp_path, MachineError("out of memory"), "", retry=False)
    assert json.loads((tmp_path / "error.json").read_text())["what"] == "out of memory"
    assert not list((tmp_path / "beats").iterdir())


def test_memory_that_pytorch_refuses_on_the_cpu_is_said_as_such() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 50)
    assert str(worker._known(caught.value, Path("work/ab"))).startswith("out of memory")


def test_the_first_request_of_others_after_a_drivers_is_no_second_one(
    own_signals: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    again: list[int] = []
    listener = Listener().listen(lambda: again.append(1))
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    with listener.deferred():
        for number, seen in ((PASSED_ON, 0), (signal.SIGTERM, 0), (signal.SIGTERM, 1)):
            os.kill(os.getpid(), number)
            assert len(again) == seen
            now[0] += 60


def test_what_a_driver_passes_on_is_never_a_second_request(own_signals: None, monkeypatch: pytest.MonkeyPatch) -> None:
    again: list[int] = []
    listener = Listener().listen(lambda: again.append(1))
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    with listener.deferred():
        os.kill(os.getpid(), signal.SIGUSR1)
        now[0] += 60
        os.kill(os.getpid(), PASSED_ON)
        assert (listener.asked, again) == ("SIGUSR1", [])
        os.kill(os.getpid(), signal.SIGTERM)
        assert again == [1]


@pytest.mark.parametrize("how", ["let through", "caught by a library", "by the stage, saved", "under torchrun"])
def test_who_is_asked_to_stop_says_so_and_ends_with_75(how: str, work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stage(*arguments: object) -> None:
        if how == "by the stage, saved":
            error = PreemptedError("step 7 is saved")
            error.kept = True
            raise error
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        except Stopped:
            if how == "caught by a library":
                raise ImportError("half a module") from None
            raise

    monkeypatch.setattr(worker, "_run", stage)
    if how == "under torchrun":
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
        monkeypatch.setattr(worker, "die_with_parent", lambda parent: None)
    assert worker.main(work) == (0 if how == "under torchrun" else 75)
    told = json.loads((work / "outcome.json").read_text())
    why = "step 7 is saved" if how == "by the stage, saved" else "SIGTERM"
    assert told == {"outcome": "preempted", "why": why, "rank": 0, "kept": how == "by the stage, saved"}
    assert not (work / "error.json").exists()
    assert json.loads((work / "beats" / "rank-00000.json").read_text())["ended"]


@pytest.mark.parametrize(("done", "code"), [(True, 75), (False, 130)])
def test_a_second_request_is_no_loss_to_who_has_stopped_already(done: bool, code: int, work: Path) -> None:
    if done:
        (work / "outcome.json").write_text("{}")
    (work / "beats").mkdir(exist_ok=True)
    program = f"from pathlib import Path; from alignment import worker; worker._end_at_once(Path({str(work)!r}))"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == code
    assert (work / "lost.json").exists() is not done


def test_an_error_says_whether_another_attempt_may_help(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stage(*arguments: object) -> None:
        error = MachineError("out of memory")
        error.retry = True
        raise error

    monkeypatch.setattr(worker, "_run", stage)
    assert worker.main(work) == 4
    told = json.loads((work / "error.json").read_text())
    assert (told["code"], told["what"], told["retry"]) == (4, "out of memory", True)


def test_a_work_folder_that_was_emptied_is_no_result(tmp_path: Path) -> None:
    (tmp_path / "stage.json").touch()
    worker.require_whole(tmp_path)
    (tmp_path / "stage.json").unlink()
    with pytest.raises(MachineError, match="files were removed from its work folder while it ran"):
        worker.require_whole(tmp_path)


def ordered(experiment: Experiment, stage: str) -> dict[str, Any]:
    """What a driver orders of a stage, as its files are now."""
    told = stage_identity(experiment, experiment.stage[stage], {"model": "ab"})
    return {"key": digest(told), "identity": told, "name": stage, "parents": {"model": {"key": "ab"}}}


def test_a_file_that_was_edited_meanwhile_is_named(tmp_path: Path) -> None:
    data = tmp_path / "rows.jsonl"
    data.write_text("a")
    experiment = compose(["experiment=quickstart", "data=path", f"data.instructions.source.path={data}"])
    order = ordered(experiment, "prepare_sft")
    context: Any = SimpleNamespace(experiment=experiment, settings=experiment.stage["prepare_sft"], code={})
    worker._require_same_input(context, order, "while it ran")
    data.write_text("another")
    said = r"stage prepare_sft: `data\.instructions\.source` \(\w{12}, now \w{12}\) changed while it ran \(run the same"
    with pytest.raises(InputError, match=said):
        worker._require_same_input(context, order, "while it ran")
    context.code[data] = b"a"
    worker._require_same_input(context, order, "while it ran")


@pytest.mark.parametrize("rank", [0, 1])
def test_each_process_judges_by_the_code_of_the_key_or_not_at_all(rank: int, tmp_path: Path) -> None:
    """It is read once, before anything else; one that reads another text is refused, and so is one that reads none."""
    own = tmp_path / "own.py"
    own.write_text("def reward(prompts, answers, rows):\n    return [1.0] * len(answers)\n")
    experiment = compose(["pipeline=sft_rloo", "reward=python", f"reward.terms.own.source.path={own}"])
    order = ordered(experiment, "evaluate")

    def process() -> StageContext:
        return StageContext(
            name="evaluate", run="test", key=order["key"], folder=tmp_path / "work", rank=rank, world_size=2,
            settings=experiment.stage["evaluate"], experiment=experiment, inputs={},
        )  # fmt: skip

    (tmp_path / "work").mkdir()
    first = process()
    worker._look_at_inputs(first, order)
    own.write_text("def reward(prompts, answers, rows):\n    return [-1.0] * len(answers)\n")
    worker._require_same_input(first, order, "while it ran")
    row = {"prompt": [{"role": "user", "content": "Why?"}]}
    assert [score["reward"] for score in judge_of(first).score([row], ["so"])] == [1.0]
    with pytest.raises(InputError, match=r"`reward\.terms\.own\.source` .* changed since it was planned"):
        worker._look_at_inputs(process(), order)
    own.unlink()
    with pytest.raises(InputError, match=r"own\.py: cannot be read: No such file"):
        worker._look_at_inputs(process(), order)
