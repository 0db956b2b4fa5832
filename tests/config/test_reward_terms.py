"""Settings of a reward: what is impossible is one line, several choices are one reward, and what is in the key."""

from __future__ import annotations

from typing import Any

import pytest

from alignment.config.compose import compose
from alignment.config.schema import Experiment
from alignment.errors import ConfigError
from alignment.pipeline import graph

REFUSED = {
    "reward=length reward.terms.length.high=5": "`reward.terms.length.low` is 10, and `reward.terms.length.high` 5",
    "reward=length reward.terms.length.normalise={kind:clip,low:1.0,high:0.0}": "`reward.terms.length.normalise.low`",
    "reward=length reward.terms.length.normalise={kind:zscore,mean:1.0,std:0.0}": "normalise.std` should be greater",
    "reward=length reward.terms.length.normalise={kind:log}": "`reward.terms.length.normalise.kind` should be one of",
    "reward=length reward.terms.length.unit=word": "got 'word' (did you mean 'words'?)",
    "reward=format reward.terms.form.whole_sentences=false": "`reward.terms.form` sets no rule",
    "reward=regex reward.terms.pattern.pattern='('": "`reward.terms.pattern.pattern` is no regular expression: missing )",
    "reward=language reward.terms.script.scripts=[latn]": "got 'latn' (did you mean 'latin'?)",
    "reward=instructions reward.terms.instructions.checks=[{kind:words,relation:exactly}]": "checks.0.count` is missing",
    "reward=instructions reward.terms.instructions.checks=[{kind:rhymes}]": "checks.0.kind` should be one of",
    "reward=answer reward.terms.correct.tolerance=-1.0": "tolerance` should be greater than or equal to 0",
    "reward=answer reward.max_failed_share=1.5": "`reward.max_failed_share` should be less than or equal to 1",
    "reward=answer reward.terms.correct.kind=anser": "(did you mean 'answer'?)",
}


@pytest.mark.parametrize("overrides", REFUSED)
def test_what_cannot_be_is_one_line(overrides: str) -> None:
    with pytest.raises(ConfigError) as told:
        compose(overrides.split())
    assert REFUSED[overrides] in str(told.value)


def test_several_choices_are_one_reward() -> None:
    reward = compose(["reward=[sentiment,length,repetition]", "reward.terms.repeats.weight=2.0"]).reward
    assert {name: term.weight for name, term in reward.terms.items()} == {"sentiment": 1, "length": 1, "repeats": 2}


def keys(experiment: Experiment) -> dict[str, str]:
    return {node.name: node.key for node in graph.build(experiment)}


def changed(*overrides: str, reward: str = "reward=answer") -> set[str]:
    """Kinds of the nodes whose keys differ with these settings."""
    before = compose([reward])
    after = keys(compose([reward, *overrides]))
    return {
        before.stage[before.pipeline.nodes[name].stage].kind  # type: ignore[attr-defined]
        for name, key in keys(before).items()
        if key != after[name]
    }


@pytest.mark.parametrize(
    ("overrides", "matters"),
    [
        (["reward.max_failed_share=0.5"], False),
        (["reward.terms.correct.normalise={kind: sigmoid}"], True),
        (["reward.terms.correct.find=boxed"], True),
        (["reward.terms.correct.tolerance=0.1"], True),
    ],
)
def test_what_can_change_a_value_is_in_the_key(overrides: list[str], matters: bool) -> None:
    assert ({"judge", "evaluate"} <= changed(*overrides)) == matters
    assert bool(changed(*overrides)) == matters


def test_what_changes_nothing_as_the_others_stand_is_not_in_the_key() -> None:
    as_text = compose(["reward=answer", "reward.terms.correct.compare=text"])
    other: Any = compose(["reward=answer", "reward.terms.correct.compare=text", "reward.terms.correct.tolerance=0.5"])
    assert keys(as_text) == keys(other)


def test_a_reward_of_older_date_is_still_one(tmp_path: Any) -> None:
    """Without a scale, and without a limit to failures; its key is that of the same reward with both written out."""
    (tmp_path / "reward").mkdir()
    text = "terms:\n  sentiment: {kind: sentiment, weight: 1.0, source: null}\n"
    (tmp_path / "reward" / "mine.yaml").write_text(text)
    assert keys(compose(["reward=mine"], (tmp_path,))) == keys(compose(["reward=sentiment"]))
