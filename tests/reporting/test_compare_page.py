"""The page, the terminal and the command: everything is shown, nothing is dropped, nothing of it is markup."""

from __future__ import annotations

import io
import json
import re
import time
from pathlib import Path
from typing import Any

import pytest
from markupsafe import escape
from rich.console import Console

from alignment import cli
from alignment.reporting import compare_charts, compare_page, compare_terminal, sweep_curves, sweep_files, sweeps
from alignment.reporting.comparison import compare
from tests.reporting.fake_sweeps import BETA, RATE, curve, grid, key, write, write_run, write_sweep

SECTIONS = ["verdict", "leaders", "trade", "settings", "importance", "curves", "points", "command"]
FAILED = {"dpo": "failed", "evaluate_dpo": "waiting", "verdict": "waiting"}
HOSTILE = '<img src=x onerror="document.title=1">&\'"</script>'


def content(store: Path, points: list[Any], **facts: Any) -> dict[str, Any]:
    sweep = sweep_files.read_sweep(write_sweep(store, points, **facts))
    return compare(sweep, sweeps.read_points(sweep, store, lambda key: False))


def text_of(page: str) -> str:
    return re.sub(r"\s+", " ", re.sub(r"<(style|script)>.*?</\1>|<[^>]+>", " ", page, flags=re.DOTALL))


def printed(told: dict[str, Any], width: int = 100) -> str:
    screen = Console(file=io.StringIO(), width=width, highlight=False, color_system=None)
    compare_terminal.show(told, screen)
    assert isinstance(screen.file, io.StringIO)
    return screen.file.getvalue()


def some(store: Path) -> list[Any]:
    """Two betas of two seeds; a failed, a damaged, a missing point, and one that is no point."""
    points: list[Any] = grid(store, {0.1: [0.3, 0.32], 0.01: [0.1, 0.11]})
    write_run(store, "bad", {BETA: 1.0, "seed": 0}, {"reward": 0.0}, states=FAILED, error=f"loss is {HOSTILE}")
    write(store / "work" / key("bad", "dpo")[:16] / "metrics.jsonl", curve({BETA: 1.0})[:4])
    (store / "runs" / "torn").mkdir()
    (store / "runs" / "torn" / "run.json").write_text("{")
    for run in ("bad", "torn", "nowhere"):
        points.append({"run": run, "settings": {BETA: 1.0, "seed": 0}})
    return [*points, "x"]


# --- the page --------------------------------------------------------------------------------------------------------


def test_the_page_is_one_file_with_every_section_and_every_point(tmp_path: Path) -> None:
    told = content(tmp_path, some(tmp_path))
    path = compare_page.write_page(told, tmp_path / "sweeps" / "beta-0a1b2c3d")
    page = path.read_text(encoding="utf-8")
    assert path.name == "compare.html"
    assert re.findall(r'<section id="(\w+)"', page) == SECTIONS
    assert not re.search(r"""(src|href)=["']?(https?:)?//|@import|url\(http""", page), "nothing comes from elsewhere"
    assert page.count("<script") == page.count("</script>") == 1
    points = text_of(page[page.index('<section id="points"') :])
    for run, state in (("run-0.1-0", "done"), ("bad", "failed"), ("torn", "unreadable"), ("nowhere", "missing")):
        assert re.search(rf"{state} \S+ {run} ", points), run
    assert "the sweep does not say which run it is" in points
    assert compare_page.render(told) == compare_page.render(told), "equal content, equal bytes"


def test_texts_of_settings_and_errors_are_never_markup(tmp_path: Path) -> None:
    points = some(tmp_path)
    for i, value in enumerate((HOSTILE, HOSTILE * 9)):
        write_run(tmp_path, f"odd-{i}", {}, {"reward": 0.2 + i, "kl": 1.0 + i, HOSTILE: 1.0})
        points.append({"run": f"odd-{i}", "settings": {BETA: value, HOSTILE: value, "seed": 0}})
    facts = {"command": f"run {HOSTILE}", "wandb_group": HOSTILE}
    page = compare_page.render(content(tmp_path, points, name=HOSTILE, **facts) | {"name": HOSTILE})
    assert "<img" not in page
    assert str(escape(HOSTILE)) in page
    assert page.count("<script") == page.count("</script>") == 1


