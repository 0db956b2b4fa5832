from __future__ import annotations

import io
import json
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from markupsafe import escape
from rich.console import Console

from alignment.files import write_jsonl
from alignment.reporting.gather import gather
from alignment.reporting.page import flows, headline, render, samples, table, timing, write_report
from alignment.reporting.terminal import comparison_table

MakeRun = Callable[..., tuple[Path, Path]]
SECTIONS = ["verdict", "models", "curves", "trade", "lengths", "samples", "data", "time", "lineage", "keys", "config"]


def text_of(page: str) -> str:
    return re.sub(r"\s+", " ", re.sub(r"<(style|script)>.*?</\1>|<[^>]+>", " ", page, flags=re.DOTALL))


def test_the_report_is_one_small_file_with_every_section_in_order(make_run: MakeRun) -> None:
    path = write_report(*make_run())
    page = path.read_text(encoding="utf-8")
    assert path.name == "report.html"
    assert re.findall(r'<section id="(\w+)"', page) == SECTIONS
    assert 50_000 < len(page) < 400_000
    assert not re.search(r"""(src|href)=["']?(https?:)?//|@import|url\(http""", page), (
        "nothing is loaded from elsewhere"
    )


def test_what_models_and_data_say_is_text_and_never_markup(make_run: MakeRun) -> None:
    page = write_report(*make_run()).read_text(encoding="utf-8")
    hostile = '<script>document.title = "owned"'
    assert hostile not in page
    assert str(escape(hostile)) in page
    assert page.count("<script") == page.count("</script>") == 1


def test_every_key_stands_in_full_with_its_code_digest(make_run: MakeRun) -> None:
    folder, store = make_run()
    page = write_report(folder, store).read_text(encoding="utf-8")
    keys = page[page.index('<section id="keys"') :]
    for stage in gather(folder, store).stages:
        assert stage.key in keys
        assert stage.record["code_sha256"] in keys
    assert "538 MB" in keys
    assert "5.23.0" in keys


def test_the_table_marks_differences_whose_interval_excludes_zero(make_run: MakeRun) -> None:
    rows = {row["title"]: [cell["class"] for cell in row["cells"]] for row in table(gather(*make_run()))}
    assert rows["Stop rate"] == ["same", "good", "good"]
    assert rows["Relevance"] == ["same", "same", "same"]
    assert rows["Held-out loss"] == ["same", "good", "good"]
    assert rows["Answer length"] == ["same", "moved", "moved"]


def test_the_samples_go_from_the_biggest_loss_to_the_biggest_gain_with_every_model_s_answer(make_run: MakeRun) -> None:
    chosen = samples(gather(*make_run()))
    change = [card["change"] for card in chosen["cards"]]
    assert len(change) == 10
    assert change == sorted(change)
    assert [chosen["cards"][0]["id"], chosen["cards"][-1]["id"]] == ["row-002", "row-003"]
    assert all(
        [given["model"].name for given in card["answers"]] == ["start", "sft", "dpo"] for card in chosen["cards"]
    )
    assert chosen["lost"] + chosen["gained"] <= chosen["prompts"] == 60


def test_data_are_accounted_for_to_the_last_row(make_run: MakeRun) -> None:
    """999 rows = 200 + 60 + 60 kept, 164 good ones not needed, 515 dropped; the judge: 51 pairs of 60 prompts."""
    rows, judged, pairs = (item["flow"] for item in flows(gather(*make_run())))
    counts = {part["name"]: part["count"] for part in rows["parts"]}
    assert counts == {"train": "200", "prompts": "60", "heldout": "60", "not needed": "164", "dropped": "515"}
    assert [(d["reason"], d["count"], len(d["examples"])) for d in rows["drops"]] == [
        ("long_row", "471", 5), ("long_prompt", "30", 0), ("duplicate", "14", 2),
    ]  # fmt: skip
    assert judged["rows"] == "60"
    assert [(d["reason"], d["count"]) for d in judged["drops"]] == [
        ("rewards_too_close", "6"), ("fewer_than_two_usable_answers", "3"),
    ]  # fmt: skip
    assert pairs["drops"] == []
    assert [(d["reason"], d["count"], len(d["examples"])) for d in rows["faulty"]] == [("near_duplicate", "2", 2)]
    facts = dict(rows["facts"])
    assert facts["languages"] == "99.2 % en, 0.6 % und, 0.2 % fr"
    assert facts["personal data"] == "4 email, 1 ip address"
    assert facts["evaluation prompts"] == "41 prompts, 19 too short, 0 generic"
    assert dict(pairs["facts"])["longer answers"] == "chosen longer in 63 % of pairs (31 against 24 tokens)"


