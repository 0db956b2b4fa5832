from __future__ import annotations

import pytest

from alignment.config.paths import template_path
from alignment.data.chat import Chat
from alignment.errors import InputError

from .conftest import PLAIN, assistant, make_tokenizer, system, user

TALK = [system("Be brief."), user("Hi"), assistant("Hello."), user("Bye"), assistant("See you.")]
INSTRUCTION = (
    "### System:\nBe brief.\n\n### Instruction:\nHi\n\n### Response:\nHello.<eos>\n"
    "### Instruction:\nBye\n\n### Response:\n"
)
CHATML = (
    "<|im_start|>system\nBe brief.<eos>\n<|im_start|>user\nHi<eos>\n<|im_start|>assistant\nHello.<eos>\n"
    "<|im_start|>user\nBye<eos>\n<|im_start|>assistant\n"
)


@pytest.mark.parametrize(
    ("name", "prompt", "answer"),
    [("instruction", INSTRUCTION, "See you.<eos>\n"), ("chatml", CHATML, "See you.<eos>\n")],
)
def test_shipped_templates_render_exactly_and_prefix_stably(name: str, prompt: str, answer: str) -> None:
    chat = Chat(make_tokenizer(template_path(name).read_text().replace("<|im_end|>", "{{ eos_token }}")))
    text, answers = chat.answers(TALK, "here")
    assert text == prompt + answer
    assert [text[a.start : a.end] for a in answers] == ["Hello.<eos>", "See you.<eos>"]
    assert chat.render(TALK[:-1], "here", prompt=True) == prompt
    chat.check(needs_bos=False)


def test_encoding_a_rendered_prompt_is_what_transformers_gives_to_generation() -> None:
    chat = Chat(make_tokenizer(template_path("instruction").read_text(), bos=True))
    given = chat.tokenizer.apply_chat_template(TALK[:-1], add_generation_prompt=True, return_dict=True)
    assert chat.encode(chat.render(TALK[:-1], "here", prompt=True)) == given["input_ids"]


BAD = {
    "drops system turns": (
        PLAIN.replace("{% for m in messages %}", "{% for m in messages if m['role'] != 'system' %}"),
        "the chat template leaves out or rewrites the system turn 'Be brief.'",
    ),
    "rewrites history": (
        PLAIN.replace("{{ '\\n' }}", "{{ '!' if loop.last else '\\n' }}"),
        "the chat template renders turn 3 differently when later turns follow",
    ),
    "asks otherwise than it answers": (
        PLAIN.replace("A:{% endif", "A: {% endif"),
        "the chat template renders turn 3 differently when later turns follow",
    ),
    "never ends an answer": (
        PLAIN.replace("{{ eos_token }}", ""),
        "the chat template does not end an answer with the end-of-turn token '<eos>'",
    ),
    "refuses": (
        "{{ raise_exception('no system turns, please') }}",
        "the chat template refuses the conversation: no system",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_a_template_that_cannot_be_trusted_is_an_error_that_names_the_row(case: str) -> None:
    template, message = BAD[case]
    with pytest.raises(InputError) as caught:
        Chat(make_tokenizer(template)).answers(TALK, "rows.jsonl:9")
    assert str(caught.value).startswith(f"rows.jsonl:9: {message}")


def test_a_tokenizer_without_a_template_is_an_error() -> None:
    with pytest.raises(InputError, match=r"m: the tokenizer has no chat template \(set model.chat_template"):
        Chat(make_tokenizer(None), "m")


def test_begin_of_text_must_be_written_once() -> None:
    with pytest.raises(InputError, match="two begin-of-text tokens"):
        Chat(make_tokenizer("{{ bos_token }}{{ bos_token }}" + PLAIN)).check(needs_bos=True)
    with pytest.raises(InputError, match="begins every text with '<bos>', the chat template does not"):
        Chat(make_tokenizer(PLAIN)).check(needs_bos=True)
    Chat(make_tokenizer("{{ bos_token }}" + PLAIN)).check(needs_bos=True)


def test_control_tokens_are_found_in_text() -> None:
    chat = Chat(make_tokenizer())
    assert chat.control_token("say <|user|> now") == "<|user|>"
    assert chat.control_token("<eos>") == "<eos>"
    assert chat.control_token("a <b> c") is None
