"""Rows of any source -> checked, split, tokenised rows, and the report of what was dropped and why."""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from alignment.config.sources import HubSource, PackageSource, PathSource
from alignment.config.stages.preparing import FORMATS, Prepare
from alignment.data import tokens
from alignment.data.chat import Chat
from alignment.data.checks import Drop, Tally, check_turns, opening, prompt_key, split
from alignment.data.formats import Message, canonical, detect, finite, kept, margin, wanted
from alignment.data.sources import Row
from alignment.errors import InputError
from alignment.files import write_json, write_jsonl

ROWS_PER_WORKER = 5000  # fewer are tokenised before a second process is ready
CHUNK = 200  # rows that go to a worker at a time
PROGRESS_EVERY = 50  # rows
WANTED = "preference needs chosen and rejected, unpaired a label, scored a score beside the answer, sft an answer"
LONG_PROMPT, LONG_ROW = "prompt longer than max_prompt_length", "longer than max_length"
TOO_LONG = {LONG_PROMPT: "max_prompt_length", LONG_ROW: "max_length"}  # reason -> the limit
HELD_OUT = "its first prompt is held out for evaluation"


@dataclass
class Example:
    """One row that passed: its messages, its columns for training (token ids, a number), and its lengths in tokens.

    tokens: of the whole row; of its longer side for a pair.
    """

    row: Row
    id: str
    prompt: list[Message]
    answer: Message
    rejected: Message | None
    columns: dict[str, Any]
    prompt_tokens: int
    tokens: int
    opening: str


@dataclass
class Prepared:
    """parts: split -> rows, in training order. total counts the rows read, fit those that passed every check."""

    form: str
    total: int
    fit: int
    parts: dict[str, list[Example]]
    tally: Tally = field(default_factory=Tally)


def prepare(
    rows: Sequence[Row],
    form: str,
    chat: Chat,
    settings: Prepare,
    progress: Callable[..., None],
    heldout: Set[str] = frozenset(),
) -> Prepared:
    """Check, tokenise and split rows of the format `form` ("auto": what the first row looks like).

    heldout: openings that models are evaluated on elsewhere; rows that begin so are dropped. progress(step, total,
    **facts) is called while rows are read. Raises InputError at the first malformed row, for rows of the wrong task,
    over-long rows if they are errors, and too few rows.
    """
    form = detect(rows[0], FORMATS[settings.task]) if form == "auto" else form
    if form not in FORMATS[settings.task]:
        what = f"rows of the format {form!r} cannot be prepared for the task {settings.task!r}"
        raise InputError(what, where=rows[0].file, fix=WANTED)
    if settings.task == "unpaired" and form == "preference":
        rows, form = [half for row in rows for half in _halves(row)], "unpaired"
    tally, seen, fit = Tally(), _Seen(), []
    for number, (row, made) in enumerate(zip(rows, _tokenised(rows, form, chat), strict=True), start=1):
        try:
            example = _fit(row, made, settings, seen)
            if example.opening in heldout:
                raise Drop(HELD_OUT)
            fit.append(example)
        except Drop as drop:
            tally.add(drop.reason, row)
        if number % PROGRESS_EVERY == 0 or number == len(rows):
            progress(number, len(rows), note=f"{form}: {len(fit)} of {number} rows fit")
    try:
        parts = split(fit, settings.splits, settings.seed, lambda reason, example: tally.add(reason, example.row))
    except InputError as error:
        what = f"{error.what} (of {len(rows)}: {tally})"
        limits = [name for reason, name in TOO_LONG.items() if reason in tally.counts]
        fix = "lower the stage's splits" + (f" or raise its {' and '.join(limits)}" if limits else ", or mend the rows")
        raise InputError(what, where=rows[0].file, fix=fix) from None
    return Prepared(form, len(rows), len(fit), parts, tally)


