"""TRL's trainers under one mixin: global batches fixed by seed and step, losses divided once, metrics reduced once.

Wanted from TRL and Trainer: losses, adapters, the reference model, engines, optimiser, schedule. Replaced: batches,
micro-batches, the scale of the loss, metrics. What is leaned on below the public surface is in tests/contract.
"""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import transformers
import trl
import trl.trainer.utils as trl_utils
from accelerate.utils import DistributedType
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PrinterCallback

from alignment.errors import TrainingError
from alignment.training.batching import GlobalBatches
from alignment.training.callbacks import Reporter
from alignment.training.metrics import Meter, pair_sums, token_sums

_Trainer: Any = transformers.Trainer  # after the TRL trainer in the order of bases

# The loss where policy and reference agree, so that every margin is zero; beta is the setting.
ZERO_MARGIN_LOSS: dict[str, Callable[[float], float]] = {
    "sigmoid": lambda beta: math.log(2),  # -log sigmoid(0)
    "hinge": lambda beta: 1.0,  # max(0, 1 - 0)
    "ipo": lambda beta: 1 / (4 * beta * beta),  # (0 - 1 / (2 beta))^2
}
NOT_FINITE = "lower learning_rate, or look at the data"
FIRST_LOSS_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-3}


class AlignedTrainer(_Trainer):
    """Mixin before a TRL trainer. An item of the loader is one optimiser step: this process's micro-batches."""

    loss_is_scaled_for_ga: Any = True  # compute_loss scales: Trainer must not divide again

    def __init__(self, *, batches: GlobalBatches, on_step: Callable[..., None], model: Any, **kwargs: Any) -> None:
        """batches: rows of every step. on_step(step, total, metrics): after every step; between rows no metrics."""
        self.batches = batches
        self._meter = Meter()
        self._outputs: list[Any] = []  # what the forward of policy, then reference returned for this micro-batch
        self._input_tokens = 0.0
        self._logged_at: float | None = None
        self.first_loss = math.nan
        super().__init__(model=model, callbacks=[Reporter(on_step)], **kwargs)
        self.remove_callback(PrinterCallback)
        self.model.register_forward_hook(self._keep_output)

    # --- data ---------------------------------------------------------------------------------------------------------

    def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        """The rows are tokenised, checked and cut to size by the prepare stage."""
        return dataset

    def get_train_dataloader(self) -> DataLoader:
        steps = _Steps(self.train_dataset, self.data_collator, self.batches, self.args.process_index)
        return DataLoader(steps, batch_size=None, shuffle=False, pin_memory=self.args.dataloader_pin_memory)

    # --- one optimiser step -------------------------------------------------------------------------------------------

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """Forward and backward of this process's micro-batches; gradients meet and the optimiser may move at the last.

        Returns this process's part of the loss times the number of processes: their mean is the loss.
        """
        micro_batches, divisor = inputs["micro_batches"], inputs["weight"]
        self._logged_at = self._logged_at or time.monotonic()
        self._step_loss = torch.zeros((), dtype=torch.float64, device=self.args.device)
        self.current_gradient_accumulation_steps = len(micro_batches)
        by_engine = self.accelerator.distributed_type == DistributedType.DEEPSPEED
        with self._quiet_metrics():
            for number, micro_batch in enumerate(micro_batches, start=1):
                self._last = number == len(micro_batches)
                self.accelerator.gradient_state._set_sync_gradients(self._last)
                apart = nullcontext() if self._last or by_engine else self.accelerator.no_sync(model)
                with apart:
                    super().training_step(model, micro_batch, torch.tensor(divisor, device=self.args.device))
        return self._step_loss.float()

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        self._outputs.clear()
        with _labelled_positions_only():
            loss = super().compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)
        loss = loss * self._scale(inputs, num_items_in_batch)
        self._step_loss += loss.detach().double()
        with torch.no_grad():
            attended = inputs["attention_mask"].sum(1)
            self._meter.add({"input_tokens": attended.sum(), "longest_row": attended.max()})
            self._meter.add(self._measure(inputs))
        self._outputs.clear()
        if self._last:
            self._check_loss()
        return loss

    def _scale(self, inputs: dict[str, Any], divisor: Tensor) -> float:
        """From the loss that TRL returns to (this micro-batch's sum) * processes / (divisor of the global batch)."""
        raise NotImplementedError

    def _measure(self, inputs: dict[str, Any]) -> dict[str, Tensor]:
        """Sums for the meter, from self._outputs."""
        raise NotImplementedError

    def _check_loss(self) -> None:
        """The loss of the whole step, known to all processes before the optimiser moves: finite, or all stop."""
        loss = float(self.accelerator.reduce(self._step_loss.clone(), reduction="mean"))
        step = self.state.global_step
        if not math.isfinite(loss):
            raise TrainingError(f"the loss is {loss} at step {step + 1}", fix=NOT_FINITE)
        if step == 0:
            self.first_loss = loss
            self._check_first_loss(loss)

    def _check_first_loss(self, loss: float) -> None:
        pass

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        if norm is not None and not math.isfinite(norm):
            raise TrainingError(
                f"the gradient's norm is {float(norm)} at step {self.state.global_step + 1}",
                fix=NOT_FINITE,
            )
        return norm

    def floating_point_ops(self, inputs: Any) -> int:
        return 0

    # --- metrics ------------------------------------------------------------------------------------------------------

    def _keep_output(self, module: Any, arguments: Any, output: Any) -> None:
        self._outputs.append(output)

    @contextmanager
    def _quiet_metrics(self) -> Iterator[None]:
        """TRL gathers metrics in every micro-batch, which fails where processes hold unequal rows; ours take over."""
        names = ("gather", "gather_for_metrics")
        for name in names:
            setattr(self.accelerator, name, lambda value, *args, **kwargs: value)
        try:
            yield
        finally:
            for name in names:
                delattr(self.accelerator, name)
            self._metrics["train"] = defaultdict(list)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """One row: Trainer's loss, grad_norm and learning_rate, and the sums since the last row, reduced once."""
        sums = self._meter.reduce(self.accelerator.gather)
        if "loss" not in logs or not sums:  # Trainer's summary at the end, which is not a row
            return
        now = time.monotonic()
        self._input_tokens += sums["input_tokens"]
        sums["num_tokens"] = self._input_tokens
        sums["tokens_per_s"] = sums.pop("input_tokens") / max(now - (self._logged_at or now), 1e-9)
        self._logged_at = now
        for name in ("rows", "tokens"):
            sums.pop(name, None)
        super().log({**logs, **sums}, start_time)

    def _send_telemetry(self) -> None:
        """A library reports nothing of a run to anybody."""