@pytest.mark.parametrize("points", [[], ["x"], [{"run": "nowhere", "settings": {BETA: 1.0}}]])
def test_a_sweep_without_results_has_its_page(tmp_path: Path, points: list) -> None:
    page = compare_page.render(content(tmp_path, points))
    assert re.findall(r'<section id="(\w+)"', page) == SECTIONS
    assert "No result yet" in page
    assert "There is nothing to explain" in page
    assert ("The sweep has no points." in page) == (not points)


def test_one_point_has_its_page(tmp_path: Path) -> None:
    page = text_of(compare_page.render(content(tmp_path, grid(tmp_path, {0.1: [0.3]}))))
    assert "The same for all: stage.dpo.beta=0.1, seed=0." in page
    assert "There are not two combinations with a result." in page
    assert "its own 95 % interval over prompts" in page


def test_the_w_and_b_group_is_named_where_it_is_known(tmp_path: Path) -> None:
    points = grid(tmp_path, {0.1: [0.3]})
    assert "W&amp;B" not in compare_page.render(content(tmp_path, points))
    assert "The same grouped in W&amp;B: group my-group." in compare_page.render(
        content(tmp_path, points, wandb_group="my-group")
    )


def test_five_hundred_points_take_seconds_and_less_than_three_megabytes(tmp_path: Path) -> None:
    points = []
    for i in range(500):
        settings = {
            BETA: 0.01 * (1 + i * 37 % 499),
            RATE: 1e-5 * 1.01**i,
            "stage.dpo.loss": "ipo" if i % 3 else "hinge",
        }
        metrics = {"reward": i % 17 / 17, "kl": 1 + i % 13, "stop_rate": 0.9, "tokens": 20.0, "heldout_nll": 1.7}
        write_run(tmp_path, f"run-{i:03d}", settings, metrics, steps=100)
        points.append({"run": f"run-{i:03d}", "settings": settings})
    folder = write_sweep(tmp_path, points)
    start = time.process_time()
    assert cli.main(["compare", "beta", "--store", str(tmp_path)]) == 0
    assert time.process_time() - start < 3
    page = (folder / "compare.html").read_text(encoding="utf-8")
    assert len(page.encode()) < 3e6
    assert all(f"run-{i:03d}" in page for i in range(500))


# --- figures ---------------------------------------------------------------------------------------------------------


def test_numbers_that_span_a_decade_stand_on_a_logarithmic_axis() -> None:
    axis = compare_charts.axis("beta", [0.01, 0.1, 1.0], absent=False)
    assert (axis.note, axis.marks) == ("log", [(0.0, "0.01"), (0.5, "0.1"), (1.0, "1")])
    assert compare_charts.axis("n", [1, 2, 5], absent=False).marks == [(0.0, "1"), (0.25, "2"), (1.0, "5")]
    assert compare_charts.axis("n", [0, 10], absent=False).note == "", "0 has no logarithm"


def test_what_is_no_number_is_a_category_and_what_is_absent_stands_at_the_foot() -> None:
    axis = compare_charts.axis("loss", ["ipo", True, "hinge"], absent=True)
    assert [text for _, text in axis.marks] == ["not set", "hinge", "ipo", "true"]
    assert axis.places[""] == 0
    assert [share for share, _ in axis.marks] == pytest.approx([0, 0.12, 0.56, 1])


def test_curves_are_averaged_where_all_seeds_are(tmp_path: Path) -> None:
    """The second is known at 1 and 3 only, so at 2 it is taken as 6, between 4 and 8; after 3 there is no mean."""
    mean = sweep_curves.average([[(1, 2.0), (2, 4.0), (3, 6.0), (4, 0.0)], [(1, 4.0), (3, 8.0)]])
    assert mean == [(1, 3.0), (2, 5.0), (3, 7.0)]


