"""TR-DPO: a reference that follows the policy, without a second model.

The reference is only ever asked for log-probs of the pairs of the steps until its next update. So its weights of what
is trained are kept beside the policy's (each process its fragments), and take the policy's place for one pass over
these pairs after each update. A checkpoint holds them too; who goes on makes that pass again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from alignment.config.stages.preference import ReferenceUpdate
from alignment.training import state
from alignment.training.reference_pass import References


class MovingReference:
    """weights: key of a fragment -> fp32 [numel], the reference's; at first those of the start model.

    until_first: log-probs of the start model, which is the reference of the first steps.
    """

    def __init__(self, settings: ReferenceUpdate, until_first: References) -> None:
        self.settings = settings
        self.weights: dict[str, Tensor] = {}
        self._current, self._window = until_first, 0

    def begin(self, trainer: Any) -> None:
        """The engine has the start model."""
        self.weights = {f.key("weight"): f.values["weight"].detach().clone() for f in state.fragments(trainer)}

    def updates(self, steps: int) -> int:
        """How many there were in so many steps: each comes before the step that it is for, none before the first."""
        return max(steps - 1, 0) // self.settings.every_steps

    @torch.no_grad()
    def at(self, trainer: Any) -> References:
        """The reference's log-probs for the step that begins. A collective."""
        step, every = trainer.state.global_step, self.settings.every_steps
        window = step // every
        if window and step % every == 0:
            for fragment in state.fragments(trainer):
                # (5): theta_ref <- alpha theta + (1 - alpha) theta_ref; (6) where alpha is 1
                self.weights[fragment.key("weight")].lerp_(fragment.values["weight"], self.settings.share)
        if window != self._window:
            self._current, self._window = References(None, _alive(trainer)), window
            last = min((window + 1) * every, trainer.batches.steps)
            rows = np.unique([row for step in range(window * every, last) for row in trainer.batches.rows(step)])
            with self._in_place(trainer):
                self._current.compute(trainer, rows)
        return self._current

    @contextmanager
    def _in_place(self, trainer: Any) -> Iterator[None]:
        """The policy's weights are the reference's meanwhile."""
        held = state.fragments(trainer)
        policy = [fragment.values["weight"].clone() for fragment in held]
        self._write(trainer, held, [self.weights[fragment.key("weight")] for fragment in held])
        yield
        self._write(trainer, held, policy)

    @staticmethod
    def _write(trainer: Any, held: list[state.Fragment], weights: list[Tensor]) -> None:
        with state.rewriting(trainer):
            for fragment, weight in zip(held, weights, strict=True):
                fragment.values["weight"].copy_(weight)


def _alive(trainer: Any) -> Callable[..., None]:
    """What a pass says as it gets on: that it does, to who watches over the process."""
    return (lambda *told, **facts: trainer.keeper.stage.tick()) if trainer.keeper else (lambda *told, **facts: None)
