"""One row of any format -> examples: checked, rendered, tokenised; or why it was dropped."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from alignment.config.data_checks import Checks
from alignment.config.sources import Lists
from alignment.config.stages.preparing import FORMATS
from alignment.data import tokens
from alignment.data.chat import Chat
from alignment.data.checks import Drop, Dropped, Policy, opening, prompt_key, turn_faults
from alignment.data.formats import canonical, detect, finite, kept, margin, renamed, scored_list, wanted
from alignment.data.personal import personal
from alignment.data.ranking import candidates, choose
from alignment.data.shortening import shortened
from alignment.data.sources import Row, Unreadable
from alignment.data.turns import Message, answers_of, message, said, text, unread, words
from alignment.errors import InputError
from alignment.guarded import OverLimit

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

    @property
    def turns(self) -> list[Message]:
        return [*self.prompt, self.answer, *([self.rejected] if self.rejected else [])]

    def said(self, *roles: str) -> str:
        """All that these roles say, and call, but not what tools there are: many rows have the same. The answers are
        the assistant's, a text without turns is everybody's."""
        turns = [turn for turn in self.turns if turn["role"] in roles or self.form == "text"]
        return "\n".join(word for turn in turns for word in words(turn, "tools"))

    def texts(self) -> str:
        """All texts of all turns, those of tools too."""
        return "\n".join(word for turn in self.turns for word in words(turn))

    def text(self) -> dict[str, Any]:
        """The row as train.jsonl has it, but for its id."""
        for name in ("label", "score"):
            if name in self.columns:
                return {"prompt": self.prompt, "completion": [self.answer], name: self.columns[name]}
        if self.form == "text":
            return {"text": self.answer["content"]}
        if self.rejected is None:
            return {"messages": [*self.prompt, self.answer]}
        return {"prompt": self.prompt, "chosen": [self.answer], "rejected": [self.rejected]}


@dataclass(frozen=True)
class Reading:
    """How rows are read and judged: what a worker has to know. lists: of answers with scores; None where none come."""

    form: str
    columns: Mapping[str, str]
    task: str
    checks: Checks
    chat: Chat
    max_length: int
    max_prompt_length: int
    over_long: Literal["drop", "error", "truncate_prompt"]
    lists: Lists | None = None
    seed: int = 0


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
        _check_read(given, reading.task, policy)
        before = policy.passed()
        parts = _parts(given, form, reading, policy)
    except Drop as drop:
        return [Dropped(row, drop.fault, drop.why)]
    return [_example(part, row, form, reading, before) for part in parts]


def _unreadable(row: Unreadable, policy: Policy) -> Dropped:
    if policy.checks.malformed == "error":
        raise row.error
    return Dropped(Row({}, row.file, row.number, row.line), "malformed", row.what)


@contextmanager
def _as(fault: str, policy: Policy, row: Row) -> Iterator[None]:
    """What is wrong in here is this fault: it goes on as an InputError, or becomes a Drop. A limit that is broken is
    always an error."""
    try:
        yield
    except OverLimit:
        raise
    except InputError as error:
        if getattr(policy.checks, fault) == "error":
            raise
        policy.meet(fault, row, error.what)


def _check_read(row: Row, task: str, policy: Policy) -> None:
    """That nothing which the row says of itself is passed over. Raises InputError or Drop."""
    label, score = (row.value.get(key) if task == "sft" else None for key in ("label", "score"))
    if label is False:
        why = "has the label false: its answer is not wanted; task=unpaired learns from such, too"
        policy.meet("unwanted", row, why)
    elif label not in (None, "") and not isinstance(label, bool):
        why = f"has the label {label!r:.40}, which is neither true nor false; kept, it is trained on whatever its label"
        policy.meet("unread", row, why)
    if score not in (None, ""):
        why = "has a score, which sft does not read, but task=scored does; kept, it is trained on whatever its score"
        policy.meet("unread", row, why)
    if odd := unread(row):
        policy.meet("unread", row, f"{odd}, which nothing reads; kept, it is trained on without that")


# --- several of one row -----------------------------------------------------------------------------------------------


def _parts(row: Row, form: str, reading: Reading, policy: Policy) -> list[Row]:
    """The rows of the task's own format that a row stands for: mostly itself. Raises InputError or Drop."""
    if form == "scored_list":
        with _as("malformed", policy, row):
            prompt, answers = scored_list(row)
        parts = _pairs(row, prompt, answers, reading) if reading.task == "preference" else _scores(row, prompt, answers)
        if not parts:
            policy.meet("no_pair", row)
        return parts
    if reading.task == "unpaired" and form == "preference":
        with _as("malformed", policy, row):
            return list(_halves(row))
    return [row]


