from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from alignment import cli
from alignment.pipeline.store import Store
from alignment.reporting import queue, status
from alignment.reporting.status import Results, facts_text, read_runs
from alignment.reporting.sweep_files import read_sweep
from alignment.reporting.terminal import attempts_text
from tests.reporting.fake_sweeps import BETA, RATE, write_run, write_sweep

MakeRun = Callable[..., tuple[Path, Path]]
AFTER_SFT = ("samples", "judged", "pairs", "dpo", "evaluate_start", "evaluate_sft", "evaluate_dpo", "verdict")


def work(run: Path, store: Path, name: str, file: str, value: dict) -> str:
    key = next(node["key"] for node in json.loads((run / "run.json").read_text())["nodes"] if node["name"] == name)
    (store / "work" / key[:16]).mkdir(parents=True, exist_ok=True)
    (store / "work" / key[:16] / file).write_text(json.dumps(value))
    return key


@pytest.fixture
def halfway(make_run: MakeRun) -> tuple[Path, Path]:
    return make_run(states={"start": "reused", "sft": "running", **dict.fromkeys(AFTER_SFT, "waiting")})


def test_a_stage_at_work_tells_how_far_it_is(halfway: tuple[Path, Path]) -> None:
    key = work(*halfway, "sft", "progress.json", {"step": 4, "total": 13, "elapsed_s": 28.0})
    (run,) = read_runs(halfway[1], lambda asked: asked == key)
    sft = run["nodes"][2]
    assert (run["state"], sft["state"], sft["seconds"], sft["progress"]["step"]) == ("running", "running", 28.0, 4)
    assert run["seconds"] == pytest.approx(5.2 + 28.0), "the reused import is not this run's work"


def test_how_far_a_stage_is_that_counts_no_steps_is_a_share() -> None:
    assert facts_text({"step": 335, "total": 1000, "share": True, "note": "judging"}) == "34 %"
    assert facts_text({"step": 335, "total": 1000}) == "335/1000"


def test_a_stage_whose_process_is_dead_is_interrupted(halfway: tuple[Path, Path]) -> None:
    work(*halfway, "sft", "progress.json", {"step": 4, "total": 13, "elapsed_s": 28.0})
    (run,) = read_runs(halfway[1], lambda key: False)
    assert (run["state"], run["nodes"][2]["state"]) == ("interrupted", "interrupted")


def test_a_dead_stage_that_left_an_error_failed_with_its_words(halfway: tuple[Path, Path]) -> None:
    work(*halfway, "sft", "error.json", {"code": 5, "what": "loss is NaN", "where": "step 3", "fix": None})
    (run,) = read_runs(halfway[1], lambda key: False)
    assert (run["state"], run["nodes"][2]["state"], run["nodes"][2]["error"]) == ("failed", "failed", "loss is NaN")


@pytest.mark.parametrize(("sft", "shown"), [("preempted", "pruned"), ("done", "pruned"), ("running", "running")])
def test_a_run_that_was_pruned_says_so_unless_something_works_on_it(sft: str, shown: str, make_run: MakeRun) -> None:
    folder, store = make_run(states={"sft": sft, **dict.fromkeys(AFTER_SFT, "waiting")})
    file = folder / "run.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "pruned": "loss 3 at best"}))
    (run,) = read_runs(store, lambda key: sft == "running")
    assert run["state"] == shown


def test_a_stage_committed_as_its_driver_died_is_done(make_run: MakeRun) -> None:
    folder, store = make_run()
    run = json.loads((folder / "run.json").read_text())
    run["nodes"][2]["state"] = "running"
    (folder / "run.json").write_text(json.dumps(run))
    assert read_runs(store, lambda key: False)[0]["state"] == "done"


def test_a_result_deleted_from_the_store_is_gone(make_run: MakeRun) -> None:
    folder, store = make_run()
    key = json.loads((folder / "run.json").read_text())["nodes"][2]["key"]
    shutil.rmtree(store / "store" / key[:16])
    (run,) = read_runs(store, lambda key: False)
    assert (run["state"], run["nodes"][2]["state"], run["nodes"][1]["state"]) == ("gone", "gone", "done")
    assert run["nodes"][2]["error"] is None


def test_a_result_of_which_a_file_is_missing_or_cut_is_gone_as_for_a_run(make_run: MakeRun) -> None:
    folder, store = make_run()
    key = json.loads((folder / "run.json").read_text())["nodes"][2]["key"]
    weights = store / "store" / key[:16] / "model" / "model.safetensors"
    assert read_runs(store, lambda key: False)[0]["state"] == "done"
    with open(weights, "r+b") as stream:
        stream.truncate(1000)
    sft = read_runs(store, lambda key: False)[0]["nodes"][2]
    assert sft["state"] == "gone"
    place = store / "store" / key[:16]
    assert sft["error"] == f"damaged: model/model.safetensors has 1000 bytes instead of 538000000 (in {place})"
    weights.unlink()
    sft = read_runs(store, lambda key: False)[0]["nodes"][2]
    assert (sft["state"], sft["error"]) == ("gone", f"damaged: model/model.safetensors is gone (in {place})")
    assert Store(store).record(key) is None


