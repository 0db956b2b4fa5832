"""Shares of variance against a 2 x 2 x 2 grid worked out by hand, and what is said where there is no grid."""

from __future__ import annotations

import itertools
import random
from typing import Any

import pytest

from alignment.reporting.importance import between, importance, is_grid


def cube(value: Any, repeats: int = 1) -> list[tuple[dict[str, Any], float]]:
    return [
        ({"a": a, "b": b, "c": c}, float(value(a, b, c, seed)))
        for a, b, c in itertools.product((0, 1), repeat=3)
        for seed in range(repeats)
    ]


def shares(told: dict[str, Any]) -> dict[str, float]:
    return {one["key"]: one["share"] for one in told["settings"]}


def test_a_2_x_2_x_2_grid_by_hand() -> None:
    """y = 4a + 2b + 2ab is 0, 2, 4, 8, each twice, around 3.5: 2 * (12.25 + 2.25 + 0.25 + 20.25) = 70.

    The means of a are 1 and 6, so 8 * 2.5^2 = 50; those of b 2 and 5, so 8 * 1.5^2 = 18; those of c are equal. What is
    left, 2, is the interaction of a and b.
    """
    told = importance(cube(lambda a, b, c, seed: 4 * a + 2 * b + 2 * a * b), ["a", "b", "c"])
    assert told["method"] == "grid"
    assert shares(told) == pytest.approx({"a": 50 / 70, "b": 18 / 70, "c": 0})
    assert told["interactions"] == pytest.approx(2 / 70)
    assert told["noise"] is None, "one seed a combination"
    assert [one["key"] for one in told["settings"]] == ["a", "b", "c"], "the biggest first"


def test_seeds_have_their_own_share_and_all_shares_add_up() -> None:
    """As above twice with +1 and -1 for the seeds: all sums double, and the seeds have 16 * 1. 140 + 16 = 156."""
    told = importance(cube(lambda a, b, c, s: 4 * a + 2 * b + 2 * a * b + (1 if s else -1), 2), ["a", "b", "c"])
    assert shares(told) == pytest.approx({"a": 100 / 156, "b": 36 / 156, "c": 0})
    assert (told["interactions"], told["noise"]) == (pytest.approx(4 / 156), pytest.approx(16 / 156))
    assert sum(shares(told).values()) + told["interactions"] + told["noise"] == pytest.approx(1)


def test_a_grid_has_every_combination_equally_often() -> None:
    whole = [(a, b) for a in "xy" for b in "pqr"]
    assert is_grid(whole)
    assert is_grid(whole * 2)
    assert not is_grid(whole[:-1])
    assert not is_grid([*whole, whole[0]])


def test_a_grid_with_a_hole_is_called_one_way() -> None:
    rows = cube(lambda a, b, c, seed: a, 2)[:-1]
    told = importance(rows, ["a", "b", "c"])
    assert told["method"] == "one-way"
    assert told["interactions"] is None
    assert shares(told)["a"] == pytest.approx(1)
    assert told["noise"] == pytest.approx(0, abs=1e-12)


def test_many_values_fall_into_bins_of_equal_size_and_those_without_stand_apart() -> None:
    """40 values of x in 5 bins of 8; y is x's bin, so x explains all. Two points lack x."""
    rows = [({"x": 1.5**i, "z": i % 2}, float(i // 8)) for i in range(40)] + [({"z": 0}, 9.0), ({"z": 1}, 9.0)]
    told = importance(rows, ["x", "z"])
    x = next(one for one in told["settings"] if one["key"] == "x")
    assert (told["method"], x["levels"], x["binned"], x["share"]) == ("one-way", 6, True, pytest.approx(1))
    assert not next(one for one in told["settings"] if one["key"] == "z")["binned"]


def test_what_does_nothing_stays_below_what_chance_reaches() -> None:
    chance = random.Random(5)
    rows = [({"x": chance.random(), "junk": chance.random()}, 0.0) for _ in range(60)]
    rows = [(settings, settings["x"] + chance.gauss(0, 0.1)) for settings, _ in rows]
    told = {one["key"]: one for one in importance(rows, ["x", "junk"])["settings"]}
    assert told["x"]["share"] > 2 * told["x"]["by_chance"]
    assert told["junk"]["share"] < told["junk"]["by_chance"] < 0.3
    assert importance(rows, ["x", "junk"]) == importance(rows, ["x", "junk"]), "no other numbers the next time"


def test_a_setting_with_a_level_for_each_point_proves_nothing() -> None:
    told = importance([({"x": name}, float(i)) for i, name in enumerate("abcd")], ["x"])
    (one,) = told["settings"]
    assert one["share"] == one["by_chance"] == pytest.approx(1)


@pytest.mark.parametrize("rows", [[], [({"a": 1}, 2.0)], [({"a": 1}, 2.0), ({"a": 2}, 2.0)]])
def test_nothing_to_explain(rows: list) -> None:
    told = importance(rows, ["a"])
    assert (told["method"], told["settings"], told["noise"]) == (None, [], None)


def test_seeds_alone_are_all_noise() -> None:
    told = importance([({"seed": 0}, 1.0), ({"seed": 1}, 2.0)], [])
    assert (told["noise"], told["interactions"]) == (pytest.approx(1), None)


def test_sums_of_squares_between_levels() -> None:
    """Means 2 and 5 around 3: 2 * 1 + 1 * 4."""
    assert between(["p", "p", "q"], [1.0, 3.0, 5.0]) == pytest.approx(6.0)
