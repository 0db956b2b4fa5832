from __future__ import annotations

from typing import Any

import datasets
import pytest

from alignment.data import tokens
from alignment.data.chat import Chat
from alignment.data.checks import Drop
from alignment.errors import InputError

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
        with pytest.raises(Drop, match="control_text"):
            tokens.conversation(chat, talk, "here")


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
