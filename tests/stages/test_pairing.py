"""Which answers become pairs, by hand. Answers are named by letters, sampled in their order."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import pytest

from alignment.config.compose import compose
from alignment.config.stages.answering import Judge
from alignment.stages import pairing, pairwise

Row = dict[str, Any]


@cache
def shipped() -> dict[str, Any]:
    return compose(["pipeline=sft_sample_dpo"]).stage["judge"].model_dump()


def settings(**changes: Any) -> Judge:
    return Judge(**{**shipped(), "min_margin": 0.0, **changes})


def judged(*rewards: float, tokens: Sequence[int] = (), finished: Sequence[bool] = ()) -> Row:
    completions = [
        {
            "text": "abcdefgh"[i],
            "tokens": tokens[i] if tokens else 5,
            "finished": finished[i] if finished else True,
            "reward": reward,
        }
        for i, reward in enumerate(rewards)
    ]
    return {"id": "p1", "prompt": [{"role": "user", "content": "?"}], "completions": completions}


def named(row: Row, **changes: Any) -> list[str]:
    """Each pair as two letters, chosen first."""
    pairs = pairing.pairs_of(row, settings(**changes)).pairs
    return [pair["chosen"][0]["content"] + pair["rejected"][0]["content"] for pair in pairs]


def reason(row: Row, **changes: Any) -> str | None:
    found = pairing.pairs_of(row, settings(**changes))
    assert (found.reason is None) == bool(found.pairs)
    return found.reason


def test_the_best_against_the_worst_then_the_second_best_against_the_second_worst() -> None:
    """Rewards b 4 > d 3 > a 2 > c 1 > e 0: (b, e), (d, c), and a is left over."""
    row = judged(2, 4, 1, 3, 0)
    assert named(row) == ["be"]
    assert named(row, max_pairs_per_prompt=9) == ["be", "dc"]


def test_of_equal_rewards_the_first_sampled_counts() -> None:
    assert named(judged(1, 1, 0, 0)) == ["ac"]


def test_equal_rewards_make_no_pair_even_without_a_margin() -> None:
    assert reason(judged(0.5, 0.5)) == "rewards_too_close"


def test_one_text_twice_is_no_pair_whatever_its_lengths_are_worth() -> None:
    row = judged(1, 1, tokens=[4, 5])
    for completion in row["completions"]:
        completion["text"] = "same"
    assert reason(row, length="penalty") == "rewards_too_close"
    assert pairing.pairs_of(row, settings(ties="keep")).ties == []


def test_every_two_answers_by_falling_margin_and_what_is_beyond_the_limit_is_counted() -> None:
    """Rewards 3, 1, 0: margins ac 3, ab 2, bc 1, of which the last is too close."""
    row = judged(3, 1, 0)
    assert named(row, pairs="all_margin", max_pairs_per_prompt=9) == ["ac", "ab", "bc"]
    assert named(row, pairs="all_margin", max_pairs_per_prompt=9, min_margin=1.5) == ["ac", "ab"]
    found = pairing.pairs_of(row, settings(pairs="all_margin", min_margin=1.5))
    assert (len(found.pairs), found.beyond) == (1, 1)


def test_the_best_against_others_by_lot_depends_on_seed_and_prompt_alone() -> None:
    row = judged(9, *range(7))
    drawn = {seed: named(row, pairs="best_random", seed=seed)[0] for seed in range(20)}
    assert {pair[0] for pair in drawn.values()} == {"a"}
    assert len({pair[1] for pair in drawn.values()}) > 3
    assert drawn == {seed: named(row, pairs="best_random", seed=seed)[0] for seed in range(20)}
    others = {named({**row, "id": f"p{i}"}, pairs="best_random")[0] for i in range(20)}
    assert len(others) > 3


def test_matched_lengths_take_the_widest_pair_of_like_answers() -> None:
    """a 10 tokens, d 30: 3 times. Of like lengths (1.5) are ab 12/10, bc 18/12, and cd 30/18 is 1.67: the margins are
    ab 1, bc 1 and ac 2, but ac is 1.8. Of equal margins the first sampled counts."""
    row = judged(3, 2, 1, 0, tokens=[10, 12, 18, 30])
    assert named(row) == ["ad"]
    assert named(row, length="match") == ["ab"]
    assert named(row, length="match", length_ratio=1.8) == ["ac"]
    assert reason(row, length="match", length_ratio=1.1) == "lengths_too_unlike"


def test_the_length_penalty_is_relative_to_the_prompts_mean_length() -> None:
    """Mean 20 tokens; off each reward 0.5 (tokens / 20 - 1): a 1.0 - 0.5 = 0.5, b 0.8 + 0.25 = 1.05, c 0 + 0.25.

    The margin is of scores: of rewards 0.5 and 0.45 with 30 and 10 tokens, off which are 0.25 and -0.25, it is 0.45.
    """
    row = judged(1.0, 0.8, 0.0, tokens=[40, 10, 10])
    assert named(row) == ["ac"]
    assert pairing.scores(row["completions"], settings(length="penalty")) == pytest.approx([0.5, 1.05, 0.25])
    assert named(row, length="penalty") == ["bc"]
    (pair,) = pairing.pairs_of(row, settings(length="penalty")).pairs
    assert (pair["chosen_reward"], pair["rejected_reward"], pair["margin"]) == (0.8, 0.0, pytest.approx(0.8))
    (pair,) = pairing.pairs_of(judged(0.5, 0.45, tokens=[30, 10]), settings(length="penalty")).pairs
    assert (pair["chosen_reward"], pair["rejected_reward"], pair["margin"]) == (0.45, 0.5, pytest.approx(0.45))
    best = pairing.best_of(row, settings(length="penalty"))
    assert best is not None and best["completion"][0]["content"] == "b" and best["reward"] == 0.8


def test_what_is_chosen_is_good_enough() -> None:
    assert named(judged(1, 0), min_reward=1.0) == ["ab"]
    assert reason(judged(1, 0), min_reward=1.1) == "chosen_below_min_reward"
    assert pairing.best_of(judged(1, 0), settings(min_reward=1.1)) is None


def test_ties_are_the_pairs_closer_than_the_margin() -> None:
    """Rewards 2, 1.9, 0: only ab is close."""
    found = pairing.pairs_of(judged(2, 1.9, 0), settings(min_margin=0.5, ties="keep"))
    assert [[answer["text"] for answer in tie["answers"]] for tie in found.ties] == [["a", "b"]]
    assert len(found.pairs) == 1


def test_answers_cut_off_are_used_for_nothing_unless_asked_for() -> None:
    row = judged(3, 2, 1, finished=[False, True, True])
    assert named(row) == ["bc"]
    assert named(row, finished_only=False) == ["ac"]
    assert len(pairing.labelled(row, settings(label_threshold=2.0))) == 2


# --- comparing --------------------------------------------------------------------------------------------------------


def compared(row: Row, wins: set[str], unknown: frozenset[str] = frozenset()) -> Row:
    """As the judge leaves it: of answers x and y the first wins if xy is in `wins`; `unknown` cannot be compared."""

    def outcome(x: str, y: str) -> pairwise.Outcome:
        return {"comparison": "?"} if unknown == {x, y} else int(x + y in wins) - int(y + x in wins)

    def compare(rows: Sequence[Row], a: Sequence[Row], b: Sequence[Row]) -> list[pairwise.Outcome]:
        return [outcome(x["text"], y["text"]) for x, y in zip(a, b, strict=True)]

    (judged_row,) = pairwise.judged(compare, [row])
    return judged_row


def always_first(rows: Sequence[Row], a: Sequence[str], b: Sequence[str]) -> list[int]:
    return [1] * len(a)


def test_a_comparator_that_likes_what_is_shown_first_has_no_opinion() -> None:
    """Both orders disagree: all ties, so that no pair comes of it."""
    (row,) = pairwise.judged(always_first, [judged(0, 0, 0)])
    assert [c["reward"] for c in row["completions"]] == [0, 0, 0]
    assert pairing.pairs_of(row, settings()).reason == "rewards_too_close"


def test_a_pair_must_have_been_won_itself() -> None:
    """a beats b and c, b beats d, c beats d, d beats a: means a 1/3, b 0, c 0, d -1/3. The widest margin, ad, was lost;
    of the others ab and ac (1/3) come first, then bd and cd."""
    row = compared(judged(0, 0, 0, 0), {"ab", "ac", "bd", "cd", "da"})
    assert [c["reward"] for c in row["completions"]] == pytest.approx([1 / 3, 0, 0, -1 / 3])
    assert named(row, pairs="all_margin", max_pairs_per_prompt=9) == ["ab", "ac", "bd", "cd"]
    assert named(row, max_pairs_per_prompt=9) == ["ab", "cd"]


def ties(row: Row, **changes: Any) -> list[str]:
    return [
        "".join(answer["text"] for answer in tie["answers"]) for tie in pairing.pairs_of(row, settings(**changes)).ties
    ]


def test_ties_of_a_comparison_are_neither_what_was_lost_nor_what_failed() -> None:
    """As in the test above a 1/3, b 0, c 0, d -1/3: b and c are even, and d, the worse one, beats a: if only these two
    end by themselves, that is why there is no pair. With b even to a, better than c, and a with c unknown: a 0, b 1/2,
    c -1, so that bc is a pair and ba a tie. Three that beat each other in a circle are all 0."""
    wins = {"ab", "ac", "bd", "cd", "da"}
    assert ties(compared(judged(0, 0, 0, 0), wins)) == ["bc"]
    two = compared(judged(0, 0, 0, 0, finished=[True, False, False, True]), wins)
    assert (reason(two), ties(two)) == ("comparison_lost_or_failed", [])
    row = compared(judged(0, 0, 0), {"bc"}, frozenset("ac"))
    assert [c["reward"] for c in row["completions"]] == [0, 0.5, -1]
    assert (named(row, pairs="all_margin", max_pairs_per_prompt=9), ties(row)) == (["bc"], ["ba"])
    circle = compared(judged(0, 0, 0), {"ab", "bc", "ca"})
    assert (reason(circle), ties(circle)) == ("rewards_too_close", ["ab", "ac", "bc"])


def test_each_answer_is_scored_once_for_all_its_comparisons() -> None:
    asked: list[str] = []

    def score(rows: Sequence[Row], answers: Sequence[str], tokens: Sequence[int]) -> list[Row]:
        asked.extend(answers)
        return [{"reward": "abcd".index(answer)} for answer in answers]

    (row,) = pairwise.judged(pairwise.by_reward(score), [judged(0, 0, 0, 0)])
    assert sorted(asked) == ["a", "b", "c", "d"]
    assert [c["reward"] for c in row["completions"]] == pytest.approx([-1, -1 / 3, 1 / 3, 1])


def test_an_answer_whose_comparisons_all_failed_is_used_for_nothing() -> None:
    """c cannot be compared, with a in the second order only; a beats b."""

    def outcome(x: str, y: str) -> pairwise.Outcome:
        failed = "c" in (x, y) and x + y != "ac"
        return {"comparison": f"{x}{y}?"} if failed else int(x < y) - int(x > y)

    def compare(rows: Sequence[Row], a: Sequence[Row], b: Sequence[Row]) -> list[pairwise.Outcome]:
        assert all("completions" not in row for row in rows)
        return [outcome(x["text"], y["text"]) for x, y in zip(a, b, strict=True)]

    (row,) = pairwise.judged(compare, [judged(0, 0, 0)])
    assert [c["reward"] for c in row["completions"]] == [1, -1, None]
    assert [c.get("failed") for c in row["completions"]] == [None, None, {"comparison": "ca?"}]
    assert row["failed_comparisons"] == [
        {"answers": [0, 2], "failed": {"comparison": "ca?"}},
        {"answers": [1, 2], "failed": {"comparison": "bc?"}},
    ]
    assert named(row, pairs="all_margin", max_pairs_per_prompt=9) == ["ab"]
