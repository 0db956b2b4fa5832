"""Rounds that are said once become ordinary nodes; each mistake in saying them is one line."""

from __future__ import annotations

import copy
from functools import reduce
from pathlib import Path
from typing import Any

import pytest
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from omegaconf import OmegaConf

from alignment.config import rounds
from alignment.config.compose import compose
from alignment.config.launchers import SlurmLauncher
from alignment.config.paths import CONF
from alignment.config.schema import Experiment
from alignment.errors import ConfigError
from alignment.pipeline import graph

ROUNDS = ["pipeline=iterative_dpo"]
NODES, R = "pipeline.rounds.nodes", "rounds.nodes"


def keys(*overrides: str) -> dict[str, str]:
    return {node.name: node.key for node in graph.build(compose([*ROUNDS, *overrides]))}


def test_a_round_is_the_nodes_that_one_would_write_by_hand() -> None:
    """The first one is what pipeline=sft_sample_dpo does after SFT; the second begins with the first one's model."""
    experiment = compose([*ROUNDS, "pipeline.rounds.count=2"])
    nodes = {name: (node.stage, node.inputs) for name, node in experiment.pipeline.nodes.items()}
    second = {name: nodes[name] for name in nodes if name.endswith("_2")}
    assert second == {
        "samples_2": ("sample_2", {"model": "dpo_1", "data": "rows"}),
        "judged_2": ("judge", {"data": "samples_2"}),
        "pairs_2": ("prepare_preference", {"model": "dpo_1", "data": "judged_2"}),
        "reference_2": ("reference", {"model": "dpo_1", "data": "pairs_2"}),
        "dpo_2": ("dpo", {"model": "dpo_1", "data": "pairs_2", "reference": "reference_2"}),
        "evaluate_dpo_2": ("evaluate", {"model": "dpo_2", "data": "rows", "reference": "start"}),
    }
    assert experiment.pipeline.final == "dpo_2"
    assert list(nodes["verdict"][1]) == ["start", "sft", "sft_best_of_n", "dpo_1", "dpo_2"]
    plain = {node.name: node.key for node in graph.build(compose(["pipeline=sft_sample_dpo"]))}
    first = keys("pipeline.rounds.count=2")
    for name in ("samples", "judged", "pairs", "reference", "dpo", "evaluate_dpo"):
        assert first[f"{name}_1"] == plain[name]


@pytest.mark.parametrize("prompts", ["null", "10"])
def test_more_rounds_reuse_those_that_are_there(prompts: str) -> None:
    """All keys of three rounds are among those of four, but for the comparison's, which has another model to show."""
    three, four = (keys(f"pipeline.rounds.count={count}", f"pipeline.rounds.prompts={prompts}") for count in (3, 4))
    assert {name for name, key in three.items() if four[name] != key} == {"verdict"}
    assert {name.rpartition("_")[2] for name in four.keys() - three.keys()} == {"4"}
    assert len(set(four.values())) == len(four)


def drawn(experiment: Experiment) -> list[tuple[int, int, int | None]]:
    """Seed, first prompt and number of prompts of each of three rounds."""
    found: list[Any] = [experiment.stage[experiment.pipeline.nodes[f"samples_{i}"].stage] for i in (1, 2, 3)]
    return [(settings.seed, settings.first_prompt, settings.prompts) for settings in found]


def test_each_round_draws_with_another_seed_and_its_own_prompts_where_that_is_asked() -> None:
    assert drawn(compose(ROUNDS)) == [(0, 0, None), (10**6, 0, None), (2 * 10**6, 0, None)]
    own = compose([*ROUNDS, "pipeline.rounds.prompts=20", "seed=5"])
    assert drawn(own) == [(5, 0, 20), (5 + 10**6, 20, 20), (5 + 2 * 10**6, 40, 20)]


def test_seeds_of_a_sweep_have_no_round_in_common() -> None:
    sweep = [keys(f"seed={seed}", "pipeline.rounds.count=3") for seed in (0, 1, 2)]
    seeds = [seed for at in (0, 1, 2) for seed, *_ in drawn(compose([*ROUNDS, f"seed={at}"]))]
    assert len(set(seeds)) == 9
    drawing = [found[name] for found in sweep for name in found if name.startswith("samples_")]
    assert len(set(drawing)) == 9


# changes of the pipeline's keys -> the first fault, and its key
WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "no such node before": ({f"{R}.samples.inputs.model": "previous.dop"}, "the rounds have no such node"),
    "no first": ({f"{R}.samples.inputs.model": "previous.pairs"}, "`pipeline.rounds.first` does not say what it is"),
    "no such node": ({f"{R}.samples.inputs.data": "row"}, "names `row`, which is no node"),
    "no such start": ({"rounds.first.dpo": "stf"}, "names `stf`, which is no node outside of the rounds"),
    "a start of nothing": ({"rounds.first.dop": "sft"}, "`pipeline.rounds.first.dop`: the rounds have no such node"),
    "too few prompts": ({"rounds.prompts": 30}, "is 60, and 3 rounds of 30 need 90"),
    "which of them": ({"final": "dpo"}, "`pipeline.final` names `dpo`, of which each round has one"),
    "no such last": ({"final": "last.dop"}, "names `last.dop`, and the rounds have no such node"),
    "each of one": ({"final": "each.dpo"}, "`pipeline.final` names `each.dpo`"),
    "previous outside": ({"nodes.best_of_n.inputs.model": "previous.dpo"}, "names `previous.dpo`"),
    "a role twice": (
        {"nodes.verdict.inputs.dpo_1": "evaluate_sft"},
        "makes an input of the name of `pipeline.nodes.verdict.inputs.dpo_1`",
    ),
    "a name twice": ({"nodes.dpo": {"stage": "sft", "inputs": {}}}, "has the name of a node outside of the rounds"),
    "a made name": ({"nodes.dpo_2": {"stage": "sft", "inputs": {}}}, "has the name of a node outside of the rounds"),
}


