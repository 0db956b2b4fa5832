"""The two stages that come before any training, as the worker calls them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pytest

from alignment.config.compose import compose
from alignment.config.sources import Dataset, Lists, PathSource
from alignment.config.stages.preparing import ImportModel, Prepare, Splits
from alignment.data.chat import Chat
from alignment.errors import ConfigError, InputError
from alignment.evaluation.signals import by_source
from alignment.files import read_json, read_jsonl, write_jsonl, write_lines
from alignment.stages import import_model, judge, prepare, sft
from alignment.stages.context import StageContext
from tests.conftest import default_checks
from tests.data.conftest import model_settings
from tests.stages.conftest import MakeContext
from tests.training import tiny


@pytest.fixture(scope="module")
def start(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an import_model stage."""
    folder = tmp_path_factory.mktemp("start")
    source = PathSource(kind="path", path=str(tiny_model))
    experiment: Any = SimpleNamespace(model=model_settings(source=source, chat_template="instruction"))
    settings = ImportModel(kind="import_model")
    numbers = import_model.run(StageContext("start", "run", "key", folder, settings, experiment, {}))
    assert numbers["window"] == 512
    return folder


def test_a_trained_model_has_the_template_and_the_ends_of_its_start_model(
    start: Path, instruction_rows: Path, tmp_path: Path
) -> None:
    """They decide what is asked and when an answer has ended, so the models that are compared must share them."""
    shutil.copytree(start, tmp_path / "start")
    ends = tmp_path / "start" / "model" / "generation_config.json"
    ends.write_text(json.dumps({**read_json(ends), "eos_token_id": [1, 2]}))
    (tmp_path / "rows").mkdir()
    prepared(tmp_path / "rows", tmp_path / "start", instruction_rows)
    inputs = {"model": tmp_path / "start", "data": tmp_path / "rows"}
    sft.run(tiny.context(tmp_path / "sft", inputs, tiny.sft(max_steps=1, lora=tiny.LORA), tiny.engine()))
    assert read_json(tmp_path / "sft" / "model" / "generation_config.json") == read_json(ends)
    template = Path("model", "chat_template.jinja")
    assert (tmp_path / "sft" / template).read_bytes() == (start / template).read_bytes()


LISTS = Lists(pairs="best_worst", min_margin=0.0, max_pairs=1)


def prepared(
    folder: Path, start: Path, rows: Path | None, inputs: dict[str, Path] | None = None, **changes: Any
) -> Any:
    splits = Splits(heldout=changes.pop("heldout", 0), prompts=changes.pop("prompts", 0), train=None)
    values = {
        "task": "sft",
        "dataset": "mine",
        "max_length": 96,
        "max_prompt_length": 64,
        "against": [],
        "over_long": "drop",
        "seed": 0,
        "workers": None,
    }
    limit = changes.pop("limit", None)
    settings = Prepare(kind="prepare", splits=splits, **{**values, **changes})
    data = {}
    if rows:
        source = PathSource(kind="path", path=str(rows))
        share: dict[str, Any] = {"limit": limit, "cap": None, "epochs": 1.0, "weight": None}
        data["mine"] = Dataset(source=source, format="auto", columns={}, lists=LISTS, **share)
        if settings.against:
            other = PathSource(kind="path", path=str(rows.parent / "bench.jsonl"))
            data["bench"] = Dataset(source=other, format="auto", columns={"prompt": "question"}, lists=LISTS, **share)
    experiment: Any = SimpleNamespace(data=data, checks=default_checks())
    context = StageContext("rows", "run", "key", folder, settings, experiment, {"model": start, **(inputs or {})})
    return prepare.run(context)


