"""Every check of an instruction, by texts that meet it and texts that do not; and where its faults are told."""

from __future__ import annotations

from typing import Any, get_args

import pytest

from alignment.config.instructions import Check, checks_of
from alignment.data.formats import kept
from alignment.data.sources import Row
from alignment.errors import ConfigError, InputError
from alignment.rewards.instructions import COUNTS, is_met, occurrences
from tests.rewards.conftest import judge_by, row, values

ASKED = "Say something"
COUNTED = {  # kind -> a text that has exactly two of it
    "words": "two - words!",  # a dash by itself is no word
    "sentences": "One. Two",
    "paragraphs": "a\nb\n\n \nc\n",
    "lines": "a\n\n b ",
    "bullets": "List:\n- a\n* b\n-c",  # without the space it is no bullet
    "numbered_items": "1. a\n 2) b\n3.c",
    "placeholders": "Dear [name], at [your address], [] x]",
    "highlights": "*a* and **b c** but 2 * 3 * 4",
    "capital_words": "I AM a NASA fan, A b",
}


@pytest.mark.parametrize("kind", COUNTED)
def test_counts(kind: str) -> None:
    text = COUNTED[kind]
    assert COUNTS[kind](text) == 2
    assert COUNTS[kind]("") == 0
    for relation, met in (
        ("exactly", {2}),
        ("at_least", {0, 1, 2}),
        ("at_most", {2, 3}),
    ):
        checks = {n: checks_of([{"kind": kind, "relation": relation, "count": n}])[0] for n in range(4)}
        assert {n for n, check in checks.items() if is_met(check, text, ASKED)} == met


CHECKS: list[tuple[dict[str, Any], list[str], list[str]]] = [
    ({"kind": "word_frequency", "text": "the cat", "relation": "exactly", "count": 2},
     ["The cat and the\ncat", "the cat, the cat"], ["the cat", "the cats the cat", ""]),
    ({"kind": "letter_frequency", "text": "e", "relation": "at_most", "count": 1}, ["Eh", "", "no"], ["eE"]),
    ({"kind": "include", "words": ["blue", "sky"]}, ["The sky is BLUE."], ["blue skies", "blue", ""]),
    ({"kind": "forbid", "words": ["blue", "sky"]}, ["green", "", "skyline"], ["no blue", "a sky"]),
    ({"kind": "starts_with", "text": "Dear"}, ["Dear me", " Dear"], ["dear", "My Dear", ""]),
    ({"kind": "starts_with", "text": " Dear "}, ["Dear me", " Dear me"], ["Dearest", ""]),
    ({"kind": "ends_with", "text": " end.\n"}, ["the end.", "the end.\n"], ["weekend.", ""]),
    ({"kind": "ends_with", "text": "end."}, ["the end.\n"], ["the end", ""]),
    ({"kind": "postscript", "text": "P.S."}, ["Hi\nP.S. bye", "Hi\n\nP.S.: bye"], ["P.S. bye", "Hi P.S. x", "a\nP.S."]),
    ({"kind": "one_of", "options": ["Yes", "I do not know."]}, ["yes.", " I do NOT know"], ["Yes, sir", "", "No"]),
    ({"kind": "lowercase"}, ["all low 1!"], ["One", "123", ""]),
    ({"kind": "uppercase"}, ["ALL UP 1!"], ["ONe", "123", ""]),
    ({"kind": "json"}, ['{"a": null}'], ["{a}", ""]),
    ({"kind": "title"}, ["<<A day>>\nIt was"], ["<< >>", "<<>>>", "<<a\nb>>", "A day", ""]),
    ({"kind": "quotation"}, ['"To be"\n', "“To be”"], ['"To be', "'To be'", '""', '"', ""]),
    ({"kind": "no_commas"}, ["a b"], ["a, b", "", "一，二"]),
    ({"kind": "repeat_prompt"}, ["Say  something. Well, hello"], ["Say something", "Say somethingelse", ""]),
    ({"kind": "repeat_prompt"}, [], ["Well, say something"]),
]  # fmt: skip