def _halves(row: Row) -> Iterator[Row]:
    """Both answers of a pair as unpaired rows."""
    made = canonical(row, "preference")
    for side, label in (("chosen", True), ("rejected", False)):
        name = {"id": f"{row.value['id']}-{side}"} if row.value.get("id") else {}
        yield replace(row, value={**name, "messages": [*made["prompt"], *made[side]], "label": label})


def _ids(rows: Sequence[Row]) -> list[str]:
    """The rows' own `id` where each has a different one, else their numbers."""
    own = [str(row.value.get("id") or "") for row in rows]
    return own if all(own) and len(set(own)) == len(own) else [str(row.number) for row in rows]


class _Seen:
    """Prompts and pairs met so far, to find what stands twice in the data."""

    def __init__(self) -> None:
        self.keys: set[str] = set()

    def check(self, example: Example) -> None:
        """A prompt may have several pairs, labels or scores, but none twice or turned round. Raises Drop."""
        key, answer = prompt_key(example.prompt), example.answer["content"]
        if (label := example.columns.get("label")) is not None:
            self._once("answer", (key, answer, str(label)), (key, answer, str(not label)))
        elif example.rejected is not None:
            sides = answer, example.rejected["content"]
            self._once("pair", (key, *sides), (key, *sides[::-1]))
        elif "score" in example.columns:
            self._once("answer", (key, answer))
        else:
            self._once("prompt", (key,))

    def _once(self, what: str, here: tuple[str, ...], turned: tuple[str, ...] | None = None) -> None:
        if "\0".join(here) in self.keys:
            raise Drop(f"duplicate {what}")
        if turned is not None and "\0".join(turned) in self.keys:
            raise Drop(f"contradicts an earlier {what}")
        self.keys.add("\0".join(here))


