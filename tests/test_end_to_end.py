"""Whole runs through the command line on a tiny model: made once, reused, refused for bad input."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.conftest import Command, runs, states, tiny_stages

pytestmark = pytest.mark.slow
NODES = [
    *("start", "rows", "sft", "samples", "judged", "pairs", "reference", "dpo"),
    *("evaluate_start", "evaluate_sft", "evaluate_dpo", "best_of_n", "verdict"),
]
STAGES = tiny_stages("prepare_sft", "sft", "sample", "judge", "dpo", "evaluate", "compare")


@pytest.fixture(scope="module")
def settings(tiny_settings: list[str]) -> list[str]:
    return ["pipeline=sft_sample_dpo", "name=tiny", *tiny_settings, *STAGES]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, forked: Command, settings: list[str]) -> Path:
    """A store in which the whole pipeline has run once. (Runs of new interpreters: test_kills.py, test_signals.py.)"""
    store = tmp_path_factory.mktemp("end_to_end") / "store"
    forked(store, "run", *settings)
    return store


def test_every_stage_is_committed_with_its_record(store: Path, command: Command) -> None:
    (run,) = runs(command, store)
    assert states(run) == dict.fromkeys(NODES, "done")
    for node in run["nodes"]:
        record = json.loads((store / "store" / node["key"][:16] / "record.json").read_text())
        assert record["key"] == node["key"]
        assert {"identity", "parents", "packages", "code_sha256", "host", "seconds", "metrics", "files"} <= set(record)
        assert record["files"]
    assert not list((store / "work").glob("*"))


def test_the_hash_of_the_one_chat_template_is_in_the_record_of_every_model(store: Path) -> None:
    """The file's own hash in the records of start, SFT and DPO, and the same in the reports of the rows rendered."""
    in_records, in_reports = {}, {}
    for folder in (store / "store").iterdir():
        record = json.loads((folder / "record.json").read_text())
        if template := record["files"].get("model/chat_template.jinja"):
            in_records[record["name"]] = template["sha256"]
        if "data_report.json" in record["files"]:
            in_reports[record["name"]] = json.loads((folder / "data_report.json").read_text())["template_sha256"]
    assert in_records.keys() == {"start", "sft", "dpo"} and in_reports.keys() == {"rows", "pairs"}
    assert len({*in_records.values(), *in_reports.values()}) == 1


def test_dpo_finds_the_log_probs_that_the_stage_before_it_has_computed(store: Path) -> None:
    records = [json.loads((folder / "record.json").read_text()) for folder in (store / "store").iterdir()]
    told = {record["name"]: record["metrics"] for record in records}
    assert told["reference"]["computed"] == told["reference"]["rows"] == told["dpo"]["rows"] > 0
    assert told["dpo"]["reference_computed"] == 0


def test_the_final_model_is_an_ordinary_folder(store: Path, command: Command) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    (run,) = runs(command, store)
    key = next(node["key"] for node in run["nodes"] if node["name"] == "dpo")
    folder = store / "store" / key[:16] / "model"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert sum(p.numel() for p in model.parameters()) > 0
    assert tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False) == "<|user|>Hi"


def test_the_second_run_trains_nothing_and_says_what_it_reused(
    store: Path, command: Command, settings: list[str]
) -> None:
    plan = json.loads(command(store, "plan", "--json", *settings).stdout)
    assert {row["action"] for row in plan["nodes"]} == {"reuse"}
    out = command(store, "run", *settings).stdout
    assert out.count("reused") >= len(NODES) or f"{len(NODES)} reused" in out
    assert "report.html" in out
    (run,) = runs(command, store)
    assert set(states(run).values()) == {"reused"}


def test_another_beta_runs_dpo_and_what_follows_alone(store: Path, command: Command, settings: list[str]) -> None:
    plan = json.loads(command(store, "plan", "--json", *settings, "stage.dpo.beta=0.7").stdout)
    assert [row["name"] for row in plan["nodes"] if row["action"] == "run"] == ["dpo", "evaluate_dpo", "verdict"]


def test_a_stage_is_made_though_wandb_is_down(
    store: Path, forked: Command, settings: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # nobody listens there
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    changes = ["name=unheard", "tracking=wandb", "stage.compare.resamples=101"]
    out = forked(store, "run", *[s for s in settings if s != "tracking=none"], *changes).stdout
    assert "wandb sync" in out  # the warning reaches people, with the command that uploads by hand
    (run,) = (states(run) for run in runs(forked, store) if run["name"] == "unheard")
    assert [name for name in NODES if run[name] == "done"] == ["verdict"]


def test_a_multirun_shares_what_is_equal_and_makes_the_rest(
    store: Path, command: Command, forked: Command, settings: list[str]
) -> None:
    forked(store, "run", "-m", *settings, "name=sweep", "stage.dpo.beta=0.1,0.7")
    of_sweep = sorted(
        (states(run) for run in runs(command, store) if run["name"] == "sweep"), key=lambda s: s["dpo"] == "done"
    )
    assert [set(run.values()) for run in of_sweep] == [{"reused"}, {"reused", "done"}]
    assert [name for name in NODES if of_sweep[1][name] == "done"] == ["dpo", "evaluate_dpo", "verdict"]


@pytest.mark.parametrize(
    ("fault", "code", "line"),
    [
        ("malformed", 3, "rows.jsonl:3: "),
        ("weightless", 3, "weights"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing_in_the_store(
    fault: str, code: int, line: str, tmp_path: Path, tiny_model: Path, forked: Command, settings: list[str]
) -> None:
    rows, model = tmp_path / "rows.jsonl", tmp_path / "model"
    rows.write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "c", "completion": "d"}\n{"prompt": "e", "comp\n')
    shutil.copytree(tiny_model, model)
    given = f"data.instructions.source.path={rows}"
    if fault == "weightless":
        (model / "model.safetensors").unlink()
        given = f"model.source.path={model}"
    store = tmp_path / "store"
    done = forked(store, "run", *settings, given, code=code)
    assert line in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    kinds = [json.loads((f / "record.json").read_text())["kind"] for f in store.glob("store/*")]
    assert kinds in ([], ["import_model"])
    (run,) = runs(forked, store)
    assert "failed" in states(run).values()


def test_the_report_has_the_verdict_and_needs_no_network(store: Path, command: Command) -> None:
    run = next(run for run in runs(command, store) if run["name"] == "tiny")
    page = (store / "runs" / run["run"] / "report.html").read_text()
    assert run["nodes"][-1]["key"] in page
    for remote in ('src="http', "src='http", '<link rel="stylesheet" href="http', "@import"):
        assert remote not in page


def test_chat_answers_with_the_models_of_a_run(store: Path, command: Command) -> None:
    out = command(store, "chat", "tiny", "--compare", "--prompt", "Hi", "--max-new-tokens", "4").stdout
    assert all(name in out for name in ("start", "sft", "dpo"))
