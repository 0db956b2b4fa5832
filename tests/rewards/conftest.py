"""Rewards of one term, and answers to nothing in particular."""

from __future__ import annotations

from typing import Any

from alignment.config.rewards import Reward
from alignment.rewards import Judge
from tests.rewards.serving import server  # noqa: F401


def judge_by(**settings: Any) -> Judge:
    """By one term, called `term`."""
    return Judge(Reward.model_validate({"terms": {"term": {"weight": 1.0, **settings}}}), {})


def row(**facts: Any) -> dict[str, Any]:
    return {"id": "1", "prompt": [{"role": "user", "content": "Say something"}], **facts}


def values(judge: Judge, *answers: str, tokens: list[int] | None = None, **facts: Any) -> list[float | None]:
    """Of the term, for answers to one row with these facts."""
    scores = judge.score([row(**facts)] * len(answers), answers, tokens)
    return [score["terms"]["term"] for score in scores]
