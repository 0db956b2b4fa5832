"""Which arms run on what, how often, and how long that will take. Free of torch."""

from __future__ import annotations

import time
from dataclasses import dataclass

from bench.workloads import BETAS, Workload, pairs, rows_for, totals

TRL_BATCH = 8  # per_device_train_batch_size of TrainingArguments, which TRL keeps
ABLATION_REPEATS = 3  # of an arm with a piece off: it explains a number, it is not one of those compared
# Of the tiny model's loss curves: as many rows as make every arm accumulate, and a rate at which losses move.
CURVE_ROWS, CURVE_STEPS, CURVE_RATE = 16, 20, 1e-3
SWEEP_REPEATS = 3  # one is 16 of TRL's runs


@dataclass(frozen=True)
class Arm:
    """weight: its time a token as a multiple of TRL's tuned, roughly, for the estimate only."""

    meaning: str
    tasks: tuple[str, ...]
    ours: bool = False
    tuned: bool = False
    pieces_off: frozenset[str] = frozenset()
    weight: float = 0.6

    @property
    def ablation(self) -> bool:
        return bool(self.pieces_off)


def _without(piece: str, meaning: str, *tasks: str) -> Arm:
    return Arm(meaning, tasks, ours=True, pieces_off=frozenset({piece}), weight=0.7)


ALL = ("dpo", "sft", "reward")
ARMS: dict[str, Arm] = {
    "trl_default": Arm("TRL as it comes", ALL, weight=1.1),
    "trl_tuned": Arm("TRL tuned", (*ALL, "sweep"), tuned=True, weight=1.0),
    "ours": Arm("ours", (*ALL, "sweep"), ours=True),
    "ours_no_sharing": _without("sharing", "ours, every answer with its own prompt", "dpo"),
    "ours_no_packing": _without("packing", "ours, rows padded instead of packed", "dpo", "sft"),
    "ours_warm": _without("reference_pass", "ours, reference found in the store", "dpo"),
    "ours_trl_head": _without("head", "ours, TRL's kernel for the head", "dpo", "sft"),
    "ours_whole_last_layer": _without("last_layer", "ours, the last layer whole", "dpo", "sft"),
}
# Arms for which the store must be full before the first repeat.
WARM = {"ours_warm"}


@dataclass(frozen=True)
class Group:
    """One table row set: a workload and the arms that are interleaved on it."""

    workload: Workload
    arms: tuple[str, ...]
    repeats: int

    @property
    def reference(self) -> str:
        """The arm whose losses the others must have."""
        return "trl_default" if "trl_default" in self.arms else self.arms[0]

    def repeats_of(self, arm: str) -> int:
        return min(self.repeats, ABLATION_REPEATS) if ARMS[arm].ablation else self.repeats

    def units(self, arm: str, runs: float) -> float:
        """Size of `runs` runs of an arm, to be multiplied by a time: the arm's weight times what `_cost` says."""
        padded = arm == "trl_default"
        if self.workload.task != "sweep":
            return runs * ARMS[arm].weight * _cost(self.workload, self.workload.task, padded)
        sft, dpo = (_cost(self.workload, task, padded) for task in ("sft", "dpo"))
        return runs * ARMS[arm].weight * (len(BETAS) * dpo + (1 if ARMS[arm].ours else len(BETAS)) * sft)


def _cost(workload: Workload, task: str, padded: bool) -> float:
    """Tokens; padded: as TRL's defaults pad them. A third more for DPO's reference."""
    rows = pairs(workload)
    tokens = totals(task, rows).tokens
    if padded:
        whole = rows_for("sft" if task == "sft" else "reward", rows)  # DPO's pairs as reward's: each with its prompt
        longest = [max(map(len, row.values())) for row in whole]
        batch, sides = min(TRL_BATCH, workload.rows), 1 if task == "sft" else 2
        tokens = sum(max(longest[at : at + batch]) * batch * sides for at in range(0, len(rows), batch))
    return tokens * 4 / 3 if task == "dpo" else tokens


def groups(
    tasks: tuple[str, ...], lengths: tuple[str, ...], arms: tuple[str, ...] | None, ablations: tuple[str, ...],
    size: str, rows: int, steps: int, repeats: int,
) -> list[Group]:  # fmt: skip
    """Groups in the order of what matters most; where time does not suffice for one, those after it may still fit.
    The sweep runs on the first lengths, half the steps, 3 repeats at most; reward has half the rows.

    DPO's first loss is log 2 whatever the trainer does: with one step there would be nothing to compare.

    ablations: lengths on which ours also runs with each piece off. arms: only these, where they apply.
    """
    made = []
    for task in tasks:
        for shape in lengths[:1] if task == "sweep" else lengths:
            count = max(2, steps // 2) if task == "sweep" else steps
            batch = max(2, rows // 2) if task == "reward" else rows
            workload = Workload(task=task, lengths=shape, size=size, rows=batch, steps=count)
            chosen = tuple(
                name
                for name, arm in ARMS.items()
                if task in arm.tasks and (shape in ablations or not arm.ablation) and (arms is None or name in arms)
            )
            if chosen:
                made.append(Group(workload, chosen, min(repeats, SWEEP_REPEATS) if task == "sweep" else repeats))
    return sorted(made, key=lambda group: (group.workload.task, group.workload.lengths) == ("reward", "equal"))


def micro_batches(rows: int) -> list[int]:
    return [size for size in (1, 2, 4, 8, 16) if size <= rows and rows % size == 0]


class Clock:
    """Estimates the time left from what was done so far: each unit is taken to cost what the past ones did.

    reserved: seconds of what comes after the groups. guess: seconds a unit before any was done, if anything is known.
    """

    def __init__(self, plan: list[Group], reserved: float = 0.0, guess: float | None = None) -> None:
        self._left = {(i, arm): self._of(group, arm) for i, group in enumerate(plan) for arm in group.arms}
        self._all = sum(self._left.values())
        self.reserved, self._guess = reserved, guess
        self.started = time.monotonic()

    @staticmethod
    def _of(group: Group, arm: str) -> float:
        steps = group.workload.steps
        trials = 0.0 if group.workload.task == "sweep" else 1 / steps  # the warm-up is one step
        if ARMS[arm].tuned and group.workload.task != "sweep":  # see group.find_best
            candidates = (2 if group.workload.task == "sft" else 1) * len(micro_batches(group.workload.rows))
            candidates += 2 if group.workload.task == "dpo" else 0
            trials += (candidates + 3) / steps
        return group.units(arm, group.repeats_of(arm) + trials)

    def done(self, group: int, arm: str | None = None, share: float = 1.0) -> None:
        """share: of what is left of the arm in this group (of all its arms without one)."""
        for key in self._left:
            if key[0] == group and arm in (None, key[1]):
                self._left[key] *= 1 - share

    def seconds(self) -> float:
        return time.monotonic() - self.started

    def left(self) -> float | None:
        """Seconds with those reserved, or None while nothing is known."""
        groups = self._groups(sum(self._left.values()))
        return None if groups is None else groups + self.reserved

    def left_of(self, group: int) -> float | None:
        return self._groups(sum(units for key, units in self._left.items() if key[0] == group))

    def _groups(self, units: float) -> float | None:
        done = self._all - sum(self._left.values())
        rate = self.seconds() / done if done > 0 else self._guess
        return None if rate is None else units * rate
