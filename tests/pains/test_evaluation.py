"""Scores that somebody else cannot get again; docs/pains.md, 25."""

from __future__ import annotations

from typing import Any

from transformers import set_seed

from alignment import generation
from alignment.config.compose import compose
from alignment.config.stages.answering import Evaluate
from alignment.pipeline import graph
from tests.generation.conftest import loaded, sharp_model  # noqa: F401 - fixtures
from tests.generation.test_generate import PROMPTS, SAMPLED


def test_alignment_handbook_124_scores_not_reproduced(loaded: tuple[Any, Any]) -> None:  # noqa: F811
    """The same model, prompts and seed: with transformers' generate the answers, and so every score, depend on how
    many prompts are in a batch."""
    model, tokenizer = loaded
    ids = [generation.encode_prompt(tokenizer, prompt) for prompt in PROMPTS]
    how = {"do_sample": True, "max_new_tokens": 12, "pad_token_id": 0}
    answers = []
    for size in (1, len(ids)):
        set_seed(3)
        found: list[list[int]] = []
        for first in range(0, len(ids), size):
            given = tokenizer.pad({"input_ids": ids[first : first + size]}, padding_side="left", return_tensors="pt")
            made = model.generate(**given, **how)[:, given["input_ids"].shape[1] :]
            found += [[token for token in row if token] for row in made.tolist()]
        answers.append(found)
    assert answers[0] != answers[1]

    ours = [generation.generate(model, tokenizer, PROMPTS, batch_size=size, **SAMPLED) for size in (1, len(ids))]
    assert [few[0].token_ids for few in ours[0]] == [few[0].token_ids for few in ours[1]]
    keys, warmer = evaluations(), evaluations("temperature=0.7")
    assert len(keys) == 3, "start, SFT and DPO model, within the run, by one stage's settings"
    assert not {*keys.values()} & {*warmer.values()}, "measured otherwise it is another result"


def evaluations(*changes: str) -> dict[str, str]:
    """Keys of the nodes that evaluate."""
    settings = ["pipeline=sft_sample_dpo", *(f"stage.evaluate.{change}" for change in changes)]
    nodes = [node for node in graph.build(compose(settings)) if isinstance(node.settings, Evaluate)]
    assert all({"torch", "transformers"} <= set(node.identity["packages"]) for node in nodes)
    return {node.name: node.key for node in nodes if node.settings.best_of == 1}
