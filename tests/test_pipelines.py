"""Pipelines beside SFT and DPO through the command line, on a tiny model: made, reused, shown, compared, exported."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from alignment.files import read_json
from tests.conftest import Command, states, tiny_stages

pytestmark = pytest.mark.slow

TINY = ["stage.{}.global_batch_size=4", "stage.{}.lora.rank=2", "stage.{}.max_steps=2"]
SFT = [*tiny_stages("prepare_sft"), *(one.format("sft") for one in TINY)]  # one SFT model for all of them
ANSWERS = [*tiny_stages("evaluate", "compare"), "stage.evaluate_best_of_n.best_of=2"]
REWARD = [one.format("reward_model") for one in TINY]
ROLLOUT = ["stage.rloo.completions_per_prompt=2", "stage.rloo.max_new_tokens=6"]
# name -> its settings, its final node, and what only it has
PIPELINES: dict[str, tuple[list[str], str, set[str]]] = {
    "kto": (
        ["pipeline=kto", "stage.prepare_unpaired.splits.heldout=4", *ANSWERS, *(one.format("kto") for one in TINY),
         "reward=sentiment", "tracking=wandb_offline"],
        "kto", {"answers", "reference", "kto", "evaluate_kto", "best_of_n", "verdict"},
    ),
    "rlhf": (
        ["experiment=rlhf", *SFT, *ANSWERS, *REWARD, *(one.format("rloo") for one in TINY), *ROLLOUT, "tracking=none"],
        "rloo", {"sft", "pairs", "reward_model", "rloo", "evaluate_rloo", "best_of_n", "verdict"},
    ),
    "sft_reward_ensemble": (
        ["pipeline=sft_reward_ensemble", *SFT, *REWARD, "stage.prepare_preference.splits.heldout=6", "tracking=none"],
        "member_1", {"member_1", "member_2", "member_3", "evaluate_one", "evaluate_all"},
    ),
    "sft_dpo_merge": (
        ["pipeline=sft_dpo_merge", *SFT, *ANSWERS, *(one.format("dpo") for one in TINY), "reward=sentiment",
         "tracking=none"],
        "merged", {"dpo", "merged", "evaluate_merged", "best_of_n", "verdict"},
    ),
}  # fmt: skip
SWEPT = "sft_dpo_merge"


@pytest.fixture(scope="module")
def common(tiny_model: Path, instruction_rows: Path, preference_rows: Path) -> list[str]:
    return [
        *("model=path", f"model.source.path={tiny_model}", "data=path", "min_free_gb=0", "engine.threads=1"),
        f"data.instructions.source.path={instruction_rows}",
        f"data.preferences.source.path={preference_rows}",
    ]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, forked: Command, common: list[str]) -> Path:
    """In which all of them have run, one after the other."""
    store = tmp_path_factory.mktemp("pipelines") / "store"
    for settings, *_ in PIPELINES.values():
        forked(store, "run", *settings, *common)
    return store


def found(forked: Command, store: Path) -> dict[str, dict[str, Any]]:
    """name -> the run as `status` shows it."""
    return {run["name"]: run for run in json.loads(forked(store, "status", "--json").stdout)}


@pytest.mark.parametrize("name", PIPELINES)
def test_every_stage_is_made_once_with_its_record_and_metrics(
    name: str, store: Path, forked: Command, common: list[str]
) -> None:
    settings, final, own = PIPELINES[name]
    run = found(forked, store)[name]
    assert own <= states(run).keys() and set(states(run).values()) <= {"done", "reused"}
    assert run["final"] == final
    for node in run["nodes"]:
        record = read_json(store / "store" / node["key"][:16] / "record.json")
        assert record["key"] == node["key"] and record["files"] and record["metrics"]
    assert not list((store / "work").glob("*"))

    if name == "rlhf":  # once is enough
        plan = json.loads(forked(store, "plan", "--json", *settings, *common).stdout)
        assert {row["action"] for row in plan["nodes"]} == {"reuse"}
    out = forked(store, "run", *settings, *common).stdout
    assert f"{len(run['nodes'])} reused" in out or out.count("reused") >= len(run["nodes"])
    assert set(states(found(forked, store)[name]).values()) == {"reused"}


def test_best_of_n_is_in_the_table_of_each_comparison(store: Path, forked: Command) -> None:
    for name, run in found(forked, store).items():
        if "verdict" in (keys := {node["name"]: node["key"][:16] for node in run["nodes"]}):
            verdict = read_json(store / "store" / keys["verdict"] / "verdict.json")
            (best,) = verdict["best_of"]
            assert verdict["best_of"][best] == 2 and best.endswith("_best_of_n") and best in verdict["models"]
        forked(store, "report", name)
        page = (store / "runs" / run["run"] / "report.html").read_text()
        assert all(key in page for key in keys.values())


def test_what_wandb_keeps_has_the_runs_and_stages_names(store: Path, forked: Command) -> None:
    run = found(forked, store)["kto"]
    for node in run["nodes"]:
        folder = store / "store" / node["key"][:16] / "wandb"
        (log,) = (file for kept in folder.glob("offline-run-*") for file in kept.glob("run-*.wandb"))
        content = log.read_bytes()
        assert all(word.encode() in content for word in (run["run"], node["name"])), node["name"]


def test_people_get_the_final_model_and_may_talk_to_it(store: Path, forked: Command, tmp_path: Path) -> None:
    from safetensors import safe_open

    told = forked(store, "chat", "rlhf", "--compare", "--prompt", "Hi", "--max-new-tokens", "2").stdout
    assert all(name in told for name in ("start", "sft", "rloo")) and "reward_model" not in told
    for name in ("kto", "sft_reward_ensemble", "sft_dpo_merge"):
        forked(store, "export", name, str(tmp_path / name))
        with safe_open(tmp_path / name / "model.safetensors", "pt") as weights:
            assert ("score.weight" in weights.keys()) == (name == "sft_reward_ensemble")  # noqa: SIM118 - not a dict
    forked(store, "export", "kto", str(tmp_path / "adapter"), "--adapter")
    assert (tmp_path / "adapter" / "adapter_config.json").is_file()
    told = forked(store, "chat", "sft_reward_ensemble", "--prompt", "Hi", code=2).stderr
    (line,) = told.strip().splitlines()
    assert "`member_1` of sft_reward_ensemble-" in line and "is a reward model" in line


def test_a_sweep_makes_what_differs_and_is_compared(store: Path, forked: Command, common: list[str]) -> None:
    forked(store, "run", "-m", *PIPELINES[SWEPT][0], *common, "stage.merge.t=0.5,0.25", "name=apart")
    points = [run for run in json.loads(forked(store, "status", "--json").stdout) if run["name"] == "apart"]
    made = sorted(({name for name, state in states(run).items() if state == "done"} for run in points), key=len)
    assert made == [set(), {"merged", "evaluate_merged", "verdict"}]
    told = json.loads(forked(store, "compare", "apart", "--json").stdout)
    assert len(told["points"]) == 2


def test_a_reward_file_may_be_edited_while_it_judges(
    tmp_path: Path, forked: Command, small_settings: list[str]
) -> None:
    """What judges is the text that was read when the stage began; as it stood then it is in the key."""
    own = tmp_path / "own.py"
    edit = "open(__file__, 'a').write('# a comment\\n')"
    own.write_text(f"def reward(prompts, answers, rows):\n    {edit}\n    return [1.0] * len(answers)\n")
    reward = ["reward=python", f"reward.terms.own.source.path={own}"]
    done = forked(tmp_path / "store", "run", *small_settings, "stage.sft.max_steps=1", *reward)
    assert own.read_text().endswith("# a comment\n") and "measured" in done.stdout
