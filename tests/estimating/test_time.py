"""Seconds of a step and of a stage: by hand, by the page of clusters, and by a calibration."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset
from transformers import LlamaConfig

from alignment.config.sources import Dataset as DataSet
from alignment.config.sources import Lists, PathSource
from alignment.config.stages.preparing import Splits
from alignment.data import counting
from alignment.estimating import calibration, rows, traffic
from alignment.estimating.time import Layout, Stage, estimate
from alignment.estimating.work import records_of
from alignment.training.memory import Load
from bench import zero_arithmetic as arithmetic
from tests.estimating.test_traffic import of
from tests.training import tiny

SMALL = LlamaConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, vocab_size=300)


def numbers(length: int) -> list[int]:
    return list(range(5, 5 + length))


def stage(count: int = 40, tokens: int = 100, world: int = 1, length: int = 20, **changes: Any) -> Stage:
    settings = tiny.sft(**{"global_batch_size": 8, "max_steps": None, **changes})
    made = Dataset.from_list([{"input_ids": numbers(length), "labels": numbers(length)}] * count)
    load = Load(tokens, "fp32", 100_000, 100_000, "ddp" if world > 1 else "single", world)
    return Stage(settings, SMALL, records_of(settings, made), Layout(load, tokens, False))


# --- what is computed of a row ----------------------------------------------------------------------------------------


def test_a_pair_has_its_prompt_once_and_its_reference_before_the_first_step() -> None:
    """Prompt 3, answers 2 and 4: 9 tokens. The chosen answer's row sees 1 + ... + 5 = 15 pairs of tokens, the rejected
    one's four tokens see 3 each before them and 1 + ... + 4 = 10 among themselves: 37."""
    pairs = Dataset.from_list([{"prompt_ids": numbers(3), "chosen_ids": numbers(2), "rejected_ids": numbers(4)}])
    made = records_of(tiny.dpo(), pairs)
    assert [int(column[0]) for column in made.trained] == [9, 6, 8, 37]
    assert made.looked is None and made.reference is not None and made.reference == made.trained
    assert records_of(tiny.dpo(loss="simpo"), pairs).reference is None, "it has no reference"
    whole = records_of(tiny.dpo(loss="aot"), pairs)
    assert whole.looked is not None and whole.looks == 1, "it looks at the whole batch first"
    moving = records_of(tiny.dpo(reference_update={"every_steps": 2, "share": 1.0}), pairs)
    assert moving.looked is not None and moving.looks == 1
    reward = records_of(tiny.reward_model(), pairs)
    assert [int(column[0]) for column in reward.trained] == [9, 0, 2, 37], "of two tokens a number is made"


def test_kto_computes_the_answer_with_gradients_and_another_one_without() -> None:
    made = records_of(
        tiny.kto(),
        Dataset.from_list(
            [
                {"prompt_ids": numbers(3), "completion_ids": numbers(2), "mismatched_ids": numbers(5)},
                {"prompt_ids": numbers(1), "completion_ids": numbers(5), "mismatched_ids": numbers(2)},
            ]
        ),
    )
    assert made.trained.tokens.tolist() == [5, 6] and made.trained.scored.tolist() == [2, 5]
    assert made.looked is not None and made.looked.tokens.tolist() == [8, 3]
    assert made.sizes.lengths.tolist() == [10, 8], "what a micro-batch is cut by"
    alone = records_of(
        tiny.kto(loss="apo_zero_unpaired"),
        Dataset.from_list([{"prompt_ids": numbers(3), "completion_ids": numbers(2)}] * 2),
    )
    assert alone.looked is None and alone.sizes.lengths.tolist() == [5, 5]


