"""A chat endpoint that is asked which of two answers is better: its verdicts, what fails, and who needs it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from alignment.config.compose import compose
from alignment.config.rewards import Reward
from alignment.errors import ConfigError, InputError, MachineError
from alignment.files import read_jsonl, write_jsonl
from alignment.pipeline.identity import identity_side
from alignment.rewards import Judge
from alignment.stages import judge
from alignment.stages.context import StageContext
from alignment.stages.parts import judge_of
from tests.rewards.conftest import row
from tests.rewards.serving import KEY, SETTINGS, Answer, Server, completion, judge_at
from tests.stages.conftest import MakeContext, make_context  # noqa: F401


def comparer(port: int, **changes: Any) -> Any:
    asked = {name: value for name, value in SETTINGS.items() if name not in ("kind", "weight", "low", "high")}
    asked |= {"prompt": "{prompt}: {first} or {second}?", "pattern": "Better: ([ABC])", "first": "A", "second": "B"}
    term = {"kind": "repetition", "weight": 1.0, "words": 1}
    comparison = {**asked, "url": f"http://127.0.0.1:{port}/v1", **changes}
    return Judge(Reward.model_validate({"terms": {"term": term}, "comparison": comparison}), {}).compare


def test_of_two_answers_one_is_better_or_none(server: Server) -> None:
    """The judge prefers the longer; what it does not understand has failed; who says nothing loses unasked."""

    def answer(question: dict[str, Any], before: int) -> Answer:
        first, second = question["messages"][0]["content"].split(": ")[1][:-1].split(" or ")
        if "?" in first + second:
            return completion("Hm.")
        better = "A" if len(first) > len(second) else "B" if len(first) < len(second) else "C"
        return completion(f"Better: C, no: Better: {better}")

    server.answer = answer
    compare = comparer(server.port)
    games = [("long", "s"), ("s", "long"), ("same", "size"), ("?", "x"), ("", "x"), ("x", " "), ("", "\n"), ("a", "a")]
    outcomes = compare([row()] * len(games), *zip(*games, strict=True))
    assert [one if isinstance(one, int) else str(one) for one in outcomes] == [
        1, -1, 0, "the judge's reply has no verdict", -1, 1, 0, 0,
    ]  # fmt: skip
    assert len(server.asked) == 4
    assert server.asked[0][2]["messages"][0]["content"].startswith("Say something: ")


def test_a_stage_asks_about_pairs_in_both_orders(
    server: Server, make_context: MakeContext, tmp_path: Path  # noqa: F811
) -> None:  # fmt: skip
    """Of three answers the longest beats both others. Between those the judge takes whichever is shown first: a tie."""

    def answer(question: dict[str, Any], before: int) -> Answer:
        first, second = question["messages"][0]["content"].split(": ")[1][:-1].split(" or ")
        return completion(f"Better: {'B' if len(first) < len(second) else 'A'}")

    server.answer = answer
    context = comparing(make_context, tmp_path, server.port, "ab", "the longest", "cd")
    assert judge.run(context)["pairs"] == 1
    assert len(server.asked) == 6
    (judged,) = read_jsonl(context.folder / "judged.jsonl")
    assert [completion["reward"] for completion in judged["completions"]] == [-0.5, 1.0, -0.5]


def test_comparisons_that_fail_are_counted_and_too_many_are_an_error(
    server: Server, make_context: MakeContext, tmp_path: Path  # noqa: F811
) -> None:  # fmt: skip
    """Of a, bb, ccc the judge never understands ccc with a, in one order: one comparison of three fails, and still each
    answer has a reward. The longer wins: bb against a, ccc against bb."""

    def answer(question: dict[str, Any], before: int) -> Answer:
        first, second = question["messages"][0]["content"].split(": ")[1][:-1].split(" or ")
        if (first, second) == ("ccc", "a"):
            return completion("I cannot say.")
        return completion(f"Better: {'A' if len(first) > len(second) else 'B'}")

    server.answer = answer
    context = comparing(make_context, tmp_path, server.port, "a", "bb", "ccc", max_failed_share=0.4)
    metrics = judge.run(context)
    assert (metrics["comparisons"], metrics["comparisons_failed"], metrics["reward_failed"]) == (3, 1, 0)
    (judged,) = read_jsonl(context.folder / "judged.jsonl")
    assert [completion["reward"] for completion in judged["completions"]] == [-1.0, 0.0, 1.0]
    why = {"comparison": "the judge's reply has no verdict"}
    assert judged["failed_comparisons"] == [{"answers": [0, 2], "failed": why}]
    strict = replace(context, experiment=with_share(context.experiment, 0.3))
    with pytest.raises(InputError) as told:
        judge.run(strict)
    assert str(told.value) == (
        "reward.comparison: 1 of 3 comparisons failed: the judge's reply has no verdict (1 times) (mend the "
        "comparison, or raise reward.max_failed_share, 0.3)"
    )


def with_share(experiment: Any, share: float) -> Any:
    reward = experiment.reward.model_copy(update={"max_failed_share": share})
    return experiment.model_copy(update={"reward": reward})


def comparing(
    make_context: Any, folder: Path, port: int, *texts: str, max_failed_share: float = 0.05  # noqa: F811
) -> StageContext:  # fmt: skip
    """A stage that judges the answers to one prompt by comparisons."""
    completions = [{"text": text, "tokens": 1, "finished": True} for text in texts]
    (folder / "samples").mkdir()
    write_jsonl(folder / "samples" / "samples.jsonl", [{**row(), "completions": completions}])
    context = make_context("judge", {"data": folder / "samples"}, judging="pairwise", min_margin=0.0)
    reward = context.experiment.reward.model_copy(update={"comparison": comparer(port).settings})
    experiment = context.experiment.model_copy(update={"reward": reward})
    return replace(context, experiment=with_share(experiment, max_failed_share))


def test_who_does_not_compare_neither_needs_the_comparison_nor_has_it_in_its_key(
    make_context: MakeContext, tmp_path: Path, monkeypatch: pytest.MonkeyPatch  # noqa: F811
) -> None:  # fmt: skip
    """A key that is not there; who compares reads no term, so a model that is not there is nobody's."""
    monkeypatch.delenv("JUDGE_KEY", raising=False)
    context = comparing(make_context, tmp_path, 1, "a", "bb")
    terms = {
        "gone": {"kind": "relevance", "weight": 1.0, "source": {"kind": "path", "path": str(tmp_path / "gone")}},
        "size": {"kind": "length", "weight": 1.0, "unit": "words", "low": 1, "high": None, "fall_off": 0},
    }
    raw = {"comparison": {**comparer(1).settings.model_dump(), "api_key_env": "JUDGE_KEY"}}
    both = Reward.model_validate({**raw, "terms": {"size": terms["size"]}})
    pointwise = context.settings.model_copy(update={"judging": "pointwise"})
    experiment = context.experiment.model_copy(update={"reward": both})
    scores = judge_of(replace(context, experiment=experiment, settings=pointwise)).score([row()], ["a"])
    assert scores[0]["reward"] == 1.0
    with pytest.raises(MachineError, match="JUDGE_KEY is not set"):
        judge_of(replace(context, experiment=experiment))
    monkeypatch.setenv("JUDGE_KEY", KEY)
    every = Reward.model_validate({**raw, "terms": terms})
    assert judge_of(replace(context, experiment=experiment.model_copy(update={"reward": every}))).compare
    assert set(identity_side(both.read(compares=True))) == {"terms", "comparison"}
    assert identity_side(both.read(compares=True))["terms"] == {}
    assert identity_side(both.read(compares=False)) == {"terms": identity_side(both)["terms"]}


