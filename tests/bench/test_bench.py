"""The benchmark's arithmetic, its refusals and its pages by hand-derived numbers; the driver once, on a tiny model."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest

from bench import plan, report, run, startup, summary
from bench.group import Session, find_best
from bench.group import measure as measure_group
from bench.pages import between_markers
from bench.plot import svg
from bench.pool import ROOT
from bench.workloads import Workload, pairs, totals

DPO = plan.Group(Workload("dpo", "hh", "tiny", rows=2, steps=1), ("trl_default", "trl_tuned", "ours"), repeats=3)


def answer(seconds: float, peak: int = 100, losses: tuple[float, ...] = (0.7,), attended: int = 40) -> dict[str, Any]:
    """A worker's; 60 positions of the policy."""
    return {
        "seconds": seconds, "first_step_seconds": seconds / 2, "losses": list(losses), "peak_bytes": peak,
        "start_bytes": 10, "positions": {"policy": 60, "reference": 0}, "attended": {"policy": attended},
    }  # fmt: skip


def summarised(seconds: list[float], peak: int = 100, difference: float = 0.0, curve: float = 0.0) -> dict[str, Any]:
    warm = {"model_flops": 200.0, "executed_flops": 500.0, "steps": 1}
    runs = [answer(value, peak) for value in seconds]
    return summary.arm_summary(runs, warm, DPO, difference, summary.LOSS_TOLERANCE, 1000.0, curve)


def measured(difference: float = 0.0) -> dict[str, Any]:
    """Results with one group."""
    arms = {
        "trl_default": summarised([8.0, 10.0, 30.0], peak=400),
        "trl_tuned": summarised([4.0, 6.0, 5.0], peak=200),
        "ours": summarised([2.0, 2.5, 3.0], peak=100, difference=difference),
    }
    found = {"dpo": {"micro_batch": 2, "padding_free": False, "tried": []}}
    group = {**summary.group_summary(DPO, arms, found), "missing": {"ours_warm": "<not> there"}}
    return {
        "machine": {"device": "cpu", "device_name": "CPU", "threads": 2, "versions": {"trl": "1.16"}},
        "settings": {"size": "tiny"}, "runs": 1, "minutes": 1.0,
        "ratios": group["ratios"], "groups": [group], "not_measured": [],
    }  # fmt: skip


# --- numbers ----------------------------------------------------------------------------------------------------------


def test_ratios_are_of_medians_and_their_spread_is_round_by_round() -> None:
    default, tuned = measured()["ratios"]
    assert (default["task"], default["lengths"], default["against"]) == ("dpo", "hh", "trl_default")
    assert default["speedup"] == pytest.approx(10 / 2.5)
    assert (default["speedup_low"], default["speedup_high"]) == pytest.approx((8 / 2, 30 / 3))
    assert default["memory"] == pytest.approx(100 / 400)
    assert (tuned["speedup"], tuned["memory"]) == pytest.approx((5 / 2.5, 100 / 200))


def test_an_arms_row_by_hand() -> None:
    row = summarised([4.0, 2.0, 3.0])
    needed = summary.work(DPO)
    assert row["time"] == {"median": 3.0, "low": 2.0, "high": 4.0}
    assert row["rows_per_s"] == pytest.approx(2 / 3) and row["tokens_per_s"] == pytest.approx(needed.tokens / 3)
    assert (row["padding_ratio"], row["sharing_ratio"]) == pytest.approx((60 / 40, needed.tokens / 40))
    assert row["executed_over_model_flops"] == 2.5
    assert (row["mfu"], row["executed_utilisation"]) == pytest.approx((200 / 3 / 1000, 500 / 3 / 1000))


def test_the_sweeps_work_is_that_of_eight_runs_of_sft_and_dpo() -> None:
    group = plan.Group(Workload("sweep", "hh", "tiny", rows=2, steps=1), ("trl_tuned", "ours"), repeats=3)
    rows = pairs(group.workload)
    assert summary.work(group).tokens == 8 * (totals("dpo", rows).tokens + totals("sft", rows).tokens)
    assert group.reference == "trl_tuned" and DPO.reference == "trl_default"


