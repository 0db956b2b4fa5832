"""DPO's trainer, of which only the reference's log-probs are wanted: its engine is made ready, and no step is."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

from alignment.training.preference import Referenced


class _Scored(Exception):
    """All that was wanted is there. Trainer knows no other end before its first step."""


class Scorer(Referenced):
    """The same forward as in DPO, in the same engine, without gradients, moments or master weights of their own: one
    small parameter counts as trained, for engines refuse a model without any; it is not."""

    def __init__(self, *, model: Any, **kwargs: Any) -> None:
        model.requires_grad_(False)
        min(model.parameters(), key=_size).requires_grad_(True)
        super().__init__(model=model, **kwargs)

    def _start(self) -> None:
        self._before_training()
        raise _Scored

    def score_all(self) -> None:
        with suppress(_Scored):
            self.train()


def _size(parameter: Any) -> int:
    """Its number of elements; ZeRO-3 keeps but a shard of them here."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))