def test_instruction_rows_become_token_ids_prompts_and_a_report(
    start: Path, instruction_rows: Path, tmp_path: Path
) -> None:
    numbers = prepared(tmp_path, start, instruction_rows, heldout=5, prompts=4)
    chat = Chat.load(start / "model")
    train = datasets.load_from_disk(str(tmp_path / "train"))
    rows = list(read_jsonl(tmp_path / "train.jsonl"))
    assert len(train) == len(rows) == 31
    question, answer = (message["content"] for message in rows[0]["messages"])
    assert chat.tokenizer.decode(train[0]["input_ids"]) == (
        f"### Instruction:\n{question}\n\n### Response:\n{answer}<eos>\n"
    )
    trained = [label for label in train[0]["labels"] if label != -100]
    assert chat.tokenizer.decode(trained) == f"{answer}<eos>"
    heldout = list(read_jsonl(tmp_path / "heldout.jsonl"))
    assert len(heldout) == 5 and len(list(read_jsonl(tmp_path / "prompts.jsonl"))) == 4
    assert heldout[0].keys() == {"id", "prompt", "reference"}
    assert heldout[0]["prompt"][0]["content"] not in {row["messages"][0]["content"] for row in rows}
    report = read_json(tmp_path / "data_report.json")
    assert report["rows"] == 40 and report["dropped"] == {}
    assert report["kept"] == {"heldout": 5, "prompts": 4, "train": 31, "unused": 0}
    assert report["formats"] == {"messages": 40} and report["template_sha256"] == chat.template_sha256
    assert numbers["trained_tokens"] == sum(label != -100 for row in train for label in row["labels"])
    assert read_json(tmp_path / "progress.json")["note"] == "messages: 40 of 40 rows fit"


def test_prompts_that_are_evaluated_elsewhere_are_not_trained_on(start: Path, tmp_path: Path) -> None:
    """By eight words in a row: those of a data set in `against`, and those that a parent holds out."""
    one, two = "a b c d e f g h i", "z y x w v u t s r"
    asked = (f"hm {one}", f"hm {two}", "a b c d", "j k l m n o p q r")
    (tmp_path / "parent").mkdir()
    write_lines(tmp_path / "mine.jsonl", (json.dumps({"prompt": q, "completion": "a"}) + "\n" for q in asked))
    write_lines(tmp_path / "bench.jsonl", [json.dumps({"question": one, "level": 3}) + "\n"])
    held = {"id": "1", "prompt": [{"role": "user", "content": two}], "reference": "b"}
    write_lines(tmp_path / "parent" / "heldout.jsonl", [json.dumps(held) + "\n"])
    inputs = {"heldout": tmp_path / "parent"}
    prepared(tmp_path / "parent", start, tmp_path / "mine.jsonl", inputs, against=["bench"])
    dropped = {row["line"]: row["why"] for row in read_jsonl(tmp_path / "parent" / "dropped.jsonl")}
    says = "shares 8-grams with the evaluation prompt"
    assert dropped == {1: f"{says} {tmp_path}/bench.jsonl:1", 2: f"{says} heldout.jsonl:1"}
    assert sorted(path.name for path in (tmp_path / "parent").iterdir() if path.name.startswith("rows")) == []


