"""What the assistant thinks before it answers, by the names that it goes by; and fields of turns that nothing reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from alignment import generation
from alignment.config.paths import template_path
from alignment.config.sources import Lists
from alignment.data.chat import Chat
from alignment.errors import InputError
from alignment.files import read_jsonl

from . import kinds
from .conftest import PLAIN, assistant, make_tokenizer, user
from .preparing import qa, run
from .test_formats import CALLING, WEATHER
from .test_kinds_of_rows import texts, trained

THINKING = PLAIN.replace("{{ m['content'] }}", "{% if m.NAME %}<{{ m.NAME }}>{% endif %}{{ m['content'] }}")


def thinking(name: str = "reasoning_content") -> Chat:
    return Chat(make_tokenizer(THINKING.replace("NAME", name)))


@pytest.mark.parametrize("template", ["reasoning_content", "thinking"])
@pytest.mark.parametrize("name", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_by_any_name_is_trained_and_kept(name: str, template: str) -> None:
    chat = thinking(template)
    talk = [user("q"), {**assistant("a"), name: "hm"}, {**user("r"), name: None}, {**assistant("b"), name: ""}]
    of_sharegpt = [{"from": "human", "value": "s"}, {"from": "gpt", "value": "c", name: "so"}]
    made = run(chat, [{"messages": talk}, {"conversations": of_sharegpt}])
    said = {row["text"]: trained(chat, row) for row in made.rows["train"]}
    assert sorted(said.values()) == ["<hm>a<eos>b<eos>", "<so>c<eos>"]
    first = next(json.loads(text)["messages"] for text in said if "hm" in text)
    assert first == [user("q"), {**assistant("a"), "reasoning_content": "hm"}, user("r"), assistant("b")]
    (row,) = run(chat, [{"messages": talk}]).rows["train"]
    assert generation.encode_prompt(chat.tokenizer, first[:-1]) == row["input_ids"][: row["prompt_tokens"]]


def test_a_template_that_leaves_reasoning_out_is_an_error_not_silence() -> None:
    talk = [user("q"), {**assistant("a"), "reasoning_content": "hm"}, user("r"), assistant("b")]
    with pytest.raises(InputError, match=r"rows.jsonl:1: the chat template leaves out the reasoning of turn 2 "):
        run(Chat(make_tokenizer()), [{"messages": talk}])
    with pytest.raises(InputError, match=r"leaves out the reasoning \(set .* one that has a place for reasoning\)"):
        run(Chat(make_tokenizer()), [{"messages": [user("what a"), {**assistant("a"), "thinking": "a"}]}])
    last = THINKING.replace("NAME", "reasoning_content").replace("if m.reasoning", "if loop.last and m.reasoning")
    with pytest.raises(InputError, match="leaves out the reasoning of turn 2"):
        run(Chat(make_tokenizer(last)), [{"messages": talk}])
    made = run(Chat(make_tokenizer()), [{"messages": talk}, qa("q", "a")], checks={"template": "drop"})
    assert made.counts == {"template": 1}


@pytest.mark.parametrize(
    ("turn", "what"),
    [
        ({**assistant("a"), "thinking": ["hm"]}, r"messages\[1\].thinking must be text .*, is a list"),
        ({"role": "tool", "content": "a", "thinking": "hm"}, "in a turn of the assistant, is text in one of the tool"),
        ({**assistant("a"), "thinking": "hm", "reasoning": "so"}, "has reasoning and thinking that differ"),
    ],
)
def test_what_cannot_be_reasoning_is_malformed(turn: dict[str, Any], what: str) -> None:
    with pytest.raises(InputError, match=what):
        run(thinking(), [{"messages": [user("q"), turn]}])


def test_control_tokens_in_reasoning_are_text_and_it_counts_towards_lengths() -> None:
    chat = thinking()
    talk = [user("q"), {**assistant("a"), "thinking": "<eos>"}]
    made = run(chat, [{"messages": talk}])
    assert made.judged.tally.kept == {"mine": {"control_text": 1}}
    assert list(made.rows["train"][0]["labels"]).count(chat.eos_id) == 1
    long = [user("q"), {**assistant("a"), "thinking": "x" * 50}]
    assert run(chat, [{"messages": long}, qa("r", "a")]).counts == {"long_row": 1}


def test_sides_that_differ_in_their_reasoning_alone_are_a_pair() -> None:
    pair = {"prompt": "q", "chosen": {**assistant("a"), "reasoning": "right"}, "rejected": assistant("a")}
    made = run(thinking(), [pair], task="preference")
    assert made.counts == {} and texts(made)[0]["chosen"][0]["reasoning_content"] == "right"


def test_chatml_writes_reasoning_before_the_answer_as_qwen_3_does() -> None:
    chat = Chat(kinds.tokenizer("byte-level", template_path("chatml").read_text()))
    asked, called, told, answer = CALLING
    talk = [{**asked, "tools": [WEATHER]}, {**called, "reasoning_content": "hm"}, told]
    text, answers = chat.answers([*talk, {**answer, "reasoning_content": "so\n hot"}], "here")
    call = '<tool_call>\n{"name": "weather", "arguments": {"in": "Rome"}}\n</tool_call>'
    assert [text[answer.start : answer.end] for answer in answers] == [
        f"<think>\nhm\n</think>\n\n{call}<|im_end|>", "<think>\nso\n hot\n</think>\n\nHot.<|im_end|>"
    ]  # fmt: skip


def test_fields_that_nothing_reads_are_named_and_those_that_say_nothing_are_passed(tmp_path: Path) -> None:
    chat = Chat(make_tokenizer())
    harmless = {"name": "me", "id": "1", "refusal": None, "annotations": [], "audio": None, "tool_calls": None}
    rows = [
        {"messages": [user("q"), {**assistant("a"), **harmless}]},
        {"prompt": [{**user("r"), "mood": "glad"}], "completion": [{**assistant("a"), "channel": "final"}]},
        {"conversations": [{"from": "human", "value": "s", "content": "t"}, {"from": "gpt", "value": "a"}]},
    ]
    made = run(chat, rows, checks={"unread": "drop"}, folder=tmp_path)
    assert made.counts == {"unread": 2} and made.fit == 1
    assert [row["why"].partition(",")[0] for row in read_jsonl(tmp_path / "dropped.jsonl")] == [
        "prompt[0] has 'mood'", "conversations[0] has 'content'"
    ]  # fmt: skip
    with pytest.raises(InputError, match=r"rows.jsonl:2: unread: prompt\[0\] has 'mood', which nothing reads"):
        run(chat, rows)


def test_answers_of_a_list_have_no_place_for_reasoning() -> None:
    answers = [{"text": "a", "score": 1, "model": "m"}, {"text": "b", "score": 2, "reasoning_content": "hm"}]
    lists = Lists(pairs="best_worst", min_margin=0.0, max_pairs=1)
    row = {"prompt": "q", "completions": answers}
    with pytest.raises(InputError, match=r"completions\[1\] has 'reasoning_content', which nothing reads"):
        run(Chat(make_tokenizer()), [row], task="preference", lists=lists)
    made = run(Chat(make_tokenizer()), [row], task="preference", lists=lists, checks={"unread": "keep"})
    assert made.judged.tally.kept == {"mine": {"unread": 1}}