class SFT(AlignedTrainer, trl.SFTTrainer):
    """Cross-entropy on the trained tokens, divided once by their number in the global batch.

    Rows: input_ids, labels (-100 where nothing is trained).
    """

    def _scale(self, inputs: dict[str, Any], divisor: Tensor) -> float:
        return 1.0  # TRL divides by num_items_in_batch and multiplies by the number of processes

    def _measure(self, inputs: dict[str, Any]) -> dict[str, Tensor]:
        return token_sums(self._outputs[0], inputs["labels"])


class DPO(AlignedTrainer, trl.DPOTrainer):
    """DPO and relatives, the mean over the pairs of the global batch. Rows: prompt_ids, chosen_ids, rejected_ids."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if self.ref_model is not None:
            self.ref_model.register_forward_hook(self._keep_output)

    def _scale(self, inputs: dict[str, Any], divisor: Tensor) -> float:
        pairs = len(inputs["input_ids"]) // 2  # TRL returns their mean
        return pairs * self.accelerator.num_processes / int(divisor)

    def _measure(self, inputs: dict[str, Any]) -> dict[str, Tensor]:
        policy, reference = self._outputs
        labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, -100)
        return pair_sums(policy, reference, labels, self.beta)

    def _check_first_loss(self, loss: float) -> None:
        """Before the first update the policy is the reference: every margin is zero and the loss is known."""
        expected = ZERO_MARGIN_LOSS[self.loss_types[0]](self.beta)
        tolerance = FIRST_LOSS_TOLERANCE[torch.bfloat16 if self.args.bf16 else torch.float32]
        if abs(loss - expected) > tolerance * max(1.0, expected):
            raise TrainingError(
                f"the reference is not the start model: the first loss is {loss:.5f}, "
                f"where policy and reference agree it is {expected:.5f}",
                fix="start DPO from the model that is its reference",
            )


class _Steps(torch.utils.data.Dataset):
    """Step number -> this process's micro-batches, collated, and the divisor of the step's loss."""

    def __init__(self, rows: Any, collate: Callable[[list[Any]], dict[str, Tensor]], batches: GlobalBatches, rank: int):
        self._rows, self._collate, self._batches, self._rank = rows, collate, batches, rank

    def __len__(self) -> int:
        return self._batches.steps

    def __getitem__(self, step: int) -> dict[str, Any]:
        mine = self._batches.micro_batches(step)[self._rank]
        micro_batches = [self._collate([self._rows[row] for row in micro_batch]) for micro_batch in mine]
        return {"micro_batches": micro_batches, "weight": self._batches.weight(step)}


@contextmanager
def _labelled_positions_only() -> Iterator[None]:
    """Let TRL's fused head score trained positions only. On CPU it scores all, prompt and padding included."""
    stock = trl_utils._use_triton
    trl_utils._use_triton = lambda device: True
    try:
        yield
    finally:
        trl_utils._use_triton = stock
