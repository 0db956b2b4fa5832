"""Which sweep is meant, and what is read of its points: each with its true state, damaged ones included."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from alignment import cli
from alignment.config.rewards import COUNTS
from alignment.config.varied import level, varied
from alignment.errors import ConfigError, InputError
from alignment.reporting import sweep_files, sweeps
from alignment.reporting.settings import called, is_seed, own_settings, short_names, shown
from tests.reporting.conftest import key as run_key
from tests.reporting.fake_sweeps import BETA, CREATED, RATE, grid, key, write, write_run, write_sweep

WAITING = {"evaluate_dpo": "waiting", "verdict": "waiting"}


def points_of(folder: Path, held: tuple[str, ...] = ()) -> list[dict]:
    return sweeps.read_points(sweep_files.read_sweep(folder), folder.parent.parent, lambda asked: asked in held)


def one(store: Path, **facts: object) -> dict:
    """The only point of a sweep, whose run was written as "run"."""
    return points_of(write_sweep(store, [{"run": "run", "settings": {BETA: 0.1}, **facts}]))[0]


# --- states ----------------------------------------------------------------------------------------------------------


def test_a_finished_point_has_its_metrics_with_the_verdict_s_intervals(tmp_path: Path) -> None:
    write_run(tmp_path, "run", {BETA: 0.1}, {"reward": 0.3, "kl": 9.0}, interval=0.1)
    point = one(tmp_path)
    assert (point["state"], point["measured"], point["verdict"]) == ("done", True, "better")
    assert point["metrics"]["reward"] == {
        "mean": 0.3,
        "low": pytest.approx(0.2),
        "high": pytest.approx(0.4),
        "confidence": 0.95,
    }
    assert point["training"]["folder"].endswith(key("run", "dpo")[:16])


def test_without_a_comparison_means_come_from_the_evaluation(tmp_path: Path) -> None:
    write_run(tmp_path, "run", {}, {"reward": 0.3, **dict.fromkeys(COUNTS, 1.0)}, interval=None)
    assert one(tmp_path)["metrics"] == {"reward": {"mean": 0.3, "low": None, "high": None, "confidence": None}}


def test_of_a_whole_run_the_final_model_s_values_are_read(make_run: Callable[..., tuple[Path, Path]]) -> None:
    folder, store = make_run()
    (point,) = points_of(write_sweep(store, [{"run": folder.name, "settings": {}}]))
    verdict = json.loads((store / "store" / run_key("verdict")[:16] / "verdict.json").read_text())
    wanted = {row["metric"]: {**row["values"]["dpo"], "confidence": 0.95} for row in verdict["table"]}
    assert (point["state"], point["metrics"], point["verdict"]) == ("done", wanted, "better")
    assert point["training"]["stage"] == "dpo"
    assert point["evaluation"] == run_key("evaluate_dpo")


@pytest.mark.parametrize(
    ("states", "held", "state", "note"),
    [
        ({"dpo": "failed", **WAITING}, False, "failed", "DPO: loss is NaN"),
        ({"dpo": "running", **WAITING}, True, "running", "DPO: 4/13"),
        ({"dpo": "running", **WAITING}, False, "interrupted", "DPO: 4/13"),
        ({"dpo": "preempted", **WAITING}, False, "preempted", "DPO: 4/13"),
    ],
)
def test_a_point_that_is_not_done_says_why(tmp_path: Path, states: dict, held: bool, state: str, note: str) -> None:
    write_run(tmp_path, "run", {}, {"reward": 0.3}, states=states, error="loss is NaN")
    write(tmp_path / "work" / key("run", "dpo")[:16] / "progress.json", {"step": 4, "total": 13})
    folder = write_sweep(tmp_path, [{"run": "run", "settings": {}}])
    (point,) = points_of(folder, (key("run", "dpo"),) if held else ())
    assert (point["state"], point["note"], point["measured"], point["metrics"]) == (state, note, False, {})


def test_a_point_of_which_a_model_was_deleted_still_counts(tmp_path: Path) -> None:
    write_run(tmp_path, "run", {}, {"reward": 0.3})
    shutil.rmtree(tmp_path / "store" / key("run", "dpo")[:16])
    point = one(tmp_path)
    assert (point["state"], point["measured"], point["training"]) == ("gone", True, None)


def test_a_point_whose_comparison_failed_was_measured_all_the_same(tmp_path: Path) -> None:
    write_run(tmp_path, "run", {}, {"reward": 0.3}, states={"verdict": "failed"}, error="disk full")
    point = one(tmp_path)
    assert (point["state"], point["measured"], point["note"]) == ("failed", True, "verdict: disk full")
    assert point["metrics"]["reward"]["low"] is None


def test_a_pruned_point_does_not_count_even_if_it_has_a_number(tmp_path: Path) -> None:
    write_run(tmp_path, "run", {}, {"reward": 0.3})
    point = one(tmp_path, pruned=True)
    assert (point["state"], point["measured"], point["metrics"]) == ("pruned", False, {})


def test_what_was_pruned_says_why(tmp_path: Path) -> None:
    write_run(tmp_path, "run", {}, None, states={"dpo": "preempted"})
    file = tmp_path / "runs" / "run" / "run.json"
    write(file, {**json.loads(file.read_text()), "pruned": "loss 3 at best"})
    assert (one(tmp_path, pruned=True)["note"], one(tmp_path)["state"]) == ("loss 3 at best", "pruned")


def test_an_objective_is_one_number_or_several_or_nothing(tmp_path: Path) -> None:
    for run, interval in (("compared", 0.1), ("evaluated", None)):
        write_run(tmp_path, run, {}, {"reward": 0.3, "kl": 9.0, "sentiment": 0.1}, interval=interval)
        told = json.loads((tmp_path / "runs" / run / "run.json").read_text())
        assert sweeps.objective(told, tmp_path, ["sentiment"]) == 0.1
        assert sweeps.objective(told, tmp_path, ["reward", "kl"]) == (0.3, 9.0)
        assert sweeps.objective(told, tmp_path, ["reward", "tokens"]) is None
    told["nodes"][2]["state"] = "failed"
    assert sweeps.objective(told, tmp_path, ["reward"]) is None


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"nodes": 3}', '{"nodes": ["x"]}', '{"nodes": [{"name": "a", "inputs": 3}]}']
)
def test_a_damaged_run_is_unreadable_and_hides_nothing(tmp_path: Path, text: str) -> None:
    points = grid(tmp_path, {0.1: [0.3]})
    (tmp_path / "runs" / "bad").mkdir()
    (tmp_path / "runs" / "bad" / "run.json").write_text(text)
    found = points_of(write_sweep(tmp_path, [{"run": "bad", "settings": {BETA: 1.0}}, *points]))
    assert [point["state"] for point in found] == ["unreadable", "done"]
    assert "cannot be read" in found[0]["note"]


def test_a_damaged_evaluation_is_said(tmp_path: Path) -> None:
    write_run(tmp_path, "run", {}, {"reward": 0.3}, interval=None)
    folder = tmp_path / "store" / key("run", "evaluate_dpo")[:16]
    (folder / "evaluation.json").write_text('{"metrics": ')
    assert not one(tmp_path)["measured"] and "cannot be read" in one(tmp_path)["note"]
    (folder / "record.json").write_text("{")
    point = one(tmp_path)
    assert (point["state"], point["measured"]) == ("gone", False), "`run` would make it again"


def test_points_that_are_missing_or_no_points_stay_in_the_list(tmp_path: Path) -> None:
    given = [
        {"run": "nowhere", "settings": {BETA: 1}},
        "x",
        {"settings": {BETA: 2}},
        {"run": "../up", "settings": None},
    ]
    found = points_of(write_sweep(tmp_path, given))
    assert [(p["number"], p["state"]) for p in found] == [
        (1, "missing"),
        (2, "unreadable"),
        (3, "unreadable"),
        (4, "unreadable"),
    ]


def test_settings_come_from_the_overrides_where_there_are_none(tmp_path: Path) -> None:
    found = points_of(write_sweep(tmp_path, [{"run": "nowhere", "overrides": ["+stage.dpo.beta=0.1", "x=a=b", 3]}]))
    assert found[0]["settings"] == {BETA: "0.1", "x": "a=b"}


# --- which sweep -----------------------------------------------------------------------------------------------------


def test_sweeps_are_listed_newest_first_and_a_damaged_one_does_not_hide_the_others(tmp_path: Path) -> None:
    write_sweep(tmp_path, [{"run": "a", "settings": {}}], "old")
    write_sweep(tmp_path, [], "new", created=CREATED + 1)
    (tmp_path / "sweeps" / "bad").mkdir()
    (tmp_path / "sweeps" / "bad" / "sweep.json").write_text("{")
    found = [(sweep["sweep"], sweep["points"], bool(sweep["problem"])) for sweep in sweep_files.list_sweeps(tmp_path)]
    assert found == [("new-0a1b2c3d", 0, False), ("old-0a1b2c3d", 1, False), ("bad", 0, True)]
    assert sweep_files.list_sweeps(tmp_path / "nowhere") == []


def test_a_sweep_is_found_by_name_beginning_or_folder(tmp_path: Path) -> None:
    folder, other = write_sweep(tmp_path, [], "beta"), write_sweep(tmp_path, [], "beta2", created=CREATED + 1)
    assert sweep_files.sweep_folder("beta-0a1b2c3d", tmp_path) == folder.resolve()
    assert sweep_files.sweep_folder("beta", tmp_path) == other.resolve(), "the newest that fits"
    assert sweep_files.sweep_folder(str(folder), Path("elsewhere")) == folder.resolve()
    with pytest.raises(ConfigError, match=r"no sweep is called 'no' \(known: beta2-0a1b2c3d, beta-0a1b2c3d; runs are"):
        sweep_files.sweep_folder("no", tmp_path)
    with pytest.raises(ConfigError, match="alignment run -m"):
        sweep_files.sweep_folder("no", tmp_path / "nowhere")


def test_of_several_sweeps_that_begin_so_the_newest_is_compared_and_the_others_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(3):
        write_sweep(tmp_path, [{"run": None, "settings": {}}], f"beta{number}", created=CREATED + number)
    compare = ["compare", "--store", str(tmp_path)]
    said = "beta2-0a1b2c3d: of 3 sweeps that begin so, the newest; others: beta1-0a1b2c3d, beta0-0a1b2c3d\n"
    assert cli.main([*compare, "beta"]) == 0
    assert capsys.readouterr().out.startswith(said)
    assert cli.main([*compare, "beta", "--json"]) == 0
    json.loads(capsys.readouterr().out)
    assert cli.main([*compare, "beta1"]) == 0
    assert "begin so" not in capsys.readouterr().out


def test_a_damaged_sweep_json_is_one_line(tmp_path: Path) -> None:
    folder = write_sweep(tmp_path, [])
    (folder / "sweep.json").write_text('{"points": 3}')
    with pytest.raises(InputError, match=r"sweep\.json: is no sweep\.json that can be read"):
        sweep_files.read_sweep(folder)


def test_runs_become_a_sweep_of_the_settings_in_which_they_differ(tmp_path: Path) -> None:
    for run, beta, seed in (("a-1", 0.1, 0), ("a-2", 0.3, 1)):
        write_run(
            tmp_path, run, {BETA: beta, "seed": seed, "launcher.kind": run, "store": run, RATE: 1e-3}, {"reward": beta}
        )
    sweep, folder = sweeps.sweep_of_runs(["a-1", "a-2"], tmp_path)
    assert [point["settings"] for point in sweep["points"]] == [{"seed": 0, BETA: 0.1}, {"seed": 1, BETA: 0.3}]
    assert folder.parent == tmp_path.resolve() / "sweeps"
    assert sweeps.sweep_of_runs(["a-2", "a-1"], tmp_path)[1] == folder, "in whatever order"
    with pytest.raises(ConfigError, match="are one run"):
        sweeps.sweep_of_runs(["a-1", "a-1"], tmp_path)
    with pytest.raises(ConfigError, match="no run is called 'b'"):
        sweeps.sweep_of_runs(["a-1", "b"], tmp_path)


def test_of_two_pipelines_the_pipeline_is_one_setting(tmp_path: Path) -> None:
    """What only one of them has says no more than its name; a term that only one reward has is one setting too."""
    rloo = {f"stage.rloo.{name}": 1 for name in ("epochs", "beta", "clip")}
    shared = {"stage.dpo.kind": "dpo", "reward.terms.a.kind": "sentiment", BETA: 0.1}
    nodes = "pipeline.nodes"
    dpo = {f"{nodes}.dpo.stage": "dpo", **shared}
    longer = {f"{nodes}.on.stage": "rloo", "stage.rloo.kind": "rloo", **rloo}
    longer |= {"reward.terms.b.kind": "length", BETA: 0.3}
    write_run(tmp_path, "a-1", dpo, {"reward": 0.1})
    write_run(tmp_path, "a-2", {**dpo, **longer}, {"reward": 0.2})
    write_run(tmp_path, "a-3", {**dpo, **longer, f"{nodes}.dpo.inputs.model": "on"}, {"reward": 0.3})
    points = sweeps.sweep_of_runs(["a-1", "a-2", "a-3"], tmp_path)[0]["points"]
    first, second, third = (point["settings"] for point in points)
    assert first == {"pipeline": "dpo", BETA: 0.1}
    assert second.pop("pipeline") != third.pop("pipeline") and second == third
    assert second == {BETA: 0.3, "reward.terms.b": {"kind": "length"}}
    same = [point["settings"] for point in sweeps.sweep_of_runs(["a-2", "a-3"], tmp_path)[0]["points"]]
    assert same == [{}, {f"{nodes}.dpo.inputs": {"model": "on"}}], "of the same nodes, what differs"


def test_a_run_of_another_pipeline_does_not_hide_what_the_others_differ_in(tmp_path: Path) -> None:
    """Else two betas would be one combination, with two seeds."""
    for run, kind, settings in (("a-1", "dpo", {BETA: 0.1}), ("a-2", "dpo", {BETA: 0.5}), ("a-3", "sft", {})):
        told = {f"pipeline.nodes.{kind}.stage": kind, f"stage.{kind}.kind": kind, **settings}
        write_run(tmp_path, run, told, {"reward": 0.1})
    file = tmp_path / "runs" / "a-3" / "run.json"
    run = json.loads(file.read_text())
    del run["config"]["stage"]["dpo"]
    file.write_text(json.dumps(run))
    points = sweeps.sweep_of_runs(["a-1", "a-2", "a-3"], tmp_path)[0]["points"]
    assert [point["settings"] for point in points] == [
        {"pipeline": "dpo", BETA: 0.1}, {"pipeline": "dpo", BETA: 0.5}, {"pipeline": "sft"},
    ]  # fmt: skip


def test_what_some_lack_is_one_setting_and_the_others_differ_below_it(tmp_path: Path) -> None:
    lora = "stage.dpo.lora"
    for run, told in (("a-1", {lora: None}), ("a-2", {f"{lora}.rank": 8}), ("a-3", {f"{lora}.rank": 64})):
        write_run(tmp_path, run, told, {"reward": 0.1})
    points = sweeps.sweep_of_runs(["a-1", "a-2", "a-3"], tmp_path)[0]["points"]
    assert [point["settings"] for point in points] == [
        {lora: None}, {lora: {"rank": 8}, f"{lora}.rank": 8}, {lora: {"rank": 64}, f"{lora}.rank": 64},
    ]  # fmt: skip


def test_a_source_of_another_kind_is_one_setting(tmp_path: Path) -> None:
    source = "data.rows.source"
    for run, told in (("a-1", {"kind": "path", "path": "a"}), ("a-2", {"kind": "hub", "repo": "b"})):
        write_run(tmp_path, run, {f"{source}.{name}": value for name, value in told.items()}, {"reward": 0.1})
    points = sweeps.sweep_of_runs(["a-1", "a-2"], tmp_path)[0]["points"]
    assert [point["settings"] for point in points] == [
        {source: {"kind": "path", "path": "a"}}, {source: {"kind": "hub", "repo": "b"}},
    ]  # fmt: skip


def test_a_run_that_cannot_be_read_is_one_of_the_runs_compared(tmp_path: Path) -> None:
    write_run(tmp_path, "a-1", {BETA: 0.1}, {"reward": 0.1})
    write_run(tmp_path, "a-2", {BETA: 0.3}, {"reward": 0.3})
    (tmp_path / "runs" / "a-3").mkdir()
    (tmp_path / "runs" / "a-3" / "run.json").write_text("{")
    sweep, _ = sweeps.sweep_of_runs(["a-1", "a-2", "a-3"], tmp_path)
    assert [point["settings"] for point in sweep["points"]] == [{BETA: 0.1}, {BETA: 0.3}, {}]


ODD: list[dict[str, Any]] = [  # parts of a config
    {}, {"pipeline": {"nodes": {"dpo": {}}}}, {"pipeline": [1], "stage": 2}, {"stage": {"dpo": {"kind": ["dpo"]}}},
]  # fmt: skip


def test_what_is_odd_in_a_run_does_not_hide_in_what_the_others_differ(tmp_path: Path) -> None:
    for number, odd in enumerate(ODD, start=1):
        write_run(tmp_path, f"a-{number}", {BETA: number / 10, "pipeline.nodes.dpo.stage": "dpo"}, {"reward": 0.1})
        file = tmp_path / "runs" / f"a-{number}" / "run.json"
        run = json.loads(file.read_text())
        file.write_text(json.dumps({**run, "config": {**run["config"], **odd}}))
    points = sweeps.sweep_of_runs([f"a-{number}" for number in range(1, len(ODD) + 1)], tmp_path)[0]["points"]
    assert [point["settings"].get(BETA) for point in points] == [0.1, 0.2, None, None]


# --- settings --------------------------------------------------------------------------------------------------------


def test_what_all_points_were_given_is_no_point_s_own_however_hydra_writes_it() -> None:
    given = ["stage.dpo.learning_rate=1e-4", "objective=[reward, kl]", "~x", "+a.b=true", "stage.dpo.beta=0.1,0.3"]
    of_point = ["stage.dpo.learning_rate=0.0001", "objective=[reward,kl]", "~x=null", "+a.b=True", "stage.dpo.beta=0.3"]
    assert own_settings(of_point, given) == "beta=0.3"
    assert own_settings([*of_point, "+stage.dpo.seed=1"], given) == "beta=0.3, seed=1"
    assert own_settings(["hydra.sweeper.storage=mysql://me:secret@there/db"], []) == "storage=[removed]"


def test_settings_are_told_apart_by_value_and_called_by_their_shortest_name() -> None:
    points = [
        {"settings": {BETA: 1, "seed": 0, "a.rate": 1}},
        {"settings": {BETA: 1.0, "seed": 1, "b.rate": 2, "a.rate": 1}},
    ]
    assert varied(points) == ["seed", "b.rate"]
    assert short_names([BETA, "a.rate", "b.rate", "rate"]) == {
        BETA: "beta",
        "a.rate": "a.rate",
        "b.rate": "b.rate",
        "rate": "rate",
    }
    assert [is_seed(name) for name in ("seed", "stage.dpo.seed", "seeds", "unseed")] == [True, True, False, False]
    assert level(1) == level(1.0) != level("1") != level(True)
    assert called({BETA: 1e-5}, {BETA: "beta", "x": "x"}) == "beta=1e-5, x=not set"
    assert [shown(value) for value in (0.1, 3, True, None, "a", [1, 2])] == ["0.1", "3", "true", "null", "a", "[1,2]"]
    assert len(shown("x" * 500)) == 60


def test_a_sweep_json_is_not_changed_by_reading(tmp_path: Path) -> None:
    folder = write_sweep(tmp_path, grid(tmp_path, {0.1: [0.3]}))
    before = (folder / "sweep.json").read_text()
    points_of(folder)
    assert json.loads(before) and (folder / "sweep.json").read_text() == before
