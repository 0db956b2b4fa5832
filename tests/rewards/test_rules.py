"""Terms that look at nothing but the text."""

from __future__ import annotations

import time
from typing import Any

import pytest

from alignment.texts import SCRIPTS, ends_whole, foreign_share, repetition, sentences
from tests.rewards.conftest import judge_by, row, values


def test_length_is_one_in_its_range_and_falls_to_zero_outside_of_it() -> None:
    """Range 3 to 5, fall-off 4: one word is 2 short, 1 - 2/4; 7 words are 2 over; 9 words are 4 over, 0; so are 10."""
    settings = {"kind": "length", "unit": "words", "low": 3, "high": 5}
    texts = [" ".join("w" * n) for n in (0, 1, 3, 5, 7, 9, 10)]
    assert values(judge_by(**settings, fall_off=4), *texts) == [0.25, 0.5, 1.0, 1.0, 0.5, 0.0, 0.0]
    assert values(judge_by(**settings, fall_off=0), *texts) == [0.0, 0.0, 1.0, 1.0, 0.0, 0.0, 0.0]
    assert values(judge_by(**{**settings, "high": None}, fall_off=4), "w " * 1000) == [1.0]


def test_a_word_is_the_same_for_a_length_and_for_an_instruction() -> None:
    """`- one - two, 3` has three: a dash by itself is none."""
    exactly = {"kind": "length", "unit": "words", "low": 3, "high": 3, "fall_off": 0}
    checked = {"kind": "instructions", "strict": True, "checks": [{"kind": "words", "relation": "exactly", "count": 3}]}
    for settings in (exactly, checked):
        assert values(judge_by(**settings), "- one - two, 3", "- - -", "a - b") == [1.0, 0.0, 0.0]


def test_length_in_characters_and_tokens() -> None:
    settings = {"kind": "length", "low": 4, "high": 4, "fall_off": 0}
    assert values(judge_by(**settings, unit="characters"), "four", "three") == [1.0, 0.0]
    tokens = judge_by(**settings, unit="tokens")
    assert values(tokens, "a", "b", tokens=[4, 5]) == [1.0, 0.0]
    (score,) = tokens.score([row()], ["a"])
    assert score["failed"] == {"term": "its length in tokens is not known here"}


def form(**rules: Any) -> dict[str, Any]:
    none = {"starts_with": None, "ends_with": None, "max_lines": None, "is_json": False, "whole_sentences": False}
    return {"kind": "format", **none, **rules}


@pytest.mark.parametrize(
    ("rule", "kept", "broken"),
    [
        ({"starts_with": "Sure"}, ["Sure, why not", "  Sure"], ["sure", "", "Not Sure"]),
        ({"starts_with": "\nSure"}, ["Sure, why not", "  Sure"], ["sure"]),
        ({"ends_with": "Bye! "}, ["So long. Bye!\n"], ["Bye! So long"]),
        ({"ends_with": "Bye!"}, ["So long. Bye!\n"], ["Bye! So long", ""]),
        ({"max_lines": 2}, ["", "one", "one\ntwo\n"], ["one\n\ntwo"]),
        ({"is_json": True}, ['{"a": [1]}', "3", '```json\n{"a": 1}\n```'], ["{a: 1}", "", "3 4", "NaN", "[" * 100000]),
        ({"whole_sentences": True}, ["Yes.", 'He said "Yes."', "好。", "**Done!**"], ["Yes", "", "No. And then", "a,"]),
    ],
)
def test_format_keeps_its_rules(rule: dict[str, Any], kept: list[str], broken: list[str]) -> None:
    assert values(judge_by(**form(**rule)), *kept, *broken) == [1.0] * len(kept) + [0.0] * len(broken)


