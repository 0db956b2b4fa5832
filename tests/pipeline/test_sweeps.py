from __future__ import annotations

from pathlib import Path

from alignment.config.compose import compose
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
