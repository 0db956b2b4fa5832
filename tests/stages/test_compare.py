from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from alignment.config.compose import compose
from alignment.errors import InputError
from alignment.files import read_json, read_jsonl, write_jsonl
from alignment.stages import compare
from tests.stages.conftest import MakeContext


def write_answers(folder: Path, rewards: list[float], *, ids: list[int] | None = None, finished: bool = True) -> Path:
    folder.mkdir()
    write_jsonl(
        folder / "answers.jsonl",
        [
            {
                "id": str(i), "prompt": [], "reference": "", "answer": "", "tokens": 5, "finished": finished,
                "reward": reward, "terms": {"sentiment": reward}, "kl": 0.5, "repetition": 0.0, "heldout_nll": 2.0,
            }
            for i, reward in zip(ids or range(len(rewards)), rewards, strict=True)
        ],
    )  # fmt: skip
    return folder


@pytest.fixture
def evaluations(tmp_path: Path) -> dict[str, Path]:
    """start: 0 to 0.9, never stopping; sft: 0.2 more; dpo: 0.5 more, on the same ten prompts."""
    base = [i / 10 for i in range(10)]
    return {
        "sft": write_answers(tmp_path / "e_sft", [value + 0.2 for value in base]),
        "start": write_answers(tmp_path / "e_start", base, finished=False),
        "dpo": write_answers(tmp_path / "e_dpo", [value + 0.5 for value in base]),
    }


def test_the_verdict_file_holds_the_table_and_the_sentence(make_context: MakeContext, evaluations: Any) -> None:
    context = make_context("compare", evaluations, resamples=200)
    metrics = compare.run(context)
    verdict = read_json(context.folder / "verdict.json")
    assert verdict["verdict"] == "better"
    assert verdict["sentence"].startswith("dpo is better than start and sft on 10 held-out prompts")
    assert verdict["models"] == ["start", "sft", "dpo"]
    assert (verdict["confidence"], verdict["prompts"]) == (0.95, 10)
    assert [reason["gate"] for reason in verdict["reasons"]] == ["stop_rate", "reward", "reward_against_sft"]
    table = {row["metric"]: row for row in verdict["table"]}
    assert list(table) == ["reward", "sentiment", "stop_rate", "tokens", "repetition", "kl", "heldout_nll"]
    assert table["reward"]["values"]["start"]["mean"] == pytest.approx(0.45)
    assert table["reward"]["values"]["start"]["low"] < 0.45 < table["reward"]["values"]["start"]["high"]
    assert table["reward"]["difference"]["dpo"] == pytest.approx({"mean": 0.5, "low": 0.5, "high": 0.5})
    assert table["reward"]["difference"]["sft"] == pytest.approx({"mean": 0.2, "low": 0.2, "high": 0.2})
    assert table["stop_rate"]["difference"]["sft"]["mean"] == 1.0
    assert [table[name]["higher_is_better"] for name in ("sentiment", "kl", "heldout_nll")] == [True, None, False]
    assert metrics["reward_difference"] == pytest.approx(0.5)
    assert (metrics["better"], metrics["prompts"]) == (1.0, 10.0)
    assert len(list(read_jsonl(context.folder / "metrics.jsonl"))) == 1


def test_a_candidate_that_never_stops_is_broken(make_context: MakeContext, evaluations: Any, tmp_path: Path) -> None:
    evaluations["dpo"] = write_answers(tmp_path / "endless", [2.0] * 10, finished=False)
    context = make_context("compare", evaluations, resamples=100)
    assert compare.run(context)["better"] == 0.0
    assert read_json(context.folder / "verdict.json")["verdict"] == "broken"


def test_best_of_n_is_shown_and_does_not_decide(make_context: MakeContext, evaluations: Any, tmp_path: Path) -> None:
    """Its reward is above the candidate's on every prompt, which of another model would be the verdict *worse*."""
    evaluations["best_of_n"] = write_answers(tmp_path / "best", [2.0] * 10)
    context = make_context("compare", evaluations, name="other", resamples=100)
    compare.run(context)
    assert read_json(context.folder / "verdict.json")["verdict"] == "worse"
    answers = evaluations["best_of_n"] / "answers.jsonl"
    write_jsonl(answers, [{**row, "best_of": 4} for row in list(read_jsonl(answers))])
    context = make_context("compare", evaluations, resamples=100)
    compare.run(context)
    verdict = read_json(context.folder / "verdict.json")
    assert (verdict["verdict"], verdict["best_of"]) == ("better", {"best_of_n": 4})
    assert verdict["models"] == ["start", "sft", "dpo", "best_of_n"]
    assert [reason["gate"] for reason in verdict["reasons"]] == ["stop_rate", "reward", "reward_against_sft"]
    assert verdict["table"][0]["values"]["best_of_n"]["mean"] == 2.0


