"""The benches of what is learned: their tasks, what they make of results, and a small one whole."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest

from alignment.config.compose import compose
from alignment.files import read_json, write_json, write_jsonl
from alignment.pipeline import graph
from bench.frontier import __main__ as frontier
from bench.frontier import reward, task
from bench.frontier.plot import svg
from bench.verifiable import __main__ as verifiable
from tests.conftest import Command

CONF = Path(frontier.__file__).parent / "conf"


def points(**rewards: float) -> frontier.Points:
    """Of two seeds: at the pulls the KL is 1, 2 and 4, and the reward that of a method times the root of KL."""
    found: frontier.Points = {
        "start": {"strong": [{"seed": seed, "reward": 0.0, "kl": 0.0, "tokens": 5.0} for seed in (0, 1)]}
    }
    for method in frontier.METHODS:
        slope = rewards.get(method, 0.1)
        found[method] = {
            pull: [
                {"seed": seed, "reward": slope * kl**0.5 + off, "kl": kl, "tokens": 5.0}
                for seed, off in enumerate((-0.01, 0.01))
            ]
            for pull, kl in zip(frontier.PULLS, (1.0, 2.0, 4.0), strict=True)
        }
    return found


@pytest.mark.parametrize("pull", frontier.PULLS)
def test_every_strength_is_a_run_of_all_methods(pull: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "rows.jsonl").write_text("{}")
    sources = {"model": tmp_path, "data.instructions": tmp_path / "rows.jsonl", "reward.terms.own": reward.__file__}
    given = [f"{name}.source.path={path}" for name, path in sources.items()]
    experiment = compose(["experiment=frontier", f"+pull={pull}", *given], config_dirs=(CONF,))
    measured = {node.name.removeprefix("at_") for node in graph.build(experiment) if node.name.startswith("at_")}
    assert measured == {"start", *frontier.METHODS}


def test_the_reward_is_the_share_of_friendly_words_less_that_of_hostile_ones() -> None:
    assert reward.reward(None, ["lovely river ugly", "warm warm", "", "grim"], None) == [0.0, 1.0, 0.0, -1.0]
    assert set(task.FRIENDLY) == reward.FRIENDLY and set(task.HOSTILE) == reward.HOSTILE


def test_the_order_is_that_of_rewards_at_a_kl_that_all_reach() -> None:
    told = frontier.table(points(dpo=0.3, sft_chosen=0.2))
    assert "| DPO | 0.300 ± 0.014 / 1.00 ± 0.00 | 0.424 ± 0.014 / 2.00 ± 0.00 |" in told
    order = told.splitlines()[-3]
    assert order.startswith("At a KL of 4.00 nats, which all reach: DPO 0.600, SFT on the chosen answers 0.400,")


def test_between_its_points_a_method_is_on_the_line() -> None:
    """Along the root of KL: sqrt(2.25) = 1.5 is half-way between 1 and 2."""
    assert frontier.at([(0.0, 0.0), (1.0, 0.5), (4.0, 0.7)], 2.25) == pytest.approx(0.6)
    assert frontier.at([(0.0, 0.0), (1.0, 0.5)], 5.0) == 0.5


def test_a_method_is_held_against_each_point_of_another_at_its_kl() -> None:
    """Of two seeds, three points each; 0.3 against 0.2 times the root of 1, 2 and 4."""
    ahead = frontier.above(points(dpo=0.3, sft_chosen=0.2), "dpo", "sft_chosen")
    assert sorted(ahead)[::2] == pytest.approx([0.1, 0.1 * 2**0.5, 0.2])


def test_the_figure_has_a_line_a_method_and_is_xml() -> None:
    drawn = ElementTree.fromstring(svg(points(), frontier.METHODS))
    assert len([part for part in drawn.iter() if part.tag.endswith("polyline")]) == len(frontier.METHODS)


def test_each_prompt_has_one_demand_that_its_check_is_of() -> None:
    rows = [{"instruction": f"Say something, {n}", "input": "", "output": "Something."} for n in range(40)]
    made = list(verifiable.demands([*rows, {"instruction": "And this?", "input": "a text", "output": "x"}]))
    assert len(made) == 40
    for row in made:
        (check,) = row["checks"]
        demand = check["words"][0] if check["kind"] == "include" else f"at most {check['count']} words"
        assert demand in row["prompt"].split(". ", 1)[1]


def test_what_is_gathered_is_parted_by_demand(tmp_path: Path) -> None:
    nodes = [{"name": name, "key": f"{name:x<16}"} for name in verifiable.MODELS]
    write_json(tmp_path / "runs" / "one" / "run.json", {"config": {"seed": 3}, "nodes": nodes})
    for node in nodes:
        folder = tmp_path / "store" / node["key"][:16]
        asked = [('Use the word "river" in your answer.', 1.0), ("Answer in at most 8 words.", 0.0)]
        write_jsonl(
            folder / "answers.jsonl", ({"prompt": [{"content": what}], "reward": value} for what, value in asked)
        )
        write_json(folder / "evaluation.json", {"metrics": {"reward": 0.5, "tokens": 7.0, "kl": 0.1, "repetition": 0}})
    told = verifiable.table(verifiable.gather(tmp_path))
    assert (
        "| start model, one answer | 50 % | 100 % | 0 % | 7.0 | 0.1 |" in told and "1 seed, 2 held-out prompts" in told
    )


def test_what_is_shown_holds_what_the_page_says_of_it() -> None:
    """Three seeds; every method above the start of its seed at every point, and DPO above SFT on the chosen answers."""
    shown: frontier.Points = read_json(frontier.DOCS / "frontier.json")
    start = {row["seed"]: row["reward"] for rows in shown["start"].values() for row in rows}
    assert len(start) >= 3 and set(shown) == {"start", *frontier.METHODS}
    for method in frontier.METHODS:
        points = [row for pull in frontier.PULLS for row in shown[method][pull]]
        assert len(points) == 3 * len(start) and all(row["reward"] > start[row["seed"]] for row in points)
    assert min(frontier.above(shown, "dpo", "sft_chosen")) > 0


@pytest.mark.slow
def test_dpo_raises_a_reward_that_is_known(tmp_path: Path, forked: Command) -> None:
    """The controlled task, a tenth of its size; the whole of it is python -m bench.frontier."""
    task.write_model(tmp_path / "model")
    task.write_rows(tmp_path / "rows.jsonl", 1200)
    others = ("ipo", "kto", "simpo", "rloo", "grpo", "sft_chosen")
    left_out = [*others, *(f"at_{name}" for name in others), "labelled", "at_best_of"]
    settings = {
        "model.source.path": tmp_path / "model", "data.instructions.source.path": tmp_path / "rows.jsonl",
        "reward.terms.own.source.path": reward.__file__, "+pull": "weak",
        "stage.prepare_sft.splits": "{heldout: 200, prompts: 400, train: 600}", "stage.sft.epochs": 8.0,
        "stage.dpo.learning_rate": 1.0e-3, "stage.dpo.epochs": 3.0, "stage.dpo.global_batch_size": 16,
        "engine.threads": 1,
    }  # fmt: skip
    command = ["run", "--config-dir", str(CONF), "experiment=frontier"]
    store = tmp_path / "store"
    forked(store, *command, *(f"{key}={value}" for key, value in settings.items()),
           *(f"~pipeline.nodes.{name}" for name in left_out))  # fmt: skip
    found: Any = frontier.gather(store)
    start, dpo = (found[name]["weak"][0] for name in ("start", "dpo"))
    assert start["kl"] == 0 and dpo["kl"] > 0 and dpo["reward"] > start["reward"] + 0.15
