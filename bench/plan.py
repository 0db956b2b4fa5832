"""Which arms run on what, how often, and how long that will take. Free of torch."""

from __future__ import annotations

import time
from dataclasses import dataclass

from bench.workloads import BETAS, Workload, pairs, totals


@dataclass(frozen=True)
class Arm:
    """weight: a first guess of its time as a multiple of ours, for the estimate only."""

    meaning: str
    tasks: tuple[str, ...]
    ours: bool = False
    tuned: bool = False
    pieces_off: frozenset[str] = frozenset()
    weight: float = 1.0

    @property
    def ablation(self) -> bool:
        return bool(self.pieces_off)


def _without(piece: str, meaning: str, *tasks: str) -> Arm:
    return Arm(meaning, tasks, ours=True, pieces_off=frozenset({piece}))


ALL = ("dpo", "sft", "reward")
ARMS: dict[str, Arm] = {
    "trl_default": Arm("TRL as it comes", ALL, weight=4.0),
    "trl_tuned": Arm("TRL tuned", (*ALL, "sweep"), tuned=True, weight=2.0),
    "ours": Arm("ours", (*ALL, "sweep"), ours=True),
    "ours_no_sharing": _without("sharing", "ours, every answer with its own prompt", "dpo", "reward"),
    "ours_no_packing": _without("packing", "ours, rows padded instead of packed", *ALL),
    "ours_warm": _without("reference_pass", "ours, reference found in the store", "dpo"),
    "ours_trl_head": _without("head", "ours, TRL's kernel for the head", "dpo", "sft"),
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

    def units(self, arm: str, runs: float) -> float:
        """Size of `runs` runs of an arm, to be multiplied by a time: tokens times the arm's weight."""
        workload = self.workload
        times = 1.0
        if workload.task == "sweep":  # every beta is a DPO run; TRL's have their SFT each
            times = len(BETAS)
        tokens = totals("dpo" if workload.task == "sweep" else workload.task, pairs(workload)).tokens
        reference = 1.3 if workload.task in ("dpo", "sweep") else 1.0
        return runs * times * tokens * reference * ARMS[arm].weight


def groups(
    tasks: tuple[str, ...], lengths: tuple[str, ...], arms: tuple[str, ...] | None, ablations: tuple[str, ...],
    size: str, rows: int, steps: int, repeats: int,
) -> list[Group]:  # fmt: skip
    """Groups in the order of what matters most. The sweep runs on the first lengths, half the steps, >= 3 repeats.

    Never one step only, for DPO's first loss is log 2 whatever the trainer does: there would be nothing to compare.

    ablations: lengths on which ours also runs with each piece off. arms: only these, where they apply.
    """
    made = []
    for task in tasks:
        for shape in lengths[:1] if task == "sweep" else lengths:
            count = max(2, steps // 2) if task == "sweep" else steps
            workload = Workload(task=task, lengths=shape, size=size, rows=rows, steps=count)
            chosen = tuple(
                name
                for name, arm in ARMS.items()
                if task in arm.tasks and (shape in ablations or not arm.ablation) and (arms is None or name in arms)
            )
            if chosen:
                made.append(Group(workload, chosen, min(repeats, 3) if task == "sweep" else repeats))
    return made


def micro_batches(rows: int) -> list[int]:
    return [size for size in (1, 2, 4, 8, 16) if size <= rows and rows % size == 0]


class Clock:
    """Estimates the time left from what was done so far: each unit is taken to cost what the past ones did."""

    def __init__(self, plan: list[Group]) -> None:
        self._left = {(i, arm): self._of(group, arm) for i, group in enumerate(plan) for arm in group.arms}
        self._all = sum(self._left.values())
        self.started = time.monotonic()

    @staticmethod
    def _of(group: Group, arm: str) -> float:
        steps = group.workload.steps
        trials = 1 / steps  # the warm-up is one step
        if ARMS[arm].tuned and group.workload.task != "sweep":
            trials += (2 if group.workload.task == "sft" else 1) * len(micro_batches(group.workload.rows)) / steps
        return group.units(arm, group.repeats + trials)

    def done(self, group: int, arm: str | None = None, share: float = 1.0) -> None:
        """share: of what is left of the arm in this group (of all its arms without one)."""
        for key in self._left:
            if key[0] == group and arm in (None, key[1]):
                self._left[key] *= 1 - share

    def seconds(self) -> float:
        return time.monotonic() - self.started

    def left(self) -> float | None:
        """Seconds, or None before anything was done."""
        left = sum(self._left.values())
        done = self._all - left
        return None if done <= 0 else self.seconds() * left / done

    def left_of(self, group: int) -> float | None:
        left, mine = self.left(), sum(units for key, units in self._left.items() if key[0] == group)
        total = sum(self._left.values())
        return None if left is None or not total else left * mine / total
