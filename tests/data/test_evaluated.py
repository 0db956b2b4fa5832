"""Rows beside rows that are nearly the same, and beside what models are evaluated on; what is counted of texts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_args

import pytest

from alignment.config.sources import Dataset, Lists, PathSource
from alignment.data import preparation
from alignment.data.chat import Chat
from alignment.data.named import prompts_of
from alignment.data.splitting import Share
from alignment.errors import InputError
from alignment.files import read_json, read_jsonl

from .conftest import assistant, make_tokenizer, user
from .preparing import Made, mix, qa, run
from .test_kinds_of_rows import TOOLS

LONG = {"max_length": 4000, "max_prompt_length": 3000}
WORDS = [
    "oak",
    "elm",
    "ash",
    "fir",
    "yew",
    "box",
    "bay",
    "fig",
    "sloe",
    "plum",
    "pear",
    "lime",
    "pine",
    "larch",
    "rowan",
]


@pytest.fixture(scope="module")
def chat() -> Chat:
    return Chat(make_tokenizer())


def text(seed: int, size: int = 200) -> str:
    """Words of which no five stand in another's text."""
    return " ".join(f"{WORDS[(seed * 7 + place * place) % 15]}{seed}x{place}" for place in range(size))


def near(seed: int) -> str:
    """One word of 200 is another: of 201 different runs of five words 191 are in both, a Jaccard index of 0.95."""
    return text(seed).replace(f"{seed}x30", f"{seed}y30")


def test_near_duplicates_are_counted_or_dropped_or_an_error(chat: Chat, tmp_path: Path) -> None:
    values = [qa(text(1), "a"), qa(text(2), "a"), qa(near(1), "a"), qa(text(3), "a"), qa(near(1) + " more", "b")]
    made = run(chat, values, folder=tmp_path, **LONG)
    assert (made.judged.tally.kept, made.counts, made.fit) == ({"mine": {"near_duplicate": 2}}, {}, 5)
    report = read_json(tmp_path / "data_report.json")
    assert [(one["reason"], one["line"]) for one in report["examples_kept"]] == [
        ("near_duplicate", 3), ("near_duplicate", 5),
    ]  # fmt: skip
    made = run(chat, values, folder=tmp_path, checks={"near_duplicate": "drop"}, **LONG)
    assert sorted(row["number"] for row in made.rows["train"]) == [1, 2, 4]
    assert [(row["line"], row["why"]) for row in read_jsonl(tmp_path / "dropped.jsonl")] == [
        (3, "is nearly rows.jsonl:1"), (5, "is nearly rows.jsonl:1"),
    ]  # fmt: skip
    with pytest.raises(InputError, match=r"rows.jsonl:3: near_duplicate: is nearly rows.jsonl:1"):
        run(chat, values, checks={"near_duplicate": "error"}, **LONG)
    for changes in ({"near_threshold": 1.0}, {"near_threshold": None}):
        assert run(chat, values, checks={"near_duplicate": "drop", **changes}, **LONG).fit == 5


def test_what_is_near_a_row_that_was_left_out_is_near_nothing(chat: Chat) -> None:
    values = [
        {"prompt": p, "chosen": c, "rejected": r}
        for p, c, r in ((text(1), "a", "b"), (text(1), "b", "a"), (near(2), "a", "b"))
    ]
    made = run(chat, values, task="preference", **LONG)
    assert made.counts == {"contradiction": 1} and not made.judged.tally.kept


def test_answers_to_one_prompt_and_rows_without_words_are_not_near_each_other(chat: Chat) -> None:
    pairs = [{"prompt": text(1), "chosen": f"good {n}", "rejected": f"bad {n}"} for n in range(4)]
    assert not run(chat, pairs, task="preference", **LONG).judged.tally.kept
    assert not run(chat, [qa("?" * n, "!") for n in range(1, 5)]).judged.tally.kept


def calling(question: str, argument: str, **more: Any) -> dict[str, Any]:
    call = {"function": {"name": "look", "arguments": {"at": argument}}}
    return {"messages": [user(question), {**assistant(""), "tool_calls": [call]}], **more}


