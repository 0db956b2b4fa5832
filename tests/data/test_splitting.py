"""Splits that share no prompt, and mixtures."""

from __future__ import annotations

import re
from pathlib import Path

import datasets
import pytest

from alignment.data import preparation
from alignment.data.chat import Chat
from alignment.data.splitting import Share
from alignment.errors import InputError
from alignment.files import read_json, read_jsonl

from .conftest import assistant, make_tokenizer, user
from .preparing import mix, qa, run


@pytest.fixture(scope="module")
def chat() -> Chat:
    return Chat(make_tokenizer())


def test_splits_are_disjoint_repeatable_and_decided_by_the_seed(chat: Chat) -> None:
    values = [qa(f"q{i}", f"a{i}") for i in range(30)]

    def ids(seed: int) -> dict[str, list[str]]:
        made = run(chat, values, heldout=5, prompts=4, train=10, seed=seed)
        return {name: [str(row["number"]) for row in part] for name, part in made.rows.items()}

    first = ids(0)
    assert {name: len(part) for name, part in first.items()} == {"heldout": 5, "prompts": 4, "train": 10, "unused": 11}
    assert sorted(id for part in first.values() for id in part) == sorted(str(i + 1) for i in range(30))
    assert ids(0) == first
    assert ids(1) != first


def test_held_out_prompts_are_never_trained_on(chat: Chat) -> None:
    """Twelve openings, each asked alone and as the first turn of a longer talk: both must land in one split."""
    values = []
    for i in range(12):
        values.append({"messages": [user(f"q{i}"), assistant("a")]})
        values.append({"messages": [user(f"Q{i} "), assistant("a"), user("more"), assistant("b")]})
    leaks = 0
    for seed in range(8):
        made = run(chat, values, heldout=3, prompts=3, seed=seed)
        openings = [{row["opening"] for row in made.rows[name]} for name in ("heldout", "prompts", "train")]
        assert not openings[0] & openings[1] and not (openings[0] | openings[1]) & openings[2]
        leaks += made.counts.get("leak", 0)
        assert made.fit == sum(map(len, made.rows.values())) == len(values) - sum(made.counts.values())
    assert leaks > 0


def test_pairs_that_share_a_prompt_lie_in_one_split(chat: Chat) -> None:
    """pipeline=dpo evaluates on prompts of its own pairs: the other pairs of such a prompt are not trained on."""
    sides = ("ab", "ac", "bc")
    values = [{"prompt": f"q{i}", "chosen": a, "rejected": b} for i in range(12) for a, b in sides]
    for seed in range(8):
        made = run(chat, values, task="preference", heldout=4, seed=seed)
        kept, trained = ({row["opening"] for row in made.rows[name]} for name in ("heldout", "train"))
        assert kept and trained and not kept & trained


def test_what_leaks_counts_among_the_rows_that_are_dropped(chat: Chat, tmp_path: Path) -> None:
    """20 of 21 pairs share a prompt: a held-out one of them takes 19 of 21 rows, a share of 0.905, with it."""
    values = [{"prompt": "q", "chosen": f"a{i}", "rejected": f"b{i}"} for i in range(20)]
    values.append({"prompt": "r", "chosen": "a", "rejected": "b"})
    made = run(chat, values, task="preference", heldout=1, folder=tmp_path)
    assert made.counts == {"leak": 19} and made.fit == 2 == read_json(tmp_path / "data_report.json")["fit"]
    said = (
        "rows.jsonl: 19 of 21 rows are dropped, a larger share than checks.max_dropped: 19 leak "
        "(dropped.jsonl has each; mend them, or checks.max_dropped=0.91)"
    )
    with pytest.raises(InputError, match=re.escape(said)):
        run(chat, values, task="preference", heldout=1, checks={"max_dropped": 0.9})
    run(chat, values, task="preference", heldout=1, checks={"max_dropped": 0.91})
    with pytest.raises(InputError, match=r"2 rows are fit to use.* 1 held-out.* 2 train .*of 21: 19 leak"):
        run(chat, values, task="preference", heldout=1, train=2)


def test_rows_without_the_held_out_prompts_are_not_dropped(chat: Chat) -> None:
    """Each data set's share is of its own rows: of b none is dropped."""
    pairs = [{"prompt": "q", "chosen": f"a{i}", "rejected": f"b{i}"} for i in range(9)]
    others = [{"prompt": f"r{i}", "chosen": "a", "rejected": "b"} for i in range(9)]
    data = {"a": pairs, "b": others}
    for seed in range(4):
        made, _ = mix(chat, data, task="preference", heldout=2, seed=seed)
        assert made.fit == 18 - sum(made.counts.values())
        assert set(made.judged.tally.dropped) <= {"a"}


