from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from alignment.config.rewards import RESERVED, Reward
from alignment.errors import InputError
from alignment.files import read_jsonl, write_jsonl
from alignment.stages import judge
from alignment.stages.context import StageContext
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


def test_without_any_pair_the_stage_fails_with_the_counts(make_context: MakeContext, samples: Path) -> None:
    context = make_context("judge", {"data": samples}, min_margin=5.0)
    with pytest.raises(InputError) as told:
        judge.run(context)
    message = "none of 4 prompts gives a pair: 1 fewer than two usable answers, 3 rewards too close"
    assert message in str(told.value)
    ways = "lower stage.judge.min_margin, or set stage.judge.finished_only=false, or sample more and longer answers"
    assert str(told.value.fix).startswith(ways)
    assert not (context.folder / "pairs.jsonl").exists()


def test_one_judge_makes_pairs_best_answers_and_labels_for_three_trainings(
    make_context: MakeContext, samples: Path
) -> None:
    """`lonely` has one usable answer, which is bad; `cut` has a neutral one and a bad one."""
    context = make_context("judge", {"data": samples}, best="true", label_threshold=0.0, min_reward=0.0)
    metrics = judge.run(context)
    best = list(read_jsonl(context.folder / "best.jsonl"))
    assert [(row["id"], row["completion"][0]["content"]) for row in best] == [
        ("clear", GREAT), ("close", FLAT), ("cut", FLAT),
    ]  # fmt: skip
    assert (metrics["best"], metrics["dropped_prompts_without_best"]) == (3, 1)
    unpaired = list(read_jsonl(context.folder / "unpaired.jsonl"))
    assert set(unpaired[0]) == {"prompt", "completion", "label", "reward"}
    bad = [row["completion"][0]["content"] for row in unpaired if not row["label"]]
    assert (len(unpaired), bad) == (4 + 2 + 2 + 1, [SAD, SAD, SAD])
    assert (metrics["labelled_good"], metrics["labelled_bad"]) == (6, 3)
    assert metrics["pairs"] == 2
    means = {name.removesuffix("_mean") for name in metrics if name.endswith("_mean")}
    assert means - {"sentiment"} == {"reward", "margin"} < RESERVED, "no term's names"


def test_ties_of_comparing_are_written_and_counted_as_those_of_the_reward(
    make_context: MakeContext, samples: Path
) -> None:
    """`close` has two answers of one reward, in the others all usable ones differ. Counted without a file, too."""
    told = {"ties": 1, "dropped_rewards_too_close": 1, "dropped_comparison_lost_or_failed": 0}
    for judging in ("pointwise", "pairwise"):
        for ties in ("keep", "drop"):
            how = {"judging": judging, "ties": ties, "min_margin": 0.0}
            context = make_context("judge", {"data": samples}, name=f"{judging}-{ties}", **how)
            metrics = judge.run(context)
            assert {name: metrics[name] for name in told} == told
            path = context.folder / "ties.jsonl"
            rows = list(read_jsonl(path)) if path.exists() else None
            reward = {"reward": 0.0}
            answers = [{"text": FLAT, **reward}, {"text": "It is a chair.", **reward}]
            expected = [{"id": "close", "prompt": [{"role": "user", "content": "Say something"}], "answers": answers}]
            assert rows == (expected if ties == "keep" else None)


def test_comparing_by_the_reward_gives_the_pairs_of_the_reward(make_context: MakeContext, samples: Path) -> None:
    """Outcomes of `clear`, by rewards 0, -, ++, +: two lost and one won (-1/3), three lost, three won, two won."""
    pointwise, pairwise = (
        make_context("judge", {"data": samples}, name=n, judging=n) for n in ("pointwise", "pairwise")
    )
    judge.run(pointwise)
    metrics = judge.run(pairwise)
    sides = [
        [(pair["chosen"], pair["rejected"]) for pair in read_jsonl(context.folder / "pairs.jsonl")]
        for context in (pointwise, pairwise)
    ]
    assert sides[0] == sides[1]
    judged = list(read_jsonl(pairwise.folder / "judged.jsonl"))
    assert [c["reward"] for c in judged[0]["completions"]] == pytest.approx([-1 / 3, -1, 1, 1 / 3])
    assert [c["beats"] for c in judged[0]["completions"]] == [[1], [], [0, 1, 3], [0, 1]]
    assert "reward_mean" not in metrics, "one's gain is the other's loss"
    assert (metrics["comparisons"], metrics["comparisons_failed"]) == (6 + 1 + 3 + 3, 0)


def by(context: StageContext, reward: dict[str, Any]) -> StageContext:
    """The same, with another reward."""
    return replace(context, experiment=context.experiment.model_copy(update={"reward": Reward.model_validate(reward)}))


def test_comparing_by_a_reward_has_what_the_reward_needs(make_context: MakeContext, tmp_path: Path) -> None:
    """Lengths in tokens of 4, 9 and 2 against a range that ends at 3: of these 2 is best, and 9 worst."""
    row = sample("sizes", "ab", "abc", "abcd")
    for completion, tokens in zip(row["completions"], (4, 9, 2), strict=True):
        completion["tokens"] = tokens
    write_jsonl(tmp_path / "samples.jsonl", [row])
    length = {"kind": "length", "weight": 1.0, "unit": "tokens", "low": 0, "high": 3, "fall_off": 20}
    context = by(make_context("judge", {"data": tmp_path}, judging="pairwise"), {"terms": {"size": length}})
    assert judge.run(context)["comparisons_failed"] == 0
    (judged,) = read_jsonl(context.folder / "judged.jsonl")
    assert [c["reward"] for c in judged["completions"]] == [0, -1, 1]


def test_a_comparison_by_a_reward_that_fails_says_which_term_and_why(make_context: MakeContext, tmp_path: Path) -> None:
    """The second row expects nothing: its one comparison fails, of two."""
    rows = [{**sample("known", "1", "2"), "expected": 2}, sample("unknown", "1", "2")]
    write_jsonl(tmp_path / "samples.jsonl", rows)
    right = {"kind": "answer", "weight": 1.0, "find": "auto", "compare": "number", "tolerance": 0.0}
    context = make_context("judge", {"data": tmp_path}, judging="pairwise")
    metrics = judge.run(by(context, {"terms": {"right": right}, "max_failed_share": 0.5}))
    assert (metrics["comparisons"], metrics["comparisons_failed"], metrics["reward_failed"]) == (2, 1, 2)
    why = "its row expects nothing: it has neither `expected` nor `reference`"
    judged = list(read_jsonl(context.folder / "judged.jsonl"))
    assert "failed_comparisons" not in judged[0]
    assert judged[1]["failed_comparisons"] == [{"answers": [0, 1], "failed": {"right": why}}]
    assert [c["failed"] for c in judged[1]["completions"]] == [{"right": why}] * 2
    with pytest.raises(InputError, match=r"^reward\.terms\.right: 1 of 2 comparisons failed: its row expects nothing"):
        judge.run(by(context, {"terms": {"right": right}, "max_failed_share": 0.49}))