def _halves(row: Row) -> Iterator[Row]:
    """Both answers of a pair as unpaired rows."""
    made = canonical(row, "preference")
    for side, label in (("chosen", True), ("rejected", False)):
        yield _part(row, side, {"messages": [*made["prompt"], *made[side]], "label": label})


def _pairs(row: Row, prompt: list[Message], answers: list[dict[str, Any]], reading: Reading) -> list[Row]:
    """Of answers with scores, by the data set's rule."""
    lists = reading.lists
    assert lists is not None  # rows of other stages are no lists
    found = candidates(answers, [answer["score"] for answer in answers])
    apart = [one for one in found if one.margin >= lists.min_margin and one.margin > 0]
    chosen = choose(apart, lists.pairs, reading.seed, prompt_key(prompt))[: lists.max_pairs]
    return [
        _part(row, str(number), {"prompt": prompt, "chosen": one.better["text"], "rejected": one.worse["text"],
                                 "margin": one.margin})
        for number, one in enumerate(chosen, start=1)
    ]  # fmt: skip


def _scores(row: Row, prompt: list[Message], answers: list[dict[str, Any]]) -> list[Row]:
    return [
        _part(row, str(number), {"prompt": prompt, "completion": answer["text"], "score": answer["score"]})
        for number, answer in enumerate(answers, start=1)
    ]


def _part(row: Row, name: str, value: dict[str, Any]) -> Row:
    own = {} if _own_id(row) is None else {"id": f"{_own_id(row)}-{name}"}
    return replace(row, value={**own, **kept(row), **value})


# --- one example ------------------------------------------------------------------------------------------------------


def _example(part: Row, row: Row, form: str, reading: Reading, before: Mapping[str, str]) -> Example | Dropped:
    """part: the row, or what stands for it now. before: faults that it is kept with so far. Raises InputError for a
    fault that is an error."""
    policy = Policy(reading.checks)
    try:
        try:
            made = _made(part, form, reading, policy)
            if over := _over(made, reading):
                made = _shorter(made, over, reading, policy)
            _check_personal(made, row, policy)
        except Drop as drop:  # of one that met no policy yet
            policy.meet(drop.fault, row, drop.why)
            raise
    except Drop as drop:
        return Dropped(row, drop.fault, drop.why)
    made.kept = {**before, **policy.passed()}
    return made


def _made(row: Row, form: str, reading: Reading, policy: Policy) -> Example:
    makers = {"preference": _preference, "unpaired": _unpaired, "scored": _scored}
    maker = _text if form == "text" else makers.get(reading.task, _conversation)
    return maker(row, form, reading.chat, policy)


def _check_personal(made: Example, row: Row, policy: Policy) -> None:
    """Raises InputError or Drop. What it holds is told by the kind alone."""
    if policy.checks.personal is None:
        return
    found = personal(made.texts())
    made.personal = {kind: many for kind, many in found.items() if many}
    if made.personal:
        policy.meet("personal", row, ", ".join(f"{many} {kind}" for kind, many in made.personal.items()))


def _over(made: Example, reading: Reading) -> tuple[str, str] | None:
    """The limit that it goes beyond as a fault, and what it has."""
    if made.prompt_tokens > reading.max_prompt_length:
        return "long_prompt", f"prompt of {made.prompt_tokens} tokens"
    return ("long_row", f"row of {made.tokens} tokens") if made.tokens > reading.max_length else None


def _shorter(made: Example, over: tuple[str, str], reading: Reading, policy: Policy) -> Example:
    """What `over_long` makes of a row that is too long. Raises InputError or Drop."""
    if reading.over_long == "error":
        limits = f"max_length is {reading.max_length}, max_prompt_length {reading.max_prompt_length}"
        fix = "raise the limit, or set the stage's over_long=drop"
        raise InputError(f"{over[1]}: {limits}", where=made.row.where, fix=fix)
    if reading.over_long == "drop" or not made.prompt:
        raise Drop(*over)

    def again(prompt: list[Message]) -> Example | None:
        value = {**kept(made.row), **replace(made, prompt=prompt).text()}
        if "margin" in made.columns:
            value["margin"] = made.columns["margin"]
        form = "messages" if reading.task == "sft" else made.form
        found = _made(replace(made.row, value=value), form, reading, policy)
        return None if _over(found, reading) else found

    found = shortened(made.prompt, again)
    if found is None:  # its answer is too long, or its system turn
        raise Drop(*over)
    policy.kept.setdefault("truncated", over[1])
    return replace(found, row=made.row, id=made.id, form=made.form, opening=made.opening)


