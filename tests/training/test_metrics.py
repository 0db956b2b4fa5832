from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

from alignment.training.metrics import METRICS, UNUSED, Meter, combine, pair_sums, reward_sums, token_sums


def test_metrics_of_uneven_processes_equal_those_of_one_process() -> None:
    """Process A holds 1 pair of 10 tokens, B 3 pairs of 2 tokens in two micro-batches.

    entropy, by tokens: (10 * 2.0 + 2 * 5.0) / 12 = 2.5; rewards/chosen, by rows: (1 + 2 + 3 + 6) / 4 = 3; the longest
    row is a maximum, rows a sum. A mean of the processes' means would give an entropy of 3.5.
    """
    a, b, one = Meter(), Meter(), Meter()
    parts = [
        {"rows": 1, "tokens": 10, "entropy": 20.0, "rewards/chosen": 1.0, "longest_row": 12},
        {"rows": 2, "tokens": 1, "entropy": 4.0, "rewards/chosen": 2.0 + 3.0, "longest_row": 4},
        {"rows": 1, "tokens": 1, "entropy": 6.0, "rewards/chosen": 6.0, "longest_row": 3},
    ]
    for meter, part in ((a, parts[0]), (b, parts[1]), (b, parts[2]), (one, parts[0]), (one, parts[1]), (one, parts[2])):
        meter.add(part)
    columns: list[torch.Tensor] = []
    a.reduce(lambda row: columns.append(row) or row)
    both = b.reduce(lambda row: torch.cat([columns[0], row]))
    assert both == {"entropy": 2.5, "longest_row": 12, "rewards/chosen": 3, "rows": 4, "tokens": 12}
    assert both == one.reduce(lambda row: row)


def test_extremes_and_shares_of_uneven_processes_equal_those_of_one_process() -> None:
    """min and max are those of all; the computed share is (30 + 10) of (40 + 40) tokens, not (0.75 + 0.25) / 2 of rows
    of unlike number."""
    a, b = Meter(), Meter()
    a.add({"min_reward": -2.0, "max_reward": 1.0, "input_tokens": 40, "computed_share": 30})
    b.add({"min_reward": 0.5, "max_reward": 0.7, "input_tokens": 20, "computed_share": 5})
    b.add({"min_reward": -1.0, "max_reward": 3.0, "input_tokens": 20, "computed_share": 5})
    columns: list[torch.Tensor] = []
    a.reduce(lambda row: columns.append(row) or row)
    both = b.reduce(lambda row: torch.cat([columns[0], row]))
    assert both == {"min_reward": -2, "max_reward": 3, "input_tokens": 80, "computed_share": 0.5}


def test_reward_sums_of_two_pairs_by_hand() -> None:
    """Rewards chosen 2, -1, rejected 0, 1: one of two right, margins 2 and -2, mean of all four 0.5 (two a pair)."""
    sums = reward_sums(torch.tensor([[2.0], [-1.0], [0.0], [1.0]]))
    expected = {"rows": 2, "accuracy": 1, "margin": 0, "mean_reward": 1, "min_reward": -1, "max_reward": 2}
    assert {name: float(value) for name, value in sums.items()} == expected


def test_a_margin_of_rounding_is_no_margin() -> None:
    """Before the first update policy and reference agree to rounding: no pair counts as right."""
    reference = torch.tensor([[-3.0], [-1.0]])
    policy = SimpleNamespace(
        log_probs=reference + torch.tensor([[1e-6], [-1e-6]]), is_top1=torch.ones(2, 1), entropy=torch.ones(2, 1)
    )
    labels = torch.tensor([[-100, 4], [-100, 5]])
    assert pair_sums(policy, reference, labels, beta=0.1)["rewards/accuracies"] == 0
    policy.log_probs = reference + torch.tensor([[1e-2], [-1e-2]])
    assert pair_sums(policy, reference, labels, beta=0.1)["rewards/accuracies"] == 1


def test_trls_own_metrics_come_to_zero_and_ask_the_device_for_nothing() -> None:
    assert (UNUSED[:, -3:].chunk(2, dim=0)[1][torch.ones(2).bool()].sum() / UNUSED).mean().item() == 0
    assert UNUSED.sum().item() // 1 == 0 and not UNUSED > 0


def test_a_meter_starts_anew_after_a_row() -> None:
    meter = Meter()
    meter.add({"tokens": 4, "entropy": 8.0})
    assert meter.reduce(lambda row: row)["entropy"] == 2
    meter.add({"tokens": 1, "entropy": 3.0})
    assert meter.reduce(lambda row: row) == {"tokens": 1, "entropy": 3}
    assert meter.reduce(lambda row: row) == {}


def test_counts_that_the_cpu_knows_meet_the_sums_on_the_device_once_a_row() -> None:
    """The "meta" device stands for a GPU: it holds no numbers, but refuses to meet the CPU's as one does."""
    meter, devices = Meter(), []
    for _ in range(2):
        meter.add({"rows": 2, "tokens": torch.ones((), device="meta"), "longest_row": torch.ones((), device="meta")})

    def gather(row: torch.Tensor) -> torch.Tensor:
        devices.append(row.device.type)
        return torch.zeros(row.shape)

    assert meter.reduce(gather).keys() == {"rows", "tokens", "longest_row"} and devices == ["meta"]


def test_every_mean_names_a_unit_that_is_summed() -> None:
    assert all(METRICS[metric.by].how == "sum" for metric in METRICS.values() if metric.how == "mean" and metric.by)


def test_the_mean_of_nothing_is_left_out() -> None:
    """An entropy of 0 would be a policy that repeats itself."""
    assert combine(["entropy", "tokens"], torch.zeros(2, 2)) == {"tokens": 0}


def test_token_sums_count_trained_positions_only() -> None:
    labels = torch.tensor([[-100, -100, 7, 1], [-100, 5, 1, -100]])
    output = SimpleNamespace(
        is_top1=torch.tensor([[0, 1, 1], [0, 1, 0]]).bool(), entropy=torch.tensor([[0, 1.5, 0.5], [1.0, 1.0, 0]])
    )
    sums = {name: float(value) for name, value in token_sums(output, labels).items()}
    assert sums == {"tokens": 4, "mean_token_accuracy": 3, "entropy": 4}


def test_pair_sums_of_one_pair_by_hand() -> None:
    """Log-ratios chosen (ln 2, 0), rejected (-ln 2, 0), beta 0.5.

    rewards: 0.5 ln 2 and -0.5 ln 2, margin ln 2; k3 a token: w = 2: 2 - 1 - ln 2; w = 1/2: 1/2 - 1 + ln 2; sum 1/2.
    """
    ln2 = math.log(2)
    reference = torch.tensor([[-3.0, -1.0], [-1.0, -2.0]])
    policy = SimpleNamespace(
        log_probs=torch.tensor([[-3 + ln2, -1.0], [-1 - ln2, -2.0]]),
        is_top1=torch.ones(2, 2).bool(),
        entropy=torch.ones(2, 2),
    )
    sums = pair_sums(policy, reference, torch.tensor([[-100, 4, 1], [-100, 5, 1]]), beta=0.5)
    expected = {
        "rows": 1, "tokens": 4, "mean_token_accuracy": 4, "entropy": 4, "kl": 0.5, "rewards/chosen": ln2 / 2,
        "rewards/rejected": -ln2 / 2, "rewards/margins": ln2, "rewards/accuracies": 1, "logps/chosen": -4 + ln2,
        "logps/rejected": -3 - ln2,
    }  # fmt: skip
    assert {name: float(value) for name, value in sums.items()} == pytest.approx(expected, abs=1e-6)
