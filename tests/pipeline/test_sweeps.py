from __future__ import annotations

from pathlib import Path

import pytest

from alignment import cli
from alignment.config.compose import compose
from alignment.hydra_app import Point
from alignment.pipeline.runner import Run
from alignment.pipeline.sweeps import Sweep
from alignment.reporting.settings import called
from alignment.reporting.sweeps import read_sweep


def test_a_point_has_no_value_of_a_setting_that_it_was_not_given(tmp_path: Path) -> None:
    settings = (["stage.dpo.beta=0.1", "seed=1"], ["stage.dpo.beta=0.1", "reward.cap=null", "seed=1.0"])
    runs = [Run(compose(["experiment=quickstart", f"store={tmp_path}", f"seed={seed}"]), "") for seed in (1, 2)]
    sweep = Sweep(["seed=1,2"], [], [])
    sweep.add(zip(runs, settings, strict=True))
    points = read_sweep(sweep.folder)["points"]
    assert [point["settings"] for point in points] == [{}, {"reward.cap": None}]
    names = {"reward.cap": "cap"}
    assert [called(point["settings"], names) for point in points] == ["cap=not set", "cap=null"]


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
