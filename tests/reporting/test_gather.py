from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from alignment.errors import InputError
from alignment.reporting.gather import changes, choose, curve_rows, gather, spread, summarise, tail

MakeRun = Callable[..., tuple[Path, Path]]


def test_the_chosen_samples_are_the_biggest_losses_and_an_even_spread_up_to_the_biggest_gain() -> None:
    """31 ids with change = rank: ranks 0, 1, 2, then seven from 3 to 30 every 27 / 6 = 4.5 (round half to even)."""
    change = {f"{rank:02d}": float(rank) for rank in reversed(range(31))}
    assert choose(change) == ["00", "01", "02", "03", "07", "12", "17", "21", "25", "30"]
    assert list(spread(4, 10, 3)) == [0, 1, 2, 3]


def test_equal_changes_are_ranked_by_id_so_that_the_choice_never_depends_on_the_order_of_rows() -> None:
    assert choose({"b": 0.0, "a": 0.0, "c": -1.0}) == ["c", "a", "b"]


def test_changes_pair_the_answers_of_the_same_prompt(make_run: MakeRun) -> None:
    """Row 2: sentiment 0.9 -> -0.95, relevance as drawn; row 3 the other way round."""
    report = gather(*make_run())
    change = changes(report)
    assert len(change) == 60
    before, after = report.models[0].answers[2], report.models[2].answers[2]
    assert change["row-002"] == pytest.approx(after["reward"] - before["reward"])
    assert min(change, key=change.__getitem__) == "row-002"
    assert max(change, key=change.__getitem__) == "row-003"


def test_models_keep_the_comparison_s_order_and_one_colour_each(make_run: MakeRun) -> None:
    report = gather(*make_run())
    assert [(m.label, m.node, m.colour) for m in report.models] == [
        ("start", "start", 0),
        ("SFT", "sft", 1),
        ("DPO", "dpo", 2),
    ]
    assert report.baseline is report.models[0]
    assert report.candidate is report.models[2]


def test_without_a_comparison_the_evaluated_models_are_found_by_what_they_evaluate(make_run: MakeRun) -> None:
    report = gather(*make_run(["start", "rows", "sft", "evaluate_start", "evaluate_sft"]))
    assert report.verdict is None
    assert [m.name for m in report.models] == ["start", "sft"]


def test_a_model_evaluated_in_two_ways_without_a_comparison_is_shown_in_both(make_run: MakeRun) -> None:
    """The second evaluation is of the first one's model too, as best-of-n is."""
    folder, store = make_run(["start", "rows", "sft", "evaluate_start", "evaluate_sft"])
    run = json.loads((folder / "run.json").read_text())
    next(node for node in run["nodes"] if node["name"] == "evaluate_sft")["inputs"]["model"] = "start"
    (folder / "run.json").write_text(json.dumps(run))
    report = gather(folder, store)
    assert [(m.name, m.node, m.colour) for m in report.models] == [
        ("evaluate_start", "start", 0),
        ("evaluate_sft", "start", 1),
    ]
    assert report.models[0].answers != report.models[1].answers


def test_a_step_written_twice_counts_as_it_was_last_and_a_half_written_line_is_left_out(make_run: MakeRun) -> None:
    folder, store = make_run()
    stage = gather(folder, store).stage("sft")
    assert stage and stage.folder
    with open(stage.folder / "metrics.jsonl", "a", encoding="utf-8") as stream:
        stream.write(json.dumps({"step": 3, "loss": 9.0}) + '\n{"step": 14, "lo')
    rows = curve_rows(stage)
    assert [row["step"] for row in rows] == list(range(1, 14))
    assert rows[2]["loss"] == 9.0


def test_the_summary_names_the_final_model(make_run: MakeRun) -> None:
    folder, store = make_run(states={"start": "reused"})
    run = json.loads((folder / "run.json").read_text())
    final = gather(folder, store).stage("dpo")
    assert final and final.folder
    summary = summarise(run, store)
    assert summary["model"] == final.folder / "model"
    assert summary["states"] == {"reused": 1, "done": 10}
    assert summary["spent_s"] == pytest.approx(415.8), "all but the 21.4 s of the reused import"
    shutil.rmtree(final.folder / "model")
    assert summarise(run, store)["model"] is None, "the folder is not there"


def test_a_folder_without_a_run_is_an_error_that_says_so(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no run\.json"):
        gather(tmp_path, tmp_path)


def test_of_the_end_of_a_file_no_line_is_half(tmp_path: Path) -> None:
    path = tmp_path / "log.txt"
    path.write_text("first\nsecond\nthird\n")
    assert [tail(path, size) for size in (6, 7, 12, 13, 14, 99)] == [
        "third\n", "third\n", "third\n", "second\nthird\n", "second\nthird\n", "first\nsecond\nthird\n",
    ]  # fmt: skip
    path.write_text("a line that is longer than that\n")
    assert tail(path, 5) == "that\n"
    assert tail(tmp_path / "none", 9) == ""
