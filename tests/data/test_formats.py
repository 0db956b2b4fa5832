from __future__ import annotations

from typing import Any

import pytest

from alignment.data.formats import canonical, detect, margin
from alignment.data.sources import Row
from alignment.errors import InputError

from .conftest import assistant, system, user


def row(**value: Any) -> Row:
    return Row(value, "rows.jsonl", 7, 9)


PAIR = {"prompt": [user("q")], "chosen": [assistant("a")], "rejected": [assistant("b")]}
TURNS = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
CONVERSATIONS = {
    "alpaca": (row(instruction="do", output="done"), [user("do"), assistant("done")]),
    "alpaca with input": (row(instruction="do", input="this", output="done"), [user("do\nthis"), assistant("done")]),
    "alpaca with system and history": (
        row(instruction="do", input=None, output="done", system="be kind", history=[["q", "a"]]),
        [system("be kind"), user("q"), assistant("a"), user("do"), assistant("done")],
    ),
    "messages": (row(messages=[system("s"), user("q"), assistant("a")]), [system("s"), user("q"), assistant("a")]),
    "prompt_completion": (row(prompt="q", completion="a"), [user("q"), assistant("a")]),
    "prompt_completion of messages": (
        row(prompt=[system("s"), user("q")], completion=[assistant("a")]),
        [system("s"), user("q"), assistant("a")],
    ),
    "sharegpt": (row(conversations=TURNS), [user("q"), assistant("a")]),
    "sharegpt with system": (row(conversations=TURNS, system="s"), [system("s"), user("q"), assistant("a")]),
}
PREFERENCES = {
    "texts": row(prompt="q", chosen="a", rejected="b"),
    "messages": row(**PAIR),
    "single messages": row(prompt=[user("q")], chosen=assistant("a"), rejected=assistant("b")),
    "sharegpt": row(conversations=TURNS[:1], chosen=TURNS[1], rejected={"from": "gpt", "value": "b"}),
    "whole conversations": row(chosen=[user("q"), assistant("a")], rejected=[user("q"), assistant("b")]),
    "both": row(prompt="q", chosen=[user("q"), assistant("a")], rejected=[user("q"), assistant("b")]),
}


@pytest.mark.parametrize("case", CONVERSATIONS)
def test_conversations_of_every_format_are_recognised_and_become_messages(case: str) -> None:
    given, messages = CONVERSATIONS[case]
    assert detect(given) == case.split()[0]
    assert canonical(given, detect(given)) == {"messages": messages}


@pytest.mark.parametrize("case", PREFERENCES)
def test_preferences_of_every_shape_become_prompt_and_two_answers(case: str) -> None:
    assert detect(PREFERENCES[case]) == "preference"
    assert canonical(PREFERENCES[case], "preference") == PAIR


def test_a_system_text_beside_a_pair_is_kept() -> None:
    made = canonical(row(prompt="q", chosen="a", rejected="b", system="s"), "preference")
    assert made["prompt"] == [system("s"), user("q")]


def test_identical_conversations_share_all_but_the_answer() -> None:
    both = [user("q"), assistant("a")]
    made = canonical(row(chosen=both, rejected=both), "preference")
    assert made == {"prompt": [user("q")], "chosen": [assistant("a")], "rejected": [assistant("a")]}


