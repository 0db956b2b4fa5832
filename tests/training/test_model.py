from __future__ import annotations

import pytest
import torch

from alignment.errors import TrainingError
from alignment.training.model import check_whole


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({}, "nothing was trained"),
        ({"a": torch.ones(2), "b": torch.ones(0)}, "b has no elements"),
        ({"a": torch.tensor([1.0, float("inf")])}, "a has values that are NaN or infinite"),
    ],
)
def test_weights_that_are_not_whole_are_never_written(weights: dict[str, torch.Tensor], message: str) -> None:
    with pytest.raises(TrainingError, match=message):
        check_whole(weights)
