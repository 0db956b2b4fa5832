from __future__ import annotations

from datasets import Dataset

from alignment.training.rows import Sizes, pair_sizes, scored_sizes, sft_sizes


def of(sizes: Sizes) -> tuple[list[int], list[int], list[int]]:
    return sizes.lengths.tolist(), sizes.widths.tolist(), sizes.weights.tolist()


def test_sft_rows_weigh_their_trained_tokens() -> None:
    rows = Dataset.from_list(
        [
            {"input_ids": [5, 6, 7, 1], "labels": [-100, -100, 7, 1]},
            {"input_ids": [5, 6, 1], "labels": [5, 6, 1]},  # nothing comes before the first token to predict it from
            {"input_ids": [9], "labels": [-100]},
        ]
    )
    assert of(sft_sizes(rows)) == ([4, 3, 1], [4, 3, 1], [2, 2, 0])
    assert of(sft_sizes(rows.select([2, 0]))) == ([1, 4], [1, 4], [0, 2])


def test_pairs_have_their_prompt_once_or_padded_both_sides_as_long_as_the_longer_and_weigh_one() -> None:
    rows = Dataset.from_list(
        [
            {"prompt_ids": [1, 2, 3], "chosen_ids": [4, 5], "rejected_ids": [6, 7, 8, 9]},
            {"prompt_ids": [1], "chosen_ids": [4, 5], "rejected_ids": [6]},
        ]
    )
    assert of(pair_sizes(rows)) == ([9, 4], [14, 6], [1, 1])


def test_answers_with_a_score_weigh_one() -> None:
    rows = Dataset.from_list([{"prompt_ids": [1, 2], "completion_ids": [4, 5, 6], "score": 0.5}])
    assert of(scored_sizes(rows)) == ([5], [5], [1])