def test_losses_that_differ_leave_no_speed_and_exit_code_1() -> None:
    assert summary.loss_difference([0.7, 0.6], [0.7, 0.6002]) == pytest.approx(2e-4)
    assert summary.loss_difference([0.7], [0.7, 0.6]) == math.inf
    assert summary.loss_difference([0.7, math.nan], [0.7, 0.6]) == math.inf
    results = measured(difference=2e-4)
    ours = results["groups"][0]["arms"]["ours"]
    assert ours["refused"] == "losses differ by 2.0e-04"
    assert not {"seconds", "time", "rows_per_s", "tokens_per_s"} & ours.keys()
    assert results["ratios"] == [] and run.exit_code(results) == 1
    line = next(line for line in report.tables(results).splitlines() if line.startswith("| ours |"))
    assert "losses differ by 2.0e-04" in line and " s " not in line
    assert run.exit_code(measured()) == 0
    assert summarised([1.0], curve=2e-4)["refused"] == "loss curves differ by 2.0e-04"
    assert summarised([1.0], curve=math.inf)["refused"] == "loss curves cannot be compared"
    assert summarised([1.0], difference=math.inf)["refused"] == "losses cannot be compared"


def test_a_failed_arm_is_exit_code_1_and_a_group_left_out_is_not() -> None:
    results = measured()
    results["not_measured"] = ["reward hh"]
    assert run.exit_code(results) == 0
    results["groups"][0]["missing"]["ours_warm"] = "failed: no memory"
    assert run.exit_code(results) == 1