@pytest.fixture(scope="module")
def plain() -> dict[str, Any]:
    """The experiment as it is said, its rounds not made out."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        said: Any = OmegaConf.to_container(hydra_compose("config", ROUNDS), resolve=True)
    return {**said, "name": "rounds"}


@pytest.mark.parametrize("name", WRONG)
def test_a_mistake_in_the_rounds_is_told(name: str, plain: dict[str, Any]) -> None:
    changes, what = WRONG[name]
    raw = copy.deepcopy(plain)
    for key, value in changes.items():
        *above, last = key.split(".")
        reduce(dict.__getitem__, above, raw["pipeline"])[last] = value
    told = next(rounds.faults(rounds.expand(Experiment.model_validate(raw))))
    assert what in told.what
    assert told.keys and told.fix
    assert next(rounds.faults(rounds.expand(Experiment.model_validate(plain))), None) is None


def test_a_mistake_is_one_line_with_its_place_and_the_fix() -> None:
    for override, line in {
        f"{NODES}.samples.inputs.model=previous.dop": f"command line: `{NODES}.samples.inputs.model` names "
        "`previous.dop`, and the rounds have no such node (did you mean `previous.dpo`?)",
        "pipeline.rounds.cuont=2": "command line: unknown key `pipeline.rounds.cuont` "
        "(did you mean `pipeline.rounds.count`?)",
        "pipeline.rounds=2": "command line: `pipeline.rounds` is several settings, not one value (set what is in it: "
        "pipeline.rounds.count, pipeline.rounds.first, pipeline.rounds.nodes, pipeline.rounds.prompts)",
    }.items():
        with pytest.raises(ConfigError) as told:
            compose([*ROUNDS, override])
        assert str(told.value) == line


def test_a_stage_with_the_name_of_a_made_one_is_refused_not_replaced() -> None:
    """Where all rounds have the same prompts the first one's stage is `sample` itself, and sample_1 is free."""
    own = "+stage.sample_{}=${{stage.sample}}"
    with pytest.raises(ConfigError) as told:
        compose([*ROUNDS, own.format(2)])
    assert str(told.value).startswith(
        "command line: `stage.sample_2` has the name of what the rounds make of `stage.sample`"
    )
    assert "sample_1" in compose([*ROUNDS, own.format(1)]).stage


def test_prompts_of_the_stage_and_of_the_rounds_are_not_both_set() -> None:
    with pytest.raises(ConfigError, match=r"`stage\.sample\.prompts` is 7, and `pipeline\.rounds\.prompts` 20"):
        compose([*ROUNDS, "stage.sample.prompts=7", "pipeline.rounds.prompts=20"])
    assert drawn(compose([*ROUNDS, "stage.sample.prompts=7"])) == [(0, 0, 7), (10**6, 0, 7), (2 * 10**6, 0, 7)]


def test_a_fault_of_a_made_node_names_the_line_of_the_rounds(tmp_path: Path) -> None:
    (tmp_path / "pipeline").mkdir()
    text = (CONF / "pipeline" / "iterative_dpo.yaml").read_text()
    file = tmp_path / "pipeline" / "mine.yaml"
    file.write_text(text.replace("{stage: judge, inputs: {data: samples}}", "{stage: judge, inputs: {data: pairs}}"))
    line = 1 + next(i for i, row in enumerate(text.splitlines()) if row.strip().startswith("judged:"))
    with pytest.raises(ConfigError, match=r"`pipeline\.nodes\.judged_1\.inputs\.data` names `pairs_1`") as told:
        compose(["pipeline=mine"], (tmp_path,))
    assert told.value.where == f"{file}:{line}"


def test_without_rounds_nothing_may_be_named_by_them(plain: dict[str, Any]) -> None:
    pipeline = {**plain["pipeline"], "rounds": None}
    told = next(rounds.faults(rounds.expand(Experiment.model_validate({**plain, "pipeline": pipeline}))))
    assert told.what == "`pipeline.nodes.verdict.inputs.dpo` names `each.evaluate_dpo`, and the pipeline has no rounds"


def test_what_a_cluster_gives_to_a_stage_or_node_each_round_gets() -> None:
    asked = [
        "+launcher.stages.sample.memory=8G",
        "+launcher.stages.samples.partition=fast",
        "+launcher.stages.dpo_2.memory=9G",
    ]
    experiment = compose([*ROUNDS, "launcher=slurm", "engine=zero2", *asked])
    launcher, nodes = experiment.launcher, experiment.pipeline.nodes
    assert isinstance(launcher, SlurmLauncher)
    for number in (1, 2, 3):
        found = launcher.resources(nodes[f"samples_{number}"].stage, f"samples_{number}", distributed=False)
        assert (found.memory, found.partition) == ("8G", "fast")
    assert launcher.resources("dpo", "dpo_2", distributed=True).memory == "9G"
    assert launcher.resources("dpo", "dpo_1", distributed=True).memory != "9G"
