"""DPO and relatives: TRL's trainer on pairs, with the reference's log-probs kept."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
import trl
from accelerate.utils import is_peft_model
from torch import Tensor

from alignment.errors import TrainingError
from alignment.training.metrics import pair_sums
from alignment.training.packing import IGNORED
from alignment.training.reference_pass import References
from alignment.training.swapped import nothing_hashed
from alignment.training.trainers import AlignedTrainer

# How far apart, in nats a token, policy and reference may be in the mean before the first update: rounding, since other
# rows share their micro-batch. Between packed and padded rows it is 5e-7 and 1e-3 in a random Llama of 12 layers on a
# CPU; the rest is for deeper models and a GPU's kernels.
START_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2}


class Pairs(AlignedTrainer):
    """The mean over the pairs of the global batch; TRL returns that of the micro-batch."""

    branches = 2

    def _scale(self, inputs: dict[str, Any], divisor: Tensor) -> float:
        return len(inputs["input_ids"]) // 2 * self.accelerator.num_processes / self._divisor


class DPO(Pairs, trl.DPOTrainer):
    """DPO and relatives. Rows: prompt_ids, chosen_ids, rejected_ids.

    The reference is the policy as training begins (with LoRA: its adapter off). Its log-probs are computed before the
    first step and kept (training/reference_pass.py); no second model is held.
    """

    def __init__(self, *, references: References, **kwargs: Any) -> None:
        self._references = references
        with nothing_hashed():
            super().__init__(**kwargs)

    def _precompute_ref_logps(self, dataset: Any, *args: Any) -> Any:
        return dataset  # TRL would go over all rows now, padded, and keep only sums

    def _before_training(self) -> None:
        super()._before_training()
        self._references.complete(self, self.keeper.safe_point if self.keeper else lambda kept: None)

    def _new_step(self, divisor: float) -> Tensor:
        self._apart = torch.zeros(2, dtype=torch.float64, device=self.args.device)  # nats, tokens: before any update
        return super()._new_step(divisor)

    @torch.no_grad()
    def score(self: Any, numbers: Sequence[int]) -> list[np.ndarray]:
        """Of each pair: log-probs of the chosen answer's tokens, then of the rejected one's, in nats, as the policy now
        gives them with its adapters off."""
        inputs = self._prepare_inputs(AlignedTrainer.collate(self, numbers))
        labels = self._labels(inputs)
        how = {"pack": inputs["pack"], "measure": False} if "pack" in inputs else {}
        engine, plain = self.model_wrapped, self.model
        was_training = engine.training
        engine.eval()
        with plain.disable_adapter() if is_peft_model(plain) else nullcontext(), self.accelerator.autocast():
            output = engine(
                input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], labels=labels, use_cache=False,
                fused_lm_head=True, **how,
            )  # fmt: skip
        engine.train(was_training)
        self._output = None  # kept for a loss that is not to come
        scored = labels[:, 1:] != IGNORED
        rows = output.log_probs[scored].float().cpu().split(scored.sum(1).tolist())
        return [torch.cat(both).numpy() for both in zip(rows[: len(numbers)], rows[len(numbers) :], strict=True)]

    def collate(self, numbers: Sequence[int]) -> dict[str, Any]:
        rows = super().collate(numbers)
        rows["reference"] = self._references.spread(numbers, self._labels(rows))
        return rows

    def training_state(self) -> dict[str, Any]:
        return {**super().training_state(), "reference": self._references.digest}

    def load_training_state(self, facts: dict[str, Any], *meters: Any) -> None:
        now = self._references.digest
        if None not in (facts["reference"], now) and facts["reference"] != now:
            raise TrainingError(
                "the checkpoint's reference is another model than the start model of now",
                where=self._references.where,
                fix="delete the checkpoints of this stage, or bring back its start model",
            )
        super().load_training_state(facts, *meters)

    def facts(self) -> dict[str, float]:
        return {**super().facts(), "reference_computed": self._references.computed}

    def _labels(self, rows: dict[str, Any]) -> Tensor:
        return rows["input_ids"].masked_fill(rows["completion_mask"] == 0, IGNORED)

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        inputs = dict(inputs)
        self._reference = inputs.pop("reference")  # not for the model
        inputs["ref_chosen_logps"], inputs["ref_rejected_logps"] = self._reference.sum(1).chunk(2)
        return super().compute_loss(model, inputs, *args, **kwargs)

    def _measure(self, inputs: dict[str, Any]) -> dict[str, Tensor | float]:
        labels = self._labels(inputs)
        if self.first_loss is None:  # added up on the device, read once
            apart = (self._output.log_probs - self._reference).abs().sum(dtype=torch.float64)
            self._apart += torch.stack([apart, (labels[:, 1:] != IGNORED).sum()])
        return pair_sums(self._output, self._reference, labels, self.beta)

    def _check_start(self) -> None:
        """Before the first update the policy is the reference, token by token. The loss would not tell: what is wrong
        in both answers cancels in their margin, and beta scales the rest."""
        apart, tokens = self.accelerator.reduce(self._apart, reduction="sum").tolist()
        allowed = START_TOLERANCE[torch.bfloat16 if self.args.bf16 else torch.float32]
        if not apart <= allowed * tokens:
            raise TrainingError(
                f"the reference is not the start model: before the first update their log-probs are "
                f"{apart / tokens:.2g} nats a token apart, rounding explains {allowed:.0e}",
                where=self._references.where,
                fix="delete that folder, and if it happens again look at the model: it answers one row unlike the next",
            )
