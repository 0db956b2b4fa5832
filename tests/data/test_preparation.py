from __future__ import annotations

import json
import os
import signal
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import datasets
import pytest
from pydantic import ValidationError

from alignment import preflight
from alignment.config.compose import compose
from alignment.data import preparation
from alignment.data.batches import Batch, Chunk, key_of, made_of
from alignment.data.chat import Chat
from alignment.data.checks import opening
from alignment.data.examples import Reading
from alignment.data.named import reading_of
from alignment.data.preparation import Source, judge
from alignment.data.sources import Row, read
from alignment.errors import InputError, MachineError
from alignment.files import read_json, read_jsonl, write_json
from alignment.preflight import rows as rows_look
from tests.conftest import default_checks

from .conftest import assistant, make_tokenizer, user
from .preparing import mix, qa, run, settings


@pytest.fixture(scope="module")
def chat() -> Chat:
    return Chat(make_tokenizer())


def test_unfit_conversations_are_dropped_and_counted_by_reason(chat: Chat) -> None:
    """Q:q\\nA:a<eos>\\n is 9 tokens with one letter each, so 32 letters of answer make 40 and 33 are too many."""
    turns = [
        [user("a"), user("b"), assistant("c")],
        [user("only a question")],
    ]
    values = [
        {"messages": [user(q), assistant(a)]}
        for q, a in [
            ("q", "a" * 32), ("q2", "a" * 33), ("q" * 26, "a"), ("same", "a"), (" Same ", "b"), ("e", " \n"),
            (" ", "a"),
        ]
    ]  # fmt: skip
    made = run(chat, values + [{"messages": messages} for messages in turns])
    assert made.counts == {
        "long_row": 1,
        "long_prompt": 1,
        "duplicate": 1,
        "empty_answer": 1,
        "empty_prompt": 1,
        "turn_order": 1,
        "no_answer": 1,
    }
    assert (made.judged.forms["mine"], made.judged.total, made.fit) == ({"messages": 3}, 9, 2)
    assert sorted(row["number"] for row in made.rows["train"]) == [1, 4]
    assert made.judged.tally.examples[0] == {"reason": "long_row", "file": "rows.jsonl", "row": 2, "line": 2}


def test_unfit_pairs_are_dropped_and_counted_by_reason(chat: Chat) -> None:
    """Pain 7: nothing is cut, so no side loses its end or its difference."""
    pairs = [
        ("q", "a", "b"), ("q", "a", "c"), ("q", "a", "b"), ("q", "b", "a"), ("r", "same", "same "), ("r", "", "x"),
        ("r", "a", "b" * 40),
    ]  # fmt: skip
    values = [dict(zip(("prompt", "chosen", "rejected"), pair, strict=True)) for pair in pairs]
    made = run(chat, values, task="preference")
    assert made.counts == {
        "duplicate": 1,
        "contradiction": 1,
        "identical_sides": 1,
        "empty_answer": 1,
        "long_row": 1,
    }
    assert made.fit == 2


def test_an_over_long_row_can_be_an_error_instead(chat: Chat) -> None:
    with pytest.raises(InputError, match=r"rows\.jsonl:2: row of 45 tokens: max_length is 40"):
        run(chat, [qa("q", "a"), qa("r", "a" * 37)], over_long="error")
    with pytest.raises(InputError, match=r"rows\.jsonl:1: prompt of 32 tokens: .* max_prompt_length 30"):
        run(chat, [qa("q" * 27, "a")], over_long="error")


def test_rows_that_are_held_out_elsewhere_are_dropped_and_counted(chat: Chat) -> None:
    values = [qa(f"q{i}", "a") for i in range(4)] + [
        {"messages": [user(f"Q{i} "), assistant("a"), user("more"), assistant("b")]} for i in range(4)
    ]
    heldout = {opening([user("q1")]), opening([user("q3")])}
    for form, part in (("prompt_completion", values[:4]), ("messages", values[4:])):
        made = run(chat, part, form, elsewhere=heldout)
        assert made.counts == {"heldout": 2}
        assert {row["opening"] for row in made.rows["train"]} == {key_of("user: q0"), key_of("user: q2")}


