"""Contamination by n-grams: cases counted by hand."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys

import pytest

from alignment.data.contamination import Index, grams_of
from alignment.errors import InputError

SIXTEEN = "a b c d e f g h i j k l m n o p"  # words of an evaluation prompt


def found(prompt: str, text: str, **options: float) -> bool:
    return Index([("it", prompt)], **options).find(text) == "it"


def test_more_than_half_of_the_prompt() -> None:
    assert found(SIXTEEN, SIXTEEN)
    assert not found(SIXTEEN, "x a b c d e f g h x")  # one 8-gram: 8 of 16 words, which is half and not more
    assert found(SIXTEEN, "x a b c d e f g h i x")  # two of them: 9 of 16
    assert not found(SIXTEEN, "a b c d e f g x i j k l m n o")  # runs of 7: no 8-gram
    assert found(SIXTEEN + " q", "a b c d e f g h i")  # 9 of 17
    assert not found(SIXTEEN + " q r", "a b c d e f g h i")  # 9 of 18


def test_words_of_two_n_grams_are_counted_once_and_apart_n_grams_together() -> None:
    assert found(SIXTEEN, "i j k l m n o p x a b c d e f g h")  # 8 + 8
    assert not found(SIXTEEN, "a b c d e f g h a b c d e f g h")  # the same 8


def test_what_the_prompt_says_twice_is_covered_twice() -> None:
    assert found("a b c d e f g h x a b c d e f g h", "a b c d e f g h")  # 16 of 17


def test_size_and_share() -> None:
    assert found("a b c d", "b c x", size=2, share=0.4) and not found("a b c d", "b c x", size=2, share=0.5)
    assert found("a b c d", "b c x", size=2, share=0)


def test_neither_case_nor_punctuation_matters() -> None:
    assert found("How many “legs” do two dogs, and a bird, have?", "so: HOW MANY legs do two dogs and a bird have")
    assert not found("How many legs do two dogs and a bird have?", "How many legs do two cats and a bird have?")


def test_any_script() -> None:
    assert found("委员会将于周四下午再次开会。", "他说，委员会将于周四下午再次开会！")
    assert not found("委员会将于周四下午再次开会。", "委员会将于周五上午再次开会。")
    assert found("समिति गुरुवार दोपहर को फिर बैठक करेगी और निर्णय लेगी।", "समिति गुरुवार दोपहर को फिर बैठक करेगी और निर्णय लेगी")


def test_a_prompt_shorter_than_an_n_gram_is_not_compared() -> None:
    index = Index([("no", "!?"), ("short", "What is 2+2?"), ("long", "a b c d e f g h")])
    assert index.too_short == 2 and index.ids == ["long"]
    assert index.find("Tell me: what is 2 + 2, please?") is None and index.find("") is None
    assert index.find("x a b c d e f g h") == "long"  # as many words as an n-gram


def test_the_first_prompt_that_is_contaminated() -> None:
    index = Index([("long", SIXTEEN), ("eight", "h i j k l m n o"), ("again", SIXTEEN)])
    assert index.find(SIXTEEN) == "long"
    assert index.find("x h i j k l m n o") == "eight"  # 8 of 16 words of the long one, which is half and not more


def test_no_prompts() -> None:
    assert Index([]).find(SIXTEEN) is None


def test_a_pickle_means_the_same_in_another_process(tmp_path) -> None:
    (tmp_path / "index").write_bytes(pickle.dumps(Index([("long", SIXTEEN)])))
    code = f"import pickle, sys; print(pickle.load(sys.stdin.buffer).find({SIXTEEN!r}))"
    env = {**os.environ, "PYTHONHASHSEED": "7"}
    with (tmp_path / "index").open("rb") as file:
        told = subprocess.run([sys.executable, "-c", code], stdin=file, env=env, capture_output=True, check=True)
    assert told.stdout.strip() == b"long"


def test_a_pickle_is_small() -> None:
    prompts = [(str(number), " ".join(f"w{number + word}" for word in range(100))) for number in range(1000)]
    assert len(pickle.dumps(Index(prompts))) < 1000 * 93 * 16 + 30_000


@pytest.mark.parametrize("options", [{"size": 0}, {"share": 1.0}, {"share": -0.1}])
def test_bad_options(options: dict[str, float]) -> None:
    with pytest.raises(InputError):
        Index([], **options)


def test_words_that_stand_in_n_grams_left_out_alone_do_not_count() -> None:
    """Of 16 words all but the last stand in the eight 8-grams that are left out; the ninth has words 9 to 16."""
    index = Index([("it", SIXTEEN), ("other", "a b c d e f g h")])
    assert index.find("a b c d e f g h i") == "it"
    assert index.leave_out(grams_of("a b c d e f g h i j k l m n o")) == 1  # of the other nothing is left
    assert index.find("a b c d e f g h i j k l m n o") is None
    assert index.find("i j k l m n o p") == "it"
    assert list(index.grams) == list(grams_of("i j k l m n o p"))
    assert not len(grams_of("a b c d e f g"))
