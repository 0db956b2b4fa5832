from __future__ import annotations

from datasets import Dataset

from alignment.training.rows import pair_sizes, sft_sizes


def test_sft_rows_weigh_their_trained_tokens() -> None:
    rows = Dataset.from_list(
        [
            {"input_ids": [5, 6, 7, 1], "labels": [-100, -100, 7, 1]},
            {"input_ids": [5, 6, 1], "labels": [5, 6, 1]},  # nothing comes before the first token to predict it from
            {"input_ids": [9], "labels": [-100]},
        ]
    )
    assert sft_sizes(rows) == ([4, 3, 1], [2, 2, 0])
    assert sft_sizes(rows.select([2, 0])) == ([1, 4], [0, 2])


def test_pairs_cost_both_sides_padded_to_the_longer_and_weigh_one() -> None:
    rows = Dataset.from_list(
        [
            {"prompt_ids": [1, 2, 3], "chosen_ids": [4, 5], "rejected_ids": [6, 7, 8, 9]},
            {"prompt_ids": [1], "chosen_ids": [4, 5], "rejected_ids": [6]},
        ]
    )
    assert pair_sizes(rows) == ([14, 6], [1, 1])