def _tokenised(rows: Sequence[Row], form: str, chat: Chat) -> Iterator[Example | Drop]:
    """Each row tokenised, or why it is unfit, in order; by several processes if there is enough to do.

    Raises InputError at the first malformed row.
    """
    named = list(zip(rows, _ids(rows), strict=True))
    workers = min(len(os.sched_getaffinity(0)), len(rows) // ROWS_PER_WORKER)
    if workers < 2:
        yield from (_example(row, name, form, chat) for row, name in named)
        return
    # Not forked from here: the tracker's threads may hold a lock that a child would wait for for ever.
    with ProcessPoolExecutor(workers, get_context("forkserver"), _become_worker, (form, chat)) as pool:
        yield from pool.map(_work, named, chunksize=CHUNK)


def _become_worker(form: str, chat: Chat) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one thread a worker: they share the cores already
    global _worker
    _worker = (form, chat)


_worker: tuple[str, Chat]


def _work(named: tuple[Row, str]) -> Example | Drop:
    return _example(*named, *_worker)


def _example(row: Row, name: str, form: str, chat: Chat) -> Example | Drop:
    """Raises InputError for a malformed row."""
    kept(row)  # what is wrong with it is told whichever split the row goes to
    try:
        makers = {"preference": _preference, "unpaired": _unpaired, "scored": _scored}
        return makers.get(form, _conversation)(row, name, form, chat)
    except Drop as drop:
        return drop


def _fit(row: Row, made: Example | Drop, settings: Prepare, seen: _Seen) -> Example:
    """Raises InputError (over-long, if that is an error) or Drop (unfit)."""
    if isinstance(made, Drop):
        raise made
    over = None
    if made.prompt_tokens > settings.max_prompt_length:
        over = f"prompt of {made.prompt_tokens} tokens", LONG_PROMPT
    elif made.tokens > settings.max_length:
        over = f"row of {made.tokens} tokens", LONG_ROW
    if over and settings.over_long == "error":
        limits = f"max_length is {settings.max_length}, max_prompt_length {settings.max_prompt_length}"
        raise InputError(f"{over[0]}: {limits}", where=row.where, fix="raise the limit, or set over_long: drop")
    if over:
        raise Drop(over[1])
    seen.check(made)
    return made


def _conversation(row: Row, name: str, form: str, chat: Chat) -> Example:
    messages = canonical(row, form)["messages"]
    check_turns(messages)
    made = tokens.conversation(chat, messages, row.where)
    columns = {"input_ids": made.ids, "labels": made.labels}
    return Example(row, name, messages[:-1], messages[-1], None, columns, made.prompt, len(made.ids), opening(messages))


def _preference(row: Row, name: str, form: str, chat: Chat) -> Example:
    made = canonical(row, form)
    prompt, chosen, rejected = made["prompt"], made["chosen"], made["rejected"]
    for side in (chosen, rejected):
        check_turns(prompt + side)
    if chosen[0]["content"].strip() == rejected[0]["content"].strip():
        raise Drop("identical sides")
    pair = tokens.pair(chat, prompt, chosen, rejected, row.where)
    columns: dict[str, Any] = {"prompt_ids": pair.prompt, "chosen_ids": pair.chosen, "rejected_ids": pair.rejected}
    if (said := margin(row)) is not None:
        columns["margin"] = said
    length = len(pair.prompt) + max(len(pair.chosen), len(pair.rejected))
    key = opening(prompt + chosen)
    return Example(row, name, prompt, chosen[0], rejected[0], columns, len(pair.prompt), length, key)


def _unpaired(row: Row, name: str, form: str, chat: Chat) -> Example:
    messages = canonical(row, form)["messages"]
    check_turns(messages)
    prompt, answer = tokens.answered(chat, messages, row.where)
    columns = {"prompt_ids": prompt, "completion_ids": answer, "label": wanted(row)}
    length, key = len(prompt) + len(answer), opening(messages)
    return Example(row, name, messages[:-1], messages[-1], None, columns, len(prompt), length, key)


def _scored(row: Row, name: str, form: str, chat: Chat) -> Example:
    made = canonical(row, form)
    prompt, answer = made["prompt"], made["completion"]
    check_turns(prompt + answer)
    asked, given = tokens.answered(chat, prompt + answer, row.where)
    columns = {"prompt_ids": asked, "completion_ids": given, "score": finite(row, "score")}
    key = opening(prompt + answer)
    return Example(row, name, prompt, answer[0], None, columns, len(asked), len(asked) + len(given), key)


# --- what is written --------------------------------------------------------------------------------------------------


def write(prepared: Prepared, folder: Path, source: str, chat: Chat) -> dict[str, float]:
    """train/ (columns of token ids), train.jsonl, prompts.jsonl, heldout.jsonl, data_report.json -> summary numbers; of
    pairs and of answers with a score also heldout/, as train/, for what measures reward models."""
    train, heldout = prepared.parts["train"], prepared.parts["heldout"]
    names = [name for name in train[0].columns if name != "margin"]
    without = [example.row.where for example in (*train, *heldout) if "margin" not in example.columns]
    if not without:  # of what some rows lack nothing can be made
        names.append("margin")
    mismatched = {}
    if prepared.form == "unpaired":
        _check_labels(train)
        mismatched = {"mismatched_ids": _mismatched(train)}
    tokens.check_end_of_turn(_save(train, names, folder / "train", **mismatched), chat.eos_id)
    if heldout and prepared.form in ("preference", "scored"):
        _save(heldout, names, folder / "heldout")
    write_jsonl(folder / "train.jsonl", (_training_row(example) for example in train))
    for name in ("prompts", "heldout"):
        write_jsonl(folder / f"{name}.jsonl", map(_asking_row, prepared.parts[name]))
    kept = {name: len(part) for name, part in prepared.parts.items()}
    report = {
        "source": source,
        "format": prepared.form,
        "rows": prepared.total,
        "fit": prepared.fit,
        "kept": kept,
        "dropped": prepared.tally.counts,
        "examples": prepared.tally.examples,
        "template_sha256": chat.template_sha256,
        "lengths": {
            "prompt_tokens": _spread([example.prompt_tokens for example in train]),
            "row_tokens": _spread([example.tokens for example in train]),
        },
    }
    if prepared.form == "preference":
        count = len(train) + len(heldout) - len(without)
        one = {"one_without": without[0]} if without and count else {}
        report["margins"] = {"rows": count, "used": not without, **one}
    write_json(folder / "data_report.json", report)
    trained = sum(_trained(example) for example in train)
    dropped = sum(prepared.tally.counts.values())
    total = sum(example.tokens for example in train)
    return {"rows": prepared.total, "dropped": dropped, **kept, "train_tokens": total, "trained_tokens": trained}


def _check_labels(train: Sequence[Example]) -> None:
    """Raises InputError if all are wanted, or none: such a loss only pushes the policy one way, whatever it says."""
    wanted = sum(example.columns["label"] for example in train)
    if wanted in (0, len(train)):
        what = f"of the answers to train on {wanted} are wanted and {len(train) - wanted} are not: KTO needs both"
        fix = "check the labels, or the judge's label_threshold; wanted answers alone are rows for SFT"
        raise InputError(what, where=train[0].row.file, fix=fix)


def _mismatched(train: Sequence[Example]) -> list[list[int]]:
    """For each row the answer of the next one that has another prompt, round in a circle: what KTO compares with.

    With it no row is longer than the longest that is trained on.
    """
    longest = max(example.tokens for example in train)
    found = []
    for number, example in enumerate(train):
        others = (train[(number + step) % len(train)] for step in range(1, len(train)))
        fitting = (one.columns["completion_ids"] for one in others if one.opening != example.opening)
        other = next((ids for ids in fitting if example.prompt_tokens + len(ids) <= longest), None)
        if other is None:
            what = "no answer to another prompt fits beside this one: KTO compares with such"
            raise InputError(what, where=example.row.where, fix="more rows, or a smaller max_prompt_length")
        found.append(other)
    return found


def _save(examples: Sequence[Example], names: Sequence[str], folder: Path, **more: Any) -> Any:
    """more: columns that no example has by itself."""
    import datasets

    datasets.disable_progress_bars()
    columns = {name: [example.columns[name] for example in examples] for name in names}
    made = datasets.Dataset.from_dict({**columns, **more})
    made.save_to_disk(folder)
    return made


def _training_row(example: Example) -> dict[str, Any]:
    for name in ("label", "score"):
        if name in example.columns:
            answer = {"completion": [example.answer], name: example.columns[name]}
            return {"id": example.id, "prompt": example.prompt, **answer}
    if example.rejected is None:
        return {"id": example.id, "messages": [*example.prompt, example.answer]}
    sides = {"chosen": [example.answer], "rejected": [example.rejected]}
    return {"id": example.id, "prompt": example.prompt, **sides}


def _asking_row(example: Example) -> dict[str, Any]:
    """What a model is asked, the answer that the data has, and what else a reward may look at."""
    return {"id": example.id, "prompt": example.prompt, "reference": example.answer["content"], **kept(example.row)}


def _trained(example: Example) -> int:
    """Tokens that carry a gradient."""
    answers = [ids for name, ids in example.columns.items() if name in tokens.TRAINED]
    return sum(label != tokens.IGNORED for ids in answers for label in ids)


def _spread(lengths: Iterable[int]) -> dict[str, float]:
    ordered = sorted(lengths)
    high = ordered[min(len(ordered) - 1, int(len(ordered) * 0.95))]
    return {"min": ordered[0], "median": statistics.median(ordered), "p95": high, "max": ordered[-1]}


def describe(source: PackageSource | PathSource | HubSource) -> str:
    """A source in one line, for the report."""
    if isinstance(source, PathSource):
        return source.path
    if isinstance(source, HubSource):
        return f"{source.id}@{source.revision} ({source.split})"
    return f"{source.package} {source.version} ({source.archive}): {source.member}"