def test_a_judge_accounts_for_what_it_was_asked_for(make_run: MakeRun) -> None:
    """100 prompts, 400 answers. Pairs, two of a prompt at most, and best answers, which 20 prompts have not: the bar is
    of the prompts that gave pairs. Best answers alone; labels alone, of all answers but 40."""

    report = gather(*make_run())
    (judge,) = report.of("judge")

    def account(told: dict[str, float]) -> tuple[str, dict[str, str], dict[str, str], dict[str, str]]:
        judge.record["metrics"] = {"prompts": 100.0, "answers": 400.0, **told}
        flow = next(item["flow"] for item in flows(report) if item["stage"] is judge)
        parts = {part["name"]: part["count"] for part in flow["parts"]}
        drops = {drop["reason"]: drop["count"] for drop in flow["drops"]}
        return f"{flow['rows']} {flow['unit']}", parts, drops, dict(flow["facts"])

    best = {"best": 80.0, "dropped_prompts_without_best": 20.0}
    labels = {"labelled_good": 250.0, "labelled_bad": 110.0}
    rows, parts, drops, facts = account({"pairs": 160.0, "dropped_rewards_too_close": 15.0, **best, **labels})
    assert (rows, parts, drops) == ("100 prompts", {"with pairs": "85", "dropped": "15"}, {"rewards_too_close": "15"})
    assert (facts["pairs"], facts["best"], facts["dropped prompts without best"]) == ("160", "80", "20")
    assert "dropped rewards too close" not in facts, "it is in the bar"
    rows, parts, drops, facts = account({**best, **labels})
    assert (rows, parts) == ("100 prompts", {"with a best answer": "80", "dropped": "20"})
    assert (drops, facts["labelled bad"]) == ({"prompts_without_best": "20"}, "110")
    rows, parts, drops, _ = account(labels)
    assert (rows, parts) == ("400 answers", {"labelled good": "250", "labelled bad": "110", "dropped": "40"})
    assert drops == {"not_usable": "40"}


def test_the_verdict_s_claim_stands_large_and_its_reasons_below(make_run: MakeRun) -> None:
    told = headline(gather(*make_run()))
    assert (told["class"], told["claim"]) == ("good", "DPO is better than start and SFT on 60 held-out prompts.")
    assert told["because"] == "", "the four gates below say all of it"
    assert [gate["passed"] for gate in told["gates"]] == [True] * 4


def test_what_the_gates_do_not_say_stands_below_the_claim(make_run: MakeRun) -> None:
    report = gather(*make_run())
    assert report.verdict
    report.verdict["sentence"] = "dpo is not shown to be better than start: these prompts cannot rule out a fall."
    told = headline(report)
    assert told["claim"] == "DPO is not shown to be better than start."
    assert told["because"] == "These prompts cannot rule out a fall."


def test_reused_time_is_told_apart_from_the_run_s_own(make_run: MakeRun) -> None:
    told = timing(gather(*make_run(states={"start": "reused", "rows": "reused"})))
    assert told["saved"] == pytest.approx(26.6)
    assert told["spent"] == pytest.approx(410.6)
    assert max(bar["share"] for bar in told["bars"]) == 100


@pytest.mark.parametrize(
    ("names", "states", "said"),
    [
        (["start", "rows", "sft"], {}, "compares no models, so there is no verdict"),
        (["start", "rows", "sft", "evaluate_start", "evaluate_sft"], {}, "means without intervals"),
        (["start"], {}, "This pipeline trains no model."),
        (None, {"sft": "failed", "dpo": "waiting"}, "The stage SFT failed"),
        (None, dict.fromkeys(("dpo", "evaluate_dpo", "verdict"), "waiting"), "DPO is waiting"),
        (None, {"pairs": "failed"}, "This stage has left no account of its data."),
    ],
)
def test_what_a_run_lacks_is_said_in_its_section(
    make_run: MakeRun, names: list[str] | None, states: dict[str, str], said: str
) -> None:
    page = write_report(*make_run(names, states)).read_text(encoding="utf-8")
    assert said in text_of(page)
    assert re.findall(r'<section id="(\w+)"', page) == SECTIONS


@pytest.mark.parametrize("state", ["done", "running", "failed"])
def test_a_run_whose_store_is_gone_still_gets_its_report(make_run: MakeRun, state: str) -> None:
    folder, store = make_run(states={"dpo": state})
    (store / "store").rename(store / "gone")
    page = write_report(folder, store).read_text(encoding="utf-8")
    assert "No model of this run was evaluated." in page or "—" in page