def test_too_few_rows_say_how_many_there_are_and_where_the_others_went(chat: Chat) -> None:
    values = [qa("q", "a"), qa("q", "b"), qa("r", "")]
    with pytest.raises(InputError) as caught:
        run(chat, values, heldout=1, prompts=1, train=2)
    assert str(caught.value) == (
        "rows.jsonl: 1 rows are fit to use, the splits ask for 1 held-out + 1 prompts + 2 train "
        "(of 3: 1 duplicate, 1 empty_answer) (lower the stage's splits, or mend the rows)"
    )
    with pytest.raises(InputError, match="at least 1 train"):
        run(chat, values, heldout=1)


def counts(folder: Path, split: str = "train") -> dict[str, dict[str, int]]:
    """data set -> id -> how often it is there."""
    found: dict[str, dict[str, int]] = {}
    for row in read_jsonl(folder / f"{split}.jsonl"):
        mine = found.setdefault(row["source"], {})
        mine[row["id"]] = mine.get(row["id"], 0) + 1
    return found


def test_a_mixture_takes_of_each_data_set_what_its_share_says(chat: Chat) -> None:
    """a: 12 rows, b: 8. Weights 1 and 3: of b all 8, of a a third as many, rounded down: 2. Epochs 2.5 of b: 20 rows,
    each twice and four of them three times. Cap 5 of a: 5."""
    data = {name: [qa(f"{name}{i}", "x") for i in range(size)] for name, size in (("a", 12), ("b", 8))}
    for shares, sizes in (
        ([Share(weight=1.0), Share(weight=3.0)], {"a": 2, "b": 8}),
        ([Share(), Share(epochs=2.5)], {"a": 12, "b": 20}),
        ([Share(cap=5), Share()], {"a": 5, "b": 8}),
        ([Share(weight=1.0), Share(weight=1.0, epochs=2.0)], {"a": 12, "b": 12}),
        ([Share(epochs=0.5), Share()], {"a": 6, "b": 8}),
    ):
        _, folder = mix(chat, data, shares=shares)
        found = counts(folder)
        assert {name: sum(times.values()) for name, times in found.items()} == sizes
        for name, times in found.items():
            assert max(times.values()) - min(times.values()) <= 1, "none is repeated before all others are"
            assert all(id.startswith(f"{name}-") for id in times)
        train = datasets.load_from_disk(str(folder / "train"))
        assert [train["source"][:].count(n) for n in (0, 1)] == list(sizes.values())
        report = read_json(folder / "data_report.json")["sources"]
        assert [(one["name"], one["rows"]) for one in report] == [("a", 12), ("b", 8)]


def test_a_mixture_is_the_same_with_any_number_of_workers(chat: Chat, monkeypatch: pytest.MonkeyPatch) -> None:
    data = {name: [qa(f"{name}{i}", "x") for i in range(size)] for name, size in (("a", 40), ("b", 30))}
    shares = [Share(weight=1.0), Share(weight=2.0, epochs=2.0)]
    _, alone = mix(chat, data, shares=shares, heldout=4, prompts=3)
    monkeypatch.setattr(preparation, "ENOUGH", 20)
    monkeypatch.setattr(preparation, "CHUNK", 7)
    monkeypatch.setattr(preparation, "made_of", None)  # here; the workers have their own
    _, several = mix(chat, data, shares=shares, heldout=4, prompts=3, workers=2)
    for name in ("train.jsonl", "heldout.jsonl", "prompts.jsonl", "data_report.json"):
        assert (alone / name).read_bytes() == (several / name).read_bytes()
    table, same = (datasets.load_from_disk(str(folder / "train")) for folder in (alone, several))
    assert table.to_dict() == same.to_dict()


def test_what_stands_in_two_data_sets_is_one_row(chat: Chat) -> None:
    made, folder = mix(chat, {"a": [qa("q", "a"), qa("r", "a")], "b": [qa("Q", "b"), qa("s", "a")]})
    assert made.judged.tally.dropped == {"b": {"duplicate": 1}}
    assert [row["source"] for row in read_jsonl(folder / "dropped.jsonl")] == ["b"]


def test_a_weight_of_no_rows_is_told(chat: Chat) -> None:
    with pytest.raises(InputError, match="has a weight and no rows to train on"):
        mix(chat, {"a": [qa("q", "")], "b": [qa("r", "a")]}, shares=[Share(weight=1.0), Share(weight=1.0)])
