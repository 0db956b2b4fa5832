from __future__ import annotations

import pytest

from alignment.config.paths import template_path
from alignment.data.chat import Chat, without_clock
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


DATED = (
    "{%- if not date_string is defined %}\n    {%- if strftime_now is defined %}\n"
    "        {%- set date_string = strftime_now('%d %b %Y') %}\n    {%- else %}\n"
    "        {%- set date_string = '26 Jul 2024' %}\n    {%- endif %}\n{%- endif %}\n"
    "{{ 'Today Date: ' + date_string + '\\n' }}" + PLAIN
)


def test_a_template_with_a_date_of_its_own_prints_that_every_day() -> None:
    """As in Llama 3.2. Apart from the date the text is the same, to the white space."""
    today = Chat(make_tokenizer(DATED)).render(TALK, "here")
    chat = Chat(make_tokenizer(without_clock(DATED)))
    text, answers = chat.answers(TALK, "here")
    assert text.startswith("Today Date: 26 Jul 2024\n") and not today.startswith("Today Date: 26 Jul 2024")
    assert text.split("\n", 1)[1] == today.split("\n", 1)[1]
    assert [text[a.start : a.end] for a in answers] == ["Hello.<eos>", "See you.<eos>"]


@pytest.mark.parametrize("lead", ["\n  ", "", "{# a comment #}\n", "{{- '' }}\n"])
def test_being_told_of_no_clock_changes_no_white_space(lead: str) -> None:
    template = lead + "{% if strftime_now is defined %}{% endif %}" + PLAIN
    frozen = Chat(make_tokenizer(without_clock(template)))
    assert frozen.render(TALK, "here") == Chat(make_tokenizer(template)).render(TALK, "here")
    assert without_clock(PLAIN) == PLAIN


@pytest.mark.parametrize(
    "date", ["{{ strftime_now('%Y-%m-%d') }}", "{% macro today() %}{{ strftime_now('%Y') }}{% endmacro %}{{ today() }}"]
)
def test_a_template_without_a_date_of_its_own_is_refused(date: str) -> None:
    with pytest.raises(InputError) as caught:
        Chat(make_tokenizer(without_clock(date + PLAIN)), "m").check(needs_bos=False)
    assert str(caught.value) == (
        "m: the chat template prints today's date, so it would change from day to day "
        "(set model.chat_template to a .jinja file with a fixed date)"
    )


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


MARKED = PLAIN.replace(
    "{{ m['content'] }}{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}",
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}{{ eos_token }}{% endgeneration %}"
    "{% else %}{{ m['content'] }}{% endif %}",
)
OURS = ": training here goes by its own marks of answers, but other programs' would not"
ODD = {
    "well": (MARKED, []),
    "without the end": (
        MARKED.replace("{{ eos_token }}{% endgeneration %}", "{% endgeneration %}{{ eos_token }}"),
        ["leave out the end-of-turn token '<eos>'"],
    ),
    "the prompt": (
        MARKED.replace("{% generation %}", "")
        .replace("{{ {'system'", "{% if 1 %}{% generation %}{{ {'system'")
        .replace("{% endgeneration %}", "")
        .replace("{{ '\\n' }}", "{% endgeneration %}{% endif %}{{ '\\n' }}"),
        ["do not mark each answer once"],
    ),
    "the role": (
        "{% for m in messages %}{% if m['role'] == 'assistant' %}{% generation %}A:{{ m['content'] }}{{ eos_token }}"
        "{% endgeneration %}{% else %}{{ m['role'] }}:{{ m['content'] }}\n{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}A:{% endif %}",
        ["mark words of the prompt"],
    ),
}


@pytest.mark.parametrize("case", ODD)
def test_marks_of_answers_by_the_template_are_checked(case: str) -> None:
    template, odd = ODD[case]
    told = Chat(make_tokenizer(template)).check(needs_bos=False)
    assert told == [f"the {{% generation %}} blocks of the chat template {words}{OURS}" for words in odd]


def test_which_conversations_a_template_cannot_render_is_told() -> None:
    check = {
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}" + PLAIN: [],
        PLAIN.replace("in messages", "in messages if m['role'] != 'system'"): [
            "rows with a system turn cannot be used: "
            "the chat template leaves out or rewrites the system turn 'Be brief.'"
        ],
        "{% if messages | length > 2 %}{{ raise_exception('one turn') }}{% endif %}" + PLAIN: [
            "rows with several turns cannot be used: "
            "the chat template refuses the conversation: one turn (line 1 of the template)"
        ],
    }  # fmt: skip
    for template, told in check.items():
        assert Chat(make_tokenizer(template)).check(needs_bos=False) == told