def test_calls_and_reasoning_are_compared_as_answers_are_and_tools_are_not() -> None:
    """Rows 1 to 3 ask nearly nothing; rows 4 and 5 have the same description of a tool, of 200 words."""
    chat = Chat(make_tokenizer(TOOLS.replace("{{ m['content'] }}", "{{ m.reasoning_content }}{{ m['content'] }}")))
    tool = [{"name": "look", "description": text(9), "parameters": {}}]
    values = [calling(f"q{n}", said) for n, said in enumerate((text(1), near(1), text(2)))]
    values += [calling(f"r{n}", f"s{n}", tools=tool) for n in range(2)]
    values += [
        {"messages": [user(f"t{n}"), {**assistant("a"), "thinking": said}]} for n, said in enumerate((text(3), near(3)))
    ]
    made = run(chat, values, **LONG)
    assert made.judged.tally.kept == {"mine": {"near_duplicate": 2}}
    assert [(one.row.number, one.why) for one in made.judged.tally.first_kept["near_duplicate"]] == [
        (2, "is nearly rows.jsonl:1"), (7, "is nearly rows.jsonl:6")
    ]  # fmt: skip


def test_personal_data_is_found_in_calls_in_what_tools_say_and_are_and_in_reasoning() -> None:
    chat = Chat(make_tokenizer(TOOLS.replace("{{ m['content'] }}", "{{ m.reasoning_content }}{{ m['content'] }}")))
    mail = "jane.doe@mail.example"
    whole = calling("q", mail, tools=[{"name": "look", "description": f"Write to {mail}", "parameters": {}}])
    whole["messages"] += [{"role": "tool", "content": f"from {mail}"}, {**assistant("a"), "reasoning": f"<{mail}>"}]
    made = run(chat, [whole], **LONG)
    assert made.judged.personal == {"mine": {"email": 4}} and made.judged.tally.kept == {"mine": {"personal": 1}}


def splits(made: Made) -> dict[str, list[int]]:
    return {name: [row["number"] for row in rows] for name, rows in made.rows.items()}


@pytest.mark.parametrize("train", [None, 4])
def test_what_is_nearly_held_out_is_not_trained_on(chat: Chat, tmp_path: Path, train: int | None) -> None:
    """Rows 1 to 10 and near copies of them, 11 to 20: of those that are held out none is in another split. The
    prompt is short, so that no n-gram of it tells."""
    values = [qa(f"q{n}", text(n)) for n in range(10)] + [qa(f"r{n}", near(n)) for n in range(10)]
    for seed in range(4):
        made = run(chat, values, folder=tmp_path, heldout=3, prompts=3, train=train, seed=seed, **LONG)
        found = splits(made)
        held = {number % 10 for number in found["heldout"]}
        assert not held & {number % 10 for number in found["prompts"] + found["train"]}
        assert len(found["heldout"]) == len(found["prompts"]) == 3 and (train is None or len(found["train"]) == train)
        told = list(read_jsonl(tmp_path / "dropped.jsonl"))
        assert all(row["fault"] == "near_leak" and row["why"].endswith("which is held out") for row in told)
        if train is None:
            assert made.counts == {"near_leak": len(told)} and len(told) > 0 and made.fit == 20 - len(told)
            kept = run(chat, values, heldout=3, prompts=3, seed=seed, checks={"near_leak": "keep"}, **LONG)
            assert kept.judged.tally.kept["mine"]["near_leak"] == len(told) and kept.counts == {}


def test_a_mixture_draws_nothing_that_leaks(chat: Chat) -> None:
    """With a size and epochs any row may be drawn, so all are looked at."""
    values = [qa(f"q{n}", text(n)) for n in range(10)] + [qa(f"r{n}", near(n)) for n in range(10)]
    for seed in range(4):
        made, _ = mix(chat, {"mine": values}, shares=[Share(epochs=2.0)], heldout=4, train=6, seed=seed, **LONG)
        found = splits(made)
        assert not {n % 10 for n in found["heldout"]} & {n % 10 for n in found["train"]}


