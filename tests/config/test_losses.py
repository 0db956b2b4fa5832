"""Losses by name: settings files, what is impossible together, and the page that has a row for each."""

from __future__ import annotations

import re
from typing import Any, get_args

import pytest
import yaml

from alignment.config.compose import compose
from alignment.config.losses import PAIR_LOSSES
from alignment.config.paths import CONF
from alignment.config.preference_checks import loss_faults
from alignment.config.stages.online import Grpo, OnlineDpo, Ppo, Rloo
from alignment.config.stages.preference import Dpo, Kto
from alignment.config.stages.reward_model import RewardModel
from alignment.errors import ConfigError

FILES = {file.stem: yaml.safe_load(file.read_text()) for file in sorted((CONF / "loss").glob("*.yaml"))}
STAGE = {**yaml.safe_load((CONF / "stage" / "dpo.yaml").read_text()), "seed": 0}
PAGE = CONF.parent / "docs" / "algorithms.md"


def stage(file: str, **changes: Any) -> Dpo:
    """stage.dpo as loss=FILE and changes make it."""
    return Dpo(**{**STAGE, **FILES[file], **changes})


IMPOSSIBLE: list[tuple[str, dict[str, Any], str]] = [
    ("simpo", {"reference_update": {"every_steps": 64, "share": 0.6}}, "is set, and simpo compares with no reference"),
    ("tr_dpo", {"max_steps": 512}, "is 512 and `stage.dpo.max_steps` 512: the reference would never move"),
    ("exo_pair", {"label_smoothing": 0.0}, "is 0, and exo_pair compares with smoothed labels"),
    ("aot", {"weighting": "wpo"}, "is wpo, and aot sorts pairs or leaves them out"),
    (
        "aot",
        {"global_batch_size": 1},
        "is 1, and aot sorts the pairs of a global batch: there would be nothing to sort",
    ),
    ("aot_unpaired", {"global_batch_size": 1}, "is 1, and aot_unpaired sorts the pairs"),
    ("simpo", {"ld_alpha": 0.5}, "ld_alpha` is 0.5, and simpo divides by the length of an answer already"),
    ("orpo", {"ld_alpha": 0.0}, "ld_alpha` is 0, and orpo divides by the length"),
    ("apo_zero", {"divergence": "js"}, "is js, and apo_zero does not go through one"),
    ("f_dpo_alpha", {"divergence_alpha": 1.0}, "is 1, where the alpha divergence is the reverse KL"),
]


@pytest.mark.parametrize(("file", "changes", "line"), IMPOSSIBLE, ids=[file for file, *_ in IMPOSSIBLE])
def test_what_is_impossible_together_is_refused(file: str, changes: dict[str, Any], line: str) -> None:
    assert list(loss_faults(stage(file), "stage.dpo")) == []
    (fault,) = loss_faults(stage(file, **changes), "stage.dpo")
    assert line in fault.what


def test_it_is_refused_on_the_command_line() -> None:
    with pytest.raises(ConfigError, match="the reference would never move"):
        compose(["loss=tr_dpo", "stage.dpo.max_steps=100"])


def test_a_weight_is_added_to_losses_that_have_weights() -> None:
    given = compose(["pipeline=dpo", "loss=mpo", "+stage.dpo.loss.nll=0.2"]).stage["dpo"]
    assert isinstance(given, Dpo) and given.losses == {"sigmoid": 0.8, "bco_pair": 0.2, "sft": 1.0, "nll": 0.2}


def test_each_loss_has_a_file_of_its_name_and_each_file_says_where_its_values_are_from() -> None:
    assert set(PAIR_LOSSES) <= FILES.keys()
    for name, values in FILES.items():
        assert re.search(r"arXiv:\d{4}\.\d{5}|ericmitchell\.ai", (CONF / "loss" / f"{name}.yaml").read_text()), name
        assert name not in PAIR_LOSSES or values["loss"] == name


@pytest.mark.parametrize("name", FILES)
def test_a_file_sets_what_its_loss_reads_and_nothing_else(name: str) -> None:
    made = stage(name)
    assert {use for traits in made.traits for use in traits.uses} <= FILES[name].keys()
    assert not made.idle() & FILES[name].keys()


def names(text: str) -> set[str]:
    """In backticks, in the first cells of tables."""
    cells = [line.split("|")[1] for line in text.splitlines() if line.startswith("|")]
    return {name for cell in cells for name in re.findall(r"`([a-z0-9_]+)`", cell)}


def test_the_page_has_a_row_for_every_loss_settings_file_and_method() -> None:
    fields = [(Kto, "loss"), (RewardModel, "loss"), *((kind, "kind") for kind in (Rloo, Grpo, OnlineDpo, Ppo))]
    methods = {name for kind, field in fields for name in get_args(kind.model_fields[field].annotation)}
    every = {*PAIR_LOSSES, *FILES, *methods}
    assert every <= names(PAGE.read_text()), every - names(PAGE.read_text())