@pytest.mark.parametrize(("check", "met", "missed"), CHECKS, ids=lambda value: str(value)[:30])
def test_checks(check: dict[str, Any], met: list[str], missed: list[str]) -> None:
    (made,) = checks_of([check])
    assert [text for text in [*met, *missed] if is_met(made, text, ASKED)] == met


def test_every_kind_is_tested() -> None:
    classes = get_args(get_args(Check)[0])
    kinds = {kind for one in classes for kind in get_args(one.model_fields["kind"].annotation)}
    assert kinds == {*COUNTED, *(check["kind"] for check, _, _ in CHECKS)}
    assert len(kinds) >= 20


def test_a_word_is_not_a_part_of_one() -> None:
    assert occurrences("art", "Art, art! start artful; art-ful") == 3
    assert occurrences("c++", "C++ or c++.") == 2


FEW = [{"kind": "words", "relation": "exactly", "count": 2}, {"kind": "lowercase"}]


def test_the_value_is_the_share_of_checks_met_or_all_of_them() -> None:
    """`two words` meets both, `Two words` one, `Three big words` none."""
    texts = ["two words", "Two words", "Three big words"]
    settings: dict[str, Any] = {"kind": "instructions", "checks": []}
    assert values(judge_by(**settings, strict=False), *texts, checks=FEW) == [1.0, 0.5, 0.0]
    assert values(judge_by(**settings, strict=True), *texts, checks=FEW) == [1.0, 0.0, 0.0]


def test_checks_of_the_settings_are_for_every_row_and_those_of_a_row_for_it() -> None:
    judge = judge_by(kind="instructions", strict=False, checks=FEW[:1])
    assert values(judge, "Two words") == [1.0]
    assert values(judge, "Two words", checks=FEW[1:]) == [0.5]


def test_a_row_without_checks_fails() -> None:
    judge = judge_by(kind="instructions", strict=False, checks=[])
    unknown = [{"kind": "rhymes"}]
    bare, empty, odd = judge.score([row(), row(checks=[]), row(checks=unknown)], ["a"] * 3)
    assert bare["failed"] == empty["failed"] == {"term": "its row has no checks"}
    assert odd["failed"]["term"].startswith("checks[0]: unknown kind 'rhymes' (known: words, sentences, ")


WRONG = [
    ("words", "must be a list of objects with a `kind`"),
    ([{"kind": "words", "relation": "exactly"}], "checks[0].count: field required"),
    ([*FEW, {"kind": "words", "relation": "about", "count": 1}], "checks[2].relation: input should be 'exactly'"),
    ([{"kind": "json", "count": 1}], "checks[0].count: extra inputs are not permitted"),
    ([{"kind": "words", "relation": "exactly", "cuont": 2}], "checks[0].cuont: extra inputs are not permitted"),
    ([{"kind": "include", "words": []}], "checks[0].words: list should have at least 1 item"),
]


@pytest.mark.parametrize(("checks", "message"), WRONG, ids=lambda value: str(value)[:30])
def test_a_wrong_check_of_a_row_is_told_with_its_line(checks: Any, message: str) -> None:
    with pytest.raises(ConfigError, match="checks"):
        checks_of(checks)
    with pytest.raises(InputError) as told:
        kept(Row({"checks": checks}, "rows.jsonl", 3, 7))
    assert str(told.value).startswith("rows.jsonl:7: ")
    assert message in str(told.value)


def test_null_keys_of_a_table_are_absent() -> None:
    wide = [{"kind": "lowercase", "count": None, "words": None}, {"kind": "words", "relation": "exactly", "count": 0}]
    assert [check.kind for check in checks_of(wide)] == ["lowercase", "words"]


def test_what_a_row_expects_is_text_or_a_number() -> None:
    line = ("rows.jsonl", 1, 1)
    assert kept(Row({"expected": 4, "checks": None, "x": 1}, *line)) == {"expected": 4}
    assert kept(Row({"expected": None}, *line)) == {}
    for odd in (True, [4]):
        with pytest.raises(InputError, match="'expected' must be text or a number"):
            kept(Row({"expected": odd}, *line))
