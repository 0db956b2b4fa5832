"""Right or wrong answers: what an answer comes to, as numbers and as text."""

from __future__ import annotations

import pytest

from alignment.rewards.answer import boxed, number
from tests.rewards.conftest import judge_by, values


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("It is 42.", 42.0),
        ("1,234.50 dollars", 1234.5),
        ("$1,234", 1234.0),
        ("first 3, then -7", -7.0),
        ("3-5", 5.0),  # a range, not minus five
        ("so x = −.5", -0.5),
        ("2e3", 2000.0),
        ("10%", 10.0),
        ("5kg", 5.0),
        (r"\frac{3}{4}", 0.75),
        ("3 / 4 of it", 0.75),
        ("4 1/2", 4.5),
        ("-4 1/2 or $3 3/4.", 3.75),
        ("-4 1/2", -4.5),
        (r"4\frac{1}{2}", 4.5),
        (r"4 \dfrac{1}{2}", 4.5),
        (r"-\frac{1}{2}", -0.5),
        ("2 3/2", 1.5),  # no mixed number has a fraction above 1
        ("step 4\n1/2", 0.5),
        ("1/2 3/4", 0.75),
        ("1 000", 1000.0),
        ("€12 345 678.50 each", 12345678.5),
        ("1\u00a0000 1/2", 1000.5),
        ("1 200/3", 400.0),
        ("1 2000", 2000.0),
        ("4 1/0", None),
        ("1/0", None),
        ("1e999", None),  # not finite
        ("v2 or x1", None),
        (r"10,\!000", 10000.0),
        (r"10{,}000 dollars", 10000.0),
        (r"\$7\,500", 7500.0),
        (r"\frac12", 0.5),
        (r"3\frac12", 3.5),
        (r"\frac{1}2", 0.5),
        (r"3 \times 10^8", 3e8),
        (r"3\cdot10^{-2}", 0.03),
        ("so about 5 x 10^3 m", 5000.0),
        ("2 × 3 = 6", 6.0),
        (r"90^\circ", 90.0),
        (r"12 \text{ cm}^2", 12.0),
        ("12 cm^2", 12.0),
        (r"2\sqrt{5}", None),  # not 5, nor 2
        (r"2\sqrt5", None),
        (r"\frac{\sqrt{3}}{2}", None),
        (r"3\pi", None),
        (r"\pi/2", None),
        ("2^{10}", None),
        ("3 × 10⁸", None),
        ("2 × 3", None),
        ("none", None),
        ("", None),
    ],
)
def test_the_last_number_of_a_text(text: str, expected: float | None) -> None:
    assert number(text) == expected


def test_what_is_boxed_is_the_last_with_its_braces() -> None:
    assert boxed(r"\boxed{1} so \boxed{\frac{1}{2}}.") == r"\frac{1}{2}"
    assert boxed(r"\boxed{1") is None
    assert boxed("1") is None


GSM8K = "She has 3 + 4 = <<3+4=7>>7 eggs, sells 2.\n#### 5"


@pytest.mark.parametrize(
    ("find", "answers"),
    [
        ("auto", {"5": 1, "It is 5.": 1, "5 or 6": 0, "#### 5\nThat took 3 steps": 1, r"\boxed{5}, not 6": 1, "": 0}),
        ("marked", {"#### 5": 1, "5": 0, "#### 6\n#### 5 eggs": 1}),
        ("boxed", {r"\boxed{5.0}": 1, "5": 0, r"\boxed{6} 5": 0}),
        ("whole", {"#### 6, or 5": 1, "five": 0}),
    ],
)
def test_numbers_are_compared_with_the_answer_of_the_row(find: str, answers: dict[str, float]) -> None:
    judge = judge_by(kind="answer", find=find, compare="number", tolerance=0.0)
    assert values(judge, *answers, reference=GSM8K) == list(answers.values())
    assert values(judge, *answers, reference="no", expected=5) == list(answers.values()), "expected comes first"


def test_a_tolerance_is_absolute() -> None:
    judge = judge_by(kind="answer", find="auto", compare="number", tolerance=0.01)
    assert values(judge, "3.14", "3.15", "3.16", expected=3.1499) == [1.0, 1.0, 0.0]


def test_texts_are_compared_without_regard_to_case_space_and_marks() -> None:
    judge = judge_by(kind="answer", find="auto", compare="text", tolerance=0.0)
    answers = {"paris": 1.0, ' "Paris." ': 1.0, r"\boxed{PARIS}": 1.0, "ｐａｒｉｓ": 1.0, "Paris, France": 0.0, "": 0.0}
    assert values(judge, *answers, expected="Paris") == list(answers.values())
