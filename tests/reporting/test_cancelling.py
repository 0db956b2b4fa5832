"""Which run or sweep `alignment cancel` takes its word for. tests/slurm cancels real jobs."""

from __future__ import annotations

import json
import os
import shutil
import threading
import time
from pathlib import Path

import pytest

from alignment import cli
from alignment.pipeline import claims, ledger
from alignment.pipeline.store import Store
from alignment.reporting import cancelling
from tests.reporting.fake_slurm import FakeSlurm, commit, key_of, note, write_run, write_sweep

DONE = {"rows": "done", "sft": "done"}


def cancel(store: Path, *names: str) -> int:
    return cli.main(["cancel", *names, "--store", str(store)])


def queued(store: Path, run: str, job: str) -> None:
    commit(store, run, "rows")
    write_run(store, run, {"rows": "reused", "sft": "queued"}, {"sft": job})


def damage(run: Path, left: str) -> None:
    if left == "no folder":
        shutil.rmtree(run)
    elif left == "run.json that is cut":
        (run / "run.json").write_text("{")
    else:
        (run / "run.json").unlink()


@pytest.fixture
def store(tmp_path: Path, slurm: FakeSlurm) -> Path:
    """Two runs that have jobs, and one of the same beginning that is done."""
    root = tmp_path / "store"
    for node in DONE:
        commit(root, "quickstart-1", node)
    write_run(root, "quickstart-1", DONE)
    queued(root, "quickstart-2", "21")
    queued(root, "mine-3", "31")
    slurm.queue(("21", "RUNNING"), ("31", "PENDING", "Priority"))
    return root


