from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest

from alignment import cli
from alignment.config.compose import compose
from alignment.files import read_json, write_json
from alignment.hydra_app import Point
from alignment.pipeline import claims
from alignment.pipeline.runner import Run
from alignment.pipeline.store import Store
from alignment.pipeline.sweeps import Sweep
from alignment.reporting.settings import called
from alignment.reporting.sweep_files import read_sweep


def test_a_point_has_no_value_of_a_setting_that_it_was_not_given(tmp_path: Path) -> None:
    settings = (["stage.dpo.beta=0.1", "seed=1"], ["stage.dpo.beta=0.1", "reward.cap=null", "seed=1.0"])
    runs = [Run(compose(["experiment=quickstart", f"store={tmp_path}", f"seed={seed}"]), "") for seed in (1, 2)]
    sweep = Sweep(["seed=1,2"], [], [])
    sweep.add(zip(runs, settings, strict=True))
    points = read_sweep(sweep.folder)["points"]
    assert [point["settings"] for point in points] == [{}, {"reward.cap": None}]
    names = {"reward.cap": "cap"}
    assert [called(point["settings"], names) for point in points] == ["cap=not set", "cap=null"]


def trial(store: Path, seed: int) -> tuple[Run, list[str]]:
    """A point, as a process of `search` asks for it."""
    run = Run(compose(["experiment=quickstart", f"store={store}", "name=search", f"seed={seed}"]), "")
    return run, [f"seed={seed}"]


def search() -> Sweep:
    """As each process of one command has it."""
    return Sweep(["hydra.sweeper.storage=sqlite:///trials.db"], [], [])


def told(sweep: Sweep) -> dict[str, Any]:
    return dict(read_json(sweep.folder / "sweep.json"))


def test_a_command_knows_that_its_sweep_was_cancelled_since_it_was_given(tmp_path: Path) -> None:
    store = Store(tmp_path)
    for _ in range(2):
        sweep = search()
        assert not sweep.is_cancelled()
        sweep.add([trial(tmp_path, 1)])
        assert not sweep.is_cancelled() and store.driver_lock(sweep.id).is_held()
        claims.end(store, "another")
        assert not sweep.is_cancelled()
        claims.end(store, sweep.id)
        assert sweep.is_cancelled()
        del sweep
    assert not store.driver_lock(search().id).is_held()


def test_two_processes_of_one_command_keep_each_other_s_points(tmp_path: Path) -> None:
    """Two workers on one study of Optuna's, say."""
    one, other = search(), search()
    points = [trial(tmp_path, seed) for seed in range(4)]
    one.add(points[:1])
    other.add(points[1:2])
    created = told(one)["created"]
    other.add(points[2:3])
    one.prune(points[0][0])
    other.prune(points[1][0])
    one.add(points[3:])
    assert [(p["run"], p["pruned"]) for p in read_sweep(one.folder)["points"]] == [
        (run.id, pruned) for (run, _), pruned in zip(points, (True, True, False, False), strict=True)
    ]
    assert [point["settings"] for point in told(one)["points"]] == [{"seed": seed} for seed in range(4)]
    assert told(one)["created"] == created
    assert one.is_pruned(points[1][0]), "a search may be given the other's point again"
    other.prune(points[0][0], False)
    one.prune(points[3][0])
    pruned = {p["run"] for p in read_sweep(one.folder)["points"] if p["pruned"]}
    assert pruned == {points[1][0].id, points[3][0].id}, "who took a mark away is not overruled by who set it before"
    assert not one.is_pruned(points[0][0])


def test_points_that_may_be_refused_are_written_once_they_are_not(tmp_path: Path) -> None:
    """Those of jobs of a cluster; which of them an earlier process has pruned is known before."""
    before, sweep = search(), search()
    points = [trial(tmp_path, seed) for seed in range(2)]
    before.add(points[:1])
    before.prune(points[0][0])
    sweep.add(points, write=False)
    assert sweep.is_pruned(points[0][0]) and points[1][0].sweep == sweep.id
    assert [line["run"] for line in told(sweep)["points"]] == [points[0][0].id]
    sweep.write()
    assert [line["run"] for line in told(sweep)["points"]] == [run.id for run, _ in points]


