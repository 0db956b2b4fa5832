from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from alignment.files import write_jsonl
from alignment.reporting import charts, lineage
from alignment.reporting.gather import Model, Stage
from alignment.reporting.svg import Frame, padded, path, tag, tick_labels, ticks


def stage(name: str, kind: str, **inputs: str) -> Stage:
    return Stage(name, kind, name * 8, "done", 1.0, None, inputs, None, {}, {})


def test_ticks_are_round_and_as_near_to_the_number_asked_for_as_can_be() -> None:
    assert ticks(0.0, 10.0, 5) == [0, 2, 4, 6, 8, 10]
    assert ticks(3.6, 4.45, 4) == pytest.approx([3.6, 3.8, 4.0, 4.2, 4.4])
    assert ticks(1.0, 1.0, 4) == []


def test_tick_labels_have_equal_decimals_and_a_true_minus() -> None:
    assert tick_labels([-0.5, 0.0, 0.5]) == ["−0.5", "0.0", "0.5"]
    assert tick_labels([0.0, 5e-4, 1e-3]) == ["0", "5e−4", "1e−3"]
    assert tick_labels([8.8e-6, 9e-6, 9.2e-6]) == ["8.8e−6", "9.0e−6", "9.2e−6"], "that tell them apart"
    assert tick_labels([0.0, 20_000.0]) == ["0k", "20k"]


def test_a_frame_maps_the_corners_of_the_data_to_the_corners_of_the_plot() -> None:
    frame = Frame(100, 50, (0, 10), (0, 4), left=10, right=10, top=5, bottom=5)
    assert [(frame.fx(0), frame.fy(0)), (frame.fx(10), frame.fy(4))] == [(10, 45), (90, 5)]


def test_a_gap_breaks_the_line_and_markup_in_attributes_is_escaped() -> None:
    assert path([(0, 0), (1, 1), None, (3, 3)]) == "M0.0 0.0L1.0 1.0M3.0 3.0"
    assert tag("g", data_tip='"><script>') == '<g data-tip="&#34;&gt;&lt;script&gt;"></g>'
    assert padded([2.0, 2.0]) == (1.5, 2.5)
    assert padded([0.0, 0.0]) == (0.0, 0.5), "a share of nothing is not drawn among shares below nothing"
    assert padded([-1.0, 1.0]) == (-1.12, 1.12)


def test_running_means_shrink_at_the_ends_and_keep_gaps() -> None:
    assert charts.running_mean([1.0, 2.0, 6.0, None, 4.0], 3) == [1.5, 3.0, 4.0, None, 4.0]
    assert charts.thinned(5, most=2) == [0, 3, 4]


def test_lengths_are_counted_per_bin_and_answers_cut_off_stand_apart() -> None:
    """Longest 12 -> bins one token wide; two answers of 3 tokens, one of 12 cut off; median 3."""
    rows = [{"tokens": 3, "finished": True}, {"tokens": 3, "finished": True}, {"tokens": 12, "finished": False}]
    drawn = charts.lengths([Model("a", "a", "a", 0, rows, {})])
    tips = re.findall(r'data-tip="([^"]*)"', str(drawn))
    assert tips == ["3 tokens\n2 ended by themselves", "12 tokens\n0 ended by themselves\n1 cut off"]
    assert "median 3 tokens · 1 of 3 cut off" in str(drawn)


@pytest.mark.parametrize(
    ("row", "titles"),
    [
        ({"loss": 1.0, "entropy": 2.0}, ["Loss", "Entropy"]),
        (
            {"loss": 0.5, "rewards/undesirable": 0.1, "reference_point": 0.2, "kl": 0.1},
            ["Loss", "Implicit reward", "Reference point", "KL to the reference"],
        ),
        ({"loss": 0.0, "reward": 1.0, "reward_std": 0.5, "kl_answer": 3.0}, ["Reward", "Spread of rewards",
                                                                             "KL to the start", "Loss"]),
        ({"loss": 0.7, "mean_reward": 1.0, "accuracy": 0.5}, ["Loss", "Accuracy", "Reward"]),
    ],
)  # fmt: skip
def test_each_kind_of_training_shows_what_it_is_watched_by(
    row: dict[str, float], titles: list[str], tmp_path: Path
) -> None:
    write_jsonl(tmp_path / "metrics.jsonl", [{"step": step, **row} for step in (1, 2)])
    trained = replace(stage("one", "kto"), folder=tmp_path)
    assert [panel["title"] for panel in charts.curves(trained, 0)] == titles


def test_one_generation_a_row_and_models_in_the_middle_lane() -> None:
    stages = [
        stage("start", "import_model"), stage("rows", "prepare", model="start"),
        stage("sft", "sft", model="start", data="rows"), stage("e0", "evaluate", model="start", data="rows"),
        stage("e1", "evaluate", model="start", data="rows"),
    ]  # fmt: skip
    assert lineage.places(stages) == {"start": (1, 0), "rows": (0, 1), "sft": (1, 2), "e0": (2, 2), "e1": (2, 3)}
    assert lineage.ancestors(stages)["sft"] == ["start", "rows"]