def test_who_compares_is_in_the_key_where_somebody_does() -> None:
    plain = {"terms": {"term": {"kind": "repetition", "weight": 1.0, "words": 1}}}
    assert "comparison" not in identity_side(Reward.model_validate(plain))
    assert judge_at(1).compare is None
    chosen = ["reward=endpoint_pairwise", "reward.terms.judge.model=m"]
    reward = compose([*chosen, "stage.judge.judging=pairwise"]).reward
    assert identity_side(reward)["comparison"]["model"] == "m"
    with pytest.raises(ConfigError, match=r"`reward\.comparison\.prompt` lacks \{second\}"):
        compose([*chosen, "reward.comparison.prompt='{first}'"])
    with pytest.raises(ConfigError, match=r"`reward\.comparison` is set, and `stage\.judge\.judging` is pointwise"):
        compose(chosen)
    alone = r"`reward\.comparison` is set, and no stage of the pipeline asks which of two answers is better \(choose a"
    for pipeline in ("sft_online_dpo", "sft"):
        with pytest.raises(ConfigError, match=alone):
            compose([*chosen, f"pipeline={pipeline}"])
    other = ["+stage@stage.other=judge", "+pipeline.nodes.other={stage:other,inputs:{data:samples}}"]
    assert not compose([*chosen, *other, "stage.other.judging=pairwise"]).stage["judge"].compares, "another node does"
