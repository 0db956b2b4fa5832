"""What is trained: the shapes of the lengths, random token rows, the sizes of the model. Free of torch.

Random tokens and random weights do for a measurement of speed: the work depends on the lengths alone.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

SHORTEST, LONGEST = 5, 700  # tokens; every prompt and every answer is clipped to these
FIRST_WORD = 4  # lower ids are padding, end, and two that nothing uses
PAD, EOS = 0, 1
IGNORED = -100
BETAS = (0.01, 0.03, 0.05, 0.1, 0.2, 0.3, 0.5, 1.0)
BETA = 0.1
LEARNING_RATE = 1e-4

# Drawn in tokens: (distribution, its two parameters) of prompt, chosen and rejected answer. Lognormal parameters are
# those of the logarithm. `equal` is the case in which sharing a prompt and packing rows have nothing to gain.
SHAPES: dict[str, tuple[tuple[str, float, float], ...]] = {
    "hh": (("lognormal", 4.8, 0.7), ("lognormal", 4.0, 0.8), ("lognormal", 4.0, 0.8)),
    "tldr": (("normal", 350, 80), ("normal", 38, 8), ("normal", 35, 9)),
    "ultrafeedback": (("lognormal", 4.9, 0.8), ("lognormal", 5.3, 0.6), ("lognormal", 5.2, 0.6)),
    "equal": (("normal", 16, 0), ("normal", 240, 0), ("normal", 240, 0)),
}
TASKS = ("dpo", "sft", "reward", "sweep")


@dataclass(frozen=True)
class Size:
    """A Llama. shrink: the lengths are divided by it, for runs that only try the machinery."""

    vocabulary: int
    hidden: int
    intermediate: int
    layers: int
    heads: int
    positions: int = 2048
    shrink: int = 1

    def body_parameters(self) -> int:
        """Weights of all matrices but the embedding and the head."""
        return self.layers * (4 * self.hidden**2 + 3 * self.hidden * self.intermediate)


SIZES = {
    "tiny": Size(vocabulary=64, hidden=32, intermediate=64, layers=2, heads=2, positions=512, shrink=10),
    "cpu": Size(vocabulary=8000, hidden=256, intermediate=704, layers=6, heads=4),
    "gpu": Size(vocabulary=32000, hidden=1536, intermediate=4096, layers=24, heads=12),
}


@dataclass(frozen=True)
class Workload:
    """rows: of a global batch, pairs for dpo, reward and sweep. steps: optimiser steps; every row is used once."""

    task: str
    lengths: str
    size: str
    rows: int
    steps: int
    seed: int = 0

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Totals:
    """Of the computation in which nothing is shared and nothing is padded, over all steps.

    rows: pairs or examples. tokens: of every row as the model reads it (a prompt counts once for each answer).
    scored: positions whose log-probability the loss needs. squares: the sum of squared lengths.
    """

    rows: int
    tokens: int
    scored: int
    squares: int


def draw_lengths(lengths: str, count: int, seed: int, shrink: int = 1) -> np.ndarray:
    """[count, 3] tokens of prompt, chosen and rejected; the same for the same seed."""
    random = np.random.default_rng([seed, sorted(SHAPES).index(lengths)])
    columns = [getattr(random, kind)(first, second, count) for kind, first, second in SHAPES[lengths]]
    drawn = np.clip(np.rint(np.stack(columns, 1)), SHORTEST, LONGEST).astype(int)
    return np.maximum(drawn // shrink, 2)


def pairs(workload: Workload) -> list[dict[str, list[int]]]:
    """Rows with prompt_ids, chosen_ids and rejected_ids, in the order in which they are trained on."""
    size, count = SIZES[workload.size], workload.rows * workload.steps
    lengths = draw_lengths(workload.lengths, count, workload.seed, size.shrink)
    random = np.random.default_rng([workload.seed, 1])
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    return [
        {name: random.integers(FIRST_WORD, size.vocabulary, n).tolist() for name, n in zip(names, row, strict=True)}
        for row in lengths
    ]


def rows_for(task: str, of: list[dict[str, list[int]]]) -> list[dict[str, list[int]]]:
    """The pairs in the columns of a task's trainer; SFT trains the chosen answers."""
    if task == "sft":
        return [
            {
                "input_ids": pair["prompt_ids"] + pair["chosen_ids"],
                "labels": [IGNORED] * len(pair["prompt_ids"]) + pair["chosen_ids"],
            }
            for pair in of
        ]
    if task == "reward":
        return [{name: pair["prompt_ids"] + pair[name] for name in ("chosen_ids", "rejected_ids")} for pair in of]
    return of


def totals(task: str, of: list[dict[str, list[int]]]) -> Totals:
    sides = ("chosen_ids",) if task == "sft" else ("chosen_ids", "rejected_ids")
    whole = [len(pair["prompt_ids"]) + len(pair[side]) for pair in of for side in sides]
    scored = len(whole) if task == "reward" else sum(len(pair[side]) for pair in of for side in sides)
    return Totals(rows=len(of), tokens=sum(whole), scored=scored, squares=sum(n * n for n in whole))
