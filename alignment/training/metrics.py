"""Metrics of training: what each means, and how it combines over micro-batches, steps and processes.

Sums stay on the device while a step runs; one collective a row of metrics brings them together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from alignment.training.losses.policy import kl


@dataclass(frozen=True)
class Metric:
    """how: mean (a sum over units by their number) | sum | max | min. by: the sum that a mean is divided by."""

    how: Literal["mean", "sum", "max", "min"]
    by: str | None = None


PER_ROW, PER_TOKEN = Metric("mean", "rows"), Metric("mean", "tokens")

# A row is an example (SFT) or a pair (DPO); a token is a trained one (SFT) or one of either answer (DPO).
METRICS: dict[str, Metric] = {
    "rows": Metric("sum"),
    "tokens": Metric("sum"),
    "input_tokens": Metric("sum"),
    "longest_row": Metric("max"),
    "computed_share": Metric("mean", "input_tokens"),  # tokens that went through the model, of those the rows hold
    "mean_token_accuracy": PER_TOKEN,
    "entropy": PER_TOKEN,
    "kl": PER_TOKEN,
    "rewards/chosen": PER_ROW,
    "rewards/rejected": PER_ROW,
    "rewards/margins": PER_ROW,
    "rewards/accuracies": PER_ROW,
    "logps/chosen": PER_ROW,
    "logps/rejected": PER_ROW,
    "desirable": Metric("sum"),
    "undesirable": Metric("sum"),
    "rewards/desirable": Metric("mean", "desirable"),
    "rewards/undesirable": Metric("mean", "undesirable"),
    "reference_point": PER_ROW,  # KTO's z0, nats an answer
    "accuracy": PER_ROW,
    "margin": PER_ROW,
    "mean_reward": PER_ROW,
    "min_reward": Metric("min"),
    "max_reward": Metric("max"),
    "squared_error": PER_ROW,
    "ratio": PER_TOKEN,  # of policy and sampling policy (online)
    "clip_fraction": PER_TOKEN,
    "value": PER_TOKEN,  # of PPO's value head
    "value_loss": PER_TOKEN,
    "fresh_tokens": Metric("sum"),  # of a rollout's first update
    "mismatch": Metric("mean", "fresh_tokens"),  # |log-prob in training - in decoding|
    "mismatch_k3": Metric("mean", "fresh_tokens"),
}
EXTREME = {"max": torch.maximum, "min": torch.minimum}
# A margin of fewer nats is rounding: before the first update every margin is zero, and no pair is right.
NO_MARGIN = 1e-3


class Meter:
    """Running sums of one process; `reduce` combines those of all and starts anew."""

    def __init__(self) -> None:
        self._values: dict[str, Tensor] = {}

    def add(self, values: Mapping[str, Tensor | float], sharers: int = 1) -> None:
        """values: for a mean or a sum, the sum over the units of one micro-batch; for max and min, its extreme.
        sharers: so many processes add the same."""
        for name, value in values.items():
            value = torch.as_tensor(value).detach().double()
            value = value if METRICS[name].how in EXTREME else value / sharers
            before = self._values.get(name)
            if before is not None:
                value = EXTREME.get(METRICS[name].how, torch.add)(before, value)
            self._values[name] = value

    def values(self) -> dict[str, float]:
        """The sums as they stand."""
        return {name: float(value) for name, value in self._values.items()}

    def load_state_dict(
        self, mine: Mapping[str, float] | None, all_of_them: Sequence[Mapping[str, float]], rank: int, device: Any
    ) -> None:
        """Go on with sums of before. mine: this process's; None: the first process takes those of all together."""
        if mine is None:
            mine = {}
            for name in sorted({name for values in all_of_them for name in values}):
                values = [values[name] for values in all_of_them if name in values]
                how = METRICS[name].how
                joined = {"max": max, "min": min}.get(how, sum)(values)
                mine[name] = joined if rank == 0 or how in EXTREME else 0.0
        self._values = {name: torch.tensor(value, dtype=torch.float64, device=device) for name, value in mine.items()}

    def reduce(self, gather: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """name -> value over all processes. gather: [1, n] of each process -> [processes, n], in one collective."""
        if not self._values:
            return {}
        names = sorted(self._values)
        device = max((value.device for value in self._values.values()), key=lambda device: device.type != "cpu")
        row = torch.stack(
            [self._values[name].to(device) for name in names]
        )  # counts known to the CPU stay there till now
        all_values = gather(row[None]).cpu()
        self._values = {}
        return combine(names, all_values)


def combine(names: Iterable[str], values: Tensor) -> dict[str, float]:
    """values: [processes, names], each column put together as METRICS says. The mean of nothing is left out."""
    columns = dict(zip(names, values.unbind(1), strict=True))
    total: dict[str, float] = {}
    for name, column in columns.items():
        total[name] = float({"max": column.max, "min": column.min}.get(METRICS[name].how, column.sum)())
    divisors = {name: metric.by for name, metric in METRICS.items() if metric.how == "mean" and metric.by}
    told = {name: value for name, value in total.items() if name not in divisors}
    return told | {name: total[name] / total[by] for name, by in divisors.items() if name in total and total[by]}


def token_sums(output: Any, labels: Tensor) -> dict[str, Tensor | float]:
    """Sums over the trained tokens of a scored micro-batch.

    output: per-token fields [rows, width - 1], zero where nothing is trained; labels: [rows, width], -100 off.
    """
    return {
        "tokens": (labels[:, 1:] != -100).sum(),
        "mean_token_accuracy": output.is_top1.sum(),
        "entropy": output.entropy.sum(),
    }


def pair_sums(
    policy: Any, reference: Tensor | None, labels: Tensor, beta: float, by_token: bool = False
) -> dict[str, Tensor | float]:
    """Sums over the pairs of a scored micro-batch whose first half are the chosen rows, the second the rejected ones.

    reference: its log-probs, [rows, width - 1] as the policy's; None where a loss has none.

    Rewards are the implicit ones of Rafailov et al. 2023 (arXiv:2305.18290, eq. 5), beta log(pi / pi_ref), in nats;
    without a reference beta log pi, by_token its mean over the answer's tokens (SimPO, ORPO). beta is 1 where the loss
    has none (`Dpo.reward_scale`).
    kl: Schulman's k3 estimator (joschu.net/blog/kl-approx.html) a token, (w - 1) - log w with w = pi / pi_ref: for
    tokens drawn from the reference - what DPO assumes of its pairs - an unbiased estimate of KL(pi_ref || pi), in nats
    a token; of pairs from elsewhere a measure of drift, still >= 0 and 0 only where both agree. What the
    evaluate stage measures is of the model's own answers, and at temperature 1 estimates KL(pi || start model).
    """
    log_probs = policy.log_probs.double()
    log_ratios = log_probs if reference is None else log_probs - reference  # [2 pairs, width - 1]
    tokens = (labels[:, 1:] != -100).sum(1) if by_token else 1
    chosen_reward, rejected_reward = (beta * log_ratios.sum(1) / tokens).chunk(2)
    chosen_logp, rejected_logp = log_probs.sum(1).chunk(2)
    return {
        "rows": len(labels) // 2,
        **token_sums(policy, labels),
        **({} if reference is None else {"kl": kl(reference, log_probs, "k3").sum()}),
        "rewards/chosen": chosen_reward.sum(),
        "rewards/rejected": rejected_reward.sum(),
        "rewards/margins": (chosen_reward - rejected_reward).sum(),
        "rewards/accuracies": (chosen_reward - rejected_reward > beta * NO_MARGIN).sum(),
        "logps/chosen": chosen_logp.sum(),
        "logps/rejected": rejected_logp.sum(),
    }


def answer_sums(
    policy: Any, reference: Tensor, labels: Tensor, desirable: Tensor, beta: float, reference_point: Tensor
) -> dict[str, Tensor | float]:
    """Sums over the answers of a scored micro-batch, wanted or not. Rewards and kl are those of `pair_sums`.

    reference: [rows, width - 1]; desirable: [rows] bool; reference_point: KTO's z0, nats.
    """
    log_ratios = (policy.log_probs - reference).double()
    rewards, unwanted = beta * log_ratios.sum(1), ~desirable
    return {
        "rows": len(labels),
        **token_sums(policy, labels),
        "kl": kl(reference, policy.log_probs.double(), "k3").sum(),
        "desirable": desirable.sum(),
        "undesirable": unwanted.sum(),
        "rewards/desirable": (rewards * desirable).sum(),
        "rewards/undesirable": (rewards * unwanted).sum(),
        "reference_point": reference_point * len(labels),
    }


def reward_sums(logits: Tensor) -> dict[str, Tensor | float]:
    """Sums over the pairs of a reward model's micro-batch. logits: [2 pairs, 1], all chosen rows first."""
    rewards = logits.detach().double().flatten()
    chosen, rejected = rewards.chunk(2)
    return {
        "rows": len(chosen),
        "accuracy": (chosen > rejected).sum(),
        "margin": (chosen - rejected).sum(),
        "mean_reward": (chosen + rejected).sum() / 2,
        "min_reward": rewards.min(),
        "max_reward": rewards.max(),
    }


def score_sums(logits: Tensor, scores: Tensor, chance: bool) -> dict[str, Tensor | float]:
    """Sums over the rows of a micro-batch of answers with scores. logits: [rows, 1]; scores: [rows]. chance: the
    sigmoid of a reward is the score, not the reward itself."""
    rewards = logits.detach().double().flatten()
    error = (torch.sigmoid(rewards) if chance else rewards) - scores
    return {
        "rows": len(rewards),
        "squared_error": (error**2).sum(),
        "mean_reward": rewards.sum(),
        "min_reward": rewards.min(),
        "max_reward": rewards.max(),
    }


class Unused:
    """Stands for each number of TRL's own metrics, which are not ours: computing with it costs nothing, asks the device
    for nothing, and comes to 0."""

    def _same(self, *args: Any, **kwargs: Any) -> Unused:
        return self

    sum = mean = min = max = __getitem__ = __truediv__ = __mul__ = _same

    def chunk(self, count: int, dim: int = 0) -> tuple[Unused, ...]:
        return (self,) * count

    def item(self) -> float:
        return 0.0

    def __floordiv__(self, other: Any) -> int:
        return 0

    def __gt__(self, other: Any) -> bool:
        return False


UNUSED = Unused()
