"""What makes a trainer go on exactly: it carries its sums, schedule and generators through checkpoints, and saves after
steps that all processes agree on. A mixin below AlignedTrainer; what is saved lies in keeper.py and state.py."""

from __future__ import annotations

import math
import time
from typing import Any

import transformers
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from alignment.errors import TrainingError
from alignment.training import ranks
from alignment.training.health import ROLLED_BACK, NonFinite, SpikeAlarm
from alignment.training.keeper import Keeper, Wishes, reduced
from alignment.training.metrics import Meter

_Trainer: Any = transformers.Trainer  # after the TRL trainer in the order of bases
SCHEDULE = ("last_epoch", "_step_count", "_last_lr")  # of torch.optim.lr_scheduler.LambdaLR


class Resumable(_Trainer):
    """keeper: writes checkpoints and knows which one training goes on from; None: nothing is saved."""

    keeper: Keeper | None
    nonfinite: NonFinite
    alarm: SpikeAlarm
    first_loss: float | None  # before the first update; None until a step's loss was a number

    def _set_up(self, keeper: Keeper | None, nonfinite: NonFinite, alarm: SpikeAlarm) -> None:
        self.keeper, self.nonfinite, self.alarm = keeper, nonfinite, alarm
        self.first_loss = None
        self.seconds = 0.0  # of training, those of earlier attempts included
        self._began = time.monotonic()
        self._losses = [0.0, 0]  # since the last row of metrics: sum, steps
        self._row: dict[str, float] = {}  # the last row of metrics
        self._micro_losses: list[Tensor] = []
        self._agreed = Wishes()
        self._trouble: str | None = None  # of this step's loss, in words
        self._held_back = False  # the schedule, in a step that was skipped
        self._saved_after = 0

    @property
    def first_step(self) -> int:
        return self.keeper.first_step if self.keeper else 0

    def _start(self) -> None:
        """Engine and reference are ready: bring in the state that training goes on from."""
        self._before_training()
        if self.keeper is None:
            return
        self.keeper.safe_point()
        self._settle_buckets()
        if self.first_step:
            self.keeper.restore(self)
        self.keeper.start(self)
        self._began = time.monotonic()

    def _before_training(self) -> None:
        """What must be done with the start model, whether training begins or goes on."""

    def _settle_buckets(self) -> None:
        """DDP lays gradients into other buckets once it has seen a backward pass. Where a value lies in them decides in
        which order more than two processes are added up, so that must not happen after the first step of an attempt."""
        if not isinstance(self.model_wrapped, DistributedDataParallel):
            return
        inputs = self._prepare_inputs(self._any_micro_batch())
        divisor = self._new_step(1)
        self._last = False
        with self._quiet_metrics(), self.accelerator.autocast():
            loss = self.compute_loss(self.model_wrapped.train(), inputs, num_items_in_batch=divisor)
        (loss * 0).backward()
        self.model_wrapped.zero_grad()
        self._meter = Meter()

    def _any_micro_batch(self) -> dict[str, Any]:
        return self.collate(self.batches.rows(0)[:1])

    def _rows_of_micro_batches(self) -> list[list[int]]:
        """Of this process, in the step that is being computed."""
        return self.batches.micro_batches(self.state.global_step)[self.share]

    def _rows_of_step(self) -> list[int]:
        """Of all processes, in the same."""
        return self.batches.rows(self.state.global_step)

    def _new_step(self, divisor: float) -> Tensor:
        """Nothing is added up yet. divisor: of the step's loss. Returns it as a tensor on the device."""
        raise NotImplementedError

    # --- what is carried ------------------------------------------------------------------------------------------

    def training_state(self) -> dict[str, Any]:
        """The same on all processes, as JSON."""
        return {
            "last_logged": self._globalstep_last_logged,
            "schedule": {name: getattr(self.lr_scheduler, name) for name in SCHEDULE},
            "losses": self._losses,
            "row": self._row,
            "first_loss": self.first_loss,
            "input_tokens": self._input_tokens,
            "skipped": self.nonfinite.skipped,
            "alarm": self.alarm.state_dict(),
            "seconds": self.seconds + time.monotonic() - self._began,
        }

    def load_training_state(
        self, facts: dict[str, Any], meter: dict[str, float] | None, meters: list[dict[str, float]]
    ) -> None:
        """facts: of `training_state`. meter: this process's sums, or None where all of them have to be shared anew."""
        self.state.global_step = self._saved_after = self.first_step
        self._globalstep_last_logged = facts["last_logged"]
        groups = self.lr_scheduler.optimizer.param_groups
        (rate,) = set(facts["schedule"]["_last_lr"])  # one for all groups, and engines differ in which empty ones stay
        schedule = facts["schedule"] | {"_last_lr": [rate] * len(groups)}
        for name in SCHEDULE:
            setattr(self.lr_scheduler, name, schedule[name])
        for group in groups:
            group["lr"] = rate
        self._losses, self._row = list(facts["losses"]), facts["row"]
        if self._row:
            self.state.log_history = [self._row]
        self.first_loss, self._input_tokens = facts["first_loss"], facts["input_tokens"]
        self.nonfinite.skipped = list(facts["skipped"])
        self.alarm.load_state_dict(facts["alarm"])
        self.seconds = facts["seconds"]
        self._meter.load_state_dict(meter, meters, ranks.rank(), self.args.device)

    def meter_values(self) -> dict[str, float]:
        return self._meter.values()

    def ranked_by(self, name: str) -> float | None:
        """What checkpoints are ranked by, of the last row of metrics."""
        return self._row.get(name)

    # --- one step -------------------------------------------------------------------------------------------------

    def _agree(self, loss: Tensor) -> Tensor:
        """Before the backward of the last micro-batch: the loss of the whole step, and every process's wishes, are
        known to all before the optimiser moves. Returns the loss, or NaN for a step whose update must not happen."""
        total, self._agreed = reduced(self._step_loss, self.keeper.wishes() if self.keeper else Wishes())
        mean, step = total / ranks.world_size(), self.state.global_step + 1
        self._trouble = None
        if not math.isfinite(mean):
            self._trouble = f"the loss is {mean}"
            if self.nonfinite.policy == "halt":
                self._meet(self._trouble)
            return loss * math.nan  # every engine leaves out the update of a gradient that is not finite
        self._losses = [self._losses[0] + mean, self._losses[1] + 1]
        if self.first_loss is None:  # steps without a number are skipped: none has moved the weights yet
            self.first_loss = mean
            self._check_start()
        if (told := self.alarm.hear(mean)) and self.args.process_index == 0:
            self.warn(f"step {step}: {told}")
        return loss

    def _check_start(self) -> None:
        """All micro-batches of the first step are computed, nothing was updated."""

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        """Known to all processes before the optimiser moves; None for a step that is skipped."""
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        if self._trouble is None and (norm is None or math.isfinite(norm)):
            return norm
        self._meet(self._trouble or f"the gradient's norm is {float(norm)}")
        if not self.is_deepspeed_enabled:  # which has left the update out
            self.optimizer.zero_grad()  # AdamW leaves alone what has no gradient
        self._held_back = self.accelerator.optimizer_step_was_skipped
        return None

    def _meet(self, what: str) -> None:
        """As stage.*.nonfinite says: raise on all processes alike, or return, and the update is left out."""
        step = self.state.global_step
        own = zip(self._micro_losses, self._rows_of_micro_batches(), strict=True)
        mine = [rows for loss, rows in own if not math.isfinite(loss)]
        rows = [row for parts in ranks.all_gather(mine) for part in parts for row in part]
        if self.keeper:
            self.keeper.settle()  # what is being written is good, and may be what training goes back to
        try:
            self.nonfinite.meet(step + 1, what, sorted(set(rows) or self._rows_of_step()))
        except TrainingError as error:
            if error.retry and self.keeper and self.args.process_index == 0:
                self.keeper.stage.tell_next(**{ROLLED_BACK: self.nonfinite.rolled_back})
            raise
        if self.args.process_index == 0:
            self.warn(f"step {step + 1}: {what}: its update is skipped")

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        """Trainer's hook after a step. Saving comes after logging: a row that a checkpoint has behind it is on disk."""
        if self._held_back:  # Trainer moves the schedule only with the weights
            self._held_back = False
            self.lr_scheduler.step()
        super()._maybe_log_save_evaluate(*args, **kwargs)
        step = self.state.global_step
        if self.keeper and step != self._saved_after:  # it is called at the end of an epoch too
            self._saved_after = step
            self.keeper.after_step(self, step, self._agreed, last=step >= self.state.max_steps)