def test_what_shares_n_grams_with_an_evaluation_prompt_is_not_trained_on(chat: Chat, tmp_path: Path) -> None:
    """A prompt of 16 words: 9 in a row are more than half of it, 8 are half."""
    words = text(1, 16).split()
    values = [
        qa("tell me: " + " ".join(words[:9]), "a"), qa("tell me: " + " ".join(words[:8]), "a"),
        qa("what else", " ".join(words)), qa("a short one", "a"),
    ]  # fmt: skip
    elsewhere = [("bench.jsonl:7", text(1, 16)), ("bench.jsonl:8", "a short one")]
    made = run(chat, values, prompts_elsewhere=elsewhere, folder=tmp_path, **LONG)
    assert made.counts == {"contamination": 1} and made.fit == 3
    (told,) = read_jsonl(tmp_path / "dropped.jsonl")
    assert (told["line"], told["why"]) == (1, "shares 8-grams with the evaluation prompt bench.jsonl:7")
    report = read_json(tmp_path / "data_report.json")
    assert report["evaluation_prompts"] == {"prompts": 1, "too_short": 1, "generic": 0}
    with pytest.raises(InputError, match=r"rows.jsonl:1: contamination: shares 8-grams with .* bench.jsonl:7"):
        run(chat, values, prompts_elsewhere=elsewhere, checks={"contamination": "error"}, **LONG)
    many = {"contamination_share": 0.4}
    assert run(chat, values, prompts_elsewhere=elsewhere, checks=many, **LONG).counts == {"contamination": 2}
    with pytest.raises(InputError, match=r"2 of 4 rows are dropped, .* 2 contamination"):
        run(chat, values, prompts_elsewhere=elsewhere, checks={**many, "max_dropped": 0.49}, **LONG)
    run(chat, values, prompts_elsewhere=elsewhere, checks={**many, "max_dropped": 0.5}, **LONG)
    made = run(chat, values, prompts_elsewhere=elsewhere, checks={"contamination_share": None}, **LONG)
    assert made.fit == 4 and made.judged.compared == {}


def test_held_out_prompts_are_evaluation_prompts(chat: Chat) -> None:
    values = [qa(text(n, 20), "a") for n in range(8)] + [qa("please: " + text(n, 15), "a") for n in range(8)]
    for seed in range(4):
        made = run(chat, values, heldout=3, seed=seed, checks={"near_threshold": None}, **LONG)
        long = {(n - 1) % 8 for n in splits(made)["heldout"] if n <= 8}
        assert not long & {(n - 1) % 8 for n in splits(made)["train"]}
        assert made.counts.get("contamination", 0) >= len(
            long - {(n - 1) % 8 for n in splits(made)["heldout"] if n > 8}
        )


def test_a_template_of_the_data_contaminates_nothing(chat: Chat) -> None:
    """Twelve words that all prompts begin with say nothing of one; those with the same end are the same prompt."""
    template = "say in one short sentence what the next word means to a child"
    values = [qa(f"{template} {one}", "a") for one in WORDS[:14]]
    made = run(chat, values, heldout=3, **LONG)
    assert made.counts == {} and len(made.rows["train"]) == 11
    elsewhere = [("bench.jsonl:1", f"{template} {WORDS[3]}")]
    assert run(chat, values, prompts_elsewhere=elsewhere, **LONG).counts == {"contamination": 1}
    assert made.judged.compared["prompts"] == 3


