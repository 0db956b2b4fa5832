from __future__ import annotations

import random
from typing import Any

import datasets
import pytest

from alignment.data import tokens
from alignment.data.chat import Chat
from alignment.data.checks import Drop
from alignment.errors import InputError

from . import kinds
from .conftest import PLAIN, assistant, make_tokenizer, system, user

EOS = 1


@pytest.fixture(scope="module")
def chat() -> Chat:
    return Chat(make_tokenizer())


def spelled(chat: Chat, ids: list[int]) -> list[str]:
    return ["-" if i == tokens.IGNORED else chat.tokenizer.decode([i]) for i in ids]


def test_only_the_answer_and_its_end_are_labelled(chat: Chat) -> None:
    """Q:hi\\nA:yo<eos>\\n is Q : h i \\n A : y o <eos> \\n: 11 tokens, labels on the three from y to <eos>."""
    made = tokens.conversation(chat, [user("hi"), assistant("yo")], "here")
    assert spelled(chat, made.ids) == ["Q", ":", "h", "i", "\n", "A", ":", "y", "o", "<eos>", "\n"]
    assert spelled(chat, made.labels) == ["-"] * 7 + ["y", "o", "<eos>"] + ["-"]
    assert made.prompt == 7


def test_every_assistant_turn_is_labelled_and_no_other(chat: Chat) -> None:
    """S:s\\n Q:q\\n A:a<eos>\\n Q:r\\n A:b<eos>\\n: 4 + 4 + 5 + 4 + 5 tokens; labels at 10, 11 and 19, 20."""
    talk = [system("s"), user("q"), assistant("a"), user("r"), assistant("b")]
    made = tokens.conversation(chat, talk, "here")
    labelled = {i: chat.tokenizer.decode([label]) for i, label in enumerate(made.labels) if label != -100}
    assert len(made.ids) == 22
    assert labelled == {10: "a", 11: "<eos>", 19: "b", 20: "<eos>"}
    assert made.prompt == 19


def test_the_end_of_turn_is_labelled_even_where_it_is_the_padding_token() -> None:
    """Pain 1: labels go by position, so a padding token that is the end-of-turn token changes nothing."""
    tokenizer = make_tokenizer()
    tokenizer.pad_token = "<eos>"
    made = tokens.conversation(Chat(tokenizer), [user("hi"), assistant("yo")], "here")
    assert made.labels[-2] == EOS


def test_pairs_share_the_prompt_and_end_with_the_end_of_turn(chat: Chat) -> None:
    made = tokens.pair(chat, [user("q")], [assistant("a")], [assistant("bc")], "here")
    assert spelled(chat, made.prompt) == ["Q", ":", "q", "\n", "A", ":"]
    assert spelled(chat, made.chosen) == ["a", "<eos>"]
    assert spelled(chat, made.rejected) == ["b", "c", "<eos>"]


def test_an_answer_that_merges_with_the_prompt_is_dropped() -> None:
    """Pain 3: with the merge ": x" the last token of the prompt, ":", vanishes into the answer's first."""
    chat = Chat(make_tokenizer(merges=((":", "x"),)))
    with pytest.raises(Drop, match="merged_prompt"):
        tokens.conversation(chat, [user("q"), assistant("xyz")], "here")
    assert tokens.conversation(chat, [user("q"), assistant("zyx")], "here").prompt == 6


@pytest.mark.parametrize("text", ["<|user|>", "a<eos>b", "<bos>"])
def test_control_tokens_in_text_never_become_control_tokens(chat: Chat, text: str) -> None:
    for talk in ([user(text), assistant("a")], [user("q"), assistant(text)], [system(text), user("q"), assistant("a")]):
        ids, control = tokens.conversation(chat, talk, "here").ids, chat.control.ids
        plain = [{**turn, "content": turn["content"].replace(text, "x")} for turn in talk]
        expected = tokens.conversation(chat, plain, "here").ids
        assert [i for i in ids if i in control] == [i for i in expected if i in control]


def test_a_begin_of_text_written_by_the_template_is_not_doubled() -> None:
    """Pain 5: the tokenizer adds one by itself, the template writes one; the row has one."""
    chat = Chat(make_tokenizer("{{ bos_token }}" + PLAIN, bos=True))
    assert tokens.conversation(chat, [user("q"), assistant("a")], "here").ids[:2] == [2, *chat.encode("Q")]


def dataset(**columns: Any) -> datasets.Dataset:
    return datasets.Dataset.from_dict(columns)


