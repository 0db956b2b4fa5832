"""Every verdict. The intervals are known by construction: a constant difference has one without width."""

from __future__ import annotations

from typing import Any

import pytest

from alignment.evaluation import gates
from alignment.evaluation.statistics import Comparison

LIMITS = gates.Limits(max_relevance_drop=0.05, min_stop_rate=0.9)


def column(values: float | list[float]) -> list[float]:
    return values if isinstance(values, list) else [values] * 10


def decide(
    reward: Any = 0.5, relevance: Any = 0.0, stops: int = 10, sft: Any = 0.2, watched: tuple[str, ...] = ("relevance",)
) -> dict[str, Any]:
    """Verdict on a dpo model. reward, relevance: differences from start; stops: of ten; sft: its reward."""
    values = {
        "start": {"reward": column(0.0), "relevance": column(0.3), "stop_rate": column(0.0)},
        "sft": {"reward": column(sft), "relevance": column(0.3), "stop_rate": column(1.0)},
        "dpo": {
            "reward": column(reward),
            "relevance": [0.3 + change for change in column(relevance)],
            "stop_rate": [float(i < stops) for i in range(10)],
        },
    }
    comparison = Comparison(values, {}, 0.95, 500, 0)
    return gates.verdict(comparison, candidate="dpo", baseline="start", limits=LIMITS, relevance=watched, prompts=10)


def passed(found: dict[str, Any]) -> dict[str, bool]:
    return {reason["gate"]: reason["passed"] for reason in found["reasons"]}


def test_a_sure_gain_with_relevance_and_stopping_kept_is_better() -> None:
    found = decide()
    assert found["verdict"] == "better"
    assert passed(found) == {"stop_rate": True, "relevance": True, "reward": True, "reward_against_sft": True}
    assert found["sentence"] == (
        "dpo is better than start and sft on 10 held-out prompts: "
        "its reward differs by +0.50 (95% interval +0.50 to +0.50) from start's (all above 0 asked), "
        "its reward differs by +0.30 (95% interval +0.30 to +0.30) from sft's (not all below 0 asked), "
        "100% of its answers end by themselves (at least 90% asked), "
        "its relevance differs by +0.00 (95% interval +0.00 to +0.00) (at most 0.05 lower allowed)."
    )


def test_a_model_that_gains_on_the_baseline_but_not_on_sft_is_said_to_beat_the_baseline_only() -> None:
    found = decide(reward=[0.1, 0.3] * 5, sft=0.2)
    assert found["verdict"] == "better"
    assert found["sentence"].startswith("dpo is better than start on 10")


def test_a_gain_whose_interval_holds_zero_is_no_measurable_difference() -> None:
    found = decide(reward=[1.0, -0.9] * 5, sft=0.0)
    assert found["verdict"] == "no measurable difference"
    assert not passed(found)["reward"]
    assert found["sentence"].startswith("dpo is not shown to be better than start on 10 held-out prompts: its reward")


def test_a_sure_loss_against_the_baseline_is_worse() -> None:
    found = decide(reward=-0.1, sft=-0.2)
    assert found["verdict"] == "worse"
    assert "its reward differs by -0.10" in found["sentence"]


def test_a_sure_loss_against_the_sft_model_is_worse_whatever_the_baseline() -> None:
    found = decide(reward=0.1, sft=0.4)
    assert found["verdict"] == "worse"
    assert passed(found) == {"stop_rate": True, "relevance": True, "reward": True, "reward_against_sft": False}
    assert "its reward differs by -0.30 (95% interval -0.30 to -0.30) from sft's" in found["sentence"]


def test_a_model_that_does_not_stop_is_broken_however_high_its_reward() -> None:
    found = decide(stops=8)
    assert found["verdict"] == "broken"
    assert found["sentence"] == (
        "dpo is broken on 10 held-out prompts: 80% of its answers end by themselves (at least 90% asked)."
    )


def test_the_stop_rate_may_lie_exactly_on_its_limit() -> None:
    assert decide(stops=9)["verdict"] == "better"


def test_relevance_that_fell_further_than_allowed_is_broken() -> None:
    found = decide(relevance=-0.06)
    assert found["verdict"] == "broken"
    assert passed(found) == {"stop_rate": True, "relevance": False, "reward": True, "reward_against_sft": True}
    assert "its relevance differs by -0.06" in found["sentence"]


def test_relevance_that_fell_by_less_than_allowed_is_better() -> None:
    assert decide(relevance=-0.04)["verdict"] == "better"


def test_a_gain_is_not_called_better_while_relevance_may_have_fallen_too_far() -> None:
    """Mean change -0.01, but of values that spread over 0.4: the lower bound lies near -0.13."""
    found = decide(relevance=[0.19, -0.21] * 5)
    assert found["verdict"] == "no measurable difference"
    assert all(passed(found).values())
    assert "cannot rule out that relevance fell by more than 0.05" in found["sentence"]


def test_both_broken_gates_are_named() -> None:
    sentence = decide(relevance=-0.2, stops=0)["sentence"]
    assert "0% of its answers end by themselves" in sentence
    assert "its relevance differs by -0.20" in sentence


def test_a_reward_without_a_relevance_term_has_no_relevance_gate() -> None:
    found = decide(relevance=-0.5, watched=())
    assert found["verdict"] == "better"
    assert "relevance" not in passed(found)


@pytest.mark.parametrize("arguments", [{}, {"stops": 0}, {"reward": -1.0}, {"reward": [1.0, -1.0] * 5, "sft": 0.0}])
def test_every_verdict_is_one_sentence_with_numbers(arguments: dict[str, Any]) -> None:
    sentence = decide(**arguments)["sentence"]
    assert sentence.endswith(".")
    assert "\n" not in sentence
    assert "10 held-out prompts" in sentence
    assert "%" in sentence


def test_a_gain_on_one_prompt_is_no_measurable_difference_and_says_so() -> None:
    """The others have no reward; that answers stop is known of all ten."""
    none: list[float | None] = [None] * 9
    values = {
        "start": {"reward": [0.0, *none], "stop_rate": column(1.0)},
        "dpo": {"reward": [9.0, *none], "stop_rate": column(1.0)},
    }
    comparison = Comparison(values, {}, 0.95, 100, 0)
    found = gates.verdict(comparison, candidate="dpo", baseline="start", limits=LIMITS, relevance=(), prompts=1)
    assert found["verdict"] == "no measurable difference"
    assert found["sentence"] == (
        "dpo is not shown to be better than start on 1 held-out prompt: "
        "its reward differs by +9.00 (on one prompt, which has no interval) from start's (all above 0 asked), "
        "100% of its answers to 10 end by themselves (at least 90% asked)."
    )