def test_a_run_json_with_next_to_nothing_in_it_gets_a_page(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(
        json.dumps({"run": "bare", "nodes": [dict.fromkeys(("name", "kind", "key", "state"), "x")]})
    )
    assert "bare" in write_report(tmp_path, tmp_path).read_text(encoding="utf-8")


def test_the_error_of_a_failed_stage_is_the_headline(make_run: MakeRun) -> None:
    folder, store = make_run(states={"sft": "failed"})
    run = json.loads((folder / "run.json").read_text())
    run["nodes"][2]["error"] = "loss is NaN at step 3"
    (folder / "run.json").write_text(json.dumps(run))
    report = gather(folder, store)
    told = headline(report)
    assert (told["class"], told["claim"], told["because"]) == ("bad", "The stage SFT failed.", "Loss is NaN at step 3")
    assert render(report) == render(report), "equal runs, equal bytes"


def test_reporting_imports_nothing_heavy() -> None:
    code = """
import sys
from alignment.reporting import compare_page, compare_terminal, comparison, gather, page, status, sweeps, terminal
print([name for name in ("torch", "transformers", "numpy", "plotly", "jinja2", "yaml") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_mean_over_fewer_prompts_says_over_how_many(make_run: MakeRun) -> None:
    """In the report and in the terminal: three prompts have no reward of every model."""
    report = gather(*make_run())
    assert report.verdict
    for row in report.verdict["table"]:
        row["prompts"] = 57 if row["metric"] == "reward" else 60
    fewer = {row["title"]: row["fewer"] for row in table(report)}
    assert fewer.pop("Reward") == "of 57 of 60 prompts" and not any(fewer.values())
    assert render(report).count("of 57 of 60 prompts") == 1
    printed = io.StringIO()
    Console(width=80, file=printed).print(comparison_table(report.verdict))
    assert printed.getvalue().count("of 57 of 60 prompts") == 1


def test_without_a_comparison_each_model_says_over_how_many_prompts_its_means_are(make_run: MakeRun) -> None:
    found = gather(*make_run())
    models = [replace(m, prompts={"reward": 60 - i, "kl": 60}) for i, m in enumerate(found.models)]
    rows = {row["title"]: row["cells"] for row in table(replace(found, verdict=None, models=models))}
    assert [cell["interval"] for cell in rows["Reward"]] == ["", "of 59 of 60 prompts", "of 58 of 60 prompts"]
    assert [cell["interval"] for cell in rows["Log-ratio to ref."]] == ["", "", ""]


def test_a_stage_s_caption_says_what_it_was_trained_by_in_words(make_run: MakeRun) -> None:
    found = gather(*make_run())
    told = {"loss": {"sigmoid": 0.8, "nll": 0.2}, "reference_update": {"every_steps": 4, "share": 0.6}, "beta": 0.1}
    stages = [
        replace(stage, settings={"kind": "dpo", **told}) if stage.name == "dpo" else stage for stage in found.stages
    ]
    shown = " ".join(render(replace(found, stages=stages)).split())
    for fact in ("loss sigmoid 0.8, nll 0.2", "reference update every steps 4, share 0.6", "beta 0.1"):
        assert f"<span>{fact}</span>" in shown


def test_what_a_policy_answered_while_it_was_trained_is_shown_first_middle_and_last(make_run: MakeRun) -> None:
    folder, store = make_run()
    answers = [{"completion": f"<b>{i}</b>", "tokens": 3, "finished": i > 0, "reward": i / 8, "terms": {"own": i}}
               for i in range(6)]  # fmt: skip
    prompt = [{"role": "user", "content": "Why?"}]
    told = [{"step": step, "rollout": step, "prompt": prompt, "completions": answers} for step in range(1, 10)]
    dpo = next(stage for stage in gather(folder, store).stages if stage.name == "dpo")
    assert dpo.folder and "while it was trained" not in render(gather(folder, store))
    write_jsonl(dpo.folder / "rollouts.jsonl", told)
    shown = render(gather(folder, store))
    for step in (1, 5, 9):
        assert f"Rollout {step}, first trained on at step {step}; 2 more answers are in rollouts.jsonl." in shown
    assert shown.count("&lt;b&gt;3&lt;/b&gt;") == 3 and "&lt;b&gt;4&lt;" not in shown and "<b>3</b>" not in shown
    write_jsonl(dpo.folder / "rollouts.jsonl", [{}, {"prompt": 3, "completions": ["a"]}])
    assert "while it was trained" in render(gather(folder, store)), "and what is odd in it does no harm"


def test_answers_without_a_reward_are_counted_as_far_as_is_known(make_run: MakeRun) -> None:
    """Results of older releases do not say of how many."""
    found = gather(*make_run())
    for answers, said in (({"answers": 40.0}, "3 of 40"), ({}, "3")):
        metrics = {"reward_failed": 3.0, **answers}
        stages = [replace(stage, record={**stage.record, "metrics": metrics}) if stage.name == "dpo" else stage
                  for stage in found.stages]  # fmt: skip
        assert f"answers without a reward: {said}</span>" in render(replace(found, stages=stages))
