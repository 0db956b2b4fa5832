"""Online training: the policy answers, the reward judges, the update learns; one optimiser step at a time.

All processes know all answers (answering.py), so each computes the same split into micro-batches, and nothing depends
on how many processes there are.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import set_seed
from trl.models.utils import prepare_deepspeed
from trl.trainer.base_trainer import _BaseTrainer
from trl.trainer.utils import add_fused_lm_head, identity

from alignment.config.stages.online import Kl, Online
from alignment.errors import TrainingError
from alignment.training.answering import Answering
from alignment.training.attention import PACKED
from alignment.training.batching import GlobalBatches
from alignment.training.losses import policy as losses
from alignment.training.ranks import all_gather, rank, world_size
from alignment.training.rollouts import Answer, Group, Rollout, Targets, collated, measured, with_signal
from alignment.training.shared_prefix import install

NO_KL = Kl(coefficient=0.0, estimator="k3", place="loss", target=None, gain=0.1, corrected=True)


class Policies(_BaseTrainer):
    """The least of a TRL trainer that carries the mixin: adapters, the head that scores labelled tokens, no collator.

    TRL's GRPOTrainer and RLOOTrainer would bring a reference loaded by the model's name, generation and reward
    functions of their own, and losses scaled by micro-batch (docs/decisions.md)."""

    def __init__(self, *, model: Any, args: Any, peft_config: Any = None, **kwargs: Any) -> None:
        set_seed(args.seed)  # of the adapters
        plain = model
        add_fused_lm_head(plain, outputs=("log_probs", "entropy"))
        if peft_config is not None:
            from peft import get_peft_model

            plugin = args.deepspeed_plugin
            model = get_peft_model(model, peft_config, autocast_adapter_dtype=plugin is None or plugin.zero_stage != 3)
            if args.activation_checkpointing:
                model.enable_input_require_grads()
        super().__init__(model=model, args=args, data_collator=identity, **kwargs)
        self._metrics: dict[str, Any] = {"train": defaultdict(list)}


class OnlineTrainer(Answering, Policies):
    """What becomes of rewards, and the loss, is in classes below."""

    def __init__(self, *, settings: Online, reference: Any = None, **kwargs: Any) -> None:
        """reference: a copy of the start model, where the KL wants one and no adapter can be switched off."""
        self._reference = reference
        self._rollout: Rollout | None = None
        self._trained_on: list[dict[str, float]] = []  # metrics of the rollouts of the steps since the last row
        self._groups: list[list[int]] = []  # of this process's micro-batches
        self._prompts: list[int] = []  # rows of this step, of all processes
        self.kl: Kl = getattr(settings, "kl", NO_KL)
        self._coefficient = self.kl.coefficient
        super().__init__(settings=settings, **kwargs)
        self.branches = settings.answers_trained_on()

    @property
    def _reuses(self) -> bool:
        """Whether a rollout is still trained on when the policy has moved."""
        return self.settings.steps_per_rollout() > 1

    def _before_training(self) -> None:
        super()._before_training()
        if self._reference is None:
            return
        reference = self._reference.requires_grad_(False).eval()
        add_fused_lm_head(reference)
        install(reference)
        if self.packing.on:
            reference.set_attn_implementation(PACKED)
        if self.is_deepspeed_enabled and self.accelerator.state.deepspeed_plugin.zero_stage == 3:
            self._reference = prepare_deepspeed(reference, self.accelerator)
        else:
            rounded = self.is_deepspeed_enabled and self.args.bf16  # as DeepSpeed rounds the policy
            self._reference = reference.to(self.args.device, torch.bfloat16 if rounded else torch.float32)

    # --- one step -------------------------------------------------------------------------------------------------

    def make_step(self, step: int) -> dict[str, Any]:
        return {"step": step}  # answers come of the policy as it is by then

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        step = inputs["step"]
        number, within = divmod(step, self.settings.steps_per_rollout())
        if self._rollout is None or self._rollout.number != number:
            left = self.batches.steps - step
            enough = -(-left // self.settings.epochs_per_rollout)
            self._rollout = self._make_rollout(number, min(self.settings.batches_per_rollout, enough))
            self._show(number, step + 1, self._rollout.groups[0])
        rollout, size = self._rollout, self.batches.global_batch_size
        first = within * size % len(rollout.groups)
        groups = rollout.groups[first : first + size]
        self._prompts = [group.number for group in groups]
        self._trained_on.append(rollout.metrics)
        self._groups = self._split(groups, self.batches.tokens_per_micro_batch)[rank()]
        made = [self._collated([groups[at] for at in part], within == 0) for part in self._groups]
        self._groups = [[groups[at].number for at in part] for part in self._groups]
        self._tell("updating", 0, 0)
        return super().training_step(model, {"micro_batches": made, "weight": self._weight(groups)}, num_items_in_batch)

    def _loss(self, model: Any, inputs: dict[str, Any], divisor: Tensor) -> Tensor:
        return self._sum(self._forward(model, inputs), inputs["targets"])

    def _sum(self, output: Any, targets: Targets) -> Tensor:
        """Over the micro-batch; what is measured goes into self._sums."""
        raise NotImplementedError

    def _weight(self, groups: Sequence[Group]) -> float:
        """The divisor of the step's loss."""
        raise NotImplementedError

    def _split(self, groups: Sequence[Group], budget: int) -> list[list[list[int]]]:
        """[process][micro-batch] -> indices of groups; a group stays whole."""
        prompts = [len(self._prompt(group.number)) for group in groups]
        answers = [[len(answer.trained) for answer in group.answers] for group in groups]
        padded = [len(each) * (prompt + max(each)) for prompt, each in zip(prompts, answers, strict=True)]
        batches: GlobalBatches = replace(
            self.batches,
            lengths=[prompt + sum(each) for prompt, each in zip(prompts, answers, strict=True)],
            widths=None if self.packing.on else padded,
            tokens_per_micro_batch=budget,
        )
        indices = list(range(len(groups)))
        return batches.split(indices + indices[:1] * max(0, world_size() - len(indices)))

    def _collated(self, groups: Sequence[Group], fresh: bool) -> dict[str, Any]:
        prompts = {group.number: self._prompt(group.number) for group in groups}
        coefficient = self._coefficient if self._rollout is None else self._rollout.coefficient
        return self._packed(collated(groups, prompts, fresh, coefficient))

    def _labels(self, rows: dict[str, Any]) -> Tensor:
        return rows["labels"]

    def _any_micro_batch(self) -> dict[str, Any]:
        number = self.batches.rows(0)[0]
        answers = [Answer([0], [0.0], True, advantages=[0.0]) for _ in range(self.branches)]
        return self._collated([Group(0, number, answers)], fresh=False)

    def _rows_of_micro_batches(self) -> list[list[int]]:
        return self._groups

    def _rows_of_step(self) -> list[int]:
        return self._prompts

    def _scale(self, inputs: dict[str, Any], divisor: Tensor) -> float:
        return self.accelerator.num_processes / self._divisor

    # --- a rollout ------------------------------------------------------------------------------------------------

    def _make_rollout(self, number: int, batches: int) -> Rollout:
        """A collective."""
        wanted, sampled = batches * self.batches.global_batch_size, 0
        telling: list[Group] = []
        spare: list[Group] = []
        rewards: list[float] = []
        for _ in range(1 + getattr(self.settings, "resamples", 0)):
            groups = self._sampled(wanted - len(telling))
            rewards += [answer.reward for group in groups for answer in group.answers if answer.reward is not None]
            sampled += len(groups)
            for group, differs in zip(groups, with_signal(groups), strict=True):
                (telling if differs and any(map(self._trains, group.answers)) else spare).append(group)
            if len(telling) == wanted:
                break
        groups = sorted([*telling, *spare[: wanted - len(telling)]], key=lambda group: group.place)
        metrics = measured(groups) | {"sampled_prompts": float(sampled), "no_signal": len(spare) / sampled}
        if not any(answer.reward is not None for group in groups for answer in group.answers):
            raise TrainingError(f"no answer of rollout {number + 1} could be judged", fix="look at the reward group")
        if getattr(self.settings, "resamples", 0):  # then `reward` is of the prompts that were kept
            metrics["reward_sampled"] = sum(rewards) / len(rewards)
        self._mark(groups)
        rollout = Rollout(number, self._coefficient, groups, metrics)
        if self.settings.refers:
            self._write(groups, self._by_reference)
            self._control(rollout)
        if self._reuses:
            self._write(groups, self._by_policy)
        self._credit(rollout)
        return rollout

    def _mark(self, groups: Sequence[Group]) -> None:
        """Which answers are trained on."""
        for group in groups:
            for answer in group.answers:
                answer.kept = self._trains(answer)

    def _trains(self, answer: Answer) -> bool:
        return answer.reward is not None and (answer.finished or self.settings.truncated != "mask")

    def _credit(self, rollout: Rollout) -> None:
        """From rewards to what each token is worth. The same on all processes."""
        raise NotImplementedError

    def _control(self, rollout: Rollout) -> None:
        """Measure the distance from the start model; the coefficient of the next rollout follows its target."""
        if self._coefficient:
            rollout.metrics["kl_coefficient"] = self._coefficient
        apart = [distance(one) for group in rollout.groups for one in group.answers if one.trained]
        if not apart:
            return
        per_answer = rollout.metrics["kl_answer"] = sum(apart) / len(apart)
        if self.kl.target is not None:
            self._coefficient = losses.adapted(self._coefficient, per_answer, self.kl.target, self.kl.gain)

    # --- passes without gradients -----------------------------------------------------------------------------------

    @torch.no_grad()
    def _write(self, groups: Sequence[Group], passes: Callable[[dict[str, Any]], dict[str, Tensor]]) -> None:
        """Into each answer that is trained on, under their names, what a pass finds of its tokens. A collective.

        passes(a micro-batch) -> name -> [rows, width - 1]."""
        found: dict[tuple[int, int, str], list[float]] = {}
        for part in self._split(groups, self.tokens_without_gradients)[rank()]:
            inputs = self._prepare_inputs(self._collated([groups[at] for at in part], fresh=False))
            mask = inputs["targets"].mask
            for name, values in passes(inputs).items():
                for row, some in enumerate(values[mask].float().cpu().split(mask.sum(1).tolist())):
                    found[part[row % len(part)], row // len(part), name] = some.tolist()
            self._tell("scoring", 0, 0)
        for (at, branch, name), some in (item for part in all_gather(found) for item in part.items()):
            if groups[at].answers[branch].trained:
                setattr(groups[at].answers[branch], name, some)

    def _by_policy(self, inputs: dict[str, Any]) -> dict[str, Tensor]:
        return {"old": self._look(inputs).log_probs}

    def _by_reference(self: Any, inputs: dict[str, Any]) -> dict[str, Tensor]:
        if self._reference is None:
            with self.model.disable_adapter():
                return {"reference": self._look(inputs).log_probs}
        with self.accelerator.autocast():
            return {"reference": self._forward(self._reference, inputs, measure=False).log_probs}

    # --- what is carried, what is told ------------------------------------------------------------------------------

    def training_state(self) -> dict[str, Any]:
        """With the rollout, if the next step trains on it again."""
        again = self._rollout is not None and self.state.global_step % self.settings.steps_per_rollout() != 0
        return {
            **super().training_state(),
            "rollout": self._rollout.to_json() if again and self._rollout else None,
            "coefficient": self._coefficient,
            "trained_on": list(self._trained_on),  # which goes on while this is written
        }

    def load_training_state(self, facts: dict[str, Any], *meters: Any) -> None:
        super().load_training_state(facts, *meters)
        self._rollout = None if facts["rollout"] is None else Rollout.from_json(facts["rollout"])
        self._coefficient, self._trained_on = facts["coefficient"], facts["trained_on"]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self._trained_on and "learning_rate" in logs:
            names = sorted({name for told in self._trained_on for name in told})
            each = {name: [told[name] for told in self._trained_on if name in told] for name in names}
            logs = {**logs, **{name: sum(values) / len(values) for name, values in each.items()}}
            self._trained_on = []
        super().log(logs, start_time)

    def _measure(self, inputs: dict[str, Any]) -> dict[str, Tensor | float]:
        return self._sums


def mismatch(log_probs: Tensor, targets: Targets) -> dict[str, Tensor | float]:
    """Sums over the tokens of an answer's first update: how far training's log-probs are from those of decoding."""
    if not targets.fresh:
        return {}
    return {
        "fresh_tokens": targets.mask.sum(),
        "mismatch": (log_probs - targets.rollout).abs().sum(),
        "mismatch_k3": losses.kl(targets.rollout, log_probs, "k3").sum(),
    }


def distance(answer: Answer) -> float:
    """Of the policy that gave it from the reference, in nats an answer: by k1, of which alone the mean over answers has
    the KL's gradient too, where it is taken off their rewards (config/online_checks.py)."""
    own = torch.tensor(answer.log_probs, dtype=torch.float64)
    return float(losses.kl(own, torch.tensor(answer.reference, dtype=torch.float64), "k1").sum())
