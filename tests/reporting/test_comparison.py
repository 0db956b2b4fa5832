"""Combinations, their order, which are within noise of the best, the frontier, and what is said in one sentence."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from alignment.errors import ConfigError
from alignment.reporting import compare_page, sweep_files, sweeps
from alignment.reporting.comparison import compare, pareto, plain
from alignment.reporting.inference import two_sided
from tests.reporting.fake_sweeps import BETA, grid, write_run, write_sweep


def content(store: Path, points: list[Any], metric: str | None = None, **facts: Any) -> dict[str, Any]:
    sweep = sweep_files.read_sweep(write_sweep(store, points, **facts))
    return compare(sweep, sweeps.read_points(sweep, store, lambda key: False), metric)


def standings(told: dict[str, Any]) -> list[tuple[str, str]]:
    return [(group["label"], group["standing"]) for group in told["groups"]]


# Seeds differ by much, betas within a seed by little: what pairing is for.
SEEDS = {0.05: [0.20, 0.30, 0.40], 0.1: [0.22, 0.33, 0.40], 0.3: [0.05, 0.16, 0.25]}


def test_points_that_differ_in_seeds_alone_are_one_row_and_the_best_is_first(tmp_path: Path) -> None:
    told = content(tmp_path, grid(tmp_path, SEEDS))
    assert (told["keys"], told["seeds"]) == ({BETA: "beta"}, ["seed"])
    assert [(group["label"], len(group["counted"]), group["of"]) for group in told["groups"]] == [
        ("beta=0.1", 3, 3), ("beta=0.05", 3, 3), ("beta=0.3", 3, 3),
    ]  # fmt: skip
    first = told["groups"][0]["values"]["reward"]
    assert (first["mean"], first["noise"], first["n"]) == (pytest.approx(0.95 / 3), "seeds", 3)
    assert told["metrics"] == ["reward", "kl", "stop_rate", "tokens"]


def test_differences_are_paired_by_seed_and_corrected_for_all_pairs(tmp_path: Path) -> None:
    """0.3 minus 0.1: -0.17, -0.17, -0.15. Mean -0.49/3, s^2 = 0.0004/3, error 0.02/3, t = 24.5 with 2 degrees of
    freedom; p = 1 - t / sqrt(2 + t^2) = 0.001661, the smallest of three pairs: times 3.
    0.05 minus 0.1: -0.02, -0.03, 0. Mean -0.05/3, s^2 = 0.0007/3, error sqrt(0.0007)/3, t = 0.05 / sqrt(0.0007)."""
    told = content(tmp_path, grid(tmp_path, SEEDS))
    assert standings(told) == [("beta=0.1", "best"), ("beta=0.05", "as good"), ("beta=0.3", "worse")]
    best, near, far = (group["difference"] for group in told["groups"])
    assert best is None
    assert (far["by"], far["n"], far["mean"]) == ("paired", 3, pytest.approx(-0.49 / 3))
    assert far["p_holm"] == pytest.approx(3 * (1 - 24.5 / math.sqrt(2 + 24.5**2)), rel=1e-6)
    assert near["p_holm"] == pytest.approx(2 * two_sided(0.05 / math.sqrt(0.0007), 2), rel=1e-6)


def test_other_seeds_are_compared_by_welch(tmp_path: Path) -> None:
    points = grid(tmp_path, {0.1: [0.30, 0.31, 0.32], 0.3: [0.10, 0.11, 0.12]})
    for i, point in enumerate(points[3:]):
        settings = {BETA: 0.3, "seed": 10 + i}
        write_run(tmp_path, point["run"], settings, {"reward": 0.10 + 0.01 * i})
        point["settings"] = settings
    told = content(tmp_path, points)["groups"][1]
    assert (told["difference"]["by"], told["difference"]["df"]) == ("welch", pytest.approx(4))
    assert told["difference"]["p_holm"] == pytest.approx(two_sided(0.2 / math.sqrt(2e-4 / 3), 4))
    assert told["standing"] == "worse"


def test_one_seed_falls_back_to_the_prompts_and_says_so(tmp_path: Path) -> None:
    """0.30 +- 0.05 against 0.10 +- 0.05: 0.2 +- 0.0707, far from 0; against 0.28 +- 0.05 it is within noise."""
    told = content(tmp_path, grid(tmp_path, {0.1: [0.30], 0.05: [0.28], 0.3: [0.10]}, interval=0.05))
    assert standings(told) == [("beta=0.1", "best"), ("beta=0.05", "as good"), ("beta=0.3", "worse")]
    assert [group["values"]["reward"]["noise"] for group in told["groups"]] == ["prompts"] * 3
    assert told["groups"][2]["difference"]["by"] == "prompts"
    assert "beta=0.05 is within noise of it (that of the prompts: too few seeds)" in told["conclusion"]


def test_seeds_that_change_nothing_are_no_seeds(tmp_path: Path) -> None:
    """Two seeds with the same difference to the last bit: their spread of 0 is not taken for certainty."""
    told = content(tmp_path, grid(tmp_path, {0.1: [0.3, 0.3], 0.3: [0.25, 0.25]}, interval=0.2))
    assert [told["groups"][1][name] for name in ("standing",)] == ["as good"]
    assert told["groups"][1]["difference"]["by"] == "prompts"


def test_what_is_equal_but_for_rounding_is_not_taken_for_certainty(tmp_path: Path) -> None:
    """0.9 - 0.8 and 0.8 - 0.7 are both 0.1, but not to the last bit: that bit is no noise between seeds."""
    few = {0.1: [0.9, 0.8], 0.3: [0.8, 0.7]}
    told = content(tmp_path / "prompts", grid(tmp_path / "prompts", few, interval=0.2))
    assert standings(told) == [("beta=0.1", "best"), ("beta=0.3", "as good")]
    assert told["groups"][1]["difference"]["by"] == "prompts"
    told = content(tmp_path / "none", grid(tmp_path / "none", few, interval=None))
    assert standings(told) == [("beta=0.1", "best"), ("beta=0.3", "not comparable")]
    assert "whether beta=0.3 differs from it cannot be told" in told["conclusion"]


def test_without_any_interval_nothing_is_claimed(tmp_path: Path) -> None:
    told = content(tmp_path, grid(tmp_path, {0.1: [0.3], 0.3: [0.1]}, interval=None))
    assert standings(told) == [("beta=0.1", "best"), ("beta=0.3", "not comparable")]
    assert told["conclusion"] == (
        "beta=0.1 leads with reward 0.300 (one seed); whether beta=0.3 differs from it cannot be told, as the noise is "
        "not known."
    )


def test_of_points_that_tie_none_leads(tmp_path: Path) -> None:
    """0.1 + 0.2 and 0.3 differ by rounding alone; 0 differs by more, and with no noise known nobody can tell."""
    told = content(
        tmp_path / "three", grid(tmp_path / "three", {0.1: [0.3], 0.3: [0.1 + 0.2], 1.0: [0.0]}, interval=0.1)
    )
    assert dict(standings(told)) == {
        "beta=0.1": "tied", "beta=0.3": "tied", "beta=1": "worse",
    }  # fmt: skip
    assert told["conclusion"] == "beta=0.3 and beta=0.1 tie with reward 0.300 (one seed); beta=1 is worse."
    told = content(
        tmp_path / "all", grid(tmp_path / "all", {beta: [0.3] for beta in (0.1, 0.2, 0.3, 0.4)}, interval=None)
    )
    assert told["conclusion"] == "all 4 tie with reward 0.300 (one seed)."
    assert compare_page.headline(told)["word"] == "Tied"


def test_the_same_result_counts_once(tmp_path: Path) -> None:
    """A run that stands there twice, and another seed that did not change the model that was evaluated."""
    points = grid(tmp_path, {0.1: [0.3]})
    write_run(tmp_path, "again", {BETA: 0.1, "seed": 1}, {"reward": 0.3}, evaluation="e" * 64)
    write_run(tmp_path, "same", {BETA: 0.1, "seed": 2}, {"reward": 0.3}, evaluation="e" * 64)
    points += [
        points[0],
        {"run": "again", "settings": {BETA: 0.1, "seed": 1}},
        {"run": "same", "settings": {BETA: 0.1, "seed": 2}},
    ]
    told = content(tmp_path, points)
    (group,) = told["groups"]
    assert (len(group["counted"]), group["of"], group["values"]["reward"]["n"]) == (2, 2, 2)
    assert [point["repeats"] for point in told["points"]] == [None, 1, None, 3]


def test_the_sentence_names_what_has_no_result(tmp_path: Path) -> None:
    points = grid(tmp_path, {0.05: [0.28, 0.29, 0.32], 0.1: [0.30, 0.33, 0.30]})
    told = content(tmp_path, points)
    assert told["conclusion"] == "beta=0.1 leads with reward 0.310 (3 seeds); beta=0.05 is within noise of it."
    for i in range(2):
        states = {"dpo": "failed", "evaluate_dpo": "waiting", "verdict": "waiting"}
        write_run(tmp_path, f"bad-{i}", {BETA: 1.0, "seed": i}, {"reward": 0.0}, states=states, error="NaN")
        points.append({"run": f"bad-{i}", "settings": {BETA: 1.0, "seed": i}})
    assert content(tmp_path, points)["conclusion"].endswith("within noise of it; 2 of 8 points failed.")
    told = content(tmp_path, [*points, {"run": "nowhere", "settings": {BETA: 1.0, "seed": 3}}, "x"])
    assert told["conclusion"].endswith("of 10 points 2 failed, 1 is missing, 1 is unreadable.")
    assert standings(told)[-1] == ("beta=1", "no result")
    assert told["states"] == {"done": 6, "failed": 2, "missing": 1, "unreadable": 1}


def test_a_broken_winner_is_said_to_be_broken(tmp_path: Path) -> None:
    told = content(tmp_path, grid(tmp_path, {0.1: [0.30, 0.33]}, verdict="broken"))
    assert "(2 seeds), and nothing to be compared with, but its verdict is broken in 2 of 2 seeds" in told["conclusion"]


def test_of_those_that_tie_all_that_are_broken_are_named(tmp_path: Path) -> None:
    """Three that tie, of which one, two and all are broken."""
    ends = {
        1: ", but the verdict of beta=0.1 is broken.",
        2: ", but the verdicts of beta=0.1 and beta=0.2 are broken.",
        3: ", but the verdicts of all of them are broken.",
    }
    for broken, end in ends.items():
        store = tmp_path / str(broken)
        points = grid(store, {beta: [0.3] for beta in (0.1, 0.2, 0.3)[:broken]}, interval=0.1, verdict="broken")
        points += grid(store, {beta: [0.3] for beta in (0.1, 0.2, 0.3)[broken:]}, interval=0.1)
        assert content(store, points)["conclusion"].endswith(end)


@pytest.mark.parametrize(
    ("points", "said"),
    [
        ([], "The sweep has no points."),
        ([{"run": "a", "settings": {BETA: 1}}], "No point has a reward yet; 1 of 1 points is missing."),
        (["x"], "No point has a reward yet; 1 of 1 points is unreadable."),
    ],
)
def test_sweeps_without_results(tmp_path: Path, points: list, said: str) -> None:
    assert content(tmp_path, points)["conclusion"] == said


def test_one_point_only(tmp_path: Path) -> None:
    told = content(tmp_path, grid(tmp_path, {0.1: [0.3]}))
    assert told["conclusion"] == "the only combination has reward 0.300 (one seed), and nothing to be compared with."
    assert (told["keys"], told["fixed"]) == ({}, {BETA: 0.1, "seed": 0})


# --- objectives ------------------------------------------------------------------------------------------------------


def test_another_metric_has_its_own_order(tmp_path: Path) -> None:
    points = grid(tmp_path, {0.1: [0.3], 0.5: [0.1]})
    assert [g["label"] for g in content(tmp_path, points, "kl:minimize")["groups"]] == ["beta=0.5", "beta=0.1"]
    assert [g["label"] for g in content(tmp_path, points, "kl:maximize")["groups"]] == ["beta=0.1", "beta=0.5"]
    assert content(tmp_path, points, "stop_rate")["objective"] == {"metric": "stop_rate", "direction": "maximize"}
    told = content(tmp_path, points, None, objective=[{"metric": "kl", "direction": "minimize"}])
    assert (told["objective"]["direction"], told["metrics"][0]) == ("minimize", "kl")
    assert told["groups"][1]["difference"]["mean"] > 0, "more KL than the best"


def test_a_term_is_looked_at_as_the_runs_weigh_it(tmp_path: Path) -> None:
    """Toxicity of 0.1 is better than of 0.5 where its weight is -1; runs of both signs do not say which way."""
    weight, points = "reward.terms.toxicity.weight", []
    for run, toxicity, weighs in (("a", 0.5, -1.0), ("b", 0.1, -2.0), ("c", 0.3, 1.0)):
        settings = {BETA: toxicity, weight: weighs}
        write_run(tmp_path, run, settings, {"reward": 0.0, "toxicity": toxicity})
        points.append({"run": run, "settings": settings})
    told = content(tmp_path, points[:2], "toxicity")
    assert told["objective"] == {"metric": "toxicity", "direction": "minimize"}
    assert [group["values"]["toxicity"]["mean"] for group in told["groups"]] == [0.1, 0.5]
    with pytest.raises(ConfigError, match="toxicity is neither better high nor low by itself"):
        content(tmp_path, points, "toxicity")


SENTIMENT, OWN = {"kind": "sentiment", "weight": 1.0}, {"kind": "model", "weight": 1.0, "roles": "reward_model"}


def judged(store: Path, runs: list[tuple[dict[str, Any], dict[str, Any], str | None]], **facts: Any) -> dict[str, Any]:
    """runs: settings, terms of the reward, and the reward model of each; the first has the least reward."""
    points = []
    for i, (settings, terms, model) in enumerate(runs):
        metrics = {"reward": 0.1 * i, "sentiment": 0.5, "kl": 1.0 + i}
        write_run(store, f"run-{i}", settings, metrics, terms=terms, reward_model=model, interval=0.01)
        points.append({"run": f"run-{i}", "settings": settings})
    return content(store, points, **facts)


def test_points_of_different_judges_are_not_ranked_by_what_these_say(tmp_path: Path) -> None:
    """A larger weight makes a larger reward of the same answers. What does not depend on it is compared as ever."""
    weight = "reward.terms.sentiment.weight"
    runs = [({weight: w}, {"sentiment": {**SENTIMENT, "weight": w}}, None) for w in (0.5, 1.0, 2.0)]
    told = judged(tmp_path, runs)
    assert [(g["label"], g["standing"], g["difference"]) for g in told["groups"]] == [
        (f"weight={w:g}", "not comparable", None) for w in (0.5, 1.0, 2.0)
    ]
    assert told["apart"] == ["reward"] and told["conclusion"] == (
        "Reward was not measured by one judge for all points (weight), so it does not rank them; --metric compares by "
        "another: kl, sentiment."
    )
    assert (told["frontier"]["points"], told["importance"]["settings"]) == ([], [])
    page = compare_page.render(told)
    assert "Not comparable" in page and "The rewards were not measured by one judge." in page
    by_kl = judged(tmp_path, runs, metric="kl:minimize")
    assert by_kl["conclusion"].startswith("weight=0.5 leads with")
    assert any("reward: not measured by one judge" in line for line in compare_page.notes(by_kl))


def test_what_weighs_nothing_judges_no_reward_but_its_own_metric(tmp_path: Path) -> None:
    watched = [{"sentiment": SENTIMENT, "long": {"kind": "length", "weight": 0.0, "low": low}} for low in (1, 2)]
    told = judged(tmp_path, [({BETA: 0.1}, watched[0], None), ({BETA: 0.3}, watched[1], None)])
    assert told["apart"] == [] and told["groups"][0]["standing"] == "best"
    weighing = [{name: {**term, "weight": 1.0} for name, term in terms.items()} for terms in watched]
    told = judged(tmp_path, [({BETA: 0.1}, weighing[0], None), ({BETA: 0.3}, weighing[1], None)])
    assert told["apart"] == ["reward"]


def test_a_reward_model_of_each_seed_is_one_judge_and_of_each_setting_is_not(tmp_path: Path) -> None:
    grid = [(beta, seed) for beta in (0.1, 0.3) for seed in (0, 1)]
    terms = {"own": OWN}
    told = judged(tmp_path, [({BETA: beta, "seed": seed}, terms, f"model-{seed}") for beta, seed in grid])
    assert told["apart"] == [] and told["groups"][0]["standing"] == "best"
    told = judged(tmp_path, [({BETA: beta, "seed": seed}, terms, f"model-{beta}") for beta, seed in grid])
    assert told["apart"] == ["reward"] and told["groups"][0]["standing"] == "not comparable"
    told = judged(tmp_path, [({BETA: beta, "seed": seed}, {"s": SENTIMENT}, f"model-{beta}") for beta, seed in grid])
    assert told["apart"] == [], "a reward model that no term reads judges nothing"


@pytest.mark.parametrize(
    ("metric", "said"),
    [
        ("nope", r"no point has a metric 'nope' \(known: reward, kl, stop_rate, tokens\)"),
        ("kl", r"kl is neither better high nor low by itself \(--metric kl:minimize or --metric kl:maximize\)"),
        ("kl:up", r"no direction 'up' \(one of: maximize, minimize\)"),
    ],
)
def test_a_metric_that_is_none_is_one_line(tmp_path: Path, metric: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        content(tmp_path, grid(tmp_path, {0.1: [0.3]}), metric)


# --- the rest --------------------------------------------------------------------------------------------------------


def test_the_frontier_is_what_no_other_beats_in_both() -> None:
    """By hand: 1 has more KL and no more reward than 0; 4 less reward than 2 at as much KL; 5 is 2 once more."""
    places = [(1.0, 0.2), (2.0, 0.2), (3.0, 0.5), (0.5, -0.1), (3.0, 0.4), (3.0, 0.5), (9.0, 0.1)]
    assert pareto(places) == [3, 0, 2, 5]
    assert pareto([]) == []


def test_the_frontier_is_of_means_and_names_rows_of_the_leaderboard(tmp_path: Path) -> None:
    """KL 10, 5 and 2 by beta; beta 0.1 has the most reward but beta 0.2 less than 0.5 at more KL."""
    told = content(tmp_path, grid(tmp_path, {0.1: [0.3, 0.4], 0.2: [0.1, 0.1], 0.5: [0.2, 0.2]}))
    assert [told["groups"][i]["label"] for i in told["frontier"]["pareto"]] == ["beta=0.5", "beta=0.1"]
    assert len(told["frontier"]["points"]) == 6
    assert told["frontier"]["groups"][0] == {"group": 0, "kl": pytest.approx(10.05), "reward": pytest.approx(0.35)}


def test_importance_is_of_the_measured_points(tmp_path: Path) -> None:
    """Means 0.31 and 0.11 of three seeds each, -0.01, 0, 0.01 around them: 6 * 0.1^2 = 0.06 and 4 * 0.01^2 = 0.0004."""
    told = content(tmp_path, grid(tmp_path, {0.1: [0.30, 0.31, 0.32], 0.3: [0.10, 0.11, 0.12]}))["importance"]
    assert (told["method"], told["points"]) == ("grid", 6)
    assert told["settings"][0]["share"] == pytest.approx(0.06 / 0.0604)
    assert told["noise"] == pytest.approx(0.0004 / 0.0604)


def test_the_content_is_json(tmp_path: Path) -> None:
    points = grid(tmp_path, {0.1: [0.3, 0.31], 0.3: [0.1]})
    points[0]["settings"]["odd"] = float("nan")
    told = plain(content(tmp_path, points))
    whole = json.loads(json.dumps(told, allow_nan=False))
    assert whole["points"][0]["settings"]["odd"] == "nan"
    assert [group["counted"] for group in whole["groups"]] == [[2], [1], [3]], "the best first"
