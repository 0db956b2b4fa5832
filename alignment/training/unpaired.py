"""KTO: single answers, each wanted or not, through the same forward, batches and reference store as pairs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from alignment.config.stages.preference import Kto
from alignment.training import sequence
from alignment.training.losses.unpaired import UNPAIRED_LOSSES
from alignment.training.metrics import answer_sums
from alignment.training.preference import Referenced


class KTO(Referenced):
    """Rows: prompt_ids, chosen_ids (the answer), rejected_ids (the answer to another prompt; empty for a loss without a
    reference point), label.

    The answers to other prompts say how far the policy has moved in general (KTO's z0): of all rows of the global
    batch, without a gradient, before the loss of any, so that the result does not depend on how the batch is split.
    Their reference log-probs lie beside those of the answers, as a pair's do.
    """

    def __init__(self, *, settings: Kto, **kwargs: Any) -> None:
        self._how = settings
        self._kl = torch.zeros(())  # z0 of the step
        super().__init__(**kwargs)

    def collate(self, numbers: Sequence[int]) -> dict[str, Any]:
        both = super().collate(numbers)
        answers = self._half(both, slice(0, len(numbers)))
        rows: Any = self.train_dataset
        answers["desirable"] = torch.tensor([bool(rows[number]["label"]) for number in numbers])
        if self._how.has_reference_point:
            answers["mismatched"] = self._half(both, slice(len(numbers), None))
        return answers

    def _half(self, both: dict[str, Any], rows: slice) -> dict[str, Any]:
        """The answers, or the mismatched ones, as rows of their own."""
        width = int(both["attention_mask"][rows].sum(1).max())
        names = ("input_ids", "attention_mask", "completion_mask")
        half: dict[str, Any] = {name: both[name][rows, :width] for name in names}
        half["reference"] = both["reference"][rows, : width - 1]
        return self._packed(half, branches=1)

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        if self._how.has_reference_point:
            self._kl = self._reference_point(inputs)
        return super().training_step(model, inputs, num_items_in_batch)

    @torch.no_grad()
    def _reference_point(self, inputs: dict[str, Any]) -> Tensor:
        """z0 of the global batch: KTO, arXiv:2402.01306, sec. 4.1. [], nats."""
        total = torch.zeros((), dtype=torch.float64, device=self.args.device)
        for micro_batch in inputs["micro_batches"]:
            rows = self._prepare_inputs(micro_batch.pop("mismatched"))
            output = self._look(rows)
            total += (output.log_probs - rows["reference"]).sum(dtype=torch.float64)
        total = self.accelerator.reduce(total, reduction="sum") / sequence.size()  # sharers of a sequence say the same
        return (total / inputs["weight"]).clamp(min=0).float()

    def _loss(self, model: Any, inputs: dict[str, Any], divisor: Tensor) -> Tensor:
        output = self._forward(model, inputs)
        ratio = (output.log_probs - inputs["reference"]).sum(1, dtype=torch.float64)
        how = {name: getattr(self._how, name) for name in ("beta", "desirable_weight", "undesirable_weight")}
        return UNPAIRED_LOSSES[self._how.loss](ratio, inputs["desirable"], self._kl, **how).sum()

    def _measure(self, inputs: dict[str, Any]) -> dict[str, Tensor | float]:
        labels, reference = self._labels(inputs), inputs["reference"]
        self._compare(reference, labels)
        return answer_sums(self._output, reference, labels, inputs["desirable"], self._how.beta, self._kl)
