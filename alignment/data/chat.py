"""One tokenizer with its one chat template: how a conversation looks to the model, and where the answers are in it."""

from __future__ import annotations

import hashlib
import re
from bisect import bisect_right
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from transformers import AutoTokenizer

from alignment import guarded
from alignment.control_tokens import ControlTokens
from alignment.data.turns import REASONING, Message, answers_of
from alignment.errors import InputError

CLOCK = "strftime_now"  # what transformers gives a template to print today's date with


GENERATION = re.compile(r"\{%-?\s*generation\b")
HELLO = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "World"}]
TURNS = [*HELLO, {"role": "user", "content": "How are you?"}, {"role": "assistant", "content": "Fine."}]
SYSTEM = {"role": "system", "content": "Be brief."}
TAIL, TAILS = 64, 1000  # characters between a control token and an answer that are remembered, and how many of them


@dataclass(frozen=True)
class Answer:
    """One answer of a rendered conversation: text[:start] is the prompt, text[start:end] the answer with its
    end-of-turn token. Both in characters.
    """

    start: int
    end: int


class Chat:
    """Renders and encodes conversations, the same way wherever it is used. tokenizer: of transformers.

    Control tokens that a message's content spells out become ordinary tokens, by markers that stand for them in
    rendered text. Who wants none of such content refuses it before: `control_token` finds it.
    """

    def __init__(self, tokenizer: Any, name: str = "the tokenizer"):
        if not tokenizer.chat_template:
            fix = "set model.chat_template to a name or a file"
            raise InputError("the tokenizer has no chat template", where=name, fix=fix)
        if tokenizer.eos_token_id is None:
            raise InputError("the tokenizer has no end-of-turn token", where=name, fix="set model.eos_token")
        self.tokenizer, self.name = tokenizer, name
        self.eos: str = tokenizer.eos_token
        self.eos_id: int = tokenizer.eos_token_id
        self.control = ControlTokens(tokenizer)
        self._tails: dict[str, list[int]] = {}

    @classmethod
    def load(cls, folder: Path) -> Chat:
        return cls(AutoTokenizer.from_pretrained(folder, trust_remote_code=False), str(folder))

    @property
    def template_sha256(self) -> str:
        """That of the model's chat_template.jinja, which its stage's record holds."""
        return hashlib.sha256(str(self.tokenizer.chat_template).encode()).hexdigest()

    def control_token(self, text: str) -> str | None:
        """The first control token spelled out in `text`, people's: the tokenizer would make it a real one."""
        return self.control.find(text)

    def plain(self, text: str) -> str:
        """Rendered text as people read it: with what the markers stand for."""
        return self.control.plain(text)

    def encode(self, text: str) -> list[int]:
        """Token ids of rendered text; the template has written every special token that belongs there."""
        return self.control.encode(text)

    def prompts(self, text: str, ids: list[int], answers: list[Answer]) -> list[int | None]:
        """How many of `ids`, those of the rendered `text`, are the prompt of each answer: as tokenising the prompt
        alone, which generation does, gives them. None where that gives no prefix of `ids`.
        """
        real = self.control.real(text)
        control = self.control.ids
        places = [place for place, token in enumerate(ids) if token in control]
        if [self.control.numbers[found[0]] for found in real] != [ids[place] for place in places]:
            real = []
        return [self._prompt(text, ids, answer.start, real, places) for answer in answers]

    def _prompt(
        self, text: str, ids: list[int], start: int, real: list[re.Match[str]], places: list[int]
    ) -> int | None:
        """A control token splits the text hard: up to the last one before the answer the ids of the prompt are those
        of the whole. What follows it, up to the answer, is the same in most rows, and remembered.
        """
        count = bisect_right(real, start, key=lambda found: found.end())
        across = count < len(real) and real[count].start() < start
        if count and not across and start - real[count - 1].end() <= TAIL:
            tail = self._tail(text[real[count - 1].start() : start])
            place = places[count - 1]
            if ids[place : place + len(tail)] == tail:
                return place + len(tail)
        prompt = self.encode(text[:start])
        return len(prompt) if ids[: len(prompt)] == prompt else None

    def _tail(self, text: str) -> list[int]:
        if (known := self._tails.get(text)) is None:
            known = self.encode(text)
            if len(self._tails) < TAILS:
                self._tails[text] = known
        return known

    def render(self, messages: list[Message], where: str, *, prompt: bool = False) -> str:
        """The conversation as text, with markers for what is neutralised; prompt: with the words that ask the model for
        its turn. Raises InputError."""
        return guarded.render(self.tokenizer, self._hidden(messages), where, prompt=prompt)

    def _hidden(self, messages: list[Message]) -> list[Message]:
        return self.control.hidden(messages)

    def answers(self, messages: list[Message], where: str) -> tuple[str, list[Answer]]:
        """The rendered conversation and its answers (`turns.answers_of`), cut where the template itself cuts.

        Rendering the turns before an answer must give a prefix of rendering them with it, and so on to the end: else
        the template rewrites history, and what is trained is not what is asked at generation. Raises InputError.
        """
        hidden = self._hidden(messages)
        numbers = answers_of(hidden)
        prompts = [(hidden[:number], True) for number in numbers]
        through = [(hidden[: number + 1], False) for number in numbers if number + 1 < len(hidden)]
        text, *parts = guarded.renderings(self.tokenizer, [(hidden, False), *prompts, *through], where)
        befores, uptos = parts[: len(numbers)], [*parts[len(numbers) :], text]
        for told, message in zip(hidden, messages, strict=True):
            if told["content"].strip() not in text:
                turn = f"{message['role']} turn {message['content'][:40]!r}"
                what = f"the chat template leaves out or rewrites the {turn}"
                raise InputError(what, where=where, fix="set model.chat_template to one that renders every turn")
        self._check_beside(hidden, text, where)
        answers = []
        for number, before, upto in zip(numbers, befores, uptos, strict=False):
            if not (upto.startswith(before) and text.startswith(upto)):
                what = f"the chat template renders turn {number + 1} differently when later turns follow"
                fix = "set model.chat_template to one that never rewrites earlier turns"
                raise InputError(what, where=where, fix=fix)
            end = upto.find(self.eos, len(before))
            if end < 0:
                what = f"the chat template does not end an answer with the end-of-turn token {self.eos!r}"
                fix = "set model.eos_token to the token that the template writes, or change the template"
                raise InputError(what, where=where, fix=fix)
            answers.append(Answer(len(before), end + len(self.eos)))
        return text, answers

    def _check_beside(self, messages: list[Message], text: str, where: str) -> None:
        """Raises InputError where the template has no place for reasoning, for what tools there are, what is called, or
        with what: then it writes the same without them. Some write the reasoning of the last turn alone."""
        for number, message in enumerate(messages, start=1):
            if message.get(REASONING, "").strip() not in text:
                self._leaves_out(f"reasoning of turn {number}", where)
        for what, key in (("tools", "tools"), ("calls of tools", "tool_calls"), ("reasoning", REASONING)):
            if any(key in message for message in messages):
                bare = [{name: value for name, value in message.items() if name != key} for message in messages]
                self._must_differ(bare, text, what, where)
        if any(call["function"]["arguments"] for message in messages for call in message.get("tool_calls", [])):
            bare = [_without_arguments(message) for message in messages]
            self._must_differ(bare, text, "arguments of calls", where)

    def _must_differ(self, bare: list[Message], text: str, what: str, where: str) -> None:
        if guarded.render(self.tokenizer, bare, where) == text:
            self._leaves_out(what, where)

    def _leaves_out(self, what: str, where: str) -> NoReturn:
        fix = f"set model.chat_template to one that has a place for {what.split()[0]}"
        raise InputError(f"the chat template leaves out the {what}", where=where, fix=fix)

    def check(self, *, needs_bos: bool) -> list[str]:
        """The template on small conversations: it ends answers with the end-of-turn token, and begins the text once.

        needs_bos: the model expects a begin-of-text token. Returns warnings: which conversations it cannot render, and
        of its own marks of answers. Raises InputError; done once, when a model is imported.
        """
        ids = self.encode(self.answers(HELLO, self.name)[0])
        check_bos(ids, self.tokenizer.bos_token_id, self.name)
        if needs_bos and ids[0] != self.tokenizer.bos_token_id:
            what = f"the tokenizer begins every text with {self.tokenizer.bos_token!r}, the chat template does not"
            raise InputError(what, where=self.name, fix="begin the template with {{ bos_token }}")
        told = []
        for name, messages in (("several turns", TURNS), ("a system turn", [SYSTEM, *HELLO])):
            try:
                check_bos(self.encode(self.answers(messages, self.name)[0]), self.tokenizer.bos_token_id, self.name)
            except InputError as error:
                if messages is TURNS or not error.what.startswith(guarded.REFUSES):  # many models take no system turn
                    told.append(f"rows with {name} cannot be used: {error.what}")
        return told + self._marks()

    def _marks(self) -> list[str]:
        """What is odd in the spans that the template marks with {% generation %}, where it does."""
        if not GENERATION.search(str(self.tokenizer.chat_template)):
            return []
        text, answers = self.answers(HELLO, self.name)
        again, spans = guarded.marked(self.tokenizer, HELLO, self.name)
        odd = []
        if again != text or len(spans) != len(answers):
            odd.append("do not mark each answer once")
        elif spans[0][0] < answers[0].start:
            odd.append("mark words of the prompt")
        if spans and answers and again == text and spans[-1][1] < answers[-1].end:
            odd.append(f"leave out the end-of-turn token {self.eos!r}")
        ours = "training here goes by its own marks of answers, but other programs' would not"
        return [f"the {{% generation %}} blocks of the chat template {words}: {ours}" for words in odd]


