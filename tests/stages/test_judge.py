from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from alignment.errors import InputError
from alignment.files import read_jsonl, write_jsonl
from alignment.stages import judge
from tests.stages.conftest import MakeContext

GOOD, GREAT, FLAT, SAD = "That is good.", "I love it, wonderful!", "It is a table.", "This is terrible."


def sample(name: str, *answers: str | tuple[str, bool]) -> dict[str, Any]:
    both = [answer if isinstance(answer, tuple) else (answer, True) for answer in answers]
    completions = [{"text": text, "tokens": 3, "finished": finished} for text, finished in both]
    return {"id": name, "prompt": [{"role": "user", "content": "Say something"}], "completions": completions}


@pytest.fixture
def samples(tmp_path: Path) -> Path:
    folder = tmp_path / "samples"
    folder.mkdir()
    write_jsonl(
        folder / "samples.jsonl",
        [
            sample("clear", FLAT, SAD, GREAT, GOOD),
            sample("close", FLAT, "It is a chair."),
            sample("cut", (GREAT, False), SAD, FLAT),
            sample("lonely", (GREAT, False), SAD, "  "),
        ],
    )
    return folder


def test_the_best_and_the_worst_answer_of_a_prompt_make_a_pair(make_context: MakeContext, samples: Path) -> None:
    """`close` has equal rewards; in `cut` the best answer was cut off; in `lonely` one answer is left."""
    context = make_context("judge", {"data": samples}, min_margin=0.2, finished_only="true")
    metrics = judge.run(context)
    pairs = list(read_jsonl(context.folder / "pairs.jsonl"))
    assert [(pair["id"], pair["chosen"][0]["content"], pair["rejected"][0]["content"]) for pair in pairs] == [
        ("clear", GREAT, SAD),
        ("cut", FLAT, SAD),
    ]
    assert all(pair["chosen"][0]["role"] == pair["rejected"][0]["role"] == "assistant" for pair in pairs)
    assert pairs[1]["chosen_reward"] == 0.0
    assert pairs[1]["rejected_reward"] == pytest.approx(-0.4767, abs=1e-4)
    assert metrics["pairs"] == 2
    assert metrics["dropped_rewards_too_close"] == 1
    assert metrics["dropped_fewer_than_two_usable_answers"] == 1
    assert (metrics["answers"], metrics["answers_unfinished"], metrics["answers_empty"]) == (12, 2, 1)
    margins = [pair["chosen_reward"] - pair["rejected_reward"] for pair in pairs]
    assert metrics["margin_mean"] == pytest.approx(sum(margins) / 2)
    judged = list(read_jsonl(context.folder / "judged.jsonl"))
    rewards = [completion["reward"] for row in judged for completion in row["completions"]]
    assert [row["id"] for row in judged] == ["clear", "close", "cut", "lonely"]
    assert metrics["reward_mean"] == metrics["sentiment_mean"] == pytest.approx(sum(rewards) / 12)
    assert judged[0]["completions"][1] == {
        "text": SAD, "tokens": 3, "finished": True, "reward": rewards[1], "terms": {"sentiment": rewards[1]},
    }  # fmt: skip


def test_unfinished_answers_are_paired_if_asked_for(make_context: MakeContext, samples: Path) -> None:
    context = make_context("judge", {"data": samples}, finished_only="false")
    assert judge.run(context)["pairs"] == 3
    pairs = {pair["id"]: pair for pair in read_jsonl(context.folder / "pairs.jsonl")}
    assert pairs["cut"]["chosen"][0]["content"] == pairs["lonely"]["chosen"][0]["content"] == GREAT


def test_equal_rewards_make_no_pair_even_without_a_margin() -> None:
    reasons: Counter[str] = Counter()
    completions = [{"text": text, "finished": True, "reward": 0.5} for text in ("a", "b")]
    assert judge.pair({"id": "x", "prompt": [], "completions": completions}, 0.0, True, reasons) is None
    assert reasons == {"rewards_too_close": 1}


def test_without_any_pair_the_stage_fails_with_the_counts(make_context: MakeContext, samples: Path) -> None:
    context = make_context("judge", {"data": samples}, min_margin=5.0)
    with pytest.raises(InputError) as told:
        judge.run(context)
    message = "none of 4 prompts gives a pair: 1 fewer than two usable answers, 3 rewards too close"
    assert message in str(told.value)
    assert "judge.min_margin" in str(told.value)
    assert not (context.folder / "pairs.jsonl").exists()
