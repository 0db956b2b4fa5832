"""TRL's trainers under one mixin: global batches fixed by seed and step, losses divided once, metrics reduced once.

Wanted from TRL and Trainer: losses, adapters, the reference model, engines, optimiser, schedule. Replaced: batches,
micro-batches, the scale of the loss, metrics. What is leaned on below the public surface is in tests/contract.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
import trl
from accelerate.utils import DistributedType, is_peft_model
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PrinterCallback

from alignment.errors import ConfigError
from alignment.training import sequence
from alignment.training.attention import PACKED
from alignment.training.batching import GlobalBatches
from alignment.training.callbacks import Before, Reporter
from alignment.training.four_bits import is_in_four_bits
from alignment.training.health import NonFinite, SpikeAlarm
from alignment.training.keeper import Keeper
from alignment.training.memory import BUDGET
from alignment.training.metrics import UNUSED, Meter, token_sums
from alignment.training.packing import BUCKET, pack
from alignment.training.ranks import all_gather
from alignment.training.resuming import Resumable
from alignment.training.shared_prefix import compile_layers, install
from alignment.training.steps import Steps
from alignment.training.swapped import labelled_positions_only
from alignment.training.trial import refusal, trial

KEPT = ("pack", "reference", "targets")  # of a micro-batch: they go to the device, and stay in the precision they have


@dataclass(frozen=True)
class Packing:
    """on: compute packs, not padded rows. share: a beginning that rows share once. compile: the layers, for packs that
    are filled up to a multiple of BUCKET tokens."""

    on: bool = True
    share: bool = True
    compile: bool = False


class AlignedTrainer(Resumable):
    """Mixin before a TRL trainer. An item of the loader is one optimiser step: this process's micro-batches."""

    loss_is_scaled_for_ga: Any = True  # compute_loss scales: Trainer must not divide again
    branches = 1  # rows of one record, which begin alike

    def __init__(
        self,
        *,
        batches: GlobalBatches,
        widths: Sequence[int],
        on_step: Callable[..., None],
        model: Any,
        packing: Packing = Packing(),
        keeper: Keeper | None = None,
        nonfinite: NonFinite | None = None,
        spike_alarm: float | None = None,
        say: Callable[[str], None] = print,
        warn: Callable[[str], None] = print,
        **kwargs: Any,
    ) -> None:
        """batches: rows of every step. widths: their tokens when padded, for models that cannot be packed.

        on_step(step, total, metrics): after every step; between rows of metrics these are empty. keeper: of
        checkpoints. say: one line to whoever reads the log. warn: one to people.
        """
        self._set_up(keeper, nonfinite or NonFinite(), SpikeAlarm(spike_alarm))
        self.warn = warn
        self.batches, self.packing, self._widths, self.say = batches, packing, widths, say
        self._meter = Meter()
        self._output: Any = None  # what the policy's forward returned for this micro-batch
        self._input_tokens = 0.0
        self._logged_at: float | None = None
        self._steps: Steps | None = None
        super().__init__(model=model, callbacks=[Before(self._start), Reporter(on_step)], **kwargs)
        if is_in_four_bits(self.model):  # TRL made bf16 of the adapters
            for parameter in self.model.parameters():
                parameter.data = parameter.data.float() if parameter.requires_grad else parameter.data
        self.remove_callback(PrinterCallback)
        self.model.register_forward_hook(self._keep_output)
        install(self._plain_model())

    def _plain_model(self) -> Any:
        """The transformers model inside adapters."""
        return self.model.get_base_model() if is_peft_model(self.model) else self.model

    @property
    def tokens_without_gradients(self) -> int:
        """Of a micro-batch of a pass without gradients: BUDGET times those of a step, since one layer's activations and
        a block of logits at a time are less than what autograd keeps of two layers and the head's gradients. Where a
        step checkpoints it keeps no more than one layer's itself."""
        return (1 if self.args.activation_checkpointing else BUDGET) * self.batches.tokens_per_micro_batch

    def _before_training(self) -> None:
        """The engine is ready, no step was made: try whether this model can be packed."""
        plain, attention = self._plain_model(), ""
        longest = max(self._widths) // self.branches
        reason = "packing is off" if not self.packing.on else refusal(plain.config, longest)
        if reason is None:
            precision = torch.bfloat16 if self.args.bf16 else torch.float32
            reason, attention = trial(plain, self.model_wrapped, min(self.branches, 2), precision, self.args.device)
        reason = next((one for one in all_gather(reason) if one), None)  # one that cannot, and nobody does
        if reason is not None and sequence.size() > 1:
            what = f"this model's packs cannot be shared by processes: {reason}"
            fix = "1, or, if it is their number, one that divides both heads and heads of keys"
            raise ConfigError(what, where="engine.sequence_parallel", fix=fix)
        if reason is not None:
            self.say(f"rows are padded, not packed: {reason}")
            if self.packing.compile:
                self.say("engine.compile is ignored: layers are compiled for packs, not for padded rows")
            self.packing = replace(self.packing, on=False, compile=False)
            self.batches = replace(self.batches, widths=self._widths)
            return
        plain.set_attn_implementation(PACKED)
        self.say(f"records are packed without padding; attention: {attention}")
        if self.packing.compile:
            count = compile_layers(plain)
            how = (
                f"{count} layers are compiled at their first packs, which are filled up to multiples of {BUCKET} tokens"
            )
            self.say(how if count else "engine.compile is ignored: no layers were found in this model")

    # --- data ---------------------------------------------------------------------------------------------------------

    def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        """The rows are tokenised, checked and cut to size by the prepare stage."""
        return dataset

    def get_train_dataloader(self) -> DataLoader:
        ahead = self.args.device.type != "cpu"
        self._steps = Steps(self.make_step, self.batches.steps, ahead, self.first_step)
        own = torch.Generator()  # a loader draws a seed as it begins: not from what a checkpoint has brought back
        pinned = self.args.dataloader_pin_memory
        return DataLoader(self._steps, batch_size=None, shuffle=False, pin_memory=pinned, generator=own)

    def make_step(self, step: int) -> dict[str, Any]:
        """This process's micro-batches, collated, and the divisor of the step's loss."""
        micro_batches = [self.collate(rows) for rows in self.batches.micro_batches(step)[self.share]]
        return {"micro_batches": micro_batches, "weight": self.batches.weight(step)}

    @property
    def share(self) -> int:
        """Which share of a global batch is this process's; sharers of a sequence have one together."""
        return self.args.process_index // sequence.size()

    def collate(self, numbers: Sequence[int]) -> dict[str, Any]:
        """The rows of these numbers as TRL's collator makes them, and their pack where the model can be packed."""
        return self._packed(self.data_collator([self.train_dataset[number] for number in numbers]))

    def _packed(self, rows: dict[str, Any], branches: int | None = None) -> dict[str, Any]:
        """With their pack, where the model can be packed. branches: rows of one record, where not as the trainer's."""
        if self.packing.on:
            labels, bucket = self._labels(rows), BUCKET if self.packing.compile else sequence.size()
            given = rows["input_ids"], rows["attention_mask"], labels
            rows["pack"] = sequence.cut(pack(*given, branches or self.branches, self.packing.share, bucket))
        return rows

    def _labels(self, rows: dict[str, Any]) -> Tensor:
        """[rows, width]: the tokens that are scored, -100 elsewhere."""
        raise NotImplementedError

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """To the device; Trainer would also round floating-point numbers to the precision of a DeepSpeed engine."""
        kept = {name: value.to(self.args.device) for name, value in inputs.items() if name in KEPT}
        rest = {name: value for name, value in inputs.items() if name not in kept}
        return {**super()._prepare_inputs(rest), **kept}

    def train(self, *args: Any, **kwargs: Any) -> Any:
        done = False
        try:
            told = super().train(*args, **kwargs)
            done = True
            return told
        finally:  # a thread left behind would be waited for when the interpreter ends
            if self._steps is not None:
                self._steps.close()
            if self.keeper is not None:
                self.keeper.close(wait=done)
            self.seconds += time.monotonic() - self._began

    # --- one optimiser step -------------------------------------------------------------------------------------------

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """Forward and backward of this process's micro-batches; gradients meet and the optimiser may move at the last.

        Returns this process's part of the loss times the number of processes: their mean is the loss.
        """
        micro_batches = inputs["micro_batches"]
        if self.keeper is not None:
            self.keeper.stage.tick()
        self._logged_at = self._logged_at or time.monotonic()
        divisor = self._new_step(inputs["weight"])
        self.current_gradient_accumulation_steps = len(micro_batches)
        by_engine = self.accelerator.distributed_type == DistributedType.DEEPSPEED
        with self._quiet_metrics():
            for number, micro_batch in enumerate(micro_batches, start=1):
                self._last = number == len(micro_batches)
                self.accelerator.gradient_state._set_sync_gradients(self._last)
                apart = nullcontext() if self._last or by_engine else self.accelerator.no_sync(model)
                with apart:
                    super().training_step(model, micro_batch, divisor)
        return self._step_loss.float().nan_to_num(0.0)  # Trainer adds it up for its summary; `log` says what it was

    def _new_step(self, divisor: float) -> Tensor:
        self._divisor, self._micro_losses = divisor, []
        self._step_loss = torch.zeros((), dtype=torch.float64, device=self.args.device)
        return torch.tensor(divisor, device=self.args.device)  # once: the copy waits for the device

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        with labelled_positions_only():
            loss = self._loss(model, inputs, num_items_in_batch)
        loss = loss * self._scale(inputs, num_items_in_batch)
        self._step_loss += loss.detach().double() / sequence.size()
        self._micro_losses.append(loss.detach())
        with torch.no_grad():
            attended = inputs["attention_mask"].sum(1)
            computed = inputs["pack"].tokens if "pack" in inputs else inputs["input_ids"].numel()
            self._meter.add({"input_tokens": attended.sum(), "longest_row": attended.max()}, sequence.size())
            self._meter.add({"computed_share": computed})
            self._meter.add(self._measure(inputs), sequence.size())
        self._output = None
        return self._agree(loss) if self._last else loss

    def _loss(self, model: Any, inputs: dict[str, Any], divisor: Tensor) -> Tensor:
        """Of a micro-batch: TRL's, where a trainer has none of its own."""
        return super().compute_loss(model, inputs, num_items_in_batch=divisor)

    def _forward(self, model: Any, inputs: dict[str, Any], **how: Any) -> Any:
        """Log-probs of the labelled tokens, [rows, width - 1], and what else of them is asked for; how: of packs only
        (shared_prefix.py)."""
        packed = {"pack": inputs["pack"], **how} if "pack" in inputs else {}
        given = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        return model(**given, labels=self._labels(inputs), use_cache=False, fused_lm_head=True, **packed)

    @torch.no_grad()
    def _look(self, inputs: dict[str, Any], **how: Any) -> Any:
        """The same by the policy as it is, for its log-probs alone."""
        engine = self.model_wrapped
        training = engine.training
        engine.eval()
        with self.accelerator.autocast():
            output = self._forward(engine, inputs, **{"measure": False, **how})
        engine.train(training)
        self._output = None  # kept for a loss that is not to come
        return output

    def _scale(self, inputs: dict[str, Any], divisor: Tensor) -> float:
        """From what `_loss` returns to (this micro-batch's sum) * processes / (divisor of the global batch)."""
        raise NotImplementedError

    def _measure(self, inputs: dict[str, Any]) -> dict[str, Tensor | float]:
        """Sums for the meter, from self._output."""
        raise NotImplementedError

    def facts(self) -> dict[str, float]:
        """Of the whole run, for its summary."""
        first = {} if self.first_loss is None else {"first_loss": self.first_loss}
        return {**first, "skipped_steps": len(self.nonfinite.skipped)}

    def floating_point_ops(self, inputs: Any) -> int:
        return 0

    # --- metrics ------------------------------------------------------------------------------------------------------

    def _keep_output(self, module: Any, arguments: Any, output: Any) -> None:
        self._output = output

    @contextmanager
    def _quiet_metrics(self) -> Iterator[None]:
        """TRL gathers metrics in every micro-batch, which fails where processes hold unequal rows, and waits for the
        device a dozen times to print them; ours take over."""
        names = ("gather", "gather_for_metrics")
        for name in names:
            setattr(self.accelerator, name, lambda value, *args, **kwargs: UNUSED)
        try:
            yield
        finally:
            for name in names:
                delattr(self.accelerator, name)
            self._metrics["train"] = defaultdict(list)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """One row: Trainer's loss, grad_norm and learning_rate, and the sums since the last row, reduced once."""
        sums = self._meter.reduce(self.accelerator.gather)
        if "learning_rate" not in logs or not sums:  # Trainer's summary at the end, which is not a row
            return
        total, steps = self._losses
        logs, self._losses = {name: value for name, value in logs.items() if name != "loss"}, [0.0, 0]
        if steps:  # of those that were not skipped
            logs = {"loss": total / steps, **logs}
        if self.nonfinite.skipped:
            logs["skipped_steps"] = len(self.nonfinite.skipped)
        now = time.monotonic()
        self._input_tokens += sums["input_tokens"]
        sums["num_tokens"] = self._input_tokens
        sums["tokens_per_s"] = sums.pop("input_tokens") / max(now - (self._logged_at or now), 1e-9)
        self._logged_at = now
        for name in ("rows", "tokens", "desirable", "undesirable", "fresh_tokens"):
            sums.pop(name, None)
        super().log({**logs, **sums}, start_time)
        self._row = self.state.log_history[-1]

    def _send_telemetry(self) -> None:
        """A library reports nothing of a run to anybody."""


class SFT(AlignedTrainer, trl.SFTTrainer):
    """Cross-entropy on the trained tokens, divided once by their number in the global batch.

    Rows: input_ids, labels (-100 where nothing is trained).
    """

    def _labels(self, rows: dict[str, Any]) -> Tensor:
        return rows["labels"]

    def _scale(self, inputs: dict[str, Any], divisor: Tensor) -> float:
        return 1.0  # TRL divides by num_items_in_batch and multiplies by the number of processes

    def _measure(self, inputs: dict[str, Any]) -> dict[str, Tensor | float]:
        return token_sums(self._output, inputs["labels"])
