"""One row of any format -> examples: checked, rendered, tokenised; or why it was dropped."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from alignment.config.data_checks import Checks
from alignment.config.stages.preparing import FORMATS
from alignment.data import tokens
from alignment.data.chat import Chat
from alignment.data.checks import Drop, Dropped, Policy, opening, turn_faults
from alignment.data.formats import ROLES, Message, canonical, detect, finite, kept, margin, renamed, wanted
from alignment.data.personal import personal
from alignment.data.sources import Row, Unreadable
from alignment.errors import InputError

WANTED = "preference needs chosen and rejected, unpaired a label, scored a score beside the answer, sft an answer"


@dataclass
class Example:
    """One row that passed: its messages, its columns for training (token ids, a number), and its lengths in tokens.

    id: its own, None if it has none. tokens: of the whole row; of its longer side for a pair. kept: faults that it is
    trained on with -> why. personal: kinds of personal data -> how many it holds.
    """

    row: Row
    id: str | None
    form: str
    prompt: list[Message]
    answer: Message
    rejected: Message | None
    columns: dict[str, Any]
    prompt_tokens: int
    tokens: int
    opening: str
    kept: dict[str, str] = field(default_factory=dict)
    personal: dict[str, int] = field(default_factory=dict)

    def said(self, *roles: str) -> str:
        """All texts of these roles; the answers are the assistant's."""
        turns = [*self.prompt, self.answer, *([self.rejected] if self.rejected else [])]
        return "\n".join(turn["content"] for turn in turns if turn["role"] in roles)

    def text(self) -> dict[str, Any]:
        """The row as train.jsonl has it, but for its id."""
        for name in ("label", "score"):
            if name in self.columns:
                return {"prompt": self.prompt, "completion": [self.answer], name: self.columns[name]}
        if self.rejected is None:
            return {"messages": [*self.prompt, self.answer]}
        return {"prompt": self.prompt, "chosen": [self.answer], "rejected": [self.rejected]}


@dataclass(frozen=True)
class Reading:
    """How rows are read and judged: what a worker has to know."""

    form: str
    columns: Mapping[str, str]
    task: str
    checks: Checks
    chat: Chat
    max_length: int
    max_prompt_length: int
    over_long: Literal["drop", "error"]


def examples(row: Row | Unreadable, reading: Reading) -> list[Example | Dropped]:
    """What a row becomes: mostly one example. Raises InputError for a fault that is an error."""
    policy = Policy(reading.checks)
    if isinstance(row, Unreadable):
        return [_unreadable(row, policy)]
    try:
        with _as("malformed", policy, row):
            given = renamed(row, reading.columns)
            kept(given)  # what is wrong with it is told whichever split the row goes to
        with _as("unknown_format", policy, row):
            form = detect(given, FORMATS[reading.task]) if reading.form == "auto" else reading.form
            if form not in FORMATS[reading.task]:
                what = f"rows of the format {form!r} cannot be prepared for the task {reading.task!r}"
                raise InputError(what, where=row.where, fix=WANTED)
        parts = [given]
        if reading.task == "unpaired" and form == "preference":
            with _as("malformed", policy, row):
                parts = list(_halves(given))
    except Drop as drop:
        return [Dropped(row, drop.fault, drop.why)]
    form = "unpaired" if len(parts) > 1 else form
    return [_example(part, row, form, reading) for part in parts]


def _unreadable(row: Unreadable, policy: Policy) -> Dropped:
    if policy.checks.malformed == "error":
        raise row.error
    return Dropped(Row({}, row.file, row.number, row.line), "malformed", row.what)


@contextmanager
def _as(fault: str, policy: Policy, row: Row) -> Iterator[None]:
    """What is wrong in here is this fault: it goes on as an InputError, or becomes a Drop."""
    try:
        yield
    except InputError as error:
        if getattr(policy.checks, fault) == "error":
            raise
        policy.meet(fault, row, error.what)


def _example(part: Row, row: Row, form: str, reading: Reading) -> Example | Dropped:
    """part: the row, or what stands for it now. Raises InputError for a fault that is an error."""
    policy = Policy(reading.checks)
    try:
        try:
            maker = {"preference": _preference, "unpaired": _unpaired, "scored": _scored}.get(form, _conversation)
            example = maker(part, form, reading.chat, policy)
            _check_length(example, reading)
            _check_personal(example, row, policy)
        except Drop as drop:  # of one that met no policy yet
            policy.meet(drop.fault, row, drop.why)
            raise
    except Drop as drop:
        return Dropped(row, drop.fault, drop.why)
    example.kept = policy.passed()
    return example