def _without_arguments(message: Message) -> Message:
    calls = message.get("tool_calls", [])
    bare = [{**call, "function": {**call["function"], "arguments": {}}} for call in calls]
    return {**message, **({"tool_calls": bare} if bare else {})}


def without_clock(template: str) -> str:
    """The template, told that there is no clock if it asks for one: else the same key would mean other rows tomorrow.

    It then prints the date it has for that case (Llama 3.2: 26 Jul 2024); one that has none is refused by `render`.
    In Jinja a name that is set to an undefined one is itself undefined, and calling it an error that says which.
    """
    if CLOCK not in template:
        return template
    return f"{{# No clock: every day the same text. #}}{{% set {CLOCK} = {guarded.NO_CLOCK} %}}\n{template}"


def adds_bos(tokenizer: Any) -> bool:
    """Whether the tokenizer itself begins a text with its begin-of-text token."""
    bos = tokenizer.bos_token_id
    return bos is not None and list(tokenizer("a")["input_ids"][:1]) == [bos]


def check_bos(ids: list[int], bos_id: int | None, where: str) -> None:
    """Raises InputError if the text begins with two begin-of-text tokens."""
    if bos_id is not None and ids[:2] == [bos_id, bos_id]:
        raise InputError("the text begins with two begin-of-text tokens", where=where, fix="let the template write one")