class Workers:
    """In place of bench.pool.Pool: ours' third loss is another one, ours_warm does not exist."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.rates: set[float] = set()
        self.tuned_apart = 0.0
        self.times: dict[int, list[float]] = {}

    def time(self, order: dict[str, Any]) -> dict[str, Any]:
        options = order["options"]["dpo"]
        return answer(
            self.times[-options["reference_batch"] if "reference_batch" in options else options["micro_batch"]].pop(0)
        )

    def ask(self, arm: str, order: dict[str, Any]) -> dict[str, Any]:
        if order["workload"]["size"] == "cpu":
            return self.time(order)
        if order["workload"]["steps"] == plan.CURVE_STEPS:
            self.rates.add(order["learning_rate"])
            return answer(1.0, losses=(0.7, 0.6) if arm != "trl_tuned" else (0.7, 0.6 + self.tuned_apart))
        if order["flops"] or order["workload"]["steps"] == 1:
            losses = (0.7,)
        else:
            self.asked.append(arm)
            losses = (0.7, 0.6, 0.5003 if arm == "ours" else 0.5)
        if arm == "ours_warm":
            return {"unavailable": "no store"}
        micro_batch = order["options"].get("dpo", {}).get("micro_batch", 0)
        return {**answer(3.0 - micro_batch / 8, losses=losses), "model_flops": 2.0, "executed_flops": 4.0}


def test_a_group_is_interleaved_tunes_trl_and_refuses_the_arm_whose_losses_differ() -> None:
    arms = ("trl_default", "trl_tuned", "ours", "ours_warm")
    group = plan.Group(Workload("dpo", "hh", "tiny", rows=8, steps=3), arms, repeats=2)
    workers = Workers()
    session = Session(workers, plan.Clock([group]), lambda words: None, {"device": "cpu"})  # type: ignore[arg-type]
    made = measure_group(session, 0, group)
    assert [arm for arm in workers.asked if arm != "ours_warm"] == ["trl_default", "trl_tuned", "ours"] * 2
    assert made["missing"] == {"ours_warm": "no store"}
    tuned = made["tuned"]["dpo"]
    assert (
        tuned["micro_batch"] == 8
        and "reference_batch" not in tuned
        and [one["micro_batch"] for one in tuned["tried"]] == [1, 2, 4, 8]
    )
    assert made["arms"]["ours"]["refused"] == "losses differ by 3.0e-04" and made["ratios"] == []
    assert workers.rates == {plan.CURVE_RATE} and made["arms"]["ours"]["curve_difference"] == 0
    workers.tuned_apart = 5e-4
    again = measure_group(session, 0, group)
    assert again["arms"]["trl_tuned"]["refused"] == "loss curves differ by 5.0e-04"
    assert made["arms"]["trl_tuned"]["refused"] is None and made["arms"]["trl_tuned"]["loss_difference"] == 0


def best(times: dict[int, list[float]]) -> dict[str, Any]:
    """times: of each micro-batch, in the order of trials; below zero of a reference pass apart."""
    workers = Workers()
    workers.times = times
    workload = Workload("dpo", "hh", "cpu", rows=8, steps=2)
    session = Session(workers, plan.Clock([]), lambda words: None, {"device": "cpu"})  # type: ignore[arg-type]
    found = find_best(session, workload)
    assert not any(times.values()), "candidates that were foreseen and not tried"
    return found


def test_trls_first_trial_is_not_timed_and_the_best_two_are_timed_thrice() -> None:
    found = best({1: [9.0, 2.0, 2.0, 2.2], 2: [1.9, 2.4, 2.5], 4: [2.6], -4: [2.7]})  # 8 is not tried, 4 is hopeless
    assert found["micro_batch"] == 1
    assert [(one["micro_batch"], one["seconds"]) for one in found["tried"]] == [(1, 2.0), (2, 2.4), (4, 2.6), (2, 2.7)]
    alone = best({1: [9.0, 2.0], 2: [3.0], -2: [2.9]})  # nothing near enough to be timed again
    assert alone["micro_batch"] == 1 and "reference_batch" not in alone and len(alone["tried"]) == 3
    apart = best({1: [9.0, 2.0], 2: [3.0], -2: [1.5], -4: [2.5]})
    assert (apart["micro_batch"], apart["reference_batch"]) == (1, 2)


# --- plan -------------------------------------------------------------------------------------------------------------


def test_pieces_are_switched_off_on_the_lengths_asked_for_and_the_sweep_runs_once() -> None:
    made = plan.groups(("dpo", "sweep"), ("hh", "equal"), None, ("hh",), "tiny", 4, 2, 5)
    assert [(g.workload.task, g.workload.lengths, g.workload.steps, g.repeats) for g in made] == [
        ("dpo", "hh", 2, 5), ("dpo", "equal", 2, 5), ("sweep", "hh", 2, 3),
    ]  # fmt: skip
    assert "ours_no_sharing" in made[0].arms and made[1].arms == ("trl_default", "trl_tuned", "ours")
    assert made[2].arms == ("trl_tuned", "ours")


def test_the_time_left_is_what_the_past_says(monkeypatch: pytest.MonkeyPatch) -> None:
    made = plan.groups(("dpo",), ("hh", "equal"), ("ours",), (), "tiny", 4, 1, 3)
    clock = plan.Clock(made)
    monkeypatch.setattr(clock, "seconds", lambda: 10.0)
    assert clock.left() is None
    first, second = made[0].units("ours", 1), made[1].units("ours", 1)
    clock.done(0)
    assert clock.left() == pytest.approx(10 * second / first) == clock.left_of(1)
    clock.reserved = 100.0
    assert clock.left() == pytest.approx(100 + 10 * second / first)
    guessed = plan.Clock(made, guess=2.0)
    assert guessed.left() == pytest.approx(2 * (first + second) * 4)  # 3 repeats and a warm-up


def test_arms_with_a_piece_off_repeat_thrice_and_reward_on_equal_rows_comes_last() -> None:
    made = plan.groups(("sft", "reward"), ("equal", "hh"), None, ("hh",), "tiny", 4, 2, 5)
    names = [(group.workload.task, group.workload.lengths, group.workload.steps) for group in made]
    assert names == [("sft", "equal", 2), ("sft", "hh", 2), ("reward", "hh", 2), ("reward", "equal", 2)]
    assert [group.workload.rows for group in made] == [4, 4, 2, 2]
    assert [made[1].repeats_of(arm) for arm in ("trl_default", "ours", "ours_no_packing")] == [5, 5, 3]


def interrupted(monkeypatch: pytest.MonkeyPatch, folder: Path, error: BaseException) -> None:
    """The driver, whose second group raises."""
    machine = measured()["machine"]
    made = iter(measured()["groups"])

    def group(*arguments: Any) -> dict[str, Any]:
        for one in made:
            return one
        raise error

    monkeypatch.setattr(run, "measure", group)
    monkeypatch.setattr(run.Pool, "ask", lambda self, arm, order: machine)
    (folder / "performance.md").write_text(f"{report.BEGIN}\n{report.END}\n")
    arguments = ["--tasks", "dpo,startup", "--lengths", "hh,equal", "--size", "tiny", "--out", str(folder)]
    try:
        assert run.main([*arguments, "--docs", str(folder)]) == 130
    finally:
        assert "| dpo | hh | trl_default |" in (folder / "performance.md").read_text()
        assert json.loads((folder / "results.json").read_text())["not_measured"] == ["dpo equal", "startup"]


def test_what_was_measured_before_an_interruption_or_an_error_is_written(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    interrupted(monkeypatch, tmp_path, KeyboardInterrupt())
    with pytest.raises(ArithmeticError):
        interrupted(monkeypatch, tmp_path, ArithmeticError())


def test_ctrl_c_while_the_workers_start_is_130(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def ask(self: Any, arm: str, order: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(run.Pool, "ask", ask)
    assert run.main(["--smoke", "--out", str(tmp_path)]) == 130
    assert list(tmp_path.iterdir()) == []


def test_what_was_left_out_is_measured_by_another_run_and_added(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    interrupted(monkeypatch, tmp_path, KeyboardInterrupt())
    options = ["--tasks", "dpo,startup", "--lengths", "hh,equal", "--size", "tiny", "--out", str(tmp_path), "--missing"]
    asked = []

    def group(session: Any, number: int, group: Any) -> dict[str, Any]:
        asked.append(group.workload.lengths)
        return {**measured()["groups"][0], "lengths": group.workload.lengths}

    monkeypatch.setattr(run, "measure", group)
    monkeypatch.setattr(startup, "measure", lambda *arguments: [])
    for other in (["--steps", "3"], ["--arms", "ours"], ["--ablations", "equal"]):
        assert run.main([*options, *other]) == 2 and "another settings" in capsys.readouterr().err
    assert run.main(options) == 0 and asked == ["equal"]
    results = json.loads((tmp_path / "results.json").read_text())
    assert [one["lengths"] for one in results["groups"]] == ["hh", "equal"]
    assert (results["not_measured"], results["runs"]) == ([], 2) and len(results["ratios"]) == 4
    assert "in 2 runs" in report.tables(results)
    written = (tmp_path / "results.json").read_bytes()
    assert run.main(options) == 0 and (tmp_path / "results.json").read_bytes() == written  # nothing is missing
    assert run.main([*options[:-3], "--out", str(tmp_path / "none"), "--missing"]) == 2
    (tmp_path / "results.json").write_text("[]")
    assert run.main(options) == 2 and "is not a bench's results.json" in capsys.readouterr().err


def test_only_the_whole_replaces_what_the_repository_has(tmp_path: Path) -> None:
    results, docs = ROOT / "bench" / "results.json", ROOT / "docs"
    assert run._targets(run.parse([])) == (results, docs)
    assert run._targets(run.parse(["--missing", "--logs", str(tmp_path)])) == (results, docs)
    for part in (
        ["--smoke"],
        ["--tasks", "dpo"],
        ["--minutes", "30"],
        ["--lengths", "hh"],
        ["--repeats", "2"],
        ["--size", "tiny"],
    ):
        target, page = run._targets(run.parse(part))
        assert ROOT not in target.parents and page is None
        target.parent.rmdir()
        assert run._targets(run.parse([*part, "--out", str(tmp_path)])) == (tmp_path / "results.json", None)


def test_an_arm_that_cannot_start_leaves_the_others_their_start_up(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def launch(logs: Path, arm: str, task: str, precision: str) -> tuple[float, float]:
        if arm == "ours":
            raise RuntimeError("no memory")
        return 4.0, 6.0

    monkeypatch.setattr(startup, "launch", launch)
    rows = startup.measure(tmp_path, 5, "fp32", lambda words: None)
    assert startup.table(rows).splitlines()[2] == (
        "| sft | 6.00 (6.00 to 6.00), 4.00 of it imports | 6.00 (6.00 to 6.00), 4.00 of it imports "
        "| failed: no memory |"
    )
    assert run.exit_code({"groups": [], "not_measured": [], "startup": rows}) == 1


def test_a_run_that_measures_nothing_leaves_the_results_of_another(tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text("{}")
    run.finish({"groups": [], "not_measured": ["dpo hh"]}, ["dpo hh"], tmp_path / "results.json", tmp_path)
    assert (tmp_path / "results.json").read_text() == "{}"


@pytest.mark.parametrize(
    "wrong",
    [
        ["--tasks", "foo"], ["--repeats", "0"], ["--minutes", "0"], ["--arms", "x"],
        ["--out", "/proc/x"], ["--docs", "/proc/x"], ["--logs", "/proc/x"],
    ],
)  # fmt: skip
def test_wrong_options_are_refused_in_one_line(wrong: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        run.parse(wrong)
    line = capsys.readouterr().err
    assert left.value.code == 2 and line.count("\n") == 1 and wrong[0] in line


def test_a_page_without_markers_and_arms_without_the_task_are_refused_before_anything_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "performance.md").write_text("# Ours\n")
    for wrong, said in (
        (["--docs", str(tmp_path)], "performance.md: the page must have"),
        (["--tasks", "dpo", "--missing"], "of which results?"),
        (["--tasks", "sweep", "--arms", "ours_warm"], "none of the arms ours_warm has a task of sweep here"),
    ):
        with pytest.raises(SystemExit, match="2"):
            run.main(wrong)
        line = capsys.readouterr().err
        assert said in line and line.count("\n") == 1
    (tmp_path / "performance.md").unlink()
    report.write_docs(tmp_path, measured())
    assert "| dpo | hh | trl_default |" in (tmp_path / "performance.md").read_text()


# --- pages ------------------------------------------------------------------------------------------------------------


def test_the_plot_is_well_formed_and_has_a_bar_for_each_arm_with_a_speed() -> None:
    root = ElementTree.fromstring(svg(measured()["groups"]))
    assert len(root.findall(".//{*}title")) == 3
    refused = ElementTree.fromstring(svg(measured(difference=1.0)["groups"]))
    assert len(refused.findall(".//{*}title")) == 2
    ElementTree.fromstring(svg([]))


def test_the_tables_replace_what_is_between_the_markers_only(tmp_path: Path) -> None:
    page = tmp_path / "performance.md"
    page.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    report.write_docs(tmp_path, measured())
    once = page.read_text()
    assert once.startswith(f"before\n{report.BEGIN}\n") and once.endswith(f"\n{report.END}\nafter\n")
    assert "old" not in once and "| dpo | hh | trl_default | 4.00 | 4.00 to 10.00 | 0.25 |" in once
    report.write_docs(tmp_path, measured())
    assert page.read_text() == once and (tmp_path / report.PLOT).exists()
    with pytest.raises(ValueError, match="once each"):
        between_markers("no markers", report.MARKED, "x")


def test_every_line_of_a_table_has_as_many_cells_as_its_head() -> None:
    for difference in (0.0, 1.0, math.inf):
        lines = report.arm_table(measured(difference)["groups"][0]).split("\n\n")[0].splitlines()
        assert len({line.count("|") for line in lines}) == 1


def test_the_repositorys_page_has_the_markers() -> None:
    between_markers((ROOT / "docs" / "performance.md").read_text(), report.MARKED, report.NOT_MEASURED)


# --- all together -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_driver_measures_trl_and_ours_and_their_losses_agree(tmp_path: Path) -> None:
    (tmp_path / "performance.md").write_text(f"{report.BEGIN}\n{report.END}\n")
    done = subprocess.run(
        [
            *(sys.executable, "-m", "bench", "--smoke", "--tasks", "dpo", "--arms", "trl_default,ours"),
            *("--out", str(tmp_path), "--docs", str(tmp_path)),
        ],
        cwd=ROOT, env={**os.environ, "BENCH_DEVICE": "cpu"}, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads((tmp_path / "results.json").read_text())
    (group,) = results["groups"]
    assert group["task"] == "dpo" and group["missing"] == {} and list(group["arms"]) == ["trl_default", "ours"]
    for row in group["arms"].values():
        assert (
            len(row["seconds"]) == 2
            and row["loss_difference"] <= 1e-5
            and row["curve_difference"] <= 1e-5
            and row["peak_bytes"]["median"] > 0
        )
        assert row["sharing_ratio"] >= 1 and row["padding_ratio"] >= 1 and row["executed_over_model_flops"] > 1
    (ratio,) = results["ratios"]
    assert ratio["against"] == "trl_default" and ratio["speedup"] > 0
    assert "| dpo | hh | trl_default |" in (tmp_path / "performance.md").read_text()


def test_start_up_is_a_table_of_medians() -> None:
    rows = [
        {"task": task, "arm": arm, "seconds": {"median": 6.0 + n, "low": 5.5, "high": 9.0}, "imports": {"median": 4.0}}
        for task in startup.TASKS
        for n, arm in enumerate(startup.ARMS)
    ]
    lines = startup.table(rows).splitlines()
    assert lines[0] == "| task | trl_default | trl_tuned | ours |"
    assert lines[2].startswith("| sft | 6.00 (5.50 to 9.00), 4.00 of it imports | 7.00 (") and len(lines) == 4