BAD = {
    "missing key": ("alpaca", row(instruction="do"), "has no 'output' (keys found: instruction)"),
    "wrong type": ("alpaca", row(instruction="do", output=3), "'output' must be text, is a number"),
    "null": ("prompt_completion", row(prompt="q", completion=None), "'completion' must be text, is null"),
    "bad history": ("alpaca", row(instruction="do", output="x", history=[["q"]]), "'history' must be a list of"),
    "not a list": ("messages", row(messages="q"), "'messages' must be a list of messages, is text"),
    "no messages": ("messages", row(messages=[]), "'messages' holds no messages"),
    "no object": ("messages", row(messages=["q"]), "messages[0] must be an object, is text"),
    "misspelled role": (
        "messages",
        row(messages=[{"role": "asistant", "content": "a"}]),
        "messages[0].role is 'asistant' (known: system, user, assistant)",
    ),
    "null content": (
        "messages",
        row(messages=[user("q"), {"role": "assistant", "content": None}]),
        "messages[1].content must be text, is null",
    ),
    "tool calls": (
        "messages",
        row(messages=[{"role": "assistant", "content": "", "tool_calls": [1]}]),
        "messages[0].tool_calls is not supported",
    ),
    "tool turn": ("sharegpt", row(conversations=[{"from": "observation", "value": "x"}]), "conversations[0].from is"),
    "no prompt": ("preference", row(chosen="Q: x A: y", rejected="Q: x A: z"), "has no 'prompt', and the two sides"),
    "two answers": (
        "preference",
        row(chosen=[user("q"), assistant("a")], rejected=[user("q"), user("b")]),
        "'chosen' and 'rejected' must each be one answer",
    ),
    "another prompt": (
        "preference",
        row(prompt="z", chosen=[user("q"), assistant("a")], rejected=[user("q"), assistant("b")]),
        "'prompt' is not the conversation that both sides begin with",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_a_malformed_row_is_an_error_with_file_and_line(case: str) -> None:
    form, given, message = BAD[case]
    with pytest.raises(InputError) as caught:
        canonical(given, form)
    assert str(caught.value).startswith(f"rows.jsonl:9: {message}")


def test_unknown_keys_name_the_formats_that_exist_or_the_nearest_one() -> None:
    with pytest.raises(InputError, match=r"no known format has the keys text, label.*alpaca: instruction, output"):
        detect(row(text="x", label=1))
    with pytest.raises(InputError, match=r"nearest is alpaca \(instruction, output\), which lacks output"):
        detect(row(instruction="x", response="y"))
    with pytest.raises(
        InputError, match=r"nearest is prompt_completion \(prompt, completion\), which lacks completion"
    ):
        detect(row(prompt="x", completions="y"))


def test_conversations_written_as_text_become_turns() -> None:
    """HH-RLHF (Bai et al. 2022, arXiv:2204.05862): a pair of texts that begin alike."""
    begin = "\n\nHuman: hi\nthere\n\nAssistant: yes?\n\nHuman: Human: who?\n\nAssistant:"
    made = canonical(row(chosen=begin + " me", rejected=begin + " no"), "preference")
    assert made["prompt"] == [user("hi\nthere"), assistant("yes?"), user("Human: who?")]
    assert (made["chosen"], made["rejected"]) == ([assistant("me")], [assistant("no")])


def test_answers_with_a_score_are_found_where_they_are_wanted() -> None:
    given = row(prompt="q", completion="a", score=3, system="s")
    assert detect(given) == "prompt_completion", "as ever, for other tasks"
    assert detect(given, ("scored",)) == "scored"
    assert canonical(given, "scored") == {"prompt": [system("s"), user("q")], "completion": [assistant("a")]}


@pytest.mark.parametrize("score", [None, "3", True, float("nan"), 1e300, -(10**400)])
def test_a_score_that_is_no_number_names_its_row(score: Any) -> None:
    with pytest.raises(InputError, match=r"'score' must be a number of at most 1e\+15 in size, is .*"):
        canonical(row(prompt="q", completion="a", score=score), "scored")


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ({"margin": 2, "chosen_reward": 5.0, "rejected_reward": 1.0}, 2.0),
        ({"chosen_reward": 5.0, "rejected_reward": 1.5}, 3.5),
        ({"chosen_reward": 5.0}, None),
        ({"margin": "large"}, None),
        ({"margin": 1e300}, None),
    ],
)
def test_the_margin_of_a_pair(given: dict[str, Any], wanted: float | None) -> None:
    assert margin(row(**PAIR, **given)) == wanted