def test_a_run_that_waits_for_another_s_stage_is_waiting(make_run: MakeRun) -> None:
    _, store = make_run(states=dict.fromkeys(AFTER_SFT, "waiting"))
    assert read_runs(store, lambda key: True)[0]["state"] == "waiting"
    assert read_runs(store, lambda key: False)[0]["state"] == "interrupted"


def test_between_two_stages_a_run_is_running_as_long_as_its_driver_lives(make_run: MakeRun) -> None:
    folder, store = make_run(states=dict.fromkeys(AFTER_SFT, "waiting"))
    driver = Store(store).run_lock(folder.name)
    assert driver.acquire(folder.name)
    assert read_runs(store, lambda key: False)[0]["state"] == "running"
    driver.release()
    assert read_runs(store, lambda key: False)[0]["state"] == "interrupted"


def test_runs_come_newest_first_and_a_damaged_one_does_not_hide_the_others(make_run: MakeRun) -> None:
    folder, store = make_run()
    run = json.loads((folder / "run.json").read_text())
    newer, damaged = store / "runs" / "newer", store / "runs" / "damaged"
    newer.mkdir()
    damaged.mkdir()
    (newer / "run.json").write_text(json.dumps({**run, "run": "newer", "created": run["created"] + 1}))
    (damaged / "run.json").write_text("{")
    runs = read_runs(store, lambda key: False)
    assert [(r["run"], r["state"]) for r in runs] == [
        ("newer", "done"),
        ("quickstart-1f0c9a2b", "done"),
        ("damaged", "unreadable"),
    ]
    assert read_runs(store / "nowhere", lambda key: False) == []


def in_sweep(store: Path, run: str, sweep: object) -> None:
    file = store / "runs" / run / "run.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "sweep": sweep}))