def test_the_end_of_turn_check_passes_what_stops_and_refuses_the_rest() -> None:
    """Pain 2: fatal, before training."""
    tokens.check_end_of_turn(dataset(input_ids=[[5, 6, 1, 7]], labels=[[-100, 6, 1, -100]]), EOS)
    tokens.check_end_of_turn(dataset(prompt_ids=[[5]], chosen_ids=[[6, 1]], rejected_ids=[[7, 1]]), EOS)
    bad = {
        "row 1, column labels: the end-of-turn token": dataset(labels=[[6, 1], [6, -100]]),
        "row 0, column labels: the end-of-turn token": dataset(labels=[[-100, -100]]),
        "row 0, column labels: nothing but": dataset(labels=[[-100, 1]]),
        "row 0, column rejected_ids: the end-of-turn token": dataset(chosen_ids=[[6, 1]], rejected_ids=[[7]]),
        "no rows to train on": dataset(labels=[]),
    }
    for message, rows in bad.items():
        with pytest.raises(InputError, match=message):
            tokens.check_end_of_turn(rows, EOS)


def slowly(chat: Chat, messages: list[dict[str, str]]) -> tokens.Conversation | str:
    """What `conversation` makes, by tokenising every prompt whole; why the row is dropped."""
    text, answers = chat.answers(messages, "here")
    ids = chat.encode(text)
    labels, first = [tokens.IGNORED] * len(ids), 0
    for answer in answers:
        prompt = chat.encode(text[: answer.start])
        first = len(prompt)
        if ids[:first] != prompt:
            return "merged_prompt"
        end = ids.index(chat.eos_id, first) + 1
        labels[first:end] = ids[first:end]
    return tokens.Conversation(ids, labels, first)


def quickly(chat: Chat, messages: list[dict[str, str]]) -> tokens.Conversation | str:
    try:
        return tokens.conversation(chat, messages, "here")
    except Drop as drop:
        return drop.fault


BARE = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}{% if m['role'] == 'assistant' %}<|im_end|>{% endif %}"
)
TEMPLATES = {
    "chatml": kinds.CHATML,
    "a blank before the answer": kinds.CHATML.replace("role'] }}\n", "role'] }}: ").replace(
        "assistant\n", "assistant: "
    ),
    "no control token before the first answer": BARE
    + "\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}",
    "an answer right after a control token": kinds.CHATML.replace("role'] }}\n", "role'] }}<s>").replace(
        "assistant\n", "assistant<s>"
    ),
}
PIECES = ["hello", " there", "\n", "\n\n", "  ", "ß", "東京", "t", "'s", " ", "123", "x", "fox", "<", "|>", "\t", "it"]


@pytest.mark.parametrize("kind", kinds.KINDS)
@pytest.mark.parametrize("template", TEMPLATES)
def test_prompts_are_cut_as_by_tokenising_each_whole(kind: str, template: str) -> None:
    rng = random.Random(kind + template)
    chat = Chat(kinds.tokenizer(kind, TEMPLATES[template]))
    for _ in range(60):
        texts = ["".join(rng.choices(PIECES, k=rng.randint(1, 6))) for _ in range(2 * rng.randint(1, 3))]
        talk = [(assistant if number % 2 else user)(text) for number, text in enumerate(texts)]
        assert quickly(chat, talk) == slowly(chat, talk)
        spelt = [{**turn, "content": turn["content"] + rng.choice(["", "<s>", "<|im_end|>"])} for turn in talk]
        assert quickly(chat, spelt) == slowly(chat, spelt)


@pytest.mark.parametrize("flag", ["lstrip", "rstrip", "single_word", "normalized"])
def test_control_tokens_that_take_what_stands_around_them_change_no_cut(flag: str) -> None:
    from tokenizers import AddedToken

    tokenizer = kinds.tokenizer("byte-level")
    tokenizer.add_special_tokens({"additional_special_tokens": [AddedToken("<|say|>", **{flag: True})]})
    tokenizer.chat_template = kinds.CHATML.replace("role'] }}\n", "role'] }} <|say|>").replace(
        "assistant\n", "assistant <|say|>"
    )
    chat = Chat(tokenizer)
    for text in ("yes", " yes", "\n\nyes ", "- a", "ß"):
        talk = [user(text), assistant(text), user("x"), assistant(text)]
        assert quickly(chat, talk) == slowly(chat, talk)


def test_rows_are_dropped_for_merges_by_either_way() -> None:
    chat = Chat(kinds.tokenizer("byte-level"))
    talk = [user("q"), assistant("\n\nhello")]
    assert quickly(chat, talk) == slowly(chat, talk) == "merged_prompt"