def test_the_same_rows_and_seed_give_the_same_bytes(start: Path, instruction_rows: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        prepared(tmp_path / name, start, instruction_rows, heldout=5)
    for file in ("train.jsonl", "heldout.jsonl", "data_report.json"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()
    one, two = (datasets.load_from_disk(str(tmp_path / name / "train")) for name in ("one", "two"))
    assert one["input_ids"][:] == two["input_ids"][:]


def test_pairs_of_a_file_become_three_columns(start: Path, preference_rows: Path, tmp_path: Path) -> None:
    prepared(tmp_path, start, preference_rows, task="preference", heldout=3)
    train = datasets.load_from_disk(str(tmp_path / "train"))
    assert train.column_names == ["prompt_ids", "chosen_ids", "rejected_ids"] and len(train) == 21
    row, decode = next(read_jsonl(tmp_path / "train.jsonl")), Chat.load(start / "model").tokenizer.decode
    assert decode(train[0]["prompt_ids"]) == f"### Instruction:\n{row['prompt'][0]['content']}\n\n### Response:\n"
    assert decode(train[0]["chosen_ids"]) == row["chosen"][0]["content"] + "<eos>"
    assert decode(train[0]["rejected_ids"]) == row["rejected"][0]["content"] + "<eos>"
    assert len(list(read_jsonl(tmp_path / "heldout.jsonl"))) == 3


def test_pairs_whose_prompts_evaluate_the_models_are_not_trained_on(
    start: Path, preference_rows: Path, tmp_path: Path
) -> None:
    """As in pipeline=sft_dpo: instructions and pairs come from two files, and some prompts are in both."""
    asked = [row["prompt"] for row in read_jsonl(preference_rows)]
    instructions = tmp_path / "rows.jsonl"
    instructions.write_text("".join(json.dumps({"prompt": text, "completion": "Yes."}) + "\n" for text in asked[:8]))
    for name in ("rows", "pairs"):
        (tmp_path / name).mkdir()
    prepared(tmp_path / "rows", start, instructions, heldout=5)
    heldout = {row["prompt"][0]["content"] for row in read_jsonl(tmp_path / "rows" / "heldout.jsonl")}
    numbers = prepared(
        tmp_path / "pairs", start, preference_rows, {"heldout": tmp_path / "rows"}, task="preference"
    )  # fmt: skip
    trained = {row["prompt"][0]["content"] for row in read_jsonl(tmp_path / "pairs" / "train.jsonl")}
    assert len(heldout) == 5 and trained == set(asked) - heldout
    assert numbers["dropped"] == 5
    report = read_json(tmp_path / "pairs" / "data_report.json")
    assert report["dropped"] == {"heldout": 5}


def test_the_pipeline_of_two_files_tells_its_pairs_what_it_evaluates_on() -> None:
    nodes = compose(["pipeline=sft_dpo"]).pipeline.nodes
    evaluated_on = {node.inputs["data"] for node in nodes.values() if node.stage == "evaluate"}
    assert evaluated_on == {nodes["pairs"].inputs["heldout"]}


def test_pairs_of_the_judge_are_read_from_the_parent(start: Path, tmp_path: Path) -> None:
    judged, folder = tmp_path / "judged", tmp_path / "pairs"
    judged.mkdir(), folder.mkdir()
    sides = {side: [{"role": "assistant", "content": side}] for side in ("chosen", "rejected")}
    pairs = [
        {"id": f"p{i}", "prompt": [{"role": "user", "content": f"q{i}"}], **sides, "chosen_reward": 1.0} for i in (1, 2)
    ]
    (judged / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    numbers = prepared(folder, start, None, {"data": judged}, task="preference", dataset=None)
    assert numbers["train"] == 2
    assert sorted(row["id"] for row in read_jsonl(folder / "train.jsonl")) == ["p1", "p2"]


@pytest.mark.parametrize("task", ["preference", "unpaired", "sft"])
def test_judged_answers_of_a_mixture_are_told_apart_to_the_evaluation(
    start: Path, tmp_path: Path, make_context: MakeContext, task: str
) -> None:
    """As in pipeline=sft_sample_dpo with two data sets: what samples.jsonl says of a prompt is known of its pairs."""
    folders = {name: tmp_path / name for name in ("samples", "rows")}
    for folder in folders.values():
        folder.mkdir()
    whose = {f"q{i}": "abb"[i % 3] for i in range(12)}
    write_jsonl(folders["samples"] / "samples.jsonl", (sampled(text, name) for text, name in whose.items()))
    context = make_context("judge", {"data": folders["samples"]}, best="true", label_threshold=0)
    judge.run(context)
    prepared(folders["rows"], start, None, {"data": context.folder}, task=task, dataset=None, heldout=3)
    report = read_json(folders["rows"] / "data_report.json")
    of_a, of_b = report["sources"]
    answers = 2 if task == "unpaired" else 1
    assert [(one["name"], one["rows"]) for one in (of_a, of_b)] == [("a", 4 * answers), ("b", 8 * answers)]
    rows = list(read_jsonl(folders["rows"] / "train.jsonl"))
    assert rows and all(whose[row.get("prompt", row.get("messages"))[0]["content"]] == row["source"] for row in rows)
    numbers = datasets.load_from_disk(str(folders["rows"] / "train"))["source"][:]
    assert numbers == ["ab".index(row["source"]) for row in rows]
    if task == "preference":
        assert of_a["length_bias"]["pairs"] + of_b["length_bias"]["pairs"] == len(rows)
    heldout = list(read_jsonl(folders["rows"] / "heldout.jsonl"))
    assert all(whose[row["prompt"][0]["content"]] == row["source"] for row in heldout)
    measured = {"reward": 1.0, "terms": {}, "finished": True, **dict.fromkeys(("tokens", "repetition", "kl"), 1.0)}
    told = by_source([{**row, **measured, "heldout_nll": None} for row in heldout])
    asked = [row["source"] for row in heldout]
    assert {name: one["prompts"]["reward"] for name, one in told.items()} == {n: asked.count(n) for n in set(asked)}


def sampled(text: str, source: str) -> dict[str, Any]:
    """Two answers of unlike length, one of which is liked."""
    answers = [{"text": said, "tokens": 3, "finished": True} for said in ("That is terrible.", "I love it, wonderful!")]
    return {"id": text, "source": source, "prompt": [{"role": "user", "content": text}], "completions": answers}


def test_what_is_dropped_of_judged_answers_is_told_by_data_set(start: Path, tmp_path: Path) -> None:
    judged, folder = tmp_path / "judged", tmp_path / "rows"
    judged.mkdir(), folder.mkdir()

    def row(number: int) -> dict[str, Any]:
        answer = [{"role": "assistant", "content": "" if number == 2 else "a"}]
        return {"source": "ab"[number % 2], "prompt": [{"role": "user", "content": f"q{number}"}], "completion": answer}

    write_jsonl(judged / "best.jsonl", map(row, range(6)))
    prepared(folder, start, None, {"data": judged}, task="sft", dataset=None)
    (dropped,) = read_jsonl(folder / "dropped.jsonl")
    assert (dropped["source"], dropped["line"]) == ("a", 3)
    report = read_json(folder / "data_report.json")["sources"]
    assert [one["dropped"] for one in report] == [{"empty_answer": 1}, {}]
    ids = {row["id"]: row["source"] for row in read_jsonl(folder / "train.jsonl")}
    assert ids == {"a-1": "a", "b-2": "b", "b-4": "b", "a-5": "a", "b-6": "b"}


def test_best_answers_of_the_judge_become_rows_for_sft(start: Path, tmp_path: Path) -> None:
    judged, folder = tmp_path / "judged", tmp_path / "rows"
    judged.mkdir(), folder.mkdir()
    best = [
        {
            "id": f"p{i}",
            "prompt": [{"role": "user", "content": f"q{i}"}],
            "completion": [{"role": "assistant", "content": f"a{i}"}],
            "reward": 1.0,
        }
        for i in (1, 2)
    ]
    (judged / "best.jsonl").write_text("".join(json.dumps(row) + "\n" for row in best))
    assert prepared(folder, start, None, {"data": judged}, task="sft", dataset=None)["train"] == 2
    written = {row["id"]: [m["content"] for m in row["messages"]] for row in read_jsonl(folder / "train.jsonl")}
    assert written == {"p1": ["q1", "a1"], "p2": ["q2", "a2"]}


def test_labelled_answers_of_the_judge_become_unpaired_rows_and_without_them_its_pairs_do(
    start: Path, tmp_path: Path
) -> None:
    def asked(text: str) -> list[dict[str, str]]:
        return [{"role": "user", "content": text}]

    def said(text: str) -> list[dict[str, str]]:
        return [{"role": "assistant", "content": text}]

    pairs = [{"prompt": asked(f"q{i}"), "chosen": said("a"), "rejected": said("b")} for i in range(2)]
    labelled = [{"prompt": asked(f"q{i % 2}"), "completion": said(f"a{i}"), "label": i < 2} for i in range(5)]
    judged = tmp_path / "judged"
    judged.mkdir()
    (judged / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    for name, count in (("of pairs", 4), ("of labels", 5)):
        (tmp_path / name).mkdir()
        numbers = prepared(tmp_path / name, start, None, {"data": judged}, task="unpaired", dataset=None)
        assert numbers["train"] == count
        (judged / "unpaired.jsonl").write_text("".join(json.dumps(row) + "\n" for row in labelled))


def test_a_limit_takes_the_first_rows(start: Path, instruction_rows: Path, tmp_path: Path) -> None:
    assert prepared(tmp_path, start, instruction_rows, limit=7)["rows"] == 7


def test_settings_that_cannot_be_are_one_line(start: Path, instruction_rows: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="rows: max_length 513 is longer than the model's context window of 512"):
        prepared(tmp_path, start, instruction_rows, max_length=513)
    with pytest.raises(InputError, match="of 40: 40 long_row"):
        prepared(tmp_path, start, instruction_rows, max_length=20)