# --- seconds ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "micro", "hpz"), [("zero2", 4096, 1), ("zero3", 8192, 1), ("zero3", 8192, 8)])
def test_a_step_of_7b_takes_what_the_page_of_clusters_says(name: str, micro: int, hpz: int) -> None:
    """32 GPUs with an adapter each, 16,384 tokens a GPU. The page leaves attention out and counts the embedding, 5%,
    and leaves out what AdamW reads and writes."""
    model = arithmetic.MODELS[0]
    config = LlamaConfig(
        hidden_size=model.hidden, intermediate_size=model.inner, num_hidden_layers=model.layers,
        num_attention_heads=model.heads, vocab_size=model.vocabulary,
    )  # fmt: skip
    settings = tiny.sft(global_batch_size=32 * 32, precision="bf16")
    made = records_of(settings, Dataset.from_list([{"input_ids": [7] * 512, "labels": [7] * 512}] * 32))
    load = Load(micro, "bf16", model.parameters, model.parameters, name, 32, hpz=hpz)
    one = Stage(settings, config, made, Layout(load, micro, False, nodes=4))
    (loads,) = one.loads(1, on_gpu=False)
    step = one.step(loads, of())
    page = arithmetic.traffic("ZeRO-2" if name == "zero2" else "ZeRO-3, hpZ" if hpz > 1 else "ZeRO-3",
                              model.parameters, model.parameters, 16_384 // micro, 32)  # fmt: skip
    across, inside = arithmetic.rates(8, 32)
    assert step is not None and loads.tokens == 32 * 16_384 and loads.micro == 16_384 // micro
    assert step.computing == pytest.approx(arithmetic.compute_seconds(model.parameters, 16_384, False), rel=0.05)
    assert step.links == pytest.approx((page.across - page.after) / across + page.inside / inside)
    assert step.after == pytest.approx(page.after / across)
    assert step.optimiser == pytest.approx(traffic.ADAM * model.parameters / 32 / 3e12)
    assert step.seconds == pytest.approx(max(step.computing, step.links) + step.after + step.optimiser)


def test_a_stage_takes_its_steps_and_the_hours_and_energy_of_its_gpus() -> None:
    """40 rows in batches of 8, twice: 10 steps of 160 tokens; two processes, of which each computes half."""
    one, two = stage(), stage(world=2)
    alone = estimate(one, 40, 10, of())
    assert (alone.steps, alone.epochs, alone.tokens) == (10, 2.0, 1600.0)
    both = estimate(two, 40, 10, of(memory=None, link=None))
    assert both.operations == pytest.approx(alone.operations) and both.sent == 2 * 4 * 100_000 / 2
    assert both.sent_s is None, "nobody knows the link"
    assert both.step_s == pytest.approx(both.operations / 2 / of().rate)  # type: ignore[operator]
    assert both.process_hours == pytest.approx(10 * both.step_s * 2 / 3600)  # type: ignore[operator]
    assert both.kwh == pytest.approx(both.process_hours * 0.7)  # type: ignore[operator]
    nothing = estimate(one, 40, 10, None)
    assert (nothing.step_s, nothing.seconds, nothing.kwh) == (None, None, None)
    assert nothing.operations == alone.operations


def test_a_calibration_scales_what_is_predicted_and_is_kept(tmp_path: Path) -> None:
    one, device = stage(), of()
    steps = [one.step(loads, device) for loads in one.loads(6, on_gpu=True)]
    seconds = [3 * step.seconds for step in steps[1:] if step is not None]
    made = calibration.calibrated(one, [*seconds[:-1], 100.0], device)  # for the last one others had the machine
    assert made is not None and made.scale == pytest.approx(3) and made.steps == 5
    plain, scaled = estimate(one, 40, 10, device), estimate(one, 40, 10, made.device, made.scale)
    assert scaled.seconds == pytest.approx(3 * plain.seconds)  # type: ignore[operator]
    assert f"{device.utilisation / 3:.0%}" in made.told()
    setup = tiny.engine()
    place = calibration.place(tmp_path, one, setup, device)
    assert calibration.kept(place) is None
    calibration.keep(place, made)
    assert calibration.kept(place) == made
    assert calibration.place(tmp_path, stage(count=80, length=30), setup, device) == place, "other rows"
    assert calibration.place(tmp_path, one, tiny.engine(watchdog_s=5.0), device) == place
    for other in (stage(tokens=50), stage(lora=tiny.LORA), stage(world=2), replace(one, config=LlamaConfig())):
        assert calibration.place(tmp_path, other, setup, device) != place
    place.write_text("{")
    assert calibration.kept(place) is None


def test_the_head_of_longer_rows_and_a_checkpoint_cost_more() -> None:
    kept = stage().operations(on_gpu=False).step.sum()
    again = stage()
    again = replace(again, layout=again.layout._replace(checkpointing=True))
    assert kept * 1.1 < again.operations(on_gpu=False).step.sum() < kept * 4 / 3
    assert stage(length=40).operations(on_gpu=False).step.sum() > 2 * kept
    assert kept < stage().operations(on_gpu=True).step.sum(), "TRL's head computes logits twice"


# --- rows that were not looked at -------------------------------------------------------------------------------------


def data(**changes: Any) -> DataSet:
    lists = Lists(pairs="best_worst", min_margin=0.0, max_pairs=1)
    plain = {"format": "auto", "columns": {}, "limit": None, "cap": None, "epochs": 1.0, "weight": None, "lists": lists}
    return DataSet(source=PathSource(kind="path", path="x"), **{**plain, **changes})


def test_rows_are_those_that_fit_without_the_splits() -> None:
    splits = Splits(heldout=50, prompts=50, train=None)
    assert rows.trained_on({"a": data()}, {"a": 1000}, {"a": 0.5}, splits) == 400
    assert rows.trained_on({"a": data(limit=400)}, {"a": 1000}, {"a": 1.0}, splits) == 300
    assert rows.trained_on({"a": data(cap=200)}, {"a": 1000}, {"a": 1.0}, splits) == 100
    assert rows.trained_on({"a": data()}, {"a": 1000}, {"a": 1.0}, splits.model_copy(update={"train": 64})) == 64
    assert rows.trained_on({"a": data()}, {"a": None}, {"a": 1.0}, splits) is None
    whole = Splits(heldout=0, prompts=0, train=None)
    both = {"a": data(epochs=2.0), "b": data()}
    assert rows.trained_on(both, {"a": 100, "b": 300}, {"a": 1.0, "b": 1.0}, whole) == 500
    weighed = {"a": data(weight=1.0), "b": data(weight=1.0)}
    assert rows.trained_on(weighed, {"a": 100, "b": 300}, {"a": 1.0, "b": 1.0}, whole) == 200


def test_rows_are_counted_as_they_are_read_and_not_by_lines(tmp_path: Path) -> None:
    """Answers of several lines, blank lines, and a row that is longer than what is looked at."""
    table = tmp_path / "rows.csv"
    with open(table, "w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerows([["prompt", "completion"], *([number, "a\n" * 40 + "end"] for number in range(30_000))])
    assert counting.in_source(str(table)) == pytest.approx(30_000, rel=0.03)
    long = tmp_path / "long.jsonl"
    row = '{"prompt": "' + "a" * (2 << 20) + '"}'
    long.write_text("\n".join([row] * 3))
    assert counting.in_source(str(long)) == 3
    for name in "abc":
        (tmp_path / f"{name}.tsv").write_text('a\tb\n1\t"2\n3"\n\n4\t5\n')
    assert counting.in_source(f"{tmp_path}/*.tsv") == 6, "few rows are counted exactly"
    (tmp_path / "c.tsv").write_text('a\tb\n1\t"2')
    assert counting.in_source(f"{tmp_path}/*.tsv") is None, "reading it tells why"


def test_rows_of_a_file_are_counted_by_its_beginning_or_its_footer(tmp_path: Path) -> None:
    lines = tmp_path / "rows.jsonl"
    lines.write_text('{"prompt": "abcdefgh"}\n' * 100_000)
    assert counting.in_source(str(lines)) == pytest.approx(100_000, rel=0.01)
    table = tmp_path / "rows.parquet"
    Dataset.from_dict({"a": np.arange(123)}).to_parquet(table)
    assert counting.in_source(table) == 123
    array = tmp_path / "rows.json"
    array.write_text("[]")
    assert counting.in_source(array) is None, "it would have to be read"
    table.write_bytes(b"PAR1 and no more")
    assert counting.in_source(table) is None, "reading it tells why"