def _check_length(made: Example, reading: Reading) -> None:
    """Raises InputError or Drop."""
    if made.prompt_tokens > reading.max_prompt_length:
        over = "long_prompt", f"prompt of {made.prompt_tokens} tokens"
    elif made.tokens > reading.max_length:
        over = "long_row", f"row of {made.tokens} tokens"
    else:
        return
    if reading.over_long == "error":
        limits = f"max_length is {reading.max_length}, max_prompt_length {reading.max_prompt_length}"
        fix = "raise the limit, or set over_long: drop"
        raise InputError(f"{over[1]}: {limits}", where=made.row.where, fix=fix)
    raise Drop(*over)


def _check_personal(made: Example, row: Row, policy: Policy) -> None:
    """Raises InputError or Drop. What it holds is told by the kind alone."""
    if policy.checks.personal is None:
        return
    found = personal(made.said(*ROLES))
    made.personal = {kind: many for kind, many in found.items() if many}
    if made.personal:
        policy.meet("personal", row, ", ".join(f"{many} {kind}" for kind, many in made.personal.items()))


def _own_id(row: Row) -> str | None:
    return str(row.value.get("id") or "") or None


def _halves(row: Row) -> Iterator[Row]:
    """Both answers of a pair as unpaired rows."""
    made = canonical(row, "preference")
    for side, label in (("chosen", True), ("rejected", False)):
        name = {"id": f"{row.value['id']}-{side}"} if row.value.get("id") else {}
        yield replace(row, value={**name, "messages": [*made["prompt"], *made[side]], "label": label})


def _checked(messages: list[Message], row: Row, chat: Chat, policy: Policy) -> None:
    for fault in turn_faults(messages):
        policy.meet(fault, row)
    for message in messages:
        if found := chat.control_token(message["content"]):
            policy.meet("control_text", row, f"the {message['role']} turn spells out the control token {found!r}")


def _conversation(row: Row, form: str, chat: Chat, policy: Policy) -> Example:
    with _as("malformed", policy, row):
        messages = canonical(row, form)["messages"]
    _checked(messages, row, chat, policy)
    with _as("template", policy, row):
        made = tokens.conversation(chat, messages, row.where)
    columns, length, key = {"input_ids": made.ids, "labels": made.labels}, len(made.ids), opening(messages)
    return Example(row, _own_id(row), form, messages[:-1], messages[-1], None, columns, made.prompt, length, key)


def _preference(row: Row, form: str, chat: Chat, policy: Policy) -> Example:
    with _as("malformed", policy, row):
        made = canonical(row, form)
    prompt, chosen, rejected = made["prompt"], made["chosen"], made["rejected"]
    for side in (chosen, rejected):
        _checked(prompt + side, row, chat, policy)
    with _as("template", policy, row):
        pair = tokens.pair(chat, prompt, chosen, rejected, row.where)
    if chosen[0]["content"].strip() == rejected[0]["content"].strip() or pair.chosen == pair.rejected:
        policy.meet("identical_sides", row)
    columns: dict[str, Any] = {"prompt_ids": pair.prompt, "chosen_ids": pair.chosen, "rejected_ids": pair.rejected}
    if (said := margin(row)) is not None:
        columns["margin"] = said
    length, key = len(pair.prompt) + max(len(pair.chosen), len(pair.rejected)), opening(prompt + chosen)
    return Example(row, _own_id(row), form, prompt, chosen[0], rejected[0], columns, len(pair.prompt), length, key)


def _unpaired(row: Row, form: str, chat: Chat, policy: Policy) -> Example:
    with _as("malformed", policy, row):
        messages, label = canonical(row, form)["messages"], wanted(row)
    _checked(messages, row, chat, policy)
    return _answered(row, form, chat, policy, messages, label=label)


def _scored(row: Row, form: str, chat: Chat, policy: Policy) -> Example:
    with _as("malformed", policy, row):
        made = canonical(row, form)
    messages = made["prompt"] + made["completion"]
    _checked(messages, row, chat, policy)
    return _answered(row, form, chat, policy, messages, score=finite(row, "score"))


def _answered(row: Row, form: str, chat: Chat, policy: Policy, messages: list[Message], **more: Any) -> Example:
    """A prompt, its answer, and what is said of it."""
    with _as("template", policy, row):
        prompt, answer = tokens.answered(chat, messages, row.where)
    columns = {"prompt_ids": prompt, "completion_ids": answer, **more}
    length, key = len(prompt) + len(answer), opening(messages)
    return Example(row, _own_id(row), form, messages[:-1], messages[-1], None, columns, len(prompt), length, key)