def test_models_that_answered_other_prompts_are_not_compared(
    make_context: MakeContext, evaluations: Any, tmp_path: Path
) -> None:
    """Of other ids, or of other prompts with the same ids."""
    evaluations["dpo"] = write_answers(tmp_path / "others", [0.0] * 10, ids=list(range(1, 11)))
    with pytest.raises(InputError, match="dpo and start did not answer the same prompts"):
        compare.run(make_context("compare", evaluations))
    evaluations["dpo"] = write_answers(tmp_path / "namesakes", [0.0] * 10)
    answers = evaluations["dpo"] / "answers.jsonl"
    other = [{"role": "user", "content": "Another question"}]
    write_jsonl(answers, [{**row, "prompt": other} for row in list(read_jsonl(answers))])
    with pytest.raises(InputError, match="dpo and start did not answer the same prompts"):
        compare.run(make_context("compare", evaluations, name="again"))


def test_the_verdict_says_on_how_many_prompts_rewards_were_compared(
    make_context: MakeContext, evaluations: Any
) -> None:
    """Two of dpo's ten answers have no reward, and one of start's, the second of these."""
    for role, unknown in (("dpo", (3, 4)), ("start", (4,))):
        answers = evaluations[role] / "answers.jsonl"
        rows = [{**row, "reward": None if i in unknown else row["reward"]} for i, row in enumerate(read_jsonl(answers))]
        write_jsonl(answers, rows)
    context = make_context("compare", evaluations, resamples=100)
    assert compare.run(context)["prompts"] == 10
    verdict = read_json(context.folder / "verdict.json")
    assert " on 8 held-out prompts: " in verdict["sentence"] and verdict["prompts"] == 10
    over = {row["metric"]: row["prompts"] for row in verdict["table"]}
    assert (over["reward"], over["stop_rate"]) == (8, 10), "each row of the table says over how many"


def test_without_rewards_to_compare_it_is_one_line(make_context: MakeContext, evaluations: Any, tmp_path: Path) -> None:
    """The last prompt alone has a reward of dpo, and no reward of start."""
    for role, known in (("dpo", 9), ("start", 0)):
        answers = evaluations[role] / "answers.jsonl"
        rows = [{**row, "terms": {"sentiment": None}} for row in read_jsonl(answers)]
        rows = [row if i == known else {**row, "reward": None} for i, row in enumerate(rows)]
        write_jsonl(answers, rows)
    with pytest.raises(InputError, match="no prompt has an answer with a reward of every model"):
        compare.run(make_context("compare", evaluations, resamples=100))


@pytest.mark.parametrize(
    ("normalise", "scaled", "drop", "word"),
    [("sigmoid", 0.04, 0.18, "broken"), ("zscore,mean:0.6,std:0.05", 0.08, 0.004, "better")],
)
def test_the_limit_of_relevance_is_a_cosine_whatever_the_reward_makes_of_it(
    normalise: str, scaled: float, drop: float, word: str, make_context: MakeContext, evaluations: Any
) -> None:
    for role in evaluations:
        answers, lower = evaluations[role] / "answers.jsonl", role == "dpo"
        told = {"terms": {"relevance": 0.6 - lower * scaled}, "unscaled": {"relevance": 0.6 - lower * drop}}
        write_jsonl(answers, [{**row, **told, "finished": True} for row in list(read_jsonl(answers))])
    terms = ["reward=sentiment_relevance", f"++reward.terms.relevance.normalise={{kind:{normalise}}}"]
    experiment = compose(["pipeline=sft_sample_dpo", *terms])
    context = replace(make_context("compare", evaluations, resamples=100), experiment=experiment)
    compare.run(context)
    verdict = read_json(context.folder / "verdict.json")
    assert verdict["verdict"] == word
    assert [one["gate"] for one in verdict["reasons"]][:2] == ["stop_rate", "relevance/unscaled"]


@pytest.mark.parametrize(("weight", "better"), [(2.0, True), (-1.0, False), (0.0, None)])
def test_of_a_term_that_the_reward_subtracts_less_is_better(
    weight: float, better: bool | None, make_context: MakeContext, evaluations: Any
) -> None:
    terms = ["reward=[sentiment,length]", f"reward.terms.sentiment.weight={weight}"]
    experiment = compose(["pipeline=sft_sample_dpo", *terms])
    context = replace(make_context("compare", evaluations, resamples=100), experiment=experiment)
    compare.run(context)
    table = {row["metric"]: row for row in read_json(context.folder / "verdict.json")["table"]}
    assert (table["sentiment"]["higher_is_better"], table["reward"]["higher_is_better"]) == (better, True)