def test_format_is_the_share_of_rules_kept() -> None:
    judge = judge_by(**form(starts_with="A", ends_with="Z", max_lines=1, whole_sentences=True))
    assert values(judge, "A to Z", "A.\nZ.", "no") == [0.75, 0.5, 0.25]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, [1.0, 0.0, 0.0, 1.0]),
        ({"must": "not_match"}, [0.0, 1.0, 1.0, 0.0]),
        ({"whole": True}, [1.0, 0.0, 0.0, 0.0]),
        ({"ignore_case": True}, [1.0, 1.0, 0.0, 1.0]),
    ],
)
def test_regex(changes: dict[str, Any], expected: list[float]) -> None:
    settings = {"kind": "regex", "pattern": "a.b", "must": "match", "whole": False, "ignore_case": False, **changes}
    assert values(judge_by(**settings), "a\nb", "A-B", "", "so a-b it is") == expected


def test_a_pattern_that_would_run_for_ever_fails_for_that_answer_alone() -> None:
    settings = {"kind": "regex", "pattern": "(a+)+b", "must": "match", "whole": False, "ignore_case": False}
    began = time.process_time()
    long, short = judge_by(**settings).score([row()] * 2, ["a" * 40, "aab"])
    assert long["failed"] == {"term": "the pattern '(a+)+b' took longer than 1 s"}
    assert short["reward"] == 1.0
    assert time.process_time() - began < 5


@pytest.mark.parametrize(
    ("text", "words", "expected"),
    [("a b a b", 1, 0.5), ("a b a b", 2, 1 / 3), ("a b a b", 4, 0.0), ("a b", 3, 0.0), ("", 1, 0.0), ("A a", 1, 0.5)],
)
def test_repetition_costs_the_share_of_what_is_said_again(text: str, words: int, expected: float) -> None:
    """a b a b: of 4 words 2 are distinct; of ab ba ab 2 of 3."""
    assert repetition(text, words) == pytest.approx(expected)
    assert values(judge_by(kind="repetition", words=words), text) == [pytest.approx(-expected)]


@pytest.mark.parametrize(
    ("text", "scripts", "expected"),
    [
        ("Hello, wörld 123!", ["latin"], 0.0),
        ("Приветhi", ["latin"], 0.75),  # 6 of 8
        ("Приветhi", ["cyrillic", "latin"], 0.0),
        ("日本語です", ["han"], 0.4),
        ("日本語です", ["han", "hiragana"], 0.0),
        ("12 + 3 = 15", ["thai"], 0.0),
        ("人々", ["han"], 0.0),
        ("5 µm at 1º", ["latin"], 0.0),
        ("ＡＢ", ["latin"], 0.0),  # full width
    ],
)
def test_letters_of_other_scripts_cost_their_share(text: str, scripts: list[str], expected: float) -> None:
    assert foreign_share(text, scripts) == pytest.approx(expected)
    assert values(judge_by(kind="language", scripts=scripts), text) == [pytest.approx(-expected)]


def test_every_script_of_the_settings_has_letters() -> None:
    letters = {
        "arabic": "ب", "armenian": "ա", "bengali": "ক", "cyrillic": "ж", "devanagari": "क", "georgian": "ა",
        "greek": "ω", "han": "中", "hangul": "한", "hebrew": "א", "hiragana": "の", "katakana": "カ", "latin": "é",
        "tamil": "அ", "thai": "ก",
    }  # fmt: skip
    assert set(letters) == set(SCRIPTS)
    for script in letters:
        shares = {name: foreign_share(letter, [script]) for name, letter in letters.items()}
        assert shares == {name: float(name != script) for name in letters}


@pytest.mark.parametrize(
    ("text", "count"),
    [("", 0), ("One. Two! Three?", 3), ("One. Two", 2), ("3.5 is less than 4.", 1), ("So...", 1), ("你好。再见。", 2)],
)
def test_sentences(text: str, count: int) -> None:
    assert sentences(text) == count
    assert ends_whole(text) == (text != "" and text[-1] in ".?。")