def test_rows_of_the_other_task_are_refused(chat: Chat) -> None:
    with pytest.raises(InputError, match="format 'preference' cannot be prepared for the task 'sft'"):
        run(chat, [{"prompt": "q", "chosen": "a", "rejected": "b"}])
    with pytest.raises(InputError, match="format 'prompt_completion' cannot be prepared for the task 'preference'"):
        run(chat, [qa("q", "a")], task="preference")


def test_rows_keep_their_own_ids_only_if_they_tell_them_apart(chat: Chat) -> None:
    for ids, written in (("xy", ["x", "y"]), ("xx", ["1", "2"])):
        rows = [{**qa("q", "a"), "id": ids[0]}, {**qa("r", "a"), "id": ids[1]}]
        _, folder = mix(chat, {"mine": rows})
        assert sorted(row["id"] for row in read_jsonl(folder / "train.jsonl")) == written


def test_several_processes_make_what_one_makes(chat: Chat, monkeypatch: pytest.MonkeyPatch) -> None:
    values = [qa(f"question {number % 70}", "a" * (number % 45)) for number in range(90)]
    alone = run(chat, values, heldout=5, prompts=5)
    monkeypatch.setattr(preparation, "ENOUGH", 20)
    monkeypatch.setattr(preparation, "CHUNK", 7)
    monkeypatch.setattr(preparation, "made_of", None)  # here; the workers have their own
    several = run(chat, values, heldout=5, prompts=5, workers=2)
    assert several.counts == alone.counts and several.fit == alone.fit
    assert several.rows == alone.rows
    values[50] = {"prompt": 7, "completion": "a"}
    values[80] = {"prompt": None, "completion": "a"}
    with pytest.raises(InputError, match=r"rows.jsonl:51: "):
        run(chat, values, workers=3)


class Fatal(Chat):
    """As if the system killed whoever renders, for want of memory."""

    def answers(self, messages: list[Any], where: str) -> Any:
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_worker_that_is_killed_ends_the_stage_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preparation, "ENOUGH", 20)
    monkeypatch.setattr(preparation, "CHUNK", 7)
    with pytest.raises(MachineError) as caught:
        run(Fatal(make_tokenizer()), [qa(f"q{number}", "a") for number in range(60)], workers=2)
    assert str(caught.value) == (
        "one of 2 processes that prepare rows was killed "
        "(for want of memory, probably: give more, or lower the stage's workers)"
    )


