"""The stage that trains reward models: what it learns, writes, refuses; and how it goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset

from alignment.errors import InputError, PreemptedError
from alignment.files import write_json, write_jsonl
from alignment.stages import reward_model
from alignment.training.classifier import load_classifier
from tests.conftest import write_tiny_model
from tests.training import tiny, trainers
from tests.training.test_resume import After, rows, weights

pytestmark = pytest.mark.usefixtures("one_thread")
GOOD, BAD = 200, 201  # a token that makes an answer good, or bad


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("start")
    write_tiny_model(folder / "model")
    return folder


def told_pairs(count: int = 48, seed: int = 5) -> list[dict[str, Any]]:
    """Answers that differ in one token; margins from 0 to 2."""
    random, made = np.random.default_rng(seed), []
    for number in range(count):
        prompt, before, after = (tiny.tokens(random, 3, 9) for _ in range(3))
        sides = {side: [*before, word, *after, tiny.EOS] for side, word in (("chosen", GOOD), ("rejected", BAD))}
        made.append(
            {"prompt_ids": prompt, **{f"{s}_ids": ids for s, ids in sides.items()}, "margin": float(number % 3)}
        )
    return made


def scored_of(pairs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    both = [
        (pair["prompt_ids"], pair[f"{s}_ids"], score)
        for pair in pairs
        for s, score in (("chosen", 0.9), ("rejected", 0.1))
    ]
    return [{"prompt_ids": p, "completion_ids": c, "score": score} for p, c, score in both]


def trained(folder: Path, start: Path, given: list[dict[str, Any]], stop: int | None = None, **settings: Any) -> Any:
    data = folder.parent / f"{folder.name}-rows"
    if not data.exists():
        Dataset.from_list(given).save_to_disk(data / "train")
    context = tiny.context(folder, {"model": start, "data": data}, tiny.reward_model(**settings), tiny.engine())
    if stop is not None:
        context.stop = After(context, stop)
    return reward_model.run(context)


def rewards_of(folder: Path, ids: list[list[int]]) -> list[float]:
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(folder)
    with torch.no_grad():
        return [model(torch.tensor([row])).logits.item() for row in ids]


LEARNS = {"max_steps": 40, "learning_rate": 1e-2, "schedule": "constant"}


@pytest.mark.parametrize("lora", [None, tiny.LORA], ids=["full", "lora"])
def test_it_learns_what_makes_an_answer_good_and_is_an_ordinary_classifier(
    lora: Any, start: Path, tmp_path: Path
) -> None:
    from transformers import AutoTokenizer

    metrics = trained(tmp_path / "run", start, told_pairs(), lora=lora, **LEARNS)
    assert metrics["first_loss"] == pytest.approx(np.log(2), abs=0.2)
    unseen = told_pairs(seed=6)
    sides = [[row["prompt_ids"] + row[f"{side}_ids"] for row in unseen] for side in ("chosen", "rejected")]
    chosen, rejected = (np.array(rewards_of(tmp_path / "run" / "model", side)) for side in sides)
    assert (chosen > rejected).mean() > 0.9
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run" / "model")
    assert tokenizer.pad_token_id == 0 and tokenizer.chat_template
    assert (tmp_path / "run" / "adapter").exists() == (lora is not None)


def test_losses_and_weights_are_those_of_trl(start: Path, tmp_path: Path) -> None:
    """Margins and centring; TRL pads the whole batch. Losses equal to 1e-5, as for the other stages."""
    steps = 12
    pairs, how = told_pairs(), {"margin": 1.0, "centring": 0.05, "max_steps": steps}
    trained(tmp_path / "run", start, pairs, **how)
    data = Dataset.from_list(pairs)
    model = load_classifier(start / "model", seed=3)
    batches = trainers.batches_of("reward", data, steps, budget=120)
    order = [row for step in range(steps) for row in batches.rows(step)]
    config = trainers.configuration(
        "reward", steps, tmp_path / "stock", center_rewards_coefficient=0.05, per_device_train_batch_size=6
    )
    from transformers import AutoTokenizer

    stock = trainers.StockReward(
        model=model, args=config, processing_class=AutoTokenizer.from_pretrained(start / "model"),
        train_dataset=Dataset.from_list([trainers.with_prompts(pairs[row]) for row in order]),
    )  # fmt: skip
    wanted = trainers.losses(stock)
    assert [row["loss"] for row in rows(tmp_path / "run")] == pytest.approx(wanted, abs=1e-5)
    from safetensors.torch import load_file

    written = load_file(tmp_path / "run" / "model" / "model.safetensors")
    assert max((written[k] - v).abs().max() for k, v in stock.model.state_dict().items() if k in written) < 1e-5


@pytest.mark.parametrize("loss", ["mse", "bce"])
def test_regression_finds_the_scores(loss: str, start: Path, tmp_path: Path) -> None:
    given = scored_of(told_pairs())
    metrics = trained(tmp_path / "run", start, given, loss=loss, **{**LEARNS, "max_steps": 80, "learning_rate": 3e-3})
    assert metrics["squared_error"] < 0.03 < 0.16, "0.16: of who always says 0.5"


def test_the_head_is_drawn_from_the_seed_alone(start: Path) -> None:
    torch.manual_seed(1)
    one, other = load_classifier(start / "model", 3).score.weight, load_classifier(start / "model", 4).score.weight
    torch.manual_seed(2)
    assert torch.equal(load_classifier(start / "model", 3).score.weight, one) and not torch.equal(one, other)
    assert one.std().item() == pytest.approx(1 / np.sqrt(33), rel=0.3)


@pytest.mark.parametrize(
    ("given", "settings", "line"),
    [
        (tiny.pair_rows(8), {"margin": 1.0}, "no pair has a `margin`"),
        (
            [*scored_of(told_pairs(4)), {**tiny.scored_rows(1)[0], "score": 1.5}],
            {"loss": "bce"},
            "row 9: `score` is 1.5, not from 0 to 1, as chances are",
        ),
    ],
)
def test_rows_that_do_not_fit_the_loss_are_refused(
    given: Any, settings: Any, line: str, start: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=line):
        trained(tmp_path / "run", start, given, **settings)


def test_what_is_held_out_and_margins_below_0_are_looked_at_too(
    start: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Rows are called as their source has them."""
    data = tmp_path / "scores-rows"
    for split, odd in (("train", 0.5), ("heldout", 2.0)):
        rows_ = [*scored_of(told_pairs(4)), {**tiny.scored_rows(1)[0], "score": odd}]
        Dataset.from_list(rows_).save_to_disk(data / split)
        write_jsonl(data / f"{split}.jsonl", [{"id": f"mine-{number}"} for number in range(len(rows_))])
    write_json(data / "data_report.json", {"source": "scores.jsonl"})
    with pytest.raises(InputError, match=r"scores\.jsonl, row mine-8: `score` is 2, not from 0 to 1, as chances are"):
        trained(tmp_path / "scores", start, [], loss="bce")
    trained(tmp_path / "pairs", start, [{**row, "margin": -1.0} for row in tiny.pair_rows(8)], margin=1.0, max_steps=1)
    assert "8 pairs have a margin below 0: they may be ranked the other way round" in capsys.readouterr().out
    report = {"source": "pairs.jsonl", "margins": {"rows": 7, "used": False, "one_without": "pairs.jsonl:4"}}
    (tmp_path / "few-rows").mkdir()
    Dataset.from_list(tiny.pair_rows(8)).save_to_disk(tmp_path / "few-rows" / "train")
    write_json(tmp_path / "few-rows" / "data_report.json", report)
    with pytest.raises(InputError, match=r"`margin` is not of all .*: 7 have .*one without is pairs\.jsonl:4"):
        trained(tmp_path / "few", start, [], margin=1.0)


@pytest.mark.parametrize(
    ("lora", "given", "how"),
    [
        (None, told_pairs(), {"margin": 1.0, "label_smoothing": 0.1, "centring": 0.01}),
        (tiny.LORA, scored_of(told_pairs()), {"loss": "mse"}),
    ],
    ids=["pairs", "scores with lora"],
)
def test_interrupted_is_uninterrupted_bit_for_bit(lora: Any, given: Any, how: Any, start: Path, tmp_path: Path) -> None:
    how = {**how, "lora": lora, "max_steps": 8}
    trained(tmp_path / "whole", start, given, **how)
    for stop in (2, 5):
        with pytest.raises(PreemptedError):
            trained(tmp_path / "parts", start, given, stop=stop, **how)
    trained(tmp_path / "parts", start, given, **how)
    assert rows(tmp_path / "parts") == rows(tmp_path / "whole")
    assert weights(tmp_path / "parts") == weights(tmp_path / "whole")
