"""Rows that stages will train on, as far as they are known before the run: how long they are, and how many."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from datasets import Dataset

from alignment.config.schema import Experiment
from alignment.config.stages.answering import Judge
from alignment.config.stages.answering import Sample as Sampling
from alignment.config.stages.preparing import Prepare
from alignment.data.counting import in_source
from alignment.data.named import path_of
from alignment.data.preparation import Judged
from alignment.estimating import rows
from alignment.estimating.generated import generated, stages_on

EXACT, ABOUT, AT_MOST = "", "about ", "at most "


@dataclass(frozen=True)
class KnownRows:
    """rows: a datasets.Dataset of some that are trained on. prompts: [rows], tokens of each one's prompt. count: how
    many there are in all, None if nobody knows; how: exactly, about or at most."""

    rows: Any
    prompts: np.ndarray
    count: int | None
    how: str


def known_rows(
    experiment: Experiment, settings: Prepare, judged: Judged, looked_at: Any, whole: bool, most: int
) -> KnownRows:
    """Of a stage that prepares data sets. looked_at: rows of the table that are trained on. whole: there are no others;
    most: rows of each data set that were read at most."""
    table = judged.table
    found, prompts = table.take(looked_at), table.column("prompt_tokens")[looked_at]
    if whole:
        return KnownRows(found, prompts, len(looked_at), EXACT)
    data = {name: experiment.data[name] for name in settings.datasets}
    source, counts, fit = table.column("source")[judged.fit], dict[str, int | None](), dict[str, float]()
    for number, (name, one) in enumerate(data.items()):
        read = judged.read[name]
        counts[name] = read if read < most else in_source(path_of(one))
        fit[name] = float((source == number).sum()) / read
    return KnownRows(found, prompts, rows.trained_on(data, counts, fit, settings.splits), ABOUT)


def trained(experiment: Experiment, prepared: str, sample: KnownRows) -> Iterator[tuple[str, KnownRows]]:
    """Nodes that train on what this node prepares, and on pairs of answers to its prompts, with their rows."""
    for name in stages_on(experiment, prepared):
        yield name, sample
    for later, sampling, judge in generated(experiment, prepared):
        some = pairs(experiment, prepared, sample, sampling, judge)
        yield from ((name, some) for name in stages_on(experiment, later))


def pairs(experiment: Experiment, prepared: str, sample: KnownRows, sampling: Sampling, judge: Judge) -> KnownRows:
    """As many as a judge may make, of answers as long as they may become."""
    settings = experiment.stage[experiment.pipeline.nodes[prepared].stage]
    assert isinstance(settings, Prepare)
    prompts = min(settings.splits.prompts, sampling.prompts or settings.splits.prompts)
    count = max(1, prompts * judge.max_pairs_per_prompt)
    tokens = sample.prompts[:count]
    answers = [[0] * sampling.max_new_tokens] * len(tokens)
    columns = {"prompt_ids": [[0] * int(n) for n in tokens], "chosen_ids": answers, "rejected_ids": answers}
    return KnownRows(Dataset.from_dict(columns), tokens, count, AT_MOST)
