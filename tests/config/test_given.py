"""What the command line gives is not lost without a word."""

from __future__ import annotations

from pathlib import Path

import pytest

from alignment.config.compose import compose
from alignment.config.given import lost, unread
from alignment.errors import ConfigError


@pytest.mark.parametrize(
    ("override", "key", "twice"),
    [
        ("stage.dpo.loss={sigmoid: 1.0, sigmoid: 2.0}", "stage.dpo.loss", "sigmoid"),
        ("stage.dpo.loss={sigmoid:1.0,ipo_sum:1.0,sigmoid:2.0}", "stage.dpo.loss", "sigmoid"),
        ("stage.dpo.loss={sigmoid:1.0,sigmoid:2.0},{sigmoid:3.0}", "stage.dpo.loss", "sigmoid"),
        ("stage.dpo.loss=choice({sigmoid: 3.0}, {nll: 1.0, nll: 2.0})", "stage.dpo.loss", "nll"),
        ("+reward.terms.x={kind: model, members: {a: {kind: path, kind: hub}}}", "reward.terms.x", "kind"),
    ],
)
def test_a_key_twice_in_one_mapping_is_refused(override: str, key: str, twice: str) -> None:
    with pytest.raises(ConfigError, match=f"`{key}` has `{twice}` twice") as caught:
        compose(["experiment=quickstart", override])
    assert (caught.value.where, str(caught.value.fix)[:12]) == ("command line", "give it once")


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["stage.dpo.simpo_gamma=1.0"], ["stage.dpo.simpo_gamma"]),
        (["stage.dpo.simpo_gamma=1.0", "stage.dpo.loss=simpo"], []),
        (["stage.dpo.loss={sigmoid: 1.0, ipo_sum: 1.0}", "stage.dpo.beta=0.3"], []),
        (["stage.judge.length_penalty=1.0", "stage.judge.length_penalty=2.0"], ["stage.judge.length_penalty"]),
        (["stage.judge.length=penalty", "stage.judge.length_penalty=1.0"], []),
        (["stage.evaluate.best_of=1", "reward.terms.sentiment.normalise=null"], []),  # off by their own value
    ],
    ids=" ".join,
)
def test_a_setting_that_nothing_reads_is_told(overrides: list[str], told: list[str]) -> None:
    overrides = ["experiment=quickstart", *overrides]
    assert unread(compose(overrides), overrides) == told


@pytest.mark.parametrize(
    ("overrides", "alone", "told"),
    [
        (["loss=sigmoid", "loss=simpo"], True, ["`loss=sigmoid` counts for nothing: `loss=simpo` comes after it"]),
        (["loss=simpo", "loss=simpo", "~x", "~x"], True, []),
        (["stage.sft.seed=1", "stage.sft.seed=2", "a={b: 1}", "a={c: 2}"], True, []),
        (
            ["data@data.rows=a", "data@data.other=b", "+reward=length", "reward=format"],
            False,
            ["`+reward=length` counts for nothing: `reward=format` comes after it"],
        ),
        (["sweep=optuna_dpo", "++hydra.mode=MULTIRUN"], True, []),
        (["sweep=optuna_dpo"], True, ["`sweep=optuna_dpo` is for a sweep, and without -m this is one run"]),
        (["sweep=optuna_dpo", "hydra/sweeper=optuna", "hydra.sweeper.n_jobs=2"], False, []),
        (["hydra/sweeper=optuna"], True, ["`hydra/sweeper=optuna` is for a sweep, and without -m this is one run"]),
    ],
)
def test_settings_that_count_for_nothing_are_told(overrides: list[str], alone: bool, told: list[str]) -> None:
    assert lost(overrides, alone) == told


def test_what_no_kl_reads_is_told() -> None:
    overrides = [f"stage.rloo.kl.{setting}" for setting in ("coefficient=0", "estimator=k1")]
    overrides = ["pipeline=sft_rloo", *overrides, "stage.rloo.epsilon_low=0.1", "stage.rloo.epochs_per_rollout=1"]
    assert unread(compose(overrides), overrides) == ["stage.rloo.kl.estimator", "stage.rloo.epsilon_low"]


def test_what_two_listed_files_disagree_in_the_command_line_may_decide(tmp_path: Path) -> None:
    (tmp_path / "reward").mkdir()
    for name, share in (("short", 0.1), ("long", 0.2)):
        term = (
            f"{{kind: length, weight: 1.0, normalise: null, unit: words, low: {10 * share:g}, high: null, fall_off: 1}}"
        )
        text = f"max_failed_share: {share}\nterms:\n  {name}: {term}\n"
        (tmp_path / "reward" / f"{name}.yaml").write_text(text)
    overrides = ["pipeline=sft_rloo", "reward=[short,long]"]
    with pytest.raises(ConfigError, match=r"lists short and long, which set `reward\.max_failed_share`"):
        compose(overrides, (tmp_path,))
    experiment = compose([*overrides, "reward.max_failed_share=0.3"], (tmp_path,))
    assert experiment.reward.max_failed_share == 0.3 and set(experiment.reward.terms) == {"short", "long"}