def test_what_another_process_is_about_to_write_is_waited_for(tmp_path: Path) -> None:
    sweep, (run, settings) = search(), trial(tmp_path, 1)
    sweep.add([(run, settings)])
    other = run.store.sweep_lock(sweep.id)
    assert other.acquire("the other")
    before = told(sweep)
    adding = threading.Thread(target=sweep.add, args=([trial(tmp_path, 2)],))
    adding.start()
    adding.join(0.5)
    assert adding.is_alive() and told(sweep) == before
    write_json(sweep.folder / "sweep.json", {**before, "points": [*before["points"], {"run": "x", "overrides": []}]})
    other.release()
    adding.join(60)
    assert [p["run"] for p in told(sweep)["points"]][:2] == [run.id, "x"] and len(told(sweep)["points"]) == 3


@pytest.mark.parametrize(
    "points",
    [3, None, "points", ["a", None, {}, {"run": None}, {"run": ["a"]}, {"run": ""}, {"overrides": ["seed=1"]}]],
    ids=["number", "nothing", "text", "no points"],
)
def test_a_damaged_sweep_is_written_again_by_its_command(tmp_path: Path, points: object) -> None:
    sweep, point = search(), trial(tmp_path, 1)
    sweep.add([point])
    whole = told(sweep)
    write_json(sweep.folder / "sweep.json", {**whole, "points": points})
    search().add([point])
    assert told(sweep) == whole
    write_json(sweep.folder / "sweep.json", {"points": points, "created": "yesterday"})
    sweep.prune(point[0])
    assert told(sweep) == {**whole, "points": [{**whole["points"][0], "pruned": True}]}


@pytest.mark.parametrize("overrides", [None, 3, ["seed", "seed=[", None, "seed=1"]], ids=["none", "number", "damaged"])
def test_a_point_whose_settings_are_damaged_stays_and_its_command_writes_them_again(
    tmp_path: Path, overrides: object
) -> None:
    sweep, point = search(), trial(tmp_path, 1)
    sweep.add([point])
    whole = told(sweep)
    write_json(sweep.folder / "sweep.json", {**whole, "points": [{**whole["points"][0], "overrides": overrides}]})
    search().add([other := trial(tmp_path, 2)])
    assert [line["run"] for line in told(sweep)["points"]] == [point[0].id, other[0].id]
    search().add([point])
    assert [line["overrides"] for line in told(sweep)["points"]] == [["seed=1"], ["seed=2"]]


def test_a_password_of_the_command_is_in_no_file_and_on_no_page(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    storage = "hydra.sweeper.storage=postgresql://me:hunter2@db/optuna"
    overrides = [f"store={tmp_path}", "experiment=quickstart", "tracking.project='token=hunter2'", "seed=1"]
    experiment = compose(["experiment=quickstart", f"store={tmp_path}", "seed=1"])
    point = Point(experiment, [*overrides, storage])
    run = Run(experiment, point.command)
    sweep = Sweep(["seed=1"], ["-m", *overrides, storage], [])
    sweep.add([(run, point.overrides)])
    run.submitted([node.key for node in run.nodes])
    assert cli.main(["compare", sweep.id, "--store", str(tmp_path)]) == 0
    assert cli.main(["compare", "--store", str(tmp_path)]) == 0
    files = {file.name: file.read_text() for file in tmp_path.rglob("*") if file.is_file()}
    assert {"sweep.json", "run.json", "compare.html"} <= set(files)
    assert "hunter2" not in "".join([*files.values(), *capsys.readouterr()])
    for name in ("sweep.json", "run.json", "compare.html"):
        assert "hydra.sweeper.storage=[removed]" in files[name] and "seed=1" in files[name], name
