from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from alignment.evaluation import signals


def row(**changes: Any) -> dict[str, Any]:
    base = {"reward": 0.5, "terms": {"sentiment": 0.2, "relevance": 0.3}, "finished": True, "tokens": 7}
    return {**base, "repetition": 0.0, "kl": 1.5, "heldout_nll": 2.0, **changes}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", 0.0),
        ("one two", 0.0),
        ("one two three four", 0.0),
        ("a b c a b c", 0.25),  # abc bca cab abc: 3 distinct of 4
        ("so so so so so", 2 / 3),  # three times the same: 1 distinct of 3
        ("Go on now go ON now", 0.25),  # case does not count
    ],
)
def test_repetition_is_the_share_of_three_word_sequences_seen_before(text: str, expected: float) -> None:
    assert signals.repetition(text) == pytest.approx(expected)


def test_kl_of_an_answer_is_the_difference_of_its_log_probs() -> None:
    assert signals.kl(-3.0, -4.5) == 1.5
    assert signals.kl(-4.5, -3.0) == -1.5


def test_mean_nll_is_per_token_and_nothing_without_tokens() -> None:
    assert signals.mean_nll([-1.0, -2.0, -6.0]) == 3.0
    assert signals.mean_nll([]) is None


def test_columns_hold_one_value_a_row_terms_beside_their_sum() -> None:
    table = signals.columns([row(), row(finished=False, heldout_nll=None, tokens=9)])
    assert table == {
        "reward": [0.5, 0.5],
        "sentiment": [0.2, 0.2],
        "relevance": [0.3, 0.3],
        "stop_rate": [1.0, 0.0],
        "tokens": [7.0, 9.0],
        "repetition": [0.0, 0.0],
        "kl": [1.5, 1.5],
        "heldout_nll": [2.0, None],
    }
    assert signals.columns([]) == {}


def test_means_are_over_the_rows_that_have_the_metric() -> None:
    means = signals.means([row(), row(finished=False, heldout_nll=None, kl=0.5)])
    assert (means["stop_rate"], means["heldout_nll"], means["kl"]) == (0.5, 2.0, 1.0)
    assert "heldout_nll" not in signals.means([row(heldout_nll=None)])


def test_the_bound_of_best_of_n_is_reached_by_distinct_rewards_and_many_answers() -> None:
    """Of many equally probable answers with distinct rewards best-of-n draws the one of rank share u with density
    n u^(n-1), and KL is its integral of n u^(n-1) log(n u^(n-1)): log n - (n - 1) / n. With n = 1 nothing is chosen."""
    for n in (1, 2, 4, 16):
        shares = (np.arange(200_000) + 0.5) / 200_000
        density = n * shares ** (n - 1)
        assert signals.best_of_kl(n) == pytest.approx(float((density * np.log(density)).mean()), abs=1e-3)
    assert signals.best_of_kl(1) == 0


def test_metrics_are_told_of_each_data_set_by_itself_where_there_are_several() -> None:
    given = ((1.0, 2.0, "b"), (3.0, None, "b"), (5.0, 1.0, "a"))
    rows = [{**row(kl=kl, heldout_nll=nll), "source": name} for kl, nll, name in given]
    told = signals.by_source(rows)
    assert list(told) == ["a", "b"] and told["a"]["metrics"]["kl"] == 5.0
    assert told["b"]["metrics"]["kl"] == 2.0 and told["b"]["prompts"] == {**signals.counts(rows[:2]), "heldout_nll": 1}
    assert signals.by_source(rows[:2]) == signals.by_source([row(), row()]) == {}