@pytest.mark.parametrize("launcher", ["local", "slurm"])
def test_points_of_a_sweep_say_in_what_they_differ_and_those_not_begun_are_missing(
    launcher: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a point that was queued nobody knows what became of its jobs."""
    points = [{"run": f"beta-{i}", "settings": {BETA: i / 10, "seed": i}} for i in range(3)]
    for point in points[:2]:
        write_run(tmp_path, point["run"], point["settings"], {"reward": 0.1})
        in_sweep(tmp_path, point["run"], "another-one")
    sweep = write_sweep(tmp_path, points, launcher=launcher).name
    write_sweep(tmp_path, [{"run": "beta-1", "settings": {RATE: 7}}], "another").rename(tmp_path / "sweeps/another-one")
    assert cli.main(["status", sweep, "--store", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    heads = [line for line in said.splitlines() if line.startswith("beta-")]
    assert heads[1].startswith("beta-1  beta=0.1, seed=1  done"), said
    state = "missing" if launcher == "local" else "unreadable"
    assert heads[2] == f"beta-2  beta=0.2, seed=2  {state}"
    assert ("  not begun yet, or deleted" in said) is (launcher == "local") and ("squeue" in said) is (
        state != "missing"
    )
    assert [run["own"] for run in read_runs(tmp_path, lambda key: False)] == ["", "learning_rate=7"]
    shutil.rmtree(tmp_path / "sweeps")
    for odd in (["odd"], "a\0b", "../..", 3, "\ud800", "x" * 5000):
        in_sweep(tmp_path, "beta-0", odd)
        assert [run["own"] for run in read_runs(tmp_path, lambda key: False)] == ["", ""]
    for odd_json in ({"points": [], "objective": 3}, {"points": [{"run": "beta-0", "overrides": 3}, 4]}, {"points": 5}):
        (tmp_path / "sweeps" / "odd").mkdir(parents=True, exist_ok=True)
        (tmp_path / "sweeps" / "odd" / "sweep.json").write_text(json.dumps(odd_json))
        in_sweep(tmp_path, "beta-0", "odd")
        assert [run["own"] for run in read_runs(tmp_path, lambda key: False)] == ["", ""]


def test_a_sweep_of_many_points_is_read_once_a_change_and_says_few_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    points = [{"run": f"beta-{i:02}", "settings": {BETA: i}} for i in range(40)]
    for point in points[:3]:
        write_run(tmp_path, point["run"], point["settings"], {"reward": 0.1}, states={"dpo": "failed"}, error="no room")
        in_sweep(tmp_path, point["run"], "beta-0a1b2c3d")
    write_sweep(tmp_path, points)
    seen = []
    monkeypatch.setattr(status, "read_sweep", lambda folder: (seen.append(folder), read_sweep(folder))[1])
    results, folders = Results(tmp_path), [tmp_path / "runs" / point["run"] for point in points]
    for _ in range(3):
        runs = read_runs(tmp_path, lambda key: False, folders, results=results)
    assert len(seen) == 1 and [run["own"] for run in runs] == [f"beta={i}" for i in range(40)]
    printed = io.StringIO()
    Console(width=100, file=printed).print(queue.table(runs))
    said = printed.getvalue()
    assert "37 not begun yet, or deleted" in said and len(said.splitlines()) < 20
    assert all(f"failed  DPO  beta={i}  no room" in said for i in range(3)), said


def test_a_run_that_cannot_be_read_is_shown_with_its_file_and_what_to_do(
    make_run: MakeRun, capsys: pytest.CaptureFixture[str]
) -> None:
    """Among few runs, and among many, whose stages are counted."""
    folder, store = make_run()
    bad = store / "runs" / "bad" / "run.json"
    bad.parent.mkdir()
    bad.write_text("{")
    others = [folder.with_name(f"{folder.name}-{number}") for number in range(9)]
    for other in others:
        shutil.copytree(folder, other)
    for names in (["bad"], ["bad", *(other.name for other in others)]):
        assert cli.main(["status", *names, "--store", str(store)]) == 0
        said = "".join(capsys.readouterr().out.split())  # it is folded at the width of the terminal
        assert "badunreadable" in said and "—ofwork" not in said
        assert f"{bad}:isnorun.jsonthatcanberead(itscommandwritesitagain;" in said
    assert cli.main(["status", "bad", "--json", "--store", str(store)]) == 0
    assert str(bad) in json.loads(capsys.readouterr().out)[0]["error"]


@pytest.mark.parametrize("name", ["name", "kind", "key", "state", "inputs"])
@pytest.mark.parametrize("value", [None, 3])
def test_a_run_whose_stages_lack_what_is_needed_is_unreadable_and_hides_none(
    name: str, value: int | None, make_run: MakeRun, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, store = make_run()
    run = json.loads((folder / "run.json").read_text())
    node = {"name": "a", "kind": "sft", "key": "0" * 64, "state": "queued", "inputs": {}}
    bad = {key: found for key, found in node.items() if key != name} | ({name: value} if value else {})
    (store / "runs" / "bad").mkdir()
    for nodes in ([bad], [*run["nodes"], bad]):
        (store / "runs" / "bad" / "run.json").write_text(json.dumps({"nodes": nodes, "run": "bad"}))
        states = {told["run"]: told["state"] for told in read_runs(store, lambda key: False)}
        optional = name == "inputs" and value is None
        assert states[run["run"]] == "done" and (states["bad"] == "unreadable") is not optional
        for names in ([], ["bad"]):
            assert cli.main(["status", *names, "--store", str(store)]) == 0
        assert "bad" in capsys.readouterr().out
        for command in [] if optional else (["report", "bad"], ["chat", "bad"]):
            assert cli.main([*command, "--store", str(store)]) == 3
            assert "no run.json that can be read" in capsys.readouterr().err


def test_a_dead_stage_that_was_stopped_in_order_is_preempted(halfway: tuple[Path, Path]) -> None:
    work(*halfway, "sft", "outcome.json", {"outcome": "preempted", "why": "SIGTERM", "rank": 0})
    (run,) = read_runs(halfway[1], lambda key: False)
    assert (run["state"], run["nodes"][2]["state"]) == ("preempted", "preempted")


def test_attempts_and_their_causes_are_told(halfway: tuple[Path, Path]) -> None:
    folder, store = halfway
    run = json.loads((folder / "run.json").read_text())
    run["nodes"][2].update(state="failed", error="rank 1 hung", attempts=2, causes=["rank 0 was killed", "rank 1 hung"])
    (folder / "run.json").write_text(json.dumps(run))
    (told,) = read_runs(store, lambda key: False)
    assert (told["nodes"][2]["attempts"], told["nodes"][2]["causes"][0]) == (2, "rank 0 was killed")
    assert attempts_text(told["nodes"][2]) == "2 attempts (rank 0 was killed)", "the last cause is the error itself"
    assert attempts_text({**told["nodes"][2], "state": "done"}) == "2 attempts (rank 0 was killed; rank 1 hung)"
    assert attempts_text({"state": "done", "attempts": 1, "causes": []}) == ""
