"""Answers that a policy has given, with all that its updates want to know of them; and a micro-batch made of such.

A rollout is the same on all processes, and JSON: it goes into a checkpoint where its updates are not all done.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from alignment.training import advantages
from alignment.training.packing import IGNORED


@dataclass
class Answer:
    """ids: tokens, with the one that ended it if one did (finished). Nats of each token under the policy that gave it:
    log_probs as decoding knew them; old as training's forward does, where it was asked. reference: under the start
    model. values: of the state before each token, by a value head, and returns, what they should have been. reward:
    None where it could not be judged; failed: why, by terms. advantages: of each token. kept: it is trained on."""

    ids: list[int]
    log_probs: list[float]
    finished: bool
    reward: float | None = None
    terms: dict[str, float] = field(default_factory=dict)
    failed: dict[str, str] | None = None
    kept: bool = True
    advantages: list[float] | None = None
    old: list[float] | None = None
    reference: list[float] | None = None
    values: list[float] | None = None
    returns: list[float] | None = None

    @property
    def trained(self) -> list[int]:
        """Of an answer that is not trained on its prompt alone is computed."""
        return self.ids if self.kept else []


@dataclass
class Group:
    """The answers to one prompt. place: in the stream of prompts, from which their random numbers come. number: of the
    prompt's row."""

    place: int
    number: int
    answers: list[Answer]


@dataclass
class Rollout:
    """number: of the rollout. coefficient: of the KL, while it is trained on. metrics: of its answers."""

    number: int
    coefficient: float
    groups: list[Group]
    metrics: dict[str, float]

    def to_json(self) -> dict[str, Any]:
        """As it is now, without a copy of the tokens' lists, which others take the place of, but which stay as they
        are: asdict takes half a second for 64,000 tokens, and the step waits."""
        groups = [{**vars(group), "answers": [dict(vars(one)) for one in group.answers]} for group in self.groups]
        return {**vars(self), "groups": groups, "metrics": dict(self.metrics)}

    @classmethod
    def from_json(cls, told: dict[str, Any]) -> Rollout:
        groups = [
            Group(**{**group, "answers": [Answer(**one) for one in group["answers"]]}) for group in told["groups"]
        ]
        return cls(**{**told, "groups": groups})


@dataclass(frozen=True)
class Targets:
    """What the loss of a micro-batch wants beside log-probs: [rows, width - 1] each, as these are, 0 elsewhere.

    mask: answers' tokens. advantages, rollout (log_probs), old, reference, values, returns: see Answer. fresh: the
    policy is still the one that gave the answers. coefficient: of the KL.
    """

    mask: Tensor
    advantages: Tensor
    rollout: Tensor
    old: Tensor
    reference: Tensor
    values: Tensor
    returns: Tensor
    fresh: bool
    coefficient: float

    def to(self, device: torch.device) -> Targets:
        moved: dict[str, Any] = {name: one.to(device) for name, one in vars(self).items() if torch.is_tensor(one)}
        return replace(self, **moved)


def rewards_of(groups: Sequence[Group]) -> tuple[Tensor, Tensor]:
    """[groups, answers] float64, and which of them are known."""
    given = [[answer.reward for answer in group.answers] for group in groups]
    rewards = torch.tensor([[reward or 0.0 for reward in row] for row in given], dtype=torch.float64)
    return rewards, torch.tensor([[reward is not None for reward in row] for row in given])


def with_signal(groups: Sequence[Group]) -> list[bool]:
    return advantages.has_signal(*rewards_of(groups)).tolist() if groups else []


def best_and_worst(answers: Sequence[Answer]) -> tuple[Answer, Answer] | None:
    """By reward; of answers whose rewards differ by rounding only the first. None where all are alike."""
    rewards = torch.tensor([0.0 if answer.reward is None else answer.reward for answer in answers], dtype=torch.float64)
    if len(answers) < 2 or not advantages.differ(rewards.max(), rewards.min()):
        return None
    best, worst = (int((~advantages.differ(rewards, end)).nonzero()[0]) for end in (rewards.max(), rewards.min()))
    return answers[best], answers[worst]


def measured(groups: Sequence[Group]) -> dict[str, float]:
    """Means over the answers of a rollout, and deviations: reward_std is the mean over prompts of that among a prompt's
    answers, reward_std/<term> that of the term among all."""
    answers = [answer for group in groups for answer in group.answers]
    known = [answer for answer in answers if answer.reward is not None]
    rewards, valid = rewards_of(groups)
    spread = [row[here].std(correction=0) for row, here in zip(rewards, valid, strict=True) if here.any()]
    names = sorted({name for answer in known for name in answer.terms})
    terms = {name: [answer.terms[name] for answer in known if name in answer.terms] for name in names}
    return {
        "reward": _mean([answer.reward for answer in known]),
        "reward_std": _mean([float(one) for one in spread]),
        **{f"reward/{name}": _mean(values) for name, values in terms.items()},
        **{f"reward_std/{name}": float(np.std(values)) for name, values in terms.items()},
        "reward_failed": float(len(answers) - len(known)),
        "answer_tokens": _mean([len(answer.ids) for answer in answers]),
        "stop_rate": _mean([answer.finished for answer in answers]),
    }


def _mean(values: Sequence[Any]) -> float:
    return float(sum(values)) / max(len(values), 1)


def collated(groups: Sequence[Group], prompts: Mapping[int, Sequence[int]], fresh: bool, coefficient: float) -> Any:
    """input_ids, attention_mask, labels [rows, width] and targets: all first answers, then all second ones and so on,
    as packs want them. prompts: ids by the number of the row."""
    branches = len(groups[0].answers)
    rows = [(prompts[group.number], group.answers[branch]) for branch in range(branches) for group in groups]
    width = max(len(prompt) + len(answer.trained) for prompt, answer in rows)
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, IGNORED)
    for row, (prompt, answer) in enumerate(rows):
        length = len(prompt) + len(answer.trained)
        ids[row, :length] = torch.tensor([*prompt, *answer.trained])
        mask[row, :length] = 1
        labels[row, len(prompt) : length] = ids[row, len(prompt) : length]

    def spread(name: str) -> Tensor:
        """A token is predicted one place before it stands."""
        values = torch.zeros(len(rows), width - 1)
        for row, (prompt, answer) in enumerate(rows):
            if answer.trained and getattr(answer, name) is not None:
                first = len(prompt) - 1
                values[row, first : first + len(answer.ids)] = torch.tensor(getattr(answer, name))
        return values

    worth, rollout, old, reference = map(spread, ("advantages", "log_probs", "old", "reference"))
    values, returns = spread("values"), spread("returns")
    targets = Targets(labels[:, 1:] != IGNORED, worth, rollout, old, reference, values, returns, fresh, coefficient)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels, "targets": targets}
