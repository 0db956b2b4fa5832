"""Settings of a reward: what is impossible is one line, several choices are one reward, and what is in the key."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from alignment.config.checks import check
from alignment.config.compose import compose
from alignment.config.paths import CONF
from alignment.config.provenance import Origin
from alignment.config.rewards import RESERVED, Reward
from alignment.errors import ConfigError
from alignment.pipeline.identity import identity_side
from tests.pipeline.test_identity import leaves, other

REFUSED = {
    "reward=length reward.terms.length.high=5": "`reward.terms.length.low` is 10, and `reward.terms.length.high` 5",
    "reward=length reward.terms.length.normalise={kind:clip,low:1.0,high:0.0}": "`reward.terms.length.normalise.low`",
    "reward=length reward.terms.length.normalise={kind:log}": "`reward.terms.length.normalise.kind` should be one of",
    "reward=length reward.terms.length.unit=word": "got 'word' (did you mean 'words'?)",
    "reward=format reward.terms.form.ends_with=''": "is not written as it should be, got '' (more than white space)",
    "reward=format reward.terms.form.whole_sentences=false": "`reward.terms.form` sets no rule",
    "reward=regex reward.terms.pattern.pattern='('": "pattern` is no regular expression: missing ), unterminated",
    "reward=language reward.terms.script.scripts=[latn]": "got 'latn' (did you mean 'latin'?)",
    "reward=instructions reward.terms.instructions.checks=[{kind:words,relation:exactly}]": "checks.0.count` is miss",
    "reward=model": "`reward.terms.preference` has no model: it has no members, and `judged` no role `reward_model` (+",
    # judged, which compares, reads no term
    "reward=[endpoint_pairwise,model] reward.terms.judge.model=m stage.judge.judging=pairwise": (
        "`reward.terms.preference` has no model: it has no members, and `evaluate_start` no role"
    ),
    "reward=sentiment reward.terms.sentiment.weight=0": "`reward.terms.sentiment.weight` is 0: every answer would have",
    "reward=[sentiment,length] reward.terms.sentiment.weight=0 reward.terms.length.weight=0": "so are the others",
    "reward=endpoint_pairwise reward.terms.judge.model=m reward.comparison.second=A stage.judge.judging=pairwise": (
        "`reward.comparison.first` and `reward.comparison.second` are both 'A': each comparison would be a tie"
    ),
    "experiment=rlhf ++reward.terms.safety={kind:model,weight:1.0,normalise:null,members:{},combine:mean,"
    "uncertainty:0.0,end:template,roles:reward_model_b} +pipeline.nodes.rloo.inputs.reward_model_b=reward_model": (
        "is read by `preference` and by `safety`: its name begins as the `roles` of both say"
    ),
    "reward=model +pipeline.nodes.judged.inputs.reward_model=sft": "which makes a model, not a reward model",
    "+pipeline.nodes.sft.inputs.reward_model=sft": "a stage of this kind has no such role",
}


@pytest.mark.parametrize("overrides", REFUSED)
def test_what_cannot_be_is_one_line(overrides: str) -> None:
    with pytest.raises(ConfigError) as told:
        compose(overrides.split())
    assert REFUSED[overrides] in str(told.value)


def test_a_pipeline_gives_its_reward_model_to_all_that_judge() -> None:
    nodes = compose(["experiment=rlhf"]).pipeline.nodes
    given = {name for name, node in nodes.items() if node.inputs.get("reward_model") == "reward_model"}
    assert given == {"rloo", "evaluate_start", "evaluate_sft", "evaluate_rloo", "best_of_n"}
    with pytest.raises(ConfigError, match="is filled, and no term of the reward reads it"):
        compose(["experiment=rlhf", "reward=sentiment"])


def test_a_term_has_no_name_that_stages_write_beside_it() -> None:
    """That these are all of them is held by the tests of the stages."""
    base = compose(["experiment=quickstart"])
    for name in sorted(RESERVED):
        terms = {**base.reward.terms, name: base.reward.terms["sentiment"]}
        reward = base.reward.model_copy(update={"terms": terms})
        with pytest.raises(ConfigError, match=rf"`reward\.terms\.{name}` has the name of another number that stages"):
            check(base.model_copy(update={"reward": reward}), Origin((f"+reward.terms.{name}.kind=sentiment",)))


def test_several_choices_are_one_reward() -> None:
    reward = compose(["reward=[sentiment,length,repetition]", "reward.terms.repeats.weight=2.0"]).reward
    assert {name: term.weight for name, term in reward.terms.items()} == {"sentiment": 1, "length": 1, "repeats": 2}


def key(term: dict[str, Any], **settings: Any) -> Any:
    return identity_side(Reward.model_validate({"terms": {"term": {"weight": 1.0, **term}}, **settings}))


MODEL = {
    "kind": "model",
    "members": {},
    "roles": "reward_model",
    "combine": "mean",
    "uncertainty": 0.5,
    "end": "template",
}
CORRECT = {"kind": "answer", "find": "auto", "compare": "number", "tolerance": 0.0}
AS_TEXT = {**CORRECT, "compare": "text"}
NAMED = {**MODEL, "members": {"one": {"kind": "hub", "id": "a/b", "revision": "c" * 40, "subset": None, "split": "x"}}}
WORST = {**MODEL, "combine": "worst"}
MATTERS = [
    *((CORRECT, {"find": "boxed"}), (CORRECT, {"tolerance": 0.1}), (CORRECT, {"weight": 2.0}), (CORRECT, AS_TEXT)),
    *((CORRECT, {"normalise": {"kind": "sigmoid"}}), (MODEL, {"roles": "reward_model_2"}), (MODEL, NAMED)),
    *((MODEL, {"uncertainty": 0.0}), (MODEL, {"combine": "worst"}), (MODEL, {"end": "end_of_turn"})),
]
IDLE = [
    *((CORRECT, {"normalise": None}), (AS_TEXT, {"tolerance": 0.1}), (NAMED, {"roles": "reward_model_2"})),
    (WORST, {"uncertainty": 0.0}),
]


@pytest.mark.parametrize(("term", "change"), MATTERS)
def test_what_can_change_a_value_is_in_the_key(term: dict[str, Any], change: dict[str, Any]) -> None:
    assert key(term) != key({**term, **change})


@pytest.mark.parametrize(("term", "change"), IDLE)
def test_what_changes_nothing_as_the_others_stand_is_not_in_the_key(term: Any, change: dict[str, Any]) -> None:
    assert key(term) == key({**term, **change})


def of_conf(name: str) -> dict[str, Any]:
    """Settings of conf/reward; what they leave to the command is filled in."""
    raw = yaml.safe_load((CONF / "reward" / f"{name}.yaml").read_text().replace("???", str(CONF / "config.yaml")))
    return {key: value for key, value in raw.items() if key != "defaults"}


KINDS = [*(f.stem for f in sorted((CONF / "reward").glob("*.yaml")) if "defaults" not in yaml.safe_load(f.read_text()))]


@pytest.mark.parametrize("name", KINDS)
def test_each_setting_is_in_the_key_if_it_is_said_to_be(name: str) -> None:
    """The same as of whole pipelines, in tests/pipeline/test_identity.py, but of every kind of term."""
    base = Reward.model_validate(of_conf(name))
    for path, field, value, sides in leaves(base):
        if path[-1] in ("kind", "path") or (path[-1] == "source" and value is None):
            continue
        others = [*other(field, value), ["thai"], [{"kind": "json"}], "API_KEY"]
        changed = next(filter(None, (with_value(name, path, another) for another in others)), None)
        assert changed is not None, f"no other value of {path} is allowed"
        idle = len(path) == 3 and path[2] in base.terms[path[1]].idle() & changed.terms[path[1]].idle()
        expected = set(sides) == {"identity"} and not idle
        assert (identity_side(base) != identity_side(changed)) == expected, path


def with_value(name: str, path: tuple[Any, ...], value: Any) -> Reward | None:
    raw = Reward.model_validate(of_conf(name)).model_dump()
    place = raw
    for part in path[:-1]:
        place = place[part]
    place[path[-1]] = value
    try:
        return Reward.model_validate(raw)
    except ValueError:
        return None


def test_a_limit_to_failures_refuses_results_and_changes_none() -> None:
    assert key(CORRECT, max_failed_share=0.0) == key(CORRECT, max_failed_share=1.0) == key(CORRECT)


def test_a_reward_of_older_date_has_the_key_it_had() -> None:
    """Without a scale, and without a limit to failures, as the first ones were."""
    assert key({"kind": "sentiment", "source": None}) == {
        "terms": {"term": {"kind": "sentiment", "weight": 1.0, "source": None}}
    }
