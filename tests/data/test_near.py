"""Near-duplicates: what counts as one, in any order and number of rows."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest

from alignment.data.near import PERMUTATIONS, groups, nearest, signature
from alignment.errors import InputError


def grouped(texts: list[str], threshold: float = 0.8) -> list[int]:
    return groups(np.stack([signature(text) for text in texts]), threshold).tolist()


def counted(start: int, end: int) -> str:
    return " ".join(f"w{number}" for number in range(start, end))


def values(*agreeing: int) -> np.ndarray:
    """Row 0, and rows that agree with it in so many first values and with nobody in the others."""
    rows = np.arange(PERMUTATIONS * (len(agreeing) + 1), dtype=np.uint32).reshape(-1, PERMUTATIONS)
    for row, many in enumerate(agreeing, 1):
        rows[row, :many] = rows[0, :many]
    return rows


def test_the_same_words_are_the_same_text() -> None:
    assert (signature("Hello,  World: again!") == signature("hello world again")).all()
    assert signature("a b").shape == (PERMUTATIONS,) and signature("a b").dtype == np.uint32


@pytest.mark.parametrize("salt", ["0", "7"])
def test_a_signature_is_the_same_in_each_process_as_ever(salt: str) -> None:
    code = "from alignment.data.near import signature; print(signature('the quick brown fox jumps over')[:2].tolist())"
    env = {**os.environ, "PYTHONHASHSEED": salt}
    told = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True).stdout
    assert told.strip() == "[3933438388, 3298934994]"


def test_signatures_estimate_the_jaccard_index() -> None:
    # 196 shingles each; w0..w199 and w60..w259 share those that begin at w60..w195: 136 of 256
    agreeing = (signature(counted(0, 200)) == signature(counted(60, 260))).mean()
    assert abs(agreeing - 136 / 256) < 4 * (0.53 * 0.47 / PERMUTATIONS) ** 0.5


def test_near_duplicates_are_of_the_first() -> None:
    story = counted(0, 200)
    assert grouped([story, counted(500, 700), story + " more", story, counted(500, 700)]) == [0, 1, 0, 0, 1]


def test_short_texts_are_near_only_what_says_the_same() -> None:
    assert grouped(["yes", "no", "Yes.", "thank you", "thank you!", "", "…"]) == [0, 1, 0, 3, 3, 5, 5]


def test_scripts_without_spaces_have_words_too() -> None:
    story = "".join(chr(0x4E00 + number) for number in range(200))
    assert grouped([story, story[:-3], story[::-1]]) == [0, 0, 2]


def test_the_threshold_itself_is_near_enough() -> None:
    assert groups(values(96, 95), 0.75).tolist() == [0, 0, 2]  # 96 / 128 = 0.75


def test_rows_are_not_near_along_chains() -> None:
    first = values()[0]
    second, third = first.copy(), first.copy()
    second[108:] += 1000  # 108 / 128 = 0.84 with the first
    third[88:] += 1000  # 0.69 with the first, 0.84 with the second
    assert groups(np.stack([first, second, third]), 0.8).tolist() == [0, 0, 2]


def test_of_two_groups_the_earlier_is_joined() -> None:
    first, second = values(0)  # nothing in common
    between = np.where(np.arange(PERMUTATIONS) % 2, first, second)
    between_too = np.where(np.arange(PERMUTATIONS) < 64, second, first)
    assert groups(np.stack([second, first, between_too]), 0.5).tolist() == [0, 1, 0]
    assert groups(np.stack([first, second, between_too]), 0.5).tolist() == [0, 1, 0]
    assert groups(np.stack([first, second, between]), 0.9).tolist() == [0, 1, 2]


def test_equal_to_comparing_everything_with_everything(tmp_path) -> None:
    """On a memory map, against the definition without bands; pairs near the threshold may be missed, none is here."""
    random = np.random.default_rng(5)
    rows = random.integers(0, 2**32, (40, PERMUTATIONS), dtype=np.uint32)[random.integers(0, 40, 800)]
    changed = random.random(rows.shape) < random.choice([0.02, 0.4], (800, 1))
    rows[changed] = random.integers(0, 2**32, changed.sum(), dtype=np.uint32)
    np.save(tmp_path / "signatures.npy", rows)
    expected: list[int] = []
    for row in range(800):
        firsts = [first for first in set(expected) if (rows[first] == rows[row]).mean() >= 0.8]
        expected.append(min(firsts, default=row))
    assert groups(np.load(tmp_path / "signatures.npy", mmap_mode="r"), 0.8).tolist() == expected
    assert 350 < len(set(expected)) < 500


def test_few_rows_and_bad_thresholds() -> None:
    assert groups(np.empty((0, PERMUTATIONS), np.uint32), 0.8).tolist() == []
    assert groups(values(), 1).tolist() == [0]
    assert groups(values(128, 127), 1.0).tolist() == [0, 0, 2]
    for threshold in (0.0, 1.1, float("nan")):
        with pytest.raises(InputError):
            groups(values(), threshold)


def test_the_nearest_of_others_is_the_first_that_comparing_with_all_finds() -> None:
    random = np.random.default_rng(0)
    others = random.integers(0, 2**32, (50, PERMUTATIONS), np.uint32)
    others[7], others[9], others[31] = others[3], others[3], others[30]
    others[31, :5] = 0
    rows = others[random.integers(0, 50, 400)]
    for row, changed in enumerate(random.integers(0, 60, 400)):
        rows[row, random.permutation(PERMUTATIONS)[:changed]] = 1
    signatures = np.concatenate([rows, others])
    found = nearest(signatures, np.arange(400), np.arange(400, 450), 0.8)
    near = (rows[:, None] == others[None]).mean(2) >= 0.8
    assert 100 < near.any(1).sum() < 300
    assert (found == np.where(near.any(1), near.argmax(1), -1)).all()
    with pytest.raises(InputError, match="threshold is 0"):
        nearest(signatures, np.arange(400), np.arange(400, 450), 0)
