"""Terms are scaled, weighted and added; a term that fails takes the reward of its answer with it, and is counted."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from alignment.config.rewards import Reward
from alignment.errors import InputError
from alignment.rewards import Judge
from tests.rewards.conftest import judge_by, row, values

WORDS = {"kind": "length", "unit": "words", "low": 2, "high": None, "fall_off": 4}
CORRECT = {"kind": "answer", "find": "auto", "compare": "number", "tolerance": 0.0}


@pytest.mark.parametrize(
    ("normalise", "expected"),
    [
        (None, [1.0, 0.5]),
        ({"kind": "clip", "low": 0.6, "high": 0.9}, [0.9, 0.6]),
        ({"kind": "sigmoid"}, [1 / (1 + math.exp(-1)), 1 / (1 + math.exp(-0.5))]),
        ({"kind": "zscore", "mean": 0.5, "std": 0.25}, [2.0, 0.0]),
    ],
)
def test_a_term_is_scaled_before_it_is_weighted(normalise: Any, expected: list[float]) -> None:
    """Of two words the value is 1; none is two short of four: 1 - 2 / 4 = 0.5."""
    judge = judge_by(**WORDS, normalise=normalise)
    assert values(judge, "two words", "") == pytest.approx(expected, abs=1e-12)
    doubled = judge_by(**{**WORDS, "weight": -2.0}, normalise=normalise)
    scores = doubled.score([row()], ["two words"])
    assert scores == [{"reward": pytest.approx(-2 * expected[0]), "terms": {"term": pytest.approx(expected[0])}}]


@pytest.mark.parametrize("value", [-1e4, -1.0, 0.0, 3.0, 1e4])
def test_the_sigmoid_neither_overflows_nor_is_off(value: float) -> None:
    from alignment.config.reward_terms import Sigmoid
    from alignment.rewards.judge import scaling

    exact = 1 / (1 + math.exp(-value)) if value > -700 else 0.0
    assert scaling(Sigmoid(kind="sigmoid"))(value) == pytest.approx(exact, abs=1e-15)


def test_an_answer_that_a_term_fails_for_has_no_reward_and_says_why() -> None:
    judge = Judge(Reward.model_validate({"terms": {
        "size": {**WORDS, "weight": 1.0}, "right": {**CORRECT, "weight": 1.0},
    }}), {})  # fmt: skip
    good, bad, odd = judge.score([row(expected=4), row(), row(expected="blue")], ["It is 4"] * 3)
    assert good == {"reward": 2.0, "terms": {"size": 1.0, "right": 1.0}}
    why = "its row expects nothing: it has neither `expected` nor `reference`"
    assert bad == {"reward": None, "terms": {"size": 1.0, "right": None}, "failed": {"right": why}}
    assert odd["failed"] == {"right": "its row expects no number, but 'blue'"}
    assert json.loads(json.dumps(bad)) == bad


def test_a_term_that_is_only_watched_fails_without_taking_the_reward() -> None:
    """Nor is it the reason where another term has failed, too."""
    judge = Judge(Reward.model_validate({"max_failed_share": 0.5, "terms": {
        "size": {**WORDS, "weight": 2.0}, "seen": {**CORRECT, "weight": 0.0},
    }}), {})  # fmt: skip
    score, *_ = scores = judge.score([row()] * 3, ["It is 4"] * 3)
    assert (score["reward"], score["terms"]) == (2.0, {"size": 1.0, "seen": None})
    assert list(score["failed"]) == ["seen"] and judge.failures(scores) == 0
    none = {"reward": None, "terms": {}, "failed": {"seen": "it is blind", "size": "it has none"}}
    with pytest.raises(InputError, match=r"reward.terms.size: 1 of 1 answers have no reward: it has none \(1 times\)"):
        judge.failures([none])


def test_a_sum_that_cannot_be_trained_on_is_a_failure_too() -> None:
    """Twice the weight for two words, the weight itself for none."""

    def scores(weight: float) -> list[Any]:
        sizes = {name: {**WORDS, "weight": weight} for name in ("size", "again")}
        return Judge(Reward.model_validate({"terms": sizes}), {}).score([row()] * 2, ["two words", ""])

    (large, small), told = scores(1e308), "with its weight the reward is"
    assert large["failed"] == {"size": f"{told} inf"}
    assert small["failed"] == {"size": f"{told} 1e+308, more than 1e+15 in size"}
    assert [score["reward"] for score in scores(6e14)] == [None, 6e14]


def test_a_value_that_cannot_be_trained_on_is_no_reward() -> None:
    """(1 - 0.5) / 1e-20 of two words; (0.5 - 0.5) / 1e-20 of none."""
    judge = judge_by(**WORDS, normalise={"kind": "zscore", "mean": 0.5, "std": 1e-20})
    large, small = judge.score([row()] * 2, ["two words", ""])
    assert large["failed"] == {"term": "its value is 5e+19, more than 1e+15 in size"}
    assert (large["reward"], small["reward"]) == (None, 0.0)


def test_too_many_failures_are_an_error_with_the_commonest_reason() -> None:
    def judge(limit: float) -> Judge:
        terms = {"right": {**CORRECT, "weight": 1.0}}
        return Judge(Reward.model_validate({"terms": terms, "max_failed_share": limit}), {})

    scores = judge(0.5).score([row(expected=1), row(), row(), row(expected="no")], ["1"] * 4)
    assert judge(0.75).failures(scores) == 3
    with pytest.raises(InputError) as told:
        judge(0.5).failures(scores)
    assert str(told.value) == (
        "reward.terms.right: 3 of 4 answers have no reward: its row expects nothing: it has neither `expected` nor "
        "`reference` (2 times, beside 1 other reason) (mend the term, or raise reward.max_failed_share, 0.5)"
    )
    assert judge(0.0).failures([]) == 0
    with pytest.raises(InputError, match=r"5 of 8 answers have no reward: why \(1 times among those sampled last\)"):
        judge(0.5).check_share([{"right": "why"}], 5, 8)
