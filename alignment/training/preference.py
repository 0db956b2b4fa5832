"""DPO and its family: pairs through TRL's trainer, with the reference's log-probs kept."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
import trl
from accelerate.utils import is_peft_model
from torch import Tensor

from alignment.errors import TrainingError
from alignment.training import sequence
from alignment.training.batching import GlobalBatches
from alignment.training.health import DisplacementAlarm
from alignment.training.metrics import pair_sums
from alignment.training.moving_reference import MovingReference
from alignment.training.objective import Objective, columns, leaves
from alignment.training.packing import IGNORED
from alignment.training.ranks import all_gather
from alignment.training.reference_pass import References
from alignment.training.rows import column_lengths
from alignment.training.swapped import nothing_hashed
from alignment.training.trainers import AlignedTrainer

# How far apart, in nats a token, policy and reference may be in the mean before the first update: rounding, since other
# rows share their micro-batch. Between packed and padded rows it is 5e-7 and 1e-3 in a random Llama of 12 layers on a
# CPU; the rest is for deeper models and a GPU's kernels.
START_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2}


class Referenced(AlignedTrainer, trl.DPOTrainer):
    """Compares the policy with its reference. Rows: prompt_ids, chosen_ids, rejected_ids.

    The reference is the policy as training begins (with LoRA: its adapter off). Its log-probs are computed before the
    first step and kept (training/reference_pass.py); no second model is held. references: None: there is none.
    """

    branches = 2

    def __init__(self, *, references: References | None, **kwargs: Any) -> None:
        self._references = references
        with nothing_hashed():
            super().__init__(**kwargs)

    def _precompute_ref_logps(self, dataset: Any, *args: Any) -> Any:
        return dataset  # TRL would go over all rows now, padded, and keep only sums

    @property
    def batches_of_start(self) -> GlobalBatches:
        """Those whose reference is the start model."""
        return self.batches

    def _before_training(self) -> None:
        super()._before_training()
        if self._references is not None:
            self._references.complete(self, self.keeper.safe_point if self.keeper else lambda kept: None)

    def _labels(self, rows: dict[str, Any]) -> Tensor:
        return rows["input_ids"].masked_fill(rows["completion_mask"] == 0, IGNORED)

    _moved = False  # whether the reference has left the start model

    # --- the reference ------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def score(self: Any, numbers: Sequence[int]) -> list[np.ndarray]:
        """Of each pair: log-probs of the chosen answer's tokens, then of the rejected one's, in nats, as the policy now
        gives them with its adapters off."""
        inputs = self._prepare_inputs(AlignedTrainer.collate(self, numbers))
        labels = self._labels(inputs)
        plain = self.model
        with plain.disable_adapter() if is_peft_model(plain) and not self._moved else nullcontext():
            output = self._look(inputs)
        scored = labels[:, 1:] != IGNORED
        rows = output.log_probs[scored].float().cpu().split(scored.sum(1).tolist())
        return [torch.cat(both).numpy() for both in zip(rows[: len(numbers)], rows[len(numbers) :], strict=True)]

    def collate(self, numbers: Sequence[int]) -> dict[str, Any]:
        rows = super().collate(numbers)
        if self._references is not None:
            rows["reference"] = self._references.spread(numbers, self._labels(rows))
        return rows

    def _scale(self, inputs: dict[str, Any], divisor: Tensor) -> float:
        """Losses are sums over the micro-batch, the divisor is the number of records in the global batch."""
        return self.accelerator.num_processes / self._divisor

    def training_state(self) -> dict[str, Any]:
        digest = None if self._references is None else self._references.digest
        return {**super().training_state(), "reference": digest}

    def load_training_state(self, facts: dict[str, Any], *meters: Any) -> None:
        now = None if self._references is None else self._references.digest
        if self._references and None not in (facts["reference"], now) and facts["reference"] != now:
            raise TrainingError(
                "the checkpoint's reference is another model than the start model of now",
                where=self._references.where,
                fix="delete the checkpoints of this stage, or bring back its start model",
            )
        super().load_training_state(facts, *meters)

    def facts(self) -> dict[str, float]:
        computed = {} if self._references is None else {"reference_computed": self._references.computed}
        return {**super().facts(), **computed}

    # --- before the first update --------------------------------------------------------------------------------------

    def _new_step(self, divisor: float) -> Tensor:
        self._apart = torch.zeros(2, dtype=torch.float64, device=self.args.device)  # nats, tokens: before any update
        return super()._new_step(divisor)

    def _compare(self, reference: Tensor, labels: Tensor) -> None:
        """Added up on the device, read once."""
        if self.first_loss is None:
            apart = (self._output.log_probs - reference).abs().sum(dtype=torch.float64)
            self._apart += torch.stack([apart, (labels[:, 1:] != IGNORED).sum()])

    def _check_start(self) -> None:
        """Before the first update the policy is the reference, token by token. The loss would not tell: what is wrong
        in both answers cancels in their margin, and beta scales the rest."""
        if self._references is None:
            return
        apart, tokens = self.accelerator.reduce(self._apart, reduction="sum").tolist()
        allowed = START_TOLERANCE[torch.bfloat16 if self.args.bf16 else torch.float32]
        if not apart <= allowed * tokens:
            raise TrainingError(
                f"the reference is not the start model: before the first update their log-probs are "
                f"{apart / tokens:.2g} nats a token apart, rounding explains {allowed:.0e}",
                where=self._references.where,
                fix="delete that folder, and if it happens again look at the model: it answers one row unlike the next",
            )


class DPO(Referenced):
    """DPO and its family: the mean of objective(pairs) over the pairs of the global batch."""

    objective: Objective
    _mean_chosen_tokens = 1.0  # of the step's chosen answers
    _ahead: list[Tensor] | None = None  # of a loss of whole batches: [pairs, 4] a micro-batch of the step

    def __init__(self, *, objective: Objective, **kwargs: Any) -> None:
        self.objective = objective
        super().__init__(**kwargs)
        update = objective.settings.reference_update
        self._moving = MovingReference(update, self._references) if update and self._references else None
        self._displacement = DisplacementAlarm()

    @property
    def anchor(self) -> dict[str, Tensor]:
        """Weights of a reference that moves (state.py), by the keys of fragments."""
        return self._moving.weights if self._moving else {}

    @property
    def batches_of_start(self) -> GlobalBatches:
        if self._moving is None:
            return self.batches
        return replace(self.batches, steps=min(self._moving.settings.every_steps, self.batches.steps))

    def _before_training(self) -> None:
        super()._before_training()
        if self._moving:
            self._moving.begin(self)

    def make_step(self, step: int) -> dict[str, Any]:
        made = super().make_step(step)
        chosen = self._chosen_tokens[self.batches.rows(step)].mean()
        return {**made, "mean_chosen_tokens": float(chosen)}

    @cached_property
    def _chosen_tokens(self) -> np.ndarray:
        """[rows]: tokens of each chosen answer."""
        return column_lengths(self.train_dataset, "chosen_ids")

    def facts(self) -> dict[str, float]:
        moved = {} if self._moving is None else {"reference_updates": self._moving.updates(self.state.global_step)}
        return {**super().facts(), **moved}

    @property
    def _moved(self) -> bool:  # type: ignore[override]
        return self._moving is not None and self.state.global_step >= self._moving.settings.every_steps

    def collate(self, numbers: Sequence[int]) -> dict[str, Any]:
        return super().collate(numbers) if self._moving is None else AlignedTrainer.collate(self, numbers)

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        if self._moving is not None:  # not where rows are collated, which may be a step ahead
            references = self._moving.at(self)
            own = self.batches.micro_batches(self.state.global_step)[self.share]
            for numbers, rows in zip(own, inputs["micro_batches"], strict=True):
                rows["reference"] = references.spread(numbers, self._labels(rows).cpu())
        self._mean_chosen_tokens = inputs["mean_chosen_tokens"]
        if self.objective.whole:
            self._look_ahead(inputs["micro_batches"])
        return super().training_step(model, inputs, num_items_in_batch)

    def _loss(self, model: Any, inputs: dict[str, Any], divisor: Tensor) -> Tensor:
        labels = self._labels(inputs)
        output = self._forward(model, inputs, squares=self.objective.weighs)
        pairs, weights = self._pairs(output, inputs.get("reference"), labels)
        if not self.objective.whole:
            return self.objective(pairs, weights).sum()
        if self._ahead is None:  # not in a step: DDP lays out its buckets by any loss (Resumable._settle_buckets)
            return pairs.margin.sum()
        value, *slopes = self._ahead.pop(0).unbind(1)  # each [pairs of this micro-batch]
        moved = (slope * (one - one.detach()) for slope, one in zip(slopes, leaves(pairs), strict=True))
        return (value + sum(moved)).sum()  # that value, and its gradient

    def _pairs(self, output: Any, reference: Tensor | None, labels: Tensor) -> Any:
        squares = output.log_sum_sq_probs if self.objective.weighs else None
        pairs = self.objective.pairs(output.log_probs, reference, labels, self._mean_chosen_tokens)
        return pairs, self.objective.weights(output.log_probs, squares, labels)

    @torch.no_grad()
    def _look_ahead(self, micro_batches: list[dict[str, Any]]) -> None:
        """For a loss that depends on the whole global batch: a forward of all its pairs first, from which every process
        learns the loss of each and how it changes with the pair's log-probs. That makes the result independent of
        micro-batches and processes."""
        step = self.state.global_step
        own = self.batches.micro_batches(step)[self.share]
        told = []
        for numbers, micro_batch in zip(own, micro_batches, strict=True):
            inputs = self._prepare_inputs(micro_batch)
            labels = self._labels(inputs)
            output = self._look(inputs, squares=self.objective.weighs)
            pairs, weights = self._pairs(output, inputs.get("reference"), labels)
            told.append(list(zip(numbers, columns(pairs, weights).tolist(), strict=True)))
        each = all_gather(told)[:: sequence.size()]  # sharers of a sequence say the same
        everyone = [row for process in each for micro_batch in process for row in micro_batch]
        noise = torch.Generator().manual_seed(self.batches.seed * 1_000_003 + step)
        slopes = self.objective.slopes(everyone, noise, self._mean_chosen_tokens)
        self._ahead = [torch.stack([slopes[number] for number in numbers]).to(self.args.device) for numbers in own]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        before, settings = self._row, self.objective.settings
        super().log(logs, start_time)
        fixed = self._references is not None and self._moving is None
        if self._row is before or not fixed or "apo_down" in settings.losses:  # which lowers the chosen ones by design
            return
        told = self._displacement.hear(self._row, settings.reward_scale)
        if told and self.args.process_index == 0:
            self.warn(f"step {self.state.global_step}: {told}")

    def _measure(self, inputs: dict[str, Any]) -> dict[str, Tensor | float]:
        labels, reference = self._labels(inputs), inputs.get("reference")
        if reference is not None:
            self._compare(reference, labels)
        settings = self.objective.settings
        return pair_sums(self._output, reference, labels, settings.reward_scale, settings.by_token)

    def training_state(self) -> dict[str, Any]:
        state = {**super().training_state(), **self.objective.state_dict()}
        return {**state, "displacement": self._displacement.state_dict()}

    def load_training_state(self, facts: dict[str, Any], *meters: Any) -> None:
        super().load_training_state(facts, *meters)
        self.objective.load_state_dict(facts)
        self._displacement = DisplacementAlarm(**facts.get("displacement", {}))
