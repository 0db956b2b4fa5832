"""What the benchmark's arms are given, and how the work and memory of each is counted, by hand-derived numbers."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from bench import measure, profile
from bench.pool import ENVIRONMENT
from bench.workloads import SHAPES, Size, Totals, Workload, draw_lengths, pairs, rows_for, totals


@pytest.mark.parametrize("lengths", SHAPES)
def test_lengths_are_the_same_for_the_same_seed_and_inside_the_limits(lengths: str) -> None:
    drawn = draw_lengths(lengths, 200, seed=3)
    assert (drawn == draw_lengths(lengths, 200, seed=3)).all()
    assert drawn.min() >= 5 and drawn.max() <= 700
    if lengths == "equal":
        assert (drawn == [16, 240, 240]).all()
    else:
        assert (drawn != draw_lengths(lengths, 200, seed=4)).any()


def test_lengths_have_the_medians_of_their_shapes() -> None:
    hh, tldr = np.median(draw_lengths("hh", 4000, 0), 0), np.median(draw_lengths("tldr", 4000, 0), 0)
    assert hh == pytest.approx([math.exp(4.8), math.exp(4.0), math.exp(4.0)], rel=0.06)
    assert tldr == pytest.approx([350, 38, 35], rel=0.03)


def test_rows_in_the_columns_of_each_trainer_and_their_totals() -> None:
    pair = {"prompt_ids": [4, 5, 6], "chosen_ids": [7, 8], "rejected_ids": [9]}
    assert rows_for("sft", [pair]) == [{"input_ids": [4, 5, 6, 7, 8], "labels": [-100, -100, -100, 7, 8]}]
    assert rows_for("reward", [pair]) == [{"chosen_ids": [4, 5, 6, 7, 8], "rejected_ids": [4, 5, 6, 9]}]
    assert totals("dpo", [pair]) == Totals(rows=1, tokens=9, scored=3, squares=25 + 16)
    assert totals("sft", [pair]) == Totals(rows=1, tokens=5, scored=2, squares=25)
    assert totals("reward", [pair]) == Totals(rows=1, tokens=9, scored=2, squares=25 + 16)
    workload = Workload("dpo", "hh", "cpu", rows=2, steps=2)
    assert pairs(workload) == pairs(workload) and len(pairs(workload)) == 4


def test_model_flops_by_hand() -> None:
    size = Size(vocabulary=10, hidden=2, intermediate=3, layers=1, heads=1)
    assert size.body_parameters() == 4 * 4 + 3 * 2 * 3  # 34
    needed = 6 * 34 * 9 + 6 * 2 * 10 * 3 + 12 * 1 * 2 * 41 / 2
    work = Totals(rows=1, tokens=9, scored=3, squares=41)
    assert measure.model_flops(size, work, "sft") == needed
    assert measure.model_flops(size, work, "dpo") == pytest.approx(needed * 4 / 3)
    assert measure.peak_flops("NVIDIA H100 80GB HBM3") == 989e12 and measure.peak_flops("Something") is None


class Body(torch.nn.Module):
    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        return input_ids


def test_flops_and_positions_of_what_ran_are_counted() -> None:
    query = torch.ones(1, 1, 8, 4, requires_grad=True)
    with measure.flop_counter() as flops:
        torch.nn.functional.scaled_dot_product_attention(query, query, query)
    assert flops.get_total_flops() == 2 * (2 * 8 * 8 * 4)  # two products of [8, 4] by [4, 8] and [8, 8] by [8, 4]
    sums, factor = torch.zeros(8, 2), torch.ones(8, 4)
    with measure.flop_counter() as flops:
        sums.addmm_(factor, torch.ones(4, 2))
    assert flops.get_total_flops() == 2 * 8 * 4 * 2  # 8 times 2 sums of 4 products
    model = torch.nn.Module()
    model.base_model = Body()
    counter = measure.Counter()
    counter.watch(model)
    with torch.no_grad():
        model.base_model(torch.ones(2, 5), attention_mask=torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]))
    model.base_model(torch.ones(2, 5))
    assert counter.to_json() == {
        "positions": {"policy": 10, "reference": 10}, "attended": {"policy": 10, "reference": 8},
    }  # fmt: skip


def test_a_piece_that_cannot_be_switched_off_is_said(tmp_path: Path) -> None:
    from bench.arms import Setting, Unavailable, make_ours

    workload = Workload("dpo", "hh", "tiny", rows=2, steps=1)
    setting = Setting(workload, "cpu", "fp32", tmp_path, measure.Counter())
    with pytest.raises(Unavailable, match="no_such_piece"):
        make_ours("dpo", frozenset({"no_such_piece"}), pairs(workload), setting)


def test_the_peak_of_memory_starts_anew() -> None:
    assert measure.start_peak("cpu") > 0
    block = np.ones(20_000_000)  # 160 MB
    high = measure.peak("cpu")
    del block
    assert measure.start_peak("cpu") < high - 100e6
    assert measure.peak("cpu") < high - 100e6


def test_the_profile_says_where_the_time_goes(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ENVIRONMENT:
        monkeypatch.setenv(name, "")  # so that what the profile sets is undone
    threads = torch.get_num_threads()
    try:
        profile.main(["--size", "tiny", "--lengths", "equal"])
    finally:
        torch.set_num_threads(threads)
    said = capsys.readouterr().out
    assert "\nours, dpo, equal lengths\n\n|" in said
    shares = [int(line.split("|")[2].strip(" %")) for line in said.splitlines() if line.startswith("|") and "%" in line]
    assert len(shares) == 5 and abs(sum(shares) - 100) <= 3 and all(shares[:3])  # rounded to whole per cent
    with pytest.raises(SystemExit, match="2"):
        profile.main(["--arm", "ours_no_sharing", "--task", "sft"])
    assert "ours_no_sharing has no task sft: dpo" in capsys.readouterr().err


def test_a_whole_last_layer_executes_more(tmp_path: Path) -> None:
    from alignment.training import last_layer, shared_prefix
    from bench.arms import Setting, maker

    workload = Workload("dpo", "tldr", "tiny", rows=2, steps=1)
    executed = []
    for arm in ("ours_whole_last_layer", "ours"):
        setting = Setting(workload, "cpu", "fp32", tmp_path / arm, measure.Counter())
        setting.folder.mkdir()
        with measure.flop_counter() as flops:
            maker(arm)("dpo", pairs(workload), setting).trainer.train()
        executed.append(flops.get_total_flops())
    assert executed[0] > executed[1] > 0
    assert shared_prefix.narrow is last_layer.narrow  # switched on again
