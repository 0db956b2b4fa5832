"""Rows with tools, plain texts, lists of scored answers, and rows that are too long, through preparation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from alignment import generation
from alignment.config.paths import template_path
from alignment.config.sources import Lists
from alignment.data import tokens
from alignment.data.chat import Chat
from alignment.data.sources import Row
from alignment.errors import InputError
from alignment.files import read_jsonl

from . import kinds
from .conftest import PLAIN, assistant, make_tokenizer, system, user
from .preparing import qa, run
from .test_formats import CALLING, WEATHER

TOOLS = (
    "{% if tools %}T:{{ tools | tojson }}\n{% endif %}"
    "{% for m in messages %}{{ {'system': 'S', 'user': 'Q', 'assistant': 'A', 'tool': 'R'}[m['role']] }}:"
    "{{ m['content'] }}"
    "{% for call in m.tool_calls or [] %}{{ call.function.name }}{{ call.function.arguments | tojson }}{% endfor %}"
    "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}A:{% endif %}"
)
WIDE = {"max_length": 400, "max_prompt_length": 300}


@pytest.fixture
def chat() -> Chat:
    return Chat(make_tokenizer())


def texts(made: Any) -> list[dict[str, Any]]:
    return [json.loads(row["text"]) for row in made.rows["train"]]


def trained(chat: Chat, row: dict[str, Any]) -> str:
    return str(chat.tokenizer.decode([label for label in row["labels"] if label != tokens.IGNORED]))


def test_calls_of_tools_are_trained_and_what_tools_say_is_not() -> None:
    chat = Chat(make_tokenizer(TOOLS))
    made = run(chat, [{"messages": CALLING, "tools": [WEATHER]}], **WIDE)
    (row,) = made.rows["train"]
    assert trained(chat, row) == 'weather{"in": "Rome"}<eos>Hot.<eos>'
    whole = chat.tokenizer.decode(row["input_ids"])
    assert whole.startswith(f"T:{json.dumps([WEATHER])}\nQ:q\n") and "R:hot\n" in whole
    prompt = texts(made)[0]["messages"][:-1]
    assert generation.encode_prompt(chat.tokenizer, prompt) == row["input_ids"][: row["prompt_tokens"]]


def test_a_template_without_a_place_for_tools_is_an_error_not_silence() -> None:
    chat = Chat(make_tokenizer(PLAIN.replace("'assistant': 'A'", "'assistant': 'A', 'tool': 'R'")))
    with pytest.raises(InputError, match=r"rows.jsonl:1: the chat template leaves out the tools "):
        run(chat, [{"messages": [user("q"), assistant("a")], "tools": [WEATHER]}], **WIDE)
    with pytest.raises(InputError, match=r"leaves out the calls of tools "):
        run(chat, [{"messages": CALLING}], **WIDE)


def test_control_tokens_in_arguments_and_answers_of_tools_are_text() -> None:
    chat = Chat(make_tokenizer(TOOLS))
    call = {"function": {"name": "f", "arguments": {"<eos>": "<|user|>"}}}
    talk = [user("q"), {**assistant(""), "tool_calls": [call]}, {"role": "tool", "content": "<eos>"}, assistant("a")]
    made = run(chat, [{"messages": talk}], **WIDE)
    assert made.judged.tally.kept == {"mine": {"control_text": 1}}
    assert list(made.rows["train"][0]["input_ids"]).count(chat.eos_id) == 2
    assert run(chat, [{"messages": talk}, qa("q", "a")], checks={"control_text": "drop"}, **WIDE).counts == {
        "control_text": 1
    }


@pytest.mark.parametrize(
    ("talk", "fault"),
    [
        (
            [user("q"), {**assistant(""), "tool_calls": CALLING[1]["tool_calls"]}, user("r"), assistant("a")],
            "turn_order",
        ),
        ([user("q"), {"role": "tool", "content": "x"}, assistant("a")], "turn_order"),
        (CALLING[:3], "no_answer"),
    ],
)
def test_tools_speak_where_they_are_called(talk: list[dict[str, Any]], fault: str) -> None:
    assert run(Chat(make_tokenizer(TOOLS)), [{"messages": talk}, qa("q", "a")], **WIDE).counts == {fault: 1}


def test_turns_of_weight_0_are_not_trained(chat: Chat) -> None:
    talk = [user("q"), {**assistant("wrong"), "weight": 0}, user("r"), {**assistant("right"), "weight": 1}]
    (row,) = run(chat, [{"messages": talk}]).rows["train"]
    assert trained(chat, row) == "right<eos>"


def test_a_text_is_trained_whole_ended_and_never_asked() -> None:
    chat = Chat(make_tokenizer("{{ bos_token }}" + PLAIN, bos=True))
    values = [{"text": f"once {word} <eos> a time"} for word in "abcdef"] + [
        qa("q", "a"),
        {"text": "Once A <eos> a time"},
    ]
    made = run(chat, values, heldout=1)
    assert made.judged.forms["mine"] == {"text": 7, "prompt_completion": 1} and made.counts == {"duplicate": 1}
    assert [row["text"] for row in made.rows["heldout"]] == [json.dumps({"messages": [user("q"), assistant("a")]})]
    row = made.rows["train"][0]
    text = json.loads(row["text"])["text"]
    assert row["input_ids"] == row["labels"] == [2, *chat.encode(chat.control.hide(text)), chat.eos_id]
    assert list(row["input_ids"]).count(chat.eos_id) == 1
    with pytest.raises(InputError, match="2 held-out"):
        run(chat, values, heldout=2)


LIST = {
    "prompt": "q",
    "completions": [{"text": text, "score": score} for text, score in zip("abcd", (3, 1, 5, 2), strict=True)],
}


@pytest.mark.parametrize(
    ("lists", "expected"),
    [
        (Lists(pairs="best_worst", min_margin=0.0, max_pairs=1), ["cb"]),
        (Lists(pairs="best_worst", min_margin=0.0, max_pairs=9), ["cb", "ad"]),
        (Lists(pairs="all_margin", min_margin=2.0, max_pairs=9), ["cb", "cd", "ab", "ca"]),
        (Lists(pairs="all_margin", min_margin=4.5, max_pairs=9), []),
    ],
)
def test_lists_of_scored_answers_become_pairs_by_the_rule(lists: Lists, expected: list[str], chat: Chat) -> None:
    made = run(chat, [LIST, {"prompt": "r", "chosen": "a", "rejected": "b"}], task="preference", lists=lists)
    found = [row for row in texts(made) if row["prompt"] == [user("q")]]
    assert sorted(row["chosen"][0]["content"] + row["rejected"][0]["content"] for row in found) == sorted(expected)
    assert made.counts == ({} if expected else {"no_pair": 1})


def test_of_a_list_the_best_meets_a_random_one_by_the_seed(chat: Chat) -> None:
    lists = Lists(pairs="best_random", min_margin=0.0, max_pairs=1)
    many = [{**LIST, "prompt": f"q{n}"} for n in range(30)]
    made = [texts(run(chat, many, task="preference", lists=lists, seed=seed)) for seed in (0, 0, 1)]
    found = [sorted((row["prompt"][0]["content"], row["rejected"][0]["content"]) for row in rows) for rows in made]
    assert found[0] == found[1] != found[2] and {worse for _, worse in found[0]} == set("abd")
    assert all(row["chosen"] == [assistant("c")] for row in made[0])


def test_a_list_is_as_many_scored_rows_as_it_has_answers(chat: Chat) -> None:
    made = run(chat, [LIST], task="scored")
    assert sorted((row["completion"][0]["content"], row["score"]) for row in texts(made)) == [
        ("a", 3.0), ("b", 1.0), ("c", 5.0), ("d", 2.0)
    ]  # fmt: skip


CUT = {"over_long": "truncate_prompt", "max_length": 30, "max_prompt_length": 20}


def test_prompts_that_are_too_long_lose_their_beginning_and_keep_the_system_turn(chat: Chat) -> None:
    """Before the answer, S:s and Q: with n letters are 9 + n tokens."""
    old = [user("one two"), assistant("three")]
    values = [
        {"messages": [system("s"), *old, user("four"), assistant("five")]},  # 32 tokens before the answer
        {"messages": [system("s"), user("aa bb cc dd ee"), assistant("b")]},
        {"messages": [user("short"), assistant("c")]},
        {"messages": [user("q"), assistant("d" * 40)]},
        {"messages": [system("s" * 20), user("q"), assistant("e")]},
        {"text": "t" * 40},
    ]
    made = run(chat, values, **CUT)
    assert {row["messages"][-1]["content"]: row["messages"][:-1] for row in texts(made)} == {
        "five": [system("s"), user("four")],
        "b": [system("s"), user("bb cc dd ee")],  # 9 + 11: with aa it would be 23
        "c": [user("short")],
    }
    assert made.judged.tally.kept == {"mine": {"truncated": 2}} and made.counts == {"long_row": 2, "long_prompt": 1}
    for row in made.rows["train"]:
        assert row["prompt_tokens"] <= 20 and row["labels"][-2] == chat.eos_id  # the template ends it with a newline


def test_both_sides_of_a_pair_follow_the_same_cut_prompt(chat: Chat) -> None:
    pair = {"prompt": "x" * 30 + " word", "chosen": "a", "rejected": "bbb", "margin": 2.0}
    (row,) = run(chat, [pair, {**pair, "prompt": "y" * 40}], task="preference", **CUT).rows["train"][:1]
    assert chat.tokenizer.decode(row["prompt_ids"]) == "Q:word\nA:" and row["margin"] == 2.0
    (row,) = run(chat, [{**pair, "prompt": "y" * 40}], task="preference", **CUT).rows["train"]
    assert chat.tokenizer.decode(row["prompt_ids"]) == "Q:" + "y" * 15 + "\nA:", "one word is cut by letters"


def test_chatml_writes_tools_and_calls_as_servers_read_them() -> None:
    chat = Chat(kinds.tokenizer("byte-level", template_path("chatml").read_text()))
    talk = [{**system("Be brief."), "tools": [WEATHER]}, user("q"), {**CALLING[1], "content": "I look."}, *CALLING[2:]]
    text, answers = chat.answers(talk, "here")
    begin, _, rest = text.partition("<tools>\n")
    assert begin.startswith("<|im_start|>system\nBe brief.\n\n")
    assert json.loads(rest.partition("\n</tools>")[0]) == WEATHER
    called = 'I look.\n<tool_call>\n{"name": "weather", "arguments": {"in": "Rome"}}\n</tool_call><|im_end|>'
    assert [text[answer.start : answer.end] for answer in answers] == [called, "Hot.<|im_end|>"]
    assert "<|im_start|>tool\nhot<|im_end|>\n" in text and text.count("Be brief.") == 1
    bare = chat.render(CALLING, "here")
    assert bare.startswith("<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n<tool_call>\n")


def test_a_row_with_a_system_turn_of_its_own_is_cut_too(chat: Chat) -> None:
    long = "x" * 30 + " word"
    given = {"system": "s", "instruction": long, "output": "a"}
    made = run(chat, [given], **CUT)
    assert texts(made) == [{"messages": [system("s"), user("word"), assistant("a")]}]
    pair = {"system": "s", "prompt": long, "chosen": "a", "rejected": "b"}
    (row,) = texts(run(chat, [pair], task="preference", **CUT))
    assert row["prompt"] == [system("s"), user("word")]
    rows = [{"messages": [user(long), assistant(answer)], "label": answer == "a"} for answer in "ab"]
    rows.append({"prompt": "another", "completion": "c", "label": True})
    made = run(chat, rows, task="unpaired", **CUT)
    assert sorted(row["prompt"][-1]["content"] for row in texts(made)) == ["another", "word", "word"]
    assert made.counts == {} and made.judged.tally.kept == {"mine": {"truncated": 2}}


def test_tools_stand_in_the_first_message_or_beside_the_messages() -> None:
    chat = Chat(make_tokenizer(TOOLS))
    (row,) = texts(run(chat, [{"messages": [{**system("s"), "tools": [WEATHER["function"]]}, *CALLING]}], **WIDE))
    assert row["messages"][0]["tools"] == [WEATHER]
    for messages, what in (
        ([{**user("q"), "tools": ["f"]}, assistant("a")], "'tools' must be a list of functions"),
        ([user("q"), {**assistant("a"), "tools": [WEATHER]}], "'tools' stand in a later message"),
    ):
        with pytest.raises(InputError, match=what):
            run(chat, [{"messages": messages}], **WIDE)


def test_a_template_that_writes_a_call_without_its_arguments_is_an_error() -> None:
    chat = Chat(make_tokenizer(TOOLS.replace("{{ call.function.arguments | tojson }}", "")))
    with pytest.raises(InputError, match="leaves out the arguments of calls"):
        run(chat, [{"messages": CALLING}], **WIDE)


def test_where_no_answer_has_a_weight_there_is_none(chat: Chat) -> None:
    made = run(chat, [qa("q", "a"), {"messages": [user("r"), {**assistant("b"), "weight": 0}]}])
    assert made.counts == {"no_answer": 1}


def test_a_greeting_that_begins_a_kept_row_is_context_and_rows_are_known_by_what_is_asked(chat: Chat) -> None:
    """[assistant, user, assistant]: the first turn answers nothing. Rows with the same greeting, or system turn before
    it, ask different things all the same."""
    rows = [{"messages": [assistant("Hi!"), user(f"q{n}"), assistant(f"a{n}")]} for n in range(4)]
    rows += [{"messages": [system("s"), assistant("Hi!"), user(f"r{n}"), assistant(f"b{n}")]} for n in range(4)]
    rows += [
        {"messages": [assistant("Hi!")]},
        {"messages": [assistant("Hi!"), user("q"), {**assistant("a"), "weight": 0}]},
    ]
    assert run(chat, [*rows, qa("q", "a")]).counts == {"turn_order": 9, "no_answer": 1}
    made = run(chat, rows, checks={"turn_order": "keep"}, heldout=3, prompts=2)
    assert made.counts == {"no_answer": 2} and made.judged.tally.kept == {"mine": {"turn_order": 8}}
    said = {trained(chat, row) for rows in made.rows.values() for row in rows}
    assert said == {f"a{n}<eos>" for n in range(4)} | {f"Hi!<eos>b{n}<eos>" for n in range(4)}
    pairs = [{"prompt": [assistant("Hi!"), user(f"q{n}")], "chosen": "a", "rejected": "b"} for n in range(4)]
    made = run(chat, pairs, task="preference", checks={"turn_order": "keep"}, heldout=2)
    assert [chat.tokenizer.decode(row["prompt_ids"]) for row in made.rows["train"]] == [
        f"A:Hi!<eos>\nQ:q{row['number'] - 1}\nA:" for row in made.rows["train"]
    ]
    assert made.counts == {} and len(made.rows["train"]) == 2


def written(folder: Path) -> list[str]:
    return [row["id"] for row in read_jsonl(folder / "train.jsonl")]


def test_ids_differ_whatever_rows_are_made_of(chat: Chat, tmp_path: Path) -> None:
    lists = Lists(pairs="best_worst", min_margin=0.0, max_pairs=2)
    run(chat, [LIST, {**LIST, "prompt": "r"}], task="preference", lists=lists, folder=tmp_path)
    assert sorted(written(tmp_path)) == ["1-1", "1-2", "2-1", "2-2"]
    rows = [Row(qa(f"{file}{number}", "a"), file, number, number) for file in ("a", "b") for number in (1, 2)]
    run(chat, rows, folder=tmp_path)
    assert sorted(written(tmp_path)) == ["1-1", "1-2", "2-1", "2-2"]
    run(chat, [{**qa(f"q{number}", "a"), "id": number} for number in range(3)], folder=tmp_path)
    assert sorted(written(tmp_path)) == ["0", "1", "2"]
