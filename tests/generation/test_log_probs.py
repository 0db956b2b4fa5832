from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from alignment import generation
from alignment.errors import InputError
from alignment.padding import by_budget


def random_rows(count: int) -> list[tuple[list[int], list[int]]]:
    draw = random.Random(0)

    def tokens(length: int) -> list[int]:
        return [draw.randrange(5, 260) for _ in range(length)]

    return [(tokens(draw.randint(1, 40)), tokens(number % 23)) for number in range(count)]


def plain(model: Any, prompt: list[int], answer: list[int]) -> torch.Tensor:
    """One row, no padding, all logits."""
    with torch.inference_mode():
        table = model(torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
    return torch.tensor([float(table[len(prompt) + i - 1, token]) for i, token in enumerate(answer)])


@pytest.mark.parametrize("budget", [1, 100, 100_000])
def test_padded_batches_equal_a_plain_forward_of_each_row(loaded: tuple[Any, Any], budget: int) -> None:
    model, rows = loaded[0], random_rows(30)
    found = generation.sequence_log_probs(model, rows, tokens_per_batch=budget)
    assert [len(scores) for scores in found] == [len(answer) for _, answer in rows]
    worst = max(
        float((scores - plain(model, *row)).abs().max()) for scores, row in zip(found, rows, strict=True) if len(scores)
    )
    assert worst <= 1e-5


def test_log_probs_come_from_the_probabilities_the_model_gives(loaded: tuple[Any, Any]) -> None:
    """With all weights 0 every token has probability 1/V: log p = -ln 261 = -5.5645."""
    model = loaded[0]
    with torch.no_grad():
        for weights in model.parameters():
            weights.zero_()
    (scores,) = generation.sequence_log_probs(model, [([7, 8], [9, 10, 11])])
    assert scores.tolist() == pytest.approx([-5.564520] * 3, abs=1e-5)


def test_progress_counts_every_token_once(loaded: tuple[Any, Any]) -> None:
    rows, told = random_rows(9), []
    generation.sequence_log_probs(loaded[0], rows, tokens_per_batch=64, progress=lambda s, t, **_: told.append((s, t)))
    total = sum(len(p) + len(a) for p, a in rows)
    assert told[-1] == (total, total)
    assert len(told) > 3


def test_batches_hold_like_lengths_within_the_budget() -> None:
    """Budget 12: 6 twice; then 5 with 4 would be 2 x 5 = 10, with 3 as well 15: too much."""
    assert by_budget([3, 6, 5, 6, 4, 20], 12) == [[5], [1, 3], [2, 4], [0]]


def test_a_row_longer_than_the_window_and_an_empty_prompt_are_refused(loaded: tuple[Any, Any]) -> None:
    with pytest.raises(InputError, match="row 2 to be scored: 513 tokens, the window holds 512"):
        generation.sequence_log_probs(loaded[0], [([5], [6]), ([5] * 500, [6] * 13)])
    with pytest.raises(InputError, match="row 1 to be scored: the prompt is empty"):
        generation.sequence_log_probs(loaded[0], [([], [6])])