def test_curves_have_a_line_a_combination_and_thin_ones_for_seeds_and_for_what_broke_off(tmp_path: Path) -> None:
    told = content(tmp_path, some(tmp_path))
    found = sweep_curves.read_curves(told["groups"])
    lines = sweep_curves.lines(found, "loss", coloured=12)
    assert [(line["group"], line["kind"], len(line["curve"])) for line in lines] == [
        (2, "seed", 4), (1, "seed", 12), (1, "seed", 12), (0, "seed", 12), (0, "seed", 12),
        (1, "mean", 12), (0, "mean", 12),
    ]  # fmt: skip
    losses = (
        [row["loss"] for row in curve({BETA: 0.1, "seed": 0})],
        [row["loss"] for row in curve({BETA: 0.1, "seed": 1})],
    )
    assert lines[-1]["curve"][4] == (5, pytest.approx((losses[0][4] + losses[1][4]) / 2))
    assert [line["kind"] for line in sweep_curves.lines(found, "loss", coloured=0)] == ["seed", "mean", "mean"]


def test_torn_lines_of_metrics_are_passed_over(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2}\n{"step": 2, "loss": NaN}\n3\n{"step": 3, "lo')
    assert sweep_curves.read(tmp_path) == {"loss": [(1.0, 2.0)]}
    assert sweep_curves.read(tmp_path / "nowhere") == {}


# --- the terminal and the command ------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [80, 140])
def test_the_terminal_shows_the_leaderboard_and_names_every_point_without_a_result(tmp_path: Path, width: int) -> None:
    shown = printed(content(tmp_path, some(tmp_path)), width)
    assert "beta=0.1 leads with reward 0.310 (2 seeds)" in " ".join(shown.split())
    assert max(len(line) for line in shown.splitlines() if "│" in line or "─" in line) <= width
    for word in ("failed", "unreadable", "missing", "bad", "torn", "nowhere", "point 8", "no run.json: not begun yet"):
        assert word in shown
    assert "95 % interval of the mean over seeds" in shown
    assert "Holm's correction over all pairs of rows" in shown


def test_the_terminal_says_what_it_leaves_out(tmp_path: Path) -> None:
    points = [point for i in range(33) for point in grid(tmp_path, {round(0.01 * (i + 1), 2): [0.1 + i / 100]})]
    assert "3 further rows are on the page and in --json" in printed(content(tmp_path, points))


def test_the_command_prints_writes_and_lists(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = ["--store", str(tmp_path)]
    assert cli.main(["compare", *store]) == 0
    assert capsys.readouterr().out.startswith("no sweeps in ")
    folder = write_sweep(tmp_path, some(tmp_path))
    assert cli.main(["compare", *store]) == 0
    assert "beta-0a1b2c3d" in capsys.readouterr().out
    assert cli.main(["compare", "beta", "--json", *store]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [group["label"] for group in told["groups"]] == ["beta=0.1", "beta=0.01", "beta=1"]
    assert not (folder / "compare.html").exists()
    assert cli.main(["compare", str(folder), "--metric", "kl:minimize"]) == 0
    assert "kl" in capsys.readouterr().out
    assert (folder / "compare.html").is_file()


def test_the_command_compares_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    grid(tmp_path, {0.1: [0.3], 0.3: [0.1]})
    store = ["--store", str(tmp_path)]
    assert cli.main(["compare", "run-0.1", "run-0.3", "--json", *store]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [(g["label"], g["standing"]) for g in told["groups"]] == [("beta=0.1", "best"), ("beta=0.3", "worse")]
    assert cli.main(["compare", "run-0.1", "run-0.3", *store]) == 0
    (page,) = tmp_path.glob("sweeps/runs-*/compare.html")
    capsys.readouterr()
    assert cli.main(["compare", *store]) == 0
    assert page.parent.name not in capsys.readouterr().out, "no sweep was run"


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["no"], 2, "no sweep is called 'no'"),
        (["run-0.1", "no"], 2, "no run is called 'no'"),
        (["beta", "--metric", "kl"], 2, "--metric: kl is neither better high nor low by itself"),
    ],
)
def test_errors_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], code: int, said: str
) -> None:
    write_sweep(tmp_path, grid(tmp_path, {0.1: [0.3]}))
    assert cli.main(["compare", *arguments, "--store", str(tmp_path)]) == code
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