@pytest.fixture
def pools(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of pools that are asked for; a thread does their work."""
    sizes = list[int]()

    class Noted(ThreadPoolExecutor):
        def __init__(self, workers: int, _: Any, begin: Any, given: Any):
            sizes.append(workers)
            super().__init__(1, initializer=begin, initargs=given)

    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")  # which workers set
    for name, value in (("ENOUGH", 20), ("CHUNK", 7), ("ProcessPoolExecutor", Noted)):
        monkeypatch.setattr(preparation, name, value)
    return sizes


@pytest.mark.parametrize(("workers", "cores", "taken"), [(None, 1, 1), (None, 3, 3), (2, 5, 2), (4, 1, 4)])
def test_workers_are_as_many_as_the_setting_says_else_one_a_core(
    chat: Chat, monkeypatch: pytest.MonkeyPatch, pools: list[int], workers: int | None, cores: int, taken: int
) -> None:
    monkeypatch.setattr(preparation, "usable", lambda: cores)
    made = run(chat, [qa(f"q{number}", "a") for number in range(30)], workers=workers)
    assert made.fit == 30 and pools == ([taken] if taken > 1 else [])


@pytest.mark.parametrize(("setting", "taken"), [("null", 2), ("64", 2), ("1", 1)])
def test_a_look_takes_two_workers_at_most(
    tmp_path: Path,
    tiny_settings: list[str],
    monkeypatch: pytest.MonkeyPatch,
    pools: list[int],
    setting: str,
    taken: int,
) -> None:
    """It runs where people log in."""
    monkeypatch.setattr(rows_look, "usable", lambda: 16)
    small = ("stage.prepare_sft.splits.heldout=4", "stage.prepare_sft.splits.prompts=4")
    made = compose(["pipeline=sft", *tiny_settings, *small, f"stage.prepare_sft.workers={setting}"])
    looked = {"rows": 100, "show": 0, "fit": "", "estimate": False, "dropped": None, "stored": [], "only": None}
    order = {"experiment": made.model_dump(), "prepare": ["rows"], **looked}
    write_json(tmp_path / "order.json", order)
    assert preflight.main([str(tmp_path / "order.json")]) == 0
    assert pools == ([taken] if taken > 1 else [])


def test_chunks_end_by_their_text_too_whatever_is_made_of_them(chat: Chat, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of 2 to 2000 characters; a chunk holds 200 rows, or 4 MB of text: here 7 rows, or 100 characters."""
    values = [qa(f"q{number}", "a" * (1, 40, 2000)[number % 3]) for number in range(60)]
    values.append({"messages": [user("q"), *([assistant("a"), user("r")] * 60), assistant("a")]})
    whole, sizes = run(chat, values, heldout=3, max_length=100), list[list[int]]()

    def noted(chunk: Chunk, reading: Reading) -> Batch:
        sizes.append([len(json.dumps(row.value)) for row in chunk.rows if isinstance(row, Row)])
        return made_of(chunk, reading)

    for name, value in (("CHUNK", 7), ("CHUNK_TEXT", 100), ("made_of", noted)):
        monkeypatch.setattr(preparation, name, value)
    parts = run(chat, values, heldout=3, max_length=100)
    assert len(sizes) > 40 and all(len(chunk) == 1 or sum(chunk) < 100 + 60 * len(chunk) for chunk in sizes)
    for name, value in (("ENOUGH_TEXT", 500), ("made_of", None)):  # not here: the workers have their own
        monkeypatch.setattr(preparation, name, value)
    several = run(chat, values, heldout=3, max_length=100, workers=2)
    assert whole.rows == parts.rows == several.rows and whole.counts == parts.counts == several.counts


@pytest.mark.parametrize("enough", [100, 1000])
def test_rows_are_let_go_once_they_are_prepared(
    chat: Chat, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, enough: int
) -> None:
    """By one process or several: at the end but for the last chunks none is alive."""
    alive, left = list[weakref.ref[Row]](), list[int]()

    def rows() -> Iterator[Row]:
        for number in range(300):
            row = Row(qa(f"q{number}", "a"), "rows.jsonl", number, number)
            alive.append(weakref.ref(row))
            yield row

    def progress(step: int, total: int, note: str) -> None:
        left.append(sum(one() is not None for one in alive))

    monkeypatch.setattr(preparation, "CHUNK", 5)
    monkeypatch.setattr(preparation, "ENOUGH", enough)
    reading = reading_of(settings(), "auto", {}, default_checks(), chat)
    judge([Source("mine", rows(), reading, "rows.jsonl")], tmp_path, progress, 2)
    assert len(alive) == 300 and left[-1] <= 3 * 5


def scored(question: str, answer: str, score: float) -> dict[str, Any]:
    return {**qa(question, answer), "score": score}


def test_answers_with_a_score_keep_it_and_a_prompt_may_have_several(chat: Chat, tmp_path: Path) -> None:
    values = [scored("q", "a", 0.5), scored("q", "b", 1), scored("q", "b", 0), scored("r", "a" * 40, 1)]
    made = run(chat, values, task="scored", folder=tmp_path)
    assert made.counts == {"duplicate": 1, "long_row": 1}
    train = datasets.load_from_disk(str(tmp_path / "train"))
    assert train.column_names == ["prompt_ids", "completion_ids", "score"]
    told = {(row["completion"][0]["content"], row["score"]) for row in read_jsonl(tmp_path / "train.jsonl")}
    assert told == {("a", 0.5), ("b", 1.0)}
    answers = [chat.tokenizer.decode(row["completion_ids"]) for row in train]
    assert sorted(zip(answers, train["score"][:], strict=True)) == [("a<eos>", 0.5), ("b<eos>", 1.0)]


def test_margins_of_pairs_are_kept_where_all_have_one_and_counted_where_not(chat: Chat, tmp_path: Path) -> None:
    pairs = [{"prompt": f"q{i}", "chosen": "a", "rejected": "b", "margin": i} for i in range(4)]
    odd = [pairs[0], {**pairs[1], "margin": "big"}, *pairs[2:]]
    for name, rows, used in (("all", pairs, True), ("some", odd, False)):
        (tmp_path / name).mkdir()
        run(chat, rows, task="preference", heldout=1, folder=tmp_path / name)
        for part in ("train", "heldout"):
            columns = datasets.load_from_disk(str(tmp_path / name / part)).column_names
            assert columns == ["prompt_ids", "chosen_ids", "rejected_ids", *(["margin"] if used else [])]
        assert read_json(tmp_path / name / "data_report.json")["margins"] == (
            {"rows": 4, "used": True} if used else {"rows": 3, "used": False, "one_without": "rows.jsonl:2"}
        )


def labelled(question: str, answer: str, label: Any) -> dict[str, Any]:
    return {**qa(question, answer), "label": label}


def test_answers_with_a_label_keep_it_and_go_with_an_answer_to_another_prompt(chat: Chat, tmp_path: Path) -> None:
    values = [labelled("p", "a", True), labelled("p", "b", False), labelled("q", "c", True), labelled("r", "d", False)]
    made = run(chat, values, task="unpaired", folder=tmp_path)
    assert made.judged.forms["mine"] == {"unpaired": 4}
    rows, texts = datasets.load_from_disk(str(tmp_path / "train")), list(read_jsonl(tmp_path / "train.jsonl"))
    asked = {tuple(row["completion_ids"]): tuple(row["prompt_ids"]) for row in rows}
    for row, text in zip(rows, texts, strict=True):
        assert row["label"] is text["label"]
        assert asked[tuple(row["mismatched_ids"])] != tuple(row["prompt_ids"])
    assert sorted((text["completion"][0]["content"], text["label"]) for text in texts) == [
        ("a", True), ("b", False), ("c", True), ("d", False),
    ]  # fmt: skip


def test_answers_with_a_label_that_say_it_twice_or_both_ways_are_dropped_and_counted(chat: Chat) -> None:
    values = [labelled("p", "a", True), labelled("P ", "a", True), labelled("p", "a", False), labelled("q", "a", False)]
    made = run(chat, values, task="unpaired")
    assert made.counts == {"duplicate": 1, "contradiction": 1}


def test_the_answer_to_another_prompt_is_one_that_fits(chat: Chat, tmp_path: Path) -> None:
    """Q:p\\nA:a<eos>\\n is 9 tokens. Beside the longest prompt the longest answer would make more than any row has."""
    values = [labelled("p" * 20, "a", True), labelled("q", "b" * 15, False), labelled("r", "c", True)]
    made = run(chat, values, task="unpaired", folder=tmp_path)
    longest = max(row["tokens"] for row in made.rows["train"])
    rows = datasets.load_from_disk(str(tmp_path / "train"))
    assert all(len(row["prompt_ids"]) + len(row["mismatched_ids"]) <= longest for row in rows)


def test_pairs_are_taken_apart_into_answers_with_a_label(chat: Chat) -> None:
    pairs = [{"id": f"row {n}", "prompt": q, "chosen": "yes", "rejected": "no"} for n, q in enumerate(["p", "q"])]
    made = run(chat, pairs, task="unpaired")
    found = sorted((r["id"], json.loads(r["text"])["completion"][0]["content"], r["label"]) for r in made.rows["train"])
    assert found == [
        ("row 0-chosen", "yes", True), ("row 0-rejected", "no", False),
        ("row 1-chosen", "yes", True), ("row 1-rejected", "no", False),
    ]  # fmt: skip


def test_answers_to_other_prompts_are_of_both_kinds_where_pairs_were_taken_apart(chat: Chat, tmp_path: Path) -> None:
    """KTO's reference point is a mean over all answers: the next row of another prompt is not always the chosen one,
    as it would be in the order of the file."""
    pairs = [{"prompt": f"q{n}", "chosen": "yes", "rejected": "no"} for n in range(100)]
    run(chat, pairs, task="unpaired", folder=tmp_path)
    rows = datasets.load_from_disk(str(tmp_path / "train"))
    for label in (True, False):
        beside = [chat.tokenizer.decode(row["mismatched_ids"])[:2] for row in rows if row["label"] is label]
        assert 30 < beside.count("no") < 70


@pytest.mark.parametrize(
    ("values", "what"),
    [
        ([labelled("p", "a", True), qa("q", "b")], r"rows.jsonl:2: .*cannot be prepared .*unpaired a label"),
        ([labelled("p", "a", 1), labelled("q", "b", True)], "'label' must be true or false, is a number"),
        ([labelled("p", "a", True), labelled("p", "b", False)], "no answer to another prompt fits beside this one"),
        ([labelled(q, "a", True) for q in "pqr"], "of the answers to train on 3 are wanted and 0 are not"),
        ([labelled(q, "a", False) for q in "pq"], "of the answers to train on 0 are wanted and 2 are not"),
        ([qa("p", "a"), qa("q", "b")], "cannot be prepared for the task 'unpaired'"),
    ],
)
def test_rows_of_which_kto_can_make_nothing_are_refused(
    values: list[dict[str, Any]], what: str, chat: Chat, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=what):
        run(chat, values, task="unpaired")


def test_the_format_is_found_row_by_row_and_counted(chat: Chat, tmp_path: Path) -> None:
    values = [qa("q", "a"), {"messages": [user("r"), assistant("a")]}, {"instruction": "s", "output": "a"}]
    made = run(chat, values)
    assert made.judged.forms["mine"] == {"prompt_completion": 1, "messages": 1, "alpaca": 1}
    with pytest.raises(InputError, match=r"rows.jsonl:2: has no 'prompt'"):
        run(chat, values, "prompt_completion")


def test_columns_name_what_the_rows_call_otherwise(chat: Chat) -> None:
    made = run(chat, [{"question": "q", "reply": "a"}], columns={"prompt": "question", "completion": "reply"})
    assert json.loads(made.rows["train"][0]["text"])["messages"] == [user("q"), assistant("a")]
    with pytest.raises(
        InputError, match=r"no column 'questoin', which `columns` names for 'prompt' \(nearest: question"
    ):
        run(chat, [{"question": "q", "completion": "a"}], columns={"prompt": "questoin"})


FAULTY: dict[str, tuple[str, list[dict[str, Any]]]] = {
    "malformed": ("sft", [qa("q", "a"), {"prompt": "q", "completion": None}]),
    "unknown_format": ("sft", [qa("q", "a"), {"question": "q", "completion": "a"}]),
    "unread": ("sft", [qa("q", "a"), {"messages": [user("r"), {**assistant("a"), "thought": "t"}]}]),
    "unwanted": ("sft", [{**qa("q", "a"), "label": True}, {**qa("r", "a"), "label": False}]),
    "no_answer": ("sft", [qa("q", "a"), {"messages": [user("r")]}]),
    "empty_answer": ("sft", [qa("q", "a"), qa("r", " ")]),
    "control_text": ("sft", [qa("q", "a"), qa("<eos>", "<eos>")]),
    "turn_order": ("sft", [qa("q", "a"), {"messages": [user("r"), user("s"), assistant("a")]}]),
    "empty_prompt": ("sft", [qa("q", "a"), qa("", "a")]),
    "duplicate": ("sft", [qa("q", "a"), qa("Q ", "b")]),
    "identical_sides": ("preference", [{"prompt": "q", "chosen": "a", "rejected": r} for r in ("b", "a")]),
    "contradiction": ("preference", [{"prompt": "q", "chosen": c, "rejected": r} for c, r in ("ab", "ba")]),
}


KEEPING = dict.fromkeys(("turn_order", "empty_prompt", "duplicate", "identical_sides", "contradiction"), "keep")
KEEPING |= {"unread": "keep", "unwanted": "keep", "control_text": "neutralise"}


@pytest.mark.parametrize("fault", FAULTY)
def test_a_fault_is_an_error_a_drop_that_is_told_or_kept_and_counted(fault: str, chat: Chat, tmp_path: Path) -> None:
    task, values = FAULTY[fault]
    with pytest.raises(InputError, match=r"^rows.jsonl:2: "):
        run(chat, values, task=task, checks={fault: "error"})
    made = run(chat, values, task=task, checks={fault: "drop"}, folder=tmp_path)
    (told,) = read_jsonl(tmp_path / "dropped.jsonl")
    assert (told["fault"], told["file"], told["line"]) == (fault, "rows.jsonl", 2)
    if fault in ("duplicate", "contradiction"):  # found beside others: as train.jsonl would have it
        assert "b" in json.dumps(told["value"])
    else:
        assert told["value"] == values[1]
    assert told["why"] and not made.judged.tally.kept and made.fit == 1
    if (keeping := KEEPING.get(fault)) is not None:
        made = run(chat, values, task=task, checks={fault: keeping})
        assert made.judged.tally.kept == {"mine": {fault: 1}} and made.counts == {} and made.fit == 2
    else:
        with pytest.raises(ValidationError, match="Input should be 'error' or 'drop'"):
            default_checks(**{fault: "keep"})


def test_rows_of_sft_with_a_score_or_a_label_of_another_kind(chat: Chat) -> None:
    scored = {**qa("q", "a"), "score": 3}
    with pytest.raises(InputError, match=r"rows.jsonl:1: unread: has a score, which sft does not read, but task"):
        run(chat, [scored])
    made = run(chat, [scored, qa("r", "a")], checks={"unread": "keep"})
    assert made.judged.tally.kept == {"mine": {"unread": 1}} and made.fit == 2
    for label in (0, "false", "spam"):
        with pytest.raises(InputError, match=r"unread: has the label .*, which is neither true nor false"):
            run(chat, [{**qa("q", "a"), "label": label}])
    with pytest.raises(InputError, match="unread: has a score"):
        run(chat, [{**qa("r", "a"), "label": True, "score": "high"}])
    with pytest.raises(InputError, match="unread: the row has 'reasoning' beside its turns"):
        run(chat, [{**qa("r", "a"), "reasoning": "since"}])


def test_too_large_a_share_of_dropped_rows_ends_the_stage_after_they_were_written(chat: Chat, tmp_path: Path) -> None:
    values = [qa("q", "a"), qa("r", "a"), qa("s", ""), qa("t", "a" * 50)]
    run(chat, values, checks={"max_dropped": 0.5})
    with pytest.raises(InputError) as caught:
        run(chat, values, checks={"max_dropped": 0.49}, folder=tmp_path)
    assert str(caught.value) == (
        "rows.jsonl: 2 of 4 rows are dropped, a larger share than checks.max_dropped: 1 empty_answer, 1 long_row "
        "(raise the stage's max_length, or checks.max_dropped=0.5)"
    )
    assert len(list(read_jsonl(tmp_path / "dropped.jsonl"))) == 2


def test_lines_that_cannot_be_read_are_malformed_rows(chat: Chat, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_bytes(b'{"prompt": "q", "completion": "a"}\n{"prompt": \n\xff\n{"prompt": "r", "completion": "b"}\n')
    with pytest.raises(InputError, match=r"rows.jsonl:2: is not valid JSON"):
        run(chat, list(read(file)))
    made = run(chat, list(read(file)), checks={"malformed": "drop"}, folder=tmp_path)
    assert made.counts == {"malformed": 2} and made.fit == 2
    told = list(read_jsonl(tmp_path / "dropped.jsonl"))
    assert [(row["line"], row["value"]) for row in told] == [(2, {}), (3, {})] and "UTF-8" in told[1]["why"]


def test_rows_before_one_that_cannot_be_gone_on_after_are_told_before_the_error(chat: Chat, tmp_path: Path) -> None:
    def rows() -> Iterator[Row]:
        yield Row(qa("q", ""), "rows.jsonl", 1, 1)  # has no answer: dropped
        yield Row(qa("r", "a"), "rows.jsonl", 2, 2)
        raise InputError("is cut", where="rows.jsonl:3")

    reading = reading_of(settings(), "auto", {}, default_checks(), chat, None)
    with pytest.raises(InputError, match=r"^rows.jsonl:3: is cut$"):
        judge([Source("mine", rows(), reading, "rows.jsonl")], tmp_path, lambda *a, **k: None, None)
    (told,) = read_jsonl(tmp_path / "dropped.jsonl")
    assert (told["fault"], told["line"]) == ("empty_answer", 1)