@pytest.mark.parametrize("command", ["cancel", "status", "logs", "report", "chat", "compare"])
@pytest.mark.parametrize("name", ["", " "])
def test_a_name_that_is_empty_means_no_run(
    command: str, name: str, store: Path, slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    """As of a variable of the shell that is not set."""
    assert cli.main([command, name, "--store", str(store)]) == 2
    assert "a name is empty" in capsys.readouterr().err
    assert slurm.calls("scancel") == []


def test_a_beginning_means_the_one_run_that_has_jobs(store: Path, slurm: FakeSlurm) -> None:
    assert cancel(store, "quickstart") == 0
    assert slurm.calls("scancel") == ["21"]


def test_a_beginning_of_several_that_have_jobs_cancels_none(
    store: Path, slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    queued(store, "quickstart-4", "41")
    slurm.queue(("21", "RUNNING"), ("31", "RUNNING"), ("41", "RUNNING"))
    assert cancel(store, "mine", "quickstart") == 2
    error = capsys.readouterr().err
    assert "quickstart-2, quickstart-4" in error and "quickstart-1" not in error
    assert slurm.calls("scancel") == []
    assert cancel(store, "quickstart-4") == 0
    assert slurm.calls("scancel") == ["41"]


def test_an_exact_name_is_taken_though_others_begin_with_it(store: Path, slurm: FakeSlurm) -> None:
    queued(store, "quickstart-22", "41")
    slurm.queue(("21", "RUNNING"), ("41", "RUNNING"))
    assert cancel(store, "quickstart-2") == 0
    assert slurm.calls("scancel") == ["21"]


def test_a_sweep_s_name_means_all_its_runs_and_no_other(
    store: Path, slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    queued(store, "quickstart-4", "41")
    slurm.queue(("21", "RUNNING"), ("41", "PENDING", "Priority"))
    write_sweep(store, "quickstart-sweep", ["quickstart-2", "quickstart-4", "quickstart-1"])
    assert cancel(store, "quickstart") == 0, "the runs are the sweep's"
    assert slurm.calls("scancel") == ["21 41"]
    queued(store, "quickstart-5", "51")
    slurm.queue(("21", "RUNNING"), ("41", "RUNNING"), ("51", "RUNNING"))
    assert cancel(store, "quickstart") == 2
    assert "quickstart-sweep, quickstart-5" in capsys.readouterr().err
    assert cancel(store, "quickstart-s") == 0
    assert slurm.calls("scancel") == ["21 41"] * 2


def test_a_run_that_works_here_is_no_job_and_its_process_is_named(
    store: Path, slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    write_run(store, "local-1", {"sft": "running"})
    lock = Store(store).lock(key_of("local-1", "sft"))
    assert lock.acquire("local-1/sft")
    assert cancel(store, "local") == 0
    lock.release()
    said = capsys.readouterr().out
    assert "sft of local-1 runs on" in said and f"kill {lock.holder()['pid']}" in said
    assert slurm.calls("scancel") == []


def test_where_nothing_waits_or_runs_there_is_nothing_to_cancel(
    store: Path, slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cancel(store, "quickstart-1") == 0
    assert "nothing to cancel" in capsys.readouterr().out
    assert cancel(store, "nobody") == 2
    assert "no run is called 'nobody'" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["{", '{"points": 3}'])
def test_a_sweep_that_cannot_be_read_is_not_one_without_jobs(
    text: str, store: Path, slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    write_sweep(store, "broken-sweep", ["quickstart-2"])
    (store / "sweeps" / "broken-sweep" / "sweep.json").write_text(text)
    for command in ("cancel", "status", "logs"):
        assert cli.main([command, "broken-sweep", "--store", str(store)]) == 3
        assert "is no sweep.json that can be read" in capsys.readouterr().err
    assert slurm.calls("scancel") == []


def test_a_run_that_cannot_be_read_is_not_one_without_jobs(
    store: Path, slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    (store / "runs" / "quickstart-2" / "run.json").write_text("{")
    for command, name in (("cancel", "quickstart-2"), ("cancel", "quick"), ("logs", "quickstart-2")):
        assert cli.main([command, name, "--store", str(store)]) == 3
        assert "is no run.json that can be read" in capsys.readouterr().err
    assert slurm.calls("scancel") == []


def test_jobs_of_a_submission_that_was_killed_are_cancelled_too(store: Path, slurm: FakeSlurm) -> None:
    folder = store / "jobs" / "once"
    queued(store, "quickstart-5", "51")
    (store / "jobs" / "keys" / f"{key_of('quickstart-5', 'sft')[:16]}.json").unlink()
    order = {"run": "quickstart-5", "node": "sft", "key": key_of("quickstart-5", "sft")}
    (folder / "000-sft.json").write_text(json.dumps({"0": order}))
    (folder / "begun").touch()
    wide = f"{'51':<20}{folder}/000-sft-%j.out"
    slurm.script("squeue", f"case \"$*\" in *StdOut*) echo '{wide}';; *) echo '51|PENDING|Priority||N/A|N/A';; esac")
    assert cancel(store, "quickstart-5") == 0
    assert slurm.calls("scancel") == ["51"]


@pytest.mark.parametrize("file", ["runs/quickstart-2/run.json", "sweeps/swept/sweep.json"])
def test_a_file_that_was_removed_is_not_a_run_without_jobs(
    file: str, store: Path, slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    write_sweep(store, "swept", ["quickstart-2"])
    (store / file).unlink()
    for command in ("cancel", "status"):
        assert cli.main([command, Path(file).parent.name, "--store", str(store)]) == 3
        assert f"{file}: is gone (its command writes it again" in capsys.readouterr().err
    assert slurm.calls("scancel") == []


@pytest.mark.parametrize("left", ["a folder without run.json", "run.json that is cut", "no folder"])
def test_of_a_sweep_the_run_that_nobody_can_read_is_an_error_and_the_others_are_cancelled(
    left: str, store: Path, slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    write_sweep(store, "swept", ["quickstart-2", "mine-3"])
    damage(store / "runs" / "quickstart-2", left)
    for name in ("swept", "swe"):
        assert cancel(store, name) == 3
        told = capsys.readouterr()
        assert told.out == "cancelled sft (job 31)\n"
        assert "runs/quickstart-2/run.json: is " in told.err and "its job 21 is in the queue" in told.err
    slurm.queue(("21", "RUNNING"))
    write_sweep(store, "swept", ["quickstart-2"])
    assert cancel(store, "swept") == 3 and "nothing to cancel" not in capsys.readouterr().out


def test_points_that_a_sweep_has_not_come_to_are_no_error(
    store: Path, slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    write_sweep(store, "swept", ["quickstart-1", "later-7"])
    assert cancel(store, "swept") == 0
    assert "nothing to cancel" in capsys.readouterr().out


@pytest.mark.parametrize("left", ["a folder without run.json", "run.json that is cut", "no folder"])
def test_a_beginning_means_the_run_that_nobody_can_read_too(
    left: str, store: Path, slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    damage(store / "runs" / "quickstart-2", left)
    assert cancel(store, "quickstart") == 3
    assert "runs/quickstart-2/run.json: is " in capsys.readouterr().err
    queued(store, "quickstart-4", "41")
    slurm.queue(("21", "RUNNING"), ("41", "RUNNING"))
    assert cancel(store, "quickstart") == 2
    assert "quickstart-2, quickstart-4" in capsys.readouterr().err
    assert slurm.calls("scancel") == []


def test_an_exact_name_does_not_mean_one_that_begins_so_where_its_file_was_removed(
    store: Path, slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    queued(store, "quickstart-22", "41")
    write_sweep(store, "quick", ["quickstart-22"])
    (store / "runs" / "quickstart-2" / "run.json").unlink()
    slurm.queue(("21", "RUNNING"), ("41", "RUNNING"))
    for command in ("cancel", "status"):
        assert cli.main([command, "quickstart-2", "--store", str(store)]) == 3
        assert "runs/quickstart-2/run.json: is gone" in capsys.readouterr().err
    (store / "sweeps" / "quick" / "sweep.json").unlink()
    assert cancel(store, "qui") == 3
    assert "sweeps/quick/sweep.json: is gone" in capsys.readouterr().err
    assert slurm.calls("scancel") == []


@pytest.mark.parametrize("left", ["a folder without run.json", "run.json that is cut", "no folder"])
def test_what_a_run_that_nobody_can_read_waits_for_is_not_cancelled(
    left: str, store: Path, slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its DPO, job 31, waits for the SFT that quickstart-2 was submitted with, job 21."""
    claims.add(Store(store), "mine-3", {"mine-3": ["21"]})
    damage(store / "runs" / "mine-3", left)
    assert cancel(store, "quickstart-2") == 0
    assert capsys.readouterr().out == "sft (job 21) stays: mine-3 waits for it\n"
    assert slurm.calls("scancel") == []


def test_the_last_of_those_that_wait_for_a_job_takes_it_along(
    store: Path, slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    """In whatever order they are cancelled, and though all of them still know of it."""
    shutil.copytree(store / "runs" / "quickstart-2", store / "runs" / "other-5")
    other = store / "runs" / "other-5" / "run.json"
    other.write_text(other.read_text().replace('"run": "quickstart-2"', '"run": "other-5"'))
    claims.add(Store(store), "other-5", {"other-5": ["21"]})
    assert cancel(store, "quickstart-2") == 0
    assert capsys.readouterr().out == "sft (job 21) stays: other-5 waits for it\n"
    assert slurm.calls("scancel") == []
    assert cancel(store, "other-5") == 0
    assert capsys.readouterr().out == "cancelled sft (job 21)\n"
    assert slurm.calls("scancel") == ["21"]


def test_a_point_of_two_sweeps_goes_with_the_second_or_by_its_own_name(
    store: Path, slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    """The larger sweep was given after the smaller one, whose job it has found."""
    write_sweep(store, "smaller", ["quickstart-2"])
    queued(store, "quickstart-4", "41")
    slurm.queue(("21", "PENDING"), ("41", "PENDING"))
    write_sweep(store, "larger", ["quickstart-2", "quickstart-4"])
    claims.add(Store(store), "larger", {"quickstart-2": ["21"]})
    assert cancel(store, "smaller") == 0
    assert capsys.readouterr().out == "sft (job 21) stays: larger waits for it\n"
    assert cancel(store, "quickstart-2") == 0, "who names the run means it"
    assert slurm.calls("scancel") == ["21"]
    assert cancel(store, "larger") == 0
    assert slurm.calls("scancel") == ["21", "21 41"]


def test_all_who_wait_are_named_and_whose_jobs_are_cancelled_is_no_more_meant_by_a_beginning(
    store: Path, slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    for sweep in ("dpo-1", "dpo-2", "dpo-3"):
        write_sweep(store, sweep, ["mine-3"])
        claims.add(Store(store), sweep, {"mine-3": ["31"]})
    assert cancel(store, "dpo-1") == 0
    assert capsys.readouterr().out == "sft (job 31) stays: dpo-2, dpo-3 wait for it\n"
    assert cancel(store, "dpo") == 2
    assert "several that wait or run: dpo-2, dpo-3 (" in capsys.readouterr().err
    assert cancel(store, "dpo-2") == cancel(store, "dpo") == 0
    assert slurm.calls("scancel") == ["31"]


def test_the_command_of_a_sweep_that_is_cancelled_begins_nothing_more(
    store: Path, slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also where no job of it is in the queue just now: a search is between two rounds."""
    write_sweep(store, "search", ["quickstart-2"])
    before, driver = claims.ended(Store(store), "search"), Store(store).driver_lock("search")
    assert driver.acquire("search")
    slurm.queue(("21", "FAILED"))
    assert cancel(store, "search") == 0
    said = capsys.readouterr().out
    assert said.startswith(f"the command of search, {os.getpid()} on ") and said.endswith(", begins nothing more\n")
    assert claims.ended(Store(store), "search") != before
    driver.release()
    assert cancel(store, "search") == 0
    assert capsys.readouterr().out == "nothing to cancel: no job of theirs waits or runs\n"


def test_a_hopeless_point_of_another_sweep_too_is_not_pruned(store: Path, slurm: FakeSlurm) -> None:
    write_sweep(store, "search", ["quickstart-2", "mine-3"])
    write_sweep(store, "plain", [])
    claims.add(Store(store), "plain", {"mine-3": ["31"]})
    folders = {store / "runs" / run: key_of(run, "sft") for run in ("quickstart-2", "mine-3")}
    assert cancelling.prune(Store(store), "search", list(folders), folders) == [store / "runs" / "quickstart-2"]
    assert slurm.calls("scancel") == ["21"]
    assert claims.read(Store(store))["search"].keys() == {"mine-3"}


def test_jobs_are_found_though_all_notes_of_them_were_removed(store: Path, slurm: FakeSlurm) -> None:
    folder = store / "jobs" / "once"
    order = {"run": "quickstart-2", "node": "sft", "key": key_of("quickstart-2", "sft")}
    (folder / "000-sft.json").write_text(json.dumps({"0": order}))
    (folder / "000-sft.sbatch").touch()
    shutil.rmtree(store / "jobs" / "keys")
    wide = f"{'21':<20}{folder}/000-sft-%j.out"
    slurm.script("squeue", f"case \"$*\" in *StdOut*) echo '{wide}';; *) echo '21|PENDING|Priority||N/A|N/A';; esac")
    assert cancel(store, "quickstart-2") == 0
    assert slurm.calls("scancel") == ["21"]


def test_what_is_being_submitted_is_waited_for_and_cancelled(store: Path, slurm: FakeSlurm) -> None:
    """run.json says `queued` before the first job is sent."""
    commit(store, "late", "rows")
    write_run(store, "late", {"rows": "reused", "sft": "queued"})
    at_it = threading.Event()

    def submit() -> None:
        with ledger.alone(Store(store), "late", lambda text: None):
            at_it.set()
            time.sleep(1.0)
            note(store, "late", "sft", "61")
            claims.add(Store(store), "late", {"late": ["61"]})
            slurm.queue(("61", "PENDING"))

    command = threading.Thread(target=submit)
    command.start()
    at_it.wait()
    assert cancel(store, "late") == 0
    command.join()
    assert slurm.calls("scancel") == ["61"]
    assert claims.read(Store(store))["late"] == {}


def test_a_run_of_which_a_command_here_has_written_since_has_its_jobs_still(
    store: Path, slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    """The launcher is not in the key: the same settings under launcher=local are the same run."""
    write_run(store, "mine-3", {"rows": "reused", "sft": "failed"}, {"sft": "31"})
    assert cli.main(["status", "mine-3", "--json", "--store", str(store)]) == 0
    node = json.loads(capsys.readouterr().out)[0]["nodes"][1]
    assert (node["state"], node["job"]) == ("queued", "31")
    assert cancel(store, "mine-3") == 0
    assert slurm.calls("scancel") == ["31"]
    capsys.readouterr()
    slurm.script("squeue", "echo down >&2; exit 1")
    assert cli.main(["status", "mine-3", "--json", "--store", str(store)]) == 0
    assert json.loads(capsys.readouterr().out)[0]["nodes"][1]["state"] == "failed", "what it said itself is known"


def test_jobs_of_what_a_command_here_has_made_meanwhile_are_cancelled_too(
    store: Path, slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    """But for those that others wait for, and none that has ended."""
    commit(store, "mine-3", "sft")
    write_run(store, "mine-3", {"rows": "reused", "sft": "done"})
    claims.add(Store(store), "mine-3", {"mine-3": ["31", "32", "33"]})
    claims.add(Store(store), "other", {"other": ["32"]})
    slurm.queue(("31", "PENDING"), ("32", "PENDING"), ("33", "COMPLETED"))
    assert cancel(store, "mine-3") == 0
    assert capsys.readouterr().out == "cancelled job 31: what it was to make is there\n"
    assert slurm.calls("scancel") == ["31"]
    assert cancel(store, "mine-3") == 0
    assert "nothing to cancel" in capsys.readouterr().out


def test_a_run_that_works_here_and_has_a_job_is_told_so_and_the_job_is_cancelled(
    store: Path, slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    write_run(store, "mine-3", {"rows": "reused", "sft": "running"}, {"sft": "31"})
    lock = Store(store).lock(key_of("mine-3", "sft"))
    assert lock.acquire("mine-3/sft")
    assert cancel(store, "mine-3") == 0
    out = capsys.readouterr().out
    assert "cancelled sft (job 31)" in out and f"kill {os.getpid()} there has it save and end" in out
    lock.release()


def test_of_many_jobs_it_says_how_many_of_which(
    store: Path, slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    names = [f"point-{number}" for number in range(11)]
    for number, name in enumerate(names):
        queued(store, name, f"7_{number}")
    write_sweep(store, "swept", names)
    slurm.queue(*((f"7_{number}", "PENDING") for number in range(11)))
    assert cancel(store, "swept") == 0
    assert capsys.readouterr().out == "cancelled 11 x sft\n"