def test_workers_find_what_one_finds(chat: Chat, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    values = [qa(text(n % 30), f"answer {n}") for n in range(30)] + [
        qa(near(n), "mail a@b.example.org") for n in range(8)
    ]
    reports = []
    for name, rows in (("one", 5000), ("several", 10)):
        monkeypatch.setattr(preparation, "ENOUGH", rows)
        monkeypatch.setattr(preparation, "CHUNK", 7)
        (tmp_path / name).mkdir()
        run(chat, values, heldout=4, workers=2, folder=tmp_path / name, **LONG)
        reports.append(read_json(tmp_path / name / "data_report.json"))
    assert reports[0] == reports[1] and reports[0]["dropped"]["near_leak"] > 0


MAIL = "write to jane.doe@example.org, or to joe@example.org"


def test_personal_data_is_counted_by_kind_and_never_told(chat: Chat, tmp_path: Path) -> None:
    values = [qa("q", "a"), qa("r", MAIL), qa("call 212-555-0123", MAIL)]
    made = run(chat, values, folder=tmp_path, **LONG)
    report = read_json(tmp_path / "data_report.json")
    (source,) = report["sources"]
    assert source["personal"] == {"email": 4, "phone": 1} and source["kept_with"] == {"personal": 2}
    assert [(one["reason"], one["line"]) for one in report["examples_kept"]] == [("personal", 2), ("personal", 3)]
    assert "example.org" not in json.dumps(report) and made.fit == 3
    assert run(chat, values, checks={"personal": "drop"}, **LONG).counts == {"personal": 2}
    with pytest.raises(InputError, match=r"rows.jsonl:2: personal: 2 email \("):
        run(chat, values, checks={"personal": "error"}, **LONG)
    assert not run(chat, values, checks={"personal": None}, **LONG).judged.personal


def test_languages_of_answers_are_counted(chat: Chat, tmp_path: Path) -> None:
    values = [
        qa("q", "The committee will meet again on Thursday afternoon to decide about the budget."),
        qa("r", "Der Ausschuss trifft sich am Donnerstag wieder, um über den Haushalt zu entscheiden."),
        qa("s", "Le comité se réunira de nouveau jeudi après-midi pour décider du budget de la ville."),
        qa("t", "The weather was so bad that nobody wanted to leave the house all day."),
    ]
    run(chat, values, folder=tmp_path, **LONG)
    (source,) = read_json(tmp_path / "data_report.json")["sources"]
    assert source["languages"] == {"en": 2, "de": 1, "fr": 1}
    run(chat, values, folder=tmp_path, checks={"languages": False}, **LONG)
    assert read_json(tmp_path / "data_report.json")["sources"][0]["languages"] == {}


def test_how_much_longer_chosen_answers_are(chat: Chat, tmp_path: Path) -> None:
    """A letter is a token, and the end is one: lengths 11 and 6, 6 and 11, 21 and 20, 3 and 3."""
    lengths = ((10, 5), (5, 10), (20, 19), (2, 2))
    values = [{"prompt": f"q{n}", "chosen": "c" * c, "rejected": "r" * r} for n, (c, r) in enumerate(lengths)]
    mix(chat, {"a": values[:3], "b": values[3:]}, task="preference", folder=tmp_path)
    first, second = (one["length_bias"] for one in read_json(tmp_path / "data_report.json")["sources"])
    assert first == {
        "pairs": 3, "chosen_longer": pytest.approx(2 / 3), "rejected_longer": pytest.approx(1 / 3), "apart": 2,
        "chosen_tokens": pytest.approx(38 / 3), "rejected_tokens": pytest.approx(37 / 3), "chosen_longer_apart": 0.5,
    }  # fmt: skip
    assert (second["chosen_longer"], second["apart"]) == (0, 0) and "chosen_longer_apart" not in second


TALK = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]
OF_EACH_FORMAT = {
    "alpaca": {"instruction": "Why?", "output": "So."},
    "messages": {"messages": TALK},
    "prompt_completion": {"prompt": "Why?", "completion": "So."},
    "sharegpt": {"conversations": [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "So."}]},
    "text": {"text": "Why?"},
    "preference": {"chosen": TALK, "rejected": [TALK[0], {"role": "assistant", "content": "No."}]},
    "unpaired": {"messages": TALK, "label": False},
    "scored": {"prompt": "Why?", "completion": "So.", "score": 1},
    "scored_list": {"instruction": "Why?", "completions": [{"text": "So.", "score": 1}]},
}


def bench(path: Path, **changes: Any) -> Dataset:
    lists = Lists(pairs="best_worst", min_margin=0.0, max_pairs=1)
    share = {"limit": None, "cap": None, "epochs": 1.0, "weight": None}
    values = {"format": "auto", "columns": {}, "lists": lists, **share, **changes}
    return Dataset(source=PathSource(kind="path", path=str(path)), **values)


def test_evaluation_sets_may_be_of_any_format(tmp_path: Path) -> None:
    assert set(OF_EACH_FORMAT) == {*get_args(Dataset.model_fields["format"].annotation)} - {"auto"}
    path = tmp_path / "bench.jsonl"
    for form, row in OF_EACH_FORMAT.items():
        path.write_text(json.dumps(row) + "\n", encoding="utf-8")
        for named in ("auto", form):
            assert list(prompts_of(bench(path, format=named))) == [(f"{path}:1", "Why?")], form
        path.write_text('{"other": 1}\n', encoding="utf-8")
        with pytest.raises(InputError, match=r"bench.jsonl:1"):
            list(prompts_of(bench(path, format=form)))


def test_prompts_of_an_evaluation_set_need_no_answer(tmp_path: Path) -> None:
    rows = [
        {"prompt": "What is it?", "choices": [1, 2]},
        {"prompt": [{"role": "system", "content": "Be short."}, {"role": "user", "content": "And this?"}]},
        {"messages": [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Me."}]},
    ]
    path = tmp_path / "bench.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")

    def read(**changes: Any) -> list[tuple[str, str]]:
        return list(prompts_of(bench(path, **changes)))

    assert read() == [(f"{path}:1", "What is it?"), (f"{path}:2", "And this?"), (f"{path}:3", "Who?")]
    assert read(limit=1) == [(f"{path}:1", "What is it?")]
    path.write_text('{"question": "Why?"}\n', encoding="utf-8")
    assert read(columns={"prompt": "question"}) == [(f"{path}:1", "Why?")]
    with pytest.raises(InputError, match="no known format has the keys question"):
        read()
    path.write_text("", encoding="utf-8")
    with pytest.raises(InputError, match="no rows"):
        read()