def _own_id(row: Row) -> str | None:
    own = row.value.get("id")
    return None if own is None or own == "" else str(own)


def _checked(messages: list[Message], row: Row, chat: Chat, policy: Policy) -> None:
    for fault in turn_faults(messages):
        policy.meet(fault, row)
    for turn in messages:
        if found := next(filter(None, map(chat.control_token, words(turn))), None):
            policy.meet("control_text", row, f"the {turn['role']} turn spells out the control token {found!r}")


def _conversation(row: Row, form: str, chat: Chat, policy: Policy) -> Example:
    with _as("malformed", policy, row):
        messages = canonical(row, form)["messages"]
    _checked(messages, row, chat, policy)
    if all(messages[number].get("weight") == 0 for number in answers_of(messages)):
        policy.meet("no_answer", row, "has no answer of another weight than 0")
    with _as("template", policy, row):
        made = tokens.conversation(chat, messages, row.where)
    columns, length, key = {"input_ids": made.ids, "labels": made.labels}, len(made.ids), opening(messages[:-1])
    return Example(row, _own_id(row), form, messages[:-1], messages[-1], None, columns, made.prompt, length, key)


def _text(row: Row, form: str, chat: Chat, policy: Policy) -> Example:
    """All of it is trained on, as if it were an answer to nothing."""
    with _as("malformed", policy, row):
        answer = message("assistant", text(row, "text"))
    if not answer["content"].strip():
        policy.meet("empty_answer", row)
    if found := chat.control_token(answer["content"]):
        policy.meet("control_text", row, f"the text spells out the control token {found!r}")
    made = tokens.plain(chat, answer["content"])
    columns, key = {"input_ids": made.ids, "labels": made.labels}, prompt_key([message("text", answer["content"])])
    return Example(row, _own_id(row), form, [], answer, None, columns, 0, len(made.ids), key)


def _preference(row: Row, form: str, chat: Chat, policy: Policy) -> Example:
    with _as("malformed", policy, row):
        made = canonical(row, "preference")
    prompt, chosen, rejected = made["prompt"], made["chosen"], made["rejected"]
    for side in (chosen, rejected):
        _checked(prompt + side, row, chat, policy)
    with _as("template", policy, row):
        pair = tokens.pair(chat, prompt, chosen, rejected, row.where)
    if said(chosen[0]).strip() == said(rejected[0]).strip() or pair.chosen == pair.rejected:
        policy.meet("identical_sides", row)
    columns: dict[str, Any] = {"prompt_ids": pair.prompt, "chosen_ids": pair.chosen, "rejected_ids": pair.rejected}
    if (told := margin(row)) is not None:
        columns["margin"] = told
    length, key = len(pair.prompt) + max(len(pair.chosen), len(pair.rejected)), opening(prompt)
    return Example(row, _own_id(row), form, prompt, chosen[0], rejected[0], columns, len(pair.prompt), length, key)


def _unpaired(row: Row, form: str, chat: Chat, policy: Policy) -> Example:
    with _as("malformed", policy, row):
        messages, label = canonical(row, "unpaired")["messages"], wanted(row)
    _checked(messages, row, chat, policy)
    return _answered(row, form, chat, policy, messages, label=label)


def _scored(row: Row, form: str, chat: Chat, policy: Policy) -> Example:
    with _as("malformed", policy, row):
        made = canonical(row, "scored")
    messages = made["prompt"] + made["completion"]
    _checked(messages, row, chat, policy)
    return _answered(row, form, chat, policy, messages, score=finite(row, "score"))


def _answered(row: Row, form: str, chat: Chat, policy: Policy, messages: list[Message], **more: Any) -> Example:
    """A prompt, its answer, and what is said of it."""
    with _as("template", policy, row):
        prompt, answer = tokens.answered(chat, messages, row.where)
    columns = {"prompt_ids": prompt, "completion_ids": answer, **more}
    length, key = len(prompt) + len(answer), opening(messages[:-1])
    return Example(row, _own_id(row), form, messages[:-1], messages[-1], None, columns, len(prompt), length, key)
