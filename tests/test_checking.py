"""`alignment check` and `alignment data check`: what would stop a run is found before it, and nothing is made."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Command, environment, write_tiny_model
from tests.data.test_adapters import adapter_of
from tests.data.test_models import write_gguf

DATA = {"instructions": "talks", "preferences": "pairs"}
SMALL = ("stage.prepare_sft.splits.heldout=4", "stage.prepare_sft.splits.prompts=4")


def checked(command: Command, store: Path, *arguments: str, code: int = 0) -> dict[str, dict[str, Any]]:
    """The last finding of each check; notes apart."""
    done = command(store, *arguments, "--json", code=code)
    told = json.loads(done.stdout)
    assert told["ok"] is (code == 0)
    return {found["check"]: found for found in told["findings"] if found["state"] != "note"}


def test_a_run_that_can_be_is_told_what_was_looked_at(
    tmp_path: Path, tiny_settings: list[str], command: Command
) -> None:
    found = checked(command, tmp_path / "store", "check", "pipeline=sft_dpo", *tiny_settings, *SMALL)
    states = {name: finding["state"] for name, finding in found.items()}
    assert states.pop("length pairs") == "warning"
    assert "chosen longer in 100% of pairs" in found["length pairs"]["what"]
    assert found["length pairs"]["facts"]["length_bias"]["pairs"] == 24
    assert states == dict.fromkeys(
        (
            *("config", "packages", "store", "tracking", "template", "vocabulary", "window", "data rows", "data pairs"),
            *("reward", "window evaluate_start", "window evaluate_sft", "window evaluate_dpo", "window best_of_n"),
            *("time sft", "time reference", "time dpo"),
            *("memory sft", "memory reference", "memory dpo", "disk", "loss dpo"),
        ),
        "ok",
    )
    facts = found["data rows"]["facts"]
    assert (facts["read"], facts["all"], facts["formats"], facts["dropped"]) == (40, True, {"messages": 40}, {})
    assert not list((tmp_path / "store").rglob("record.json")), "nothing is made"
    sft = found["time sft"]["facts"]
    assert (sft["rows"], sft["steps"], sft["scale"], sft["kwh"]) == (32, 2, None, None)
    assert sft["seconds"] == pytest.approx(sft["steps"] * sft["step_s"])
    assert found["time reference"]["facts"]["before_s"] > 0 and found["time dpo"]["facts"]["before_s"] == 0
    assert "thread of this CPU, measured" in found["time dpo"]["what"]
    assert "time evaluate_sft" not in found, "it trains nothing"


def test_figures_of_a_cluster_give_hours_and_energy_and_without_them_there_are_operations(
    tmp_path: Path, tiny_settings: list[str], command: Command
) -> None:
    cluster = ["pipeline=sft", *SMALL, *tiny_settings, "launcher=slurm", "launcher.nodes=2", "engine=zero3"]
    cluster += ["stage.sft.precision=bf16"]
    found = checked(command, tmp_path / "store", "check", *cluster, "hardware=h100")["time sft"]
    facts = found["facts"]
    assert facts["processes"] == 16 and facts["on_gpu"] and facts["sent"] > 0 and facts["sent_s"] > 0
    assert facts["process_hours"] == pytest.approx(facts["seconds"] * 16 / 3600)
    assert facts["kwh"] == pytest.approx(facts["process_hours"] * 0.7)
    assert "GPU-hours" in found["what"] and "kWh" in found["what"] and "communication" in found["what"]
    told = json.loads(command(tmp_path / "store", "check", *cluster, "--json").stdout)["findings"]
    (unknown,) = (one for one in told if one["check"] == "time sft")
    (away,) = (one for one in told if one["check"] == "cluster")
    assert away["state"] == "warning" and re.search(
        "are not installed|cannot be reached|has not answered", away["what"]
    )
    assert unknown["state"] == "note" and "hardware=h100" in unknown["fix"]
    assert unknown["facts"]["step_s"] is None and unknown["facts"]["operations"] == facts["operations"]
    done = command(tmp_path / "store", "check", *cluster, "--calibrate", code=2)
    assert "launcher: --calibrate measures this machine, jobs run elsewhere" in done.stderr


def test_steps_that_are_run_here_are_what_is_estimated_and_stay_for_the_next_check(
    tmp_path: Path, short_settings: list[str], command: Command
) -> None:
    settings = [one for one in short_settings if not one.startswith(("--config-dir", "/"))]
    folder = ["--config-dir", short_settings[short_settings.index("--config-dir") + 1]]
    found = checked(command, tmp_path / "store", "check", *folder, *settings, "--calibrate")
    timed = found["steps sft"]["facts"]
    assert len(timed["seconds"]) == 5 and min(timed["seconds"]) > 0 and timed["start_s"] > 0
    facts = found["time sft"]["facts"]
    assert facts["scale"] > 1, "steps of a tiny model are no products of matrices"
    assert min(timed["seconds"]) / 2 < facts["step_s"] < 2 * max(timed["seconds"])
    assert facts["seconds"] == pytest.approx(facts["steps"] * facts["step_s"] + timed["start_s"] + timed["end_s"])
    assert not list((tmp_path / "store").rglob("record.json")), "nothing is made in the store"
    again = checked(command, tmp_path / "store", "check", *folder, *settings)["time sft"]
    assert again["facts"]["scale"] == facts["scale"] and "5 steps timed on this machine" in again["what"]


def test_what_fits_needs_no_suggestion(tmp_path: Path, tiny_settings: list[str], command: Command) -> None:
    done = command(tmp_path / "store", "check", "--suggest", "pipeline=sft", *tiny_settings, *SMALL)
    assert done.stdout == "" and "memory sft" in done.stderr


def test_rows_that_would_end_the_run_end_the_check_with_its_code_and_words(
    tmp_path: Path, tiny_settings: list[str], command: Command
) -> None:
    rows = tmp_path / "rows.jsonl"
    good = [
        {"messages": [{"role": "user", "content": f"q{i}"}, {"role": "assistant", "content": "a"}]} for i in range(9)
    ]
    rows.write_text("".join(json.dumps(row) + "\n" for row in [*good, {"question": "q", "answer": "a"}]))
    settings = [*tiny_settings, *SMALL, f"data.instructions.source.path={rows}"]
    done = command(tmp_path / "store", "data", "check", "pipeline=sft", *settings, code=3)
    where = f"{rows}:10: data rows: no known format has the keys question, answer"
    assert f"alignment: error: {where}" in done.stderr
    found = checked(
        command, tmp_path / "store", "data", "check", "pipeline=sft", *settings, "checks.unknown_format=drop"
    )
    answers = {"window evaluate_start", "window evaluate_sft", "window best_of_n"}
    assert set(found) == {"template", "vocabulary", "window", "data rows", *answers}
    assert found["data rows"]["facts"]["dropped"] == {"unknown_format": 1}
    assert found["data rows"]["state"] == "warning"


def test_rows_that_are_dropped_are_written_to_a_file_of_ones_own(
    tmp_path: Path, tiny_settings: list[str], command: Command
) -> None:
    """Of both stages, though the first fails: that is when they are wanted."""

    def asked(content: str) -> dict[str, Any]:
        return {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": "a"}]}

    rows, file = tmp_path / "rows.jsonl", tmp_path / "dropped.jsonl"
    many = [*(asked(f"q{i}") for i in range(12)), *[asked("q0")] * 30]
    rows.write_text("".join(json.dumps(row) + "\n" for row in many))
    pairs = tmp_path / "pairs.jsonl"
    sides = [*((f"p{i}", "r") for i in range(9)), ("p", "c")]
    pairs.write_text("".join(json.dumps({"prompt": p, "chosen": "c", "rejected": r}) + "\n" for p, r in sides))
    settings = ["data", "check", "pipeline=sft_dpo", *tiny_settings, *SMALL, f"data.instructions.source.path={rows}"]
    settings += [f"data.preferences.source.path={pairs}"]
    (tmp_path / "store").mkdir()
    done = command(tmp_path / "store", *settings, code=3)
    assert "data check --dropped FILE ...` writes each; mend them" in done.stderr
    done = command(tmp_path / "store", *settings, "--dropped", str(file), code=3)
    assert f"{file} has each; mend them" in done.stderr and f"31 rows are in {file}" in done.stdout
    told = [json.loads(line) for line in file.read_text().splitlines()]
    assert [(one["source"], one["fault"], one["line"]) for one in told] == [
        *(("instructions", "duplicate", line) for line in range(13, 43)),
        ("preferences", "identical_sides", 10),
    ]
    assert told[0]["value"] == asked("q0") and told[0]["file"] == str(rows)
    done = command(tmp_path / "store", *settings, "--dropped", str(file), code=2)
    assert "there is such a file already" in done.stderr
    assert not list((tmp_path / "store").iterdir()), "the tables are gone again"


def test_a_look_that_nobody_waits_for_ends_and_leaves_nothing(tmp_path: Path, tiny_settings: list[str]) -> None:
    """Though its rows would take minutes."""
    (tmp_path / "store").mkdir()
    row = {"messages": [{"role": "user", "content": "q" * 50}, {"role": "assistant", "content": "a"}]}
    (tmp_path / "rows.jsonl").write_text((json.dumps(row) + "\n") * 300_000)
    settings = ["pipeline=sft", *tiny_settings, f"data.instructions.source.path={tmp_path / 'rows.jsonl'}"]
    command = [sys.executable, "-m", "alignment.cli", "data", "check", *settings, f"store={tmp_path / 'store'}"]
    given: dict[str, Any] = {"env": environment(tmp_path / "store"), "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, stderr=subprocess.DEVNULL, **given) as process:
        assert process.stdout is not None and "template" in process.stdout.readline()
        assert [path.name[:7] for path in (tmp_path / "store").iterdir()] == [".check-"]
        process.send_signal(signal.SIGINT)
        process.wait(40)
    assert not list((tmp_path / "store").iterdir())


@pytest.mark.parametrize(
    "arguments",
    ["check --suggest --json", "check --suggest --calibrate", "data check --rows 3", "data check --html page.html",
     "data show --json", "data show --dropped rows.jsonl", "data check --dropped none/rows.jsonl"],
)  # fmt: skip
def test_options_that_do_not_go_together_are_refused(
    arguments: str, tmp_path: Path, tiny_settings: list[str], command: Command
) -> None:
    done = command(tmp_path / "store", *arguments.split(), "pipeline=sft", *tiny_settings, *SMALL, code=2)
    assert done.stdout == "" and "alignment: error: " in done.stderr


@pytest.mark.parametrize("fault", ["vocabulary", "window", "template"])
def test_a_model_that_cannot_be_trained_so_is_a_failure_of_its_check(
    fault: str, tmp_path: Path, tiny_settings: list[str], command: Command
) -> None:
    unended = "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}{% endfor %}"
    folder = write_tiny_model(tmp_path / "model", *([unended] if fault == "template" else []))
    config = json.loads((folder / "config.json").read_text())
    change = {"vocabulary": {"vocab_size": 200}, "window": {"max_position_embeddings": 8}}.get(fault, {})
    (folder / "config.json").write_text(json.dumps({**config, **change}))
    settings = ["pipeline=sft", *tiny_settings, *SMALL, f"model.source.path={folder}"]
    done = command(tmp_path / "store", "check", *settings, code=2 if fault == "window" else 3)
    says = {
        "vocabulary": "the tokenizer has token ids up to 260, the embedding 200 rows",
        "window": r"is more than the model's window of 8 tokens",
        "template": "the chat template does not end an answer with the end-of-turn token",
    }[fault]
    assert says in done.stderr and "Traceback" not in done.stderr


def test_an_evaluation_whose_prompts_leave_no_room_for_answers_fails_before_hours_of_training(
    tmp_path: Path, tiny_settings: list[str], command: Command
) -> None:
    """Of the 512 tokens of the model a prompt takes 12 and more: a token a letter."""
    settings = ["pipeline=sft", *tiny_settings, *SMALL, "stage.evaluate.max_new_tokens=501"]
    found = checked(command, tmp_path / "store", "check", *settings, code=3)
    told = found["window evaluate_sft"]
    assert told["state"] == "failed" and "rows.jsonl:" in told["where"]
    assert found["window"]["state"] == "ok" and "leaves no room for 501 more in a window of 512" in told["what"]


def test_window_and_vocabulary_of_a_gguf_file_are_looked_at(
    tmp_path: Path, tiny_settings: list[str], command: Command
) -> None:
    path, _ = write_gguf(tmp_path, "smollm")  # a window of 64 tokens
    model = [f"model.source.path={path}", "model.pad_token='<pad>'"]
    found = checked(command, tmp_path / "store", "check", "pipeline=sft", *tiny_settings, *SMALL, *model, code=2)
    assert found["vocabulary"]["what"] == "262 tokens, 262 rows of the embedding"
    assert found["window"]["what"] == "max_length 128 is more than the model's window of 64 tokens"


def test_adapters_of_modules_that_the_model_does_not_have_are_found_with_their_stage(
    tmp_path: Path, tiny_settings: list[str], command: Command
) -> None:
    settings = ["pipeline=sft_reward_model", *tiny_settings, *SMALL, "stage.sft.lora.target_modules=[q_porj,v_proj]"]
    found = checked(command, tmp_path / "store", "check", *settings, "stage.reward_model.lora={rank: 2}", code=2)
    told = found["adapters sft"]
    assert (told["state"], told["where"]) == ("failed", "stage.sft.lora.target_modules")
    assert "no linear layer `q_porj`" in told["what"] and told["fix"] == "did you mean `q_proj`?"
    assert "adapters reward_model" not in found, "a head of its own is no odd module"


def test_an_adapter_of_another_model_is_found_before_its_import(
    tmp_path: Path, tiny_model: Path, tiny_settings: list[str], command: Command
) -> None:
    adapter = tmp_path / "adapter"
    adapter_of(tiny_model, adapter, target_modules=["q_proj"])
    model = ["model.storage_precision=fp32", f"model.adapter={{kind: path, path: {adapter}}}"]
    settings = ["check", "pipeline=sft", *tiny_settings, *SMALL, *model]
    assert checked(command, tmp_path / "store", *settings)["adapters"]["state"] == "ok"
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "target_modules": ["gate_proj"]}))
    found = checked(command, tmp_path / "store", *settings, code=3)["adapters"]
    assert found["state"] == "failed" and "does not fit the model" in found["what"] and found["where"] == str(adapter)
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "peft_type": "IA3"}))
    assert "of the type IA3" in checked(command, tmp_path / "store", *settings, code=3)["model"]["what"]


def test_what_is_no_reward_model_is_found_before_anything_is_trained(
    tmp_path: Path, tiny_model: Path, tiny_settings: list[str], command: Command
) -> None:
    settings = [one for one in tiny_settings if "relevance" not in one]
    member = "+reward.terms.preference.members.own={{kind: path, path: {}}}"
    grpo = ["pipeline=sft_grpo", "reward=model", *settings, *SMALL]
    found = checked(command, tmp_path / "store", "check", *grpo, member.format(tiny_model), code=3)["reward"]
    assert found["what"] == "has 2 outputs, a reward model one" and found["where"] == str(tiny_model)
    command(tmp_path / "store", "check", *grpo, member.format(tmp_path / "none"), code=3)


def test_a_server_that_does_not_answer_is_a_warning(
    tmp_path: Path, tiny_settings: list[str], command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    settings = ["pipeline=sft", *SMALL, *(s for s in tiny_settings if s != "tracking=none"), "tracking=wandb"]
    done = command(tmp_path / "store", "check", *settings)
    assert "! tracking     W&B does not answer at 127.0.0.1:9" in done.stdout


def test_rows_are_shown_token_by_token_here_and_on_a_page_that_escapes_them(
    tmp_path: Path, tiny_settings: list[str], command: Command
) -> None:
    """Of `<|user|>q<|assistant|><b>&<eos>` the answer is trained: 4 letters and <eos>, 5 tokens of bytes."""
    rows = [{"prompt": f"q{i}", "completion": "<b>&"} for i in range(12)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = f"data.instructions.source.path={tmp_path / 'rows.jsonl'}"
    page = tmp_path / "rows.html"
    arguments = ["pipeline=sft", *tiny_settings, *SMALL, data, "--rows", "3", "--html", str(page)]
    done = command(tmp_path / "store", "data", "show", *arguments)
    assert done.stdout.count("<|assistant|>│⟦<│b│>│&│<eos>⟧") == 3
    text = page.read_text()
    assert text.count('class="on"') == 3 * 5
    assert "<b>" not in text and text.count("&lt;</span>") == 3 and "script" not in text.split("<body>")[1]
    assert sum(map(int, re.findall(r"tokens: (\d+) rows", text))) == 2 * 4, "those trained on, by prompt and by row"
    command(tmp_path / "store", "data", "show", *arguments, "--rows", "0", code=2)

    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:5]))
    few = command(tmp_path / "store", "data", "show", *arguments, code=3)
    assert few.stdout.count("<|assistant|>│⟦<│b│>│&│<eos>⟧") == 3 and "5 rows are fit to use" in few.stderr


def test_labels_of_one_kind_fail_the_check_and_among_the_first_rows_alone_are_a_warning(
    tmp_path: Path, tiny_settings: list[str], command: Command
) -> None:
    path = f"data.preferences.source.path={tmp_path / 'rows.jsonl'}"
    kto = ["pipeline=kto", *tiny_settings, "stage.prepare_unpaired.splits.heldout=4", path]
    for others, code in ((0, 3), (10, 0)):
        labels = [True] * 2500 + [False] * others if others else [True] * 20
        rows = ({"prompt": f"q{i}", "completion": "a", "label": label} for i, label in enumerate(labels))
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        done = command(tmp_path / "store", "check", *kto, code=code)
        assert "are wanted and 0 are not: KTO needs both" in done.stdout
        assert ("of the first rows, and so perhaps of all" in done.stdout) == (code == 0)


def test_prompts_that_another_stage_keeps_for_evaluation_are_left_out_as_they_will_be(
    tmp_path: Path, tiny_settings: list[str], command: Command
) -> None:
    """Of 30 prompts that both data sets have 20 are kept for evaluation: the run would drop 20 of 30 pairs."""
    talks = ({"prompt": f"q{i}", "completion": f"a{i}"} for i in range(30))
    pairs = ({"prompt": f"q{i}", "chosen": f"a{i}", "rejected": f"b{i}"} for i in range(30))
    for name, rows in (("talks", talks), ("pairs", pairs)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    paths = [f"data.{one}.source.path={tmp_path}/{name}.jsonl" for one, name in DATA.items()]
    settings = ["pipeline=sft_dpo", *tiny_settings, *paths]
    splits = [f"stage.prepare_sft.splits.{name}=4" for name in ("prompts", "train")]
    told = command(
        tmp_path / "store", "data", "check", *settings, *splits, "stage.prepare_sft.splits.heldout=20", code=3
    )
    assert "20 of 30 rows are dropped" in told.stderr and "20 heldout" in told.stderr
