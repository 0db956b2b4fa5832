"""What stands with each formula: a value derived by hand in its docstring, and its equation on its line."""

from __future__ import annotations

import inspect
import re

import pytest

from alignment.training import advantages
from alignment.training.losses import divergence, pairs, policy, reward, unpaired

FORMULAS = {
    f"{module.__name__.rpartition('.')[2]}.{name}": function
    for module in (pairs, divergence, unpaired, reward, policy, advantages)
    for name, function in inspect.getmembers(module, inspect.isfunction)
    if function.__module__ == module.__name__ and not name.startswith("_")
}
UNNUMBERED = {  # no paper numbers them: a mean of TRL, common losses, a usage
    "pairs.sft", "reward.squared_error", "reward.binary_cross_entropy", "advantages.whiten",
    "advantages.differ",
}  # fmt: skip


@pytest.mark.parametrize("name", FORMULAS)
def test_each_formula_has_a_value_by_hand_and_its_equation_on_its_line(name: str) -> None:
    source, text = inspect.getsource(FORMULAS[name]), FORMULAS[name].__doc__ or ""
    assert "By hand" in text
    numbered = re.search(r"#.*(\(\d+(\.\d+)?\)|table \d|sec\. \d)", source.replace(text, ""))
    assert bool(numbered) == (name not in UNNUMBERED)
