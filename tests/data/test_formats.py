from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from alignment.data.chat import Chat
from alignment.data.formats import canonical, detect, margin, scored_list
from alignment.data.sources import Row, read
from alignment.errors import InputError

from .conftest import assistant, make_tokenizer, system, user
from .preparing import run


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
        "messages[0].role is 'asistant' (known: system, user, assistant, tool)",
    ),
    "null content": (
        "messages",
        row(messages=[user("q"), {"role": "assistant", "content": None}]),
        "messages[1].content must be text, is null",
    ),
    "tool calls": (
        "messages",
        row(messages=[{"role": "assistant", "content": "", "tool_calls": [1]}]),
        "messages[0].tool_calls[0] is no call of a function",
    ),
    "arguments": (
        "messages",
        row(messages=[{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "2 + 2"}}]}]),
        "messages[0].tool_calls[0]: arguments must be an object, is text",
    ),
    "a call of the user": (
        "messages",
        row(messages=[{"role": "user", "content": "q", "tool_calls": [{"name": "f"}]}]),
        "messages[0].tool_calls must be a list, in a turn of the assistant",
    ),
    "an old call": (
        "messages",
        row(messages=[{**assistant(""), "function_call": {"name": "f"}}]),
        "messages[0].function_call",
    ),
    "tools": ("messages", row(messages=[user("q")], tools="f"), "'tools' must be a list of functions"),
    "a tool": ("messages", row(messages=[user("q")], tools=[{"f": 1}]), "tools[0] has no function with a name"),
    "a picture": (
        "messages",
        row(messages=[{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]),
        "messages[0].content has a part of the type 'image_url' without text",
    ),
    "a weight": (
        "messages",
        row(messages=[{**assistant("a"), "weight": 0.5}]),
        "messages[0].weight must be 0 or 1",
    ),
    "tool turn": ("sharegpt", row(conversations=[{"from": "robot", "value": "x"}]), "conversations[0].from is"),
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
    with pytest.raises(InputError, match=r"no known format has the keys words, label.*alpaca: instruction, output"):
        detect(row(words="x", label=1))
    with pytest.raises(InputError, match=r"nearest is alpaca \(instruction, output\), which lacks output"):
        detect(row(instruction="x", response="y"))
    with pytest.raises(
        InputError, match=r"nearest is prompt_completion \(prompt, completion\), which lacks completion"
    ):
        detect(row(prompt="x", completed="y"))


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


WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"in": "Rome"}}}
CALLING = [user("q"), {**assistant(""), "tool_calls": [CALL]}, {"role": "tool", "content": "hot"}, assistant("Hot.")]


def test_tools_and_their_calls_are_one_shape_whatever_they_come_in() -> None:
    of_openai = [
        user("q"),
        {"role": "assistant", "content": None, "tool_calls": [{"id": "1", "function": {
            "name": "weather", "arguments": '{"in": "Rome"}'}}]},
        {"role": "tool", "tool_call_id": "1", "content": [{"type": "text", "text": half} for half in ("ho", "t")]},
        assistant("Hot."),
    ]  # fmt: skip
    of_sharegpt = [
        {"from": "human", "value": "q"},
        {"from": "function_call", "value": '{"name": "weather", "arguments": {"in": "Rome"}}'},
        {"from": "observation", "value": "hot"},
        {"from": "gpt", "value": "Hot."},
    ]
    made = canonical(row(messages=of_openai, tools=[WEATHER]), "messages")["messages"]
    assert (
        made[0].pop("tools") == [WEATHER] and made[1]["tool_calls"][0].pop("id") == made[2].pop("tool_call_id") == "1"
    )
    assert made == CALLING
    made = canonical(row(conversations=of_sharegpt, tools=json.dumps([WEATHER["function"]])), "sharegpt")["messages"]
    assert made[0].pop("tools") == [WEATHER] and made == CALLING
    pair = canonical(row(prompt=CALLING[:3], chosen="Hot.", rejected="Cold.", tools=[WEATHER]), "preference")
    assert pair["prompt"][0]["tools"] == [WEATHER] and pair["prompt"][1:] == CALLING[1:3]


def test_a_rows_own_system_turn_comes_first_in_every_format() -> None:
    for form, given in (
        ("messages", row(messages=[user("q"), assistant("a")], system="s")),
        ("prompt_completion", row(prompt="q", completion="a", system="s")),
        ("sharegpt", row(conversations=[user("q") | {"from": "human", "value": "q"}], system="s")),
    ):
        assert canonical(given, form)["messages"][:2] == [{"role": "system", "content": "s"}, user("q")]


def test_lists_of_scored_answers_are_read_in_both_shapes() -> None:
    """UltraFeedback (Cui et al. 2023, arXiv:2310.01377) has objects; others have two lists."""
    of_objects = row(instruction="q", completions=[{"response": "a", "overall_score": 7.5, "model": "m"}])
    of_lists = row(prompt=[user("q")], completions=["a"], scores=[7.5])
    assert scored_list(of_objects) == scored_list(of_lists) == ([user("q")], [{"text": "a", "score": 7.5}])
    for given, what in (
        (row(prompt="q", completions=["a"], scores=[]), "'scores' must have one number for each"),
        (
            row(prompt="q", completions=[{"text": "a"}]),
            r"completions\[0\] has no number as its score .*keys found: text",
        ),
        (row(prompt="q", completions=[{"score": 1.0}]), r"completions\[0\] has no text"),
        (row(prompt="q", completions="a"), "'completions' must be a list of answers, is text"),
        (row(prompt="q", completions=[]), "'completions' must be a list of answers, is empty"),
        (
            row(prompt="q", completions=[{"text": "a", "score": None, "rating": 5}, {"text": "b", "score": 7.5}]),
            r"completions\[0\] has no number as its score \(score\)",
        ),
    ):
        with pytest.raises(InputError, match=what):
            scored_list(given)


OF_TEXTS = {
    "alpaca": ("sft", [{"instruction": "q", "input": "", "output": "a", "system": ""}]),
    "prompt_completion": ("sft", [{"prompt": "q", "completion": "a"}]),
    "text": ("sft", [{"text": "once"}]),
    "preference": (
        "preference",
        [{"prompt": said, "chosen": "a", "rejected": "b", "margin": said} for said in (".5", " -2e0")],
    ),
    "unpaired": (
        "unpaired",
        [{"prompt": f"q{n}", "completion": "a", "label": said} for n, said in enumerate(("True", "false", "1", " 0 "))],
    ),
    "scored": ("scored", [{"prompt": said, "completion": "a", "score": said} for said in ("3", "-0.5")]),
}  # fmt: skip


def of_file(path: Path, values: list[dict[str, str]]) -> list[Any]:
    with open(path, "w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, [*values[0]], delimiter="," if ".csv" in path.name else "\t")
        writer.writeheader()
        writer.writerows(values)
    return list(read(path))


@pytest.mark.parametrize("suffix", [".csv", ".tsv"])
@pytest.mark.parametrize("form", OF_TEXTS)
def test_tables_of_texts_hold_labels_and_numbers(form: str, suffix: str, tmp_path: Path) -> None:
    task, values = OF_TEXTS[form]
    made = run(Chat(make_tokenizer()), of_file(tmp_path / f"rows{suffix}", values), task=task)
    rows = sorted(made.rows["train"], key=lambda row: int(row["number"]))
    assert made.judged.forms["mine"] == {form: len(values)} and made.counts == {}
    said = {"preference": [0.5, -2.0], "unpaired": [True, False, True, False], "scored": [3.0, -0.5]}.get(form)
    key = {"preference": "margin", "unpaired": "label", "scored": "score"}.get(form, "")
    assert said is None or [row[key] for row in rows] == said


@pytest.mark.parametrize(
    ("task", "key", "said", "what"),
    [
        ("unpaired", "label", "yes", "'label' must be true or false, is text"),
        ("unpaired", "label", "", "'label' must be true or false, is null"),
        ("scored", "score", "1_000", "'score' must be a number .*, is text"),
        ("scored", "score", "nan", "'score' must be a number .*, is text"),
        ("scored", "score", " ", "'score' must be a number .*, is null"),
    ],
)
def test_what_a_text_does_not_say_is_an_error(task: str, key: str, said: str, what: str, tmp_path: Path) -> None:
    rows = of_file(tmp_path / "rows.csv", [{"prompt": "q", "completion": "a", "good": said}])
    with pytest.raises(InputError, match=rf"rows.csv:2: {what}"):
        run(Chat(make_tokenizer()), rows, task=task, columns={key: "good"})


def test_texts_of_other_files_are_no_labels_and_those_of_tables_none_elsewhere(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="'label' must be true or false, is text"):
        run(Chat(make_tokenizer()), [{"prompt": "q", "completion": "a", "label": "true"}], task="unpaired")
    rows = of_file(tmp_path / "rows.csv", [{"prompt": "1", "completion": "0", "expected": "1.50", "label": "true"}])
    (row,) = run(Chat(make_tokenizer()), rows).rows["train"]
    assert json.loads(row["text"])["messages"] == [user("1"), assistant("0")] and json.loads(row["kept"]) == {
        "expected": "1.50"
    }


def test_a_conversation_may_be_json_in_a_text_as_csv_has_it() -> None:
    talk = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    assert canonical(row(messages=json.dumps(talk)), "messages") == canonical(row(messages=talk), "messages")
    with pytest.raises(InputError, match=r"'messages' must be a list of messages, is text .*, in CSV as text"):
        canonical(row(messages="[{"), "messages")
