"""Which trials of a sweep are hopeless: by the rows that their training stages have logged so far."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import cache
from pathlib import Path

from alignment.config.checks import trains
from alignment.config.execution import PercentilePruning
from alignment.pipeline.graph import Node
from alignment.pipeline.runner import Run
from alignment.pipeline.store import METRICS
from alignment.reporting import words
from alignment.reporting.gather import folder_of, read_rows
from alignment.reporting.words import finite
from alignment.signals import PRUNED, Asked

Curve = dict[int, float]  # step -> the metric's value
EVERY = 1.0  # seconds between two looks at a stage at work


# --- the rule --------------------------------------------------------------------------------------------------------


def hopeless(own: Curve, others: Sequence[Curve], rule: PercentilePruning) -> str | None:
    """Why a trial with this curve is to be stopped; None if it may go on.

    The median stopping rule (Golovin et al. 2017, "Google Vizier", section 3.2.2) as Optuna defines it for its
    MedianPruner and PercentilePruner: the trial's best value so far is worse than the median, or percentile, of the
    others' values at the same step. That is the newest step which enough of the others have reached too: a trial that
    is ahead of them is compared where they are, with all that it has reached since to its credit.
    """
    newest = (step for step in sorted(own, reverse=True) if step >= rule.warmup_steps)
    step = next((step for step in newest if _count(others, step) >= rule.min_trials), None)
    if step is None:
        return None
    more_is_better = rule.direction == "maximize"
    best = max(own.values()) if more_is_better else min(own.values())
    values = [other[step] for other in others if step in other]
    limit = percentile(values, 100 - rule.percentile if more_is_better else rule.percentile)
    if not (best < limit if more_is_better else best > limit):
        return None
    told = f"{rule.metric} {words.number(best)} at best, and of {len(values)} others at step {step}"
    return f"{told} the best {rule.percentile:g} % have {words.number(limit)} or better"


def _count(others: Sequence[Curve], step: int) -> int:
    return sum(step in other for other in others)


def percentile(values: Sequence[float], percent: float) -> float:
    """As numpy's, linear between two values; the same to the last bit."""
    ordered, place = sorted(values), (len(values) - 1) * (percent / 100)
    below = math.floor(place)
    first, second, share = ordered[below], ordered[min(below + 1, len(ordered) - 1)], place - below
    return first + (second - first) * share if share < 0.5 else second - (second - first) * (1 - share)


# --- the trials of a sweep -------------------------------------------------------------------------------------------


class Trials:
    """Those that one command has asked for so far. What one has logged counts while it is at work and when it is done,
    and no more once it was dropped: it was stopped, or has failed."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self._runs: dict[str, Run] = {}
        self._curves: dict[tuple[str, str], tuple[tuple[int, int], Curve]] = {}  # and the version of their file
        self._warned = False

    def add(self, run: Run) -> None:
        self._runs[run.id] = run

    def drop(self, run: Run) -> None:
        self._runs.pop(run.id, None)

    def look(self, run: Run) -> str | None:
        """Why the trial is to be stopped now; None if it may go on, and where its stage is not at work or has ended."""
        return self.look_at([run]).get(run.id)

    def look_at(self, runs: Sequence[Run]) -> dict[str, str]:
        """As `look`, of several: run -> why, of those that are to be stopped now. However many they are, the files of
        each trial are asked for once: done for each run anew it is more than a shared file system bears."""
        asked = [
            (run, judged(run), rule)
            for run in runs
            if run.id in self._runs and isinstance(rule := run.experiment.pruning, PercentilePruning)
        ]
        at_work = [(run, node, rule) for run, node, rule in asked if run.store.work(node.key).is_dir()]
        if not at_work:
            return {}
        # Trials that train the same are one: they have one curve, and what becomes of it becomes of all.
        stores = {judged(one).key: one.store.root for one in self._runs.values()}
        folders = {key: folder_of(root, key) for key, root in stores.items()}

        @cache
        def curves(metric: str) -> dict[str, Curve]:
            return {key: self._curve(folder, metric) for key, folder in folders.items()}

        found = {}
        for run, node, rule in at_work:
            work = run.store.work(node.key)
            own = self._curve(work, rule.metric)
            if not own:
                self._warn(work, rule, node.name)
            others = [curve for key, curve in curves(rule.metric).items() if key != node.key]
            if why := hopeless(own, others, rule):
                found[run.id] = why
        return found

    def _curve(self, folder: Path | None, metric: str) -> Curve:
        """Of a stage's folder; read anew if its rows have changed."""
        try:
            told = (folder / METRICS).stat() if folder else None
        except OSError:
            told = None
        if folder is None or told is None:
            return {}
        place, version = (str(folder), metric), (told.st_mtime_ns, told.st_size)
        if place not in self._curves or self._curves[place][0] != version:
            self._curves[place] = version, curve_of(folder, metric)
        return self._curves[place][1]

    def _warn(self, work: Path, rule: PercentilePruning, name: str) -> None:
        if not self._warned and (rows := read_rows(work / METRICS)):
            self._warned = True
            known = ", ".join(sorted({key for row in rows for key in row} - {"step", "time"}))
            self._say(
                f"warning: pruning.metric: {name} logs no {rule.metric}, so nothing is stopped (it logs: {known})"
            )


def judged(run: Run) -> Node:
    """The node of the run whose rows are looked at."""
    rule = run.experiment.pruning
    name = (rule.node if isinstance(rule, PercentilePruning) else None) or trains(run.experiment)
    assert name is not None  # checks.py has seen to it
    return run.node(name)


def curve_of(folder: Path, metric: str) -> Curve:
    """A step written twice (before and after a restart) counts as it was last."""
    values = ((row.get("step"), finite(row.get(metric))) for row in read_rows(folder / METRICS))
    return {step: value for step, value in values if isinstance(step, int) and value is not None}


class Doomed:
    """What the stages of one trial hear that run here: the signals of this process, and that their trial is hopeless.

    why: the reason for which it was stopped, or None.
    """

    def __init__(self, stop: Asked, look: Callable[[], str | None], clock: Callable[[], float] = time.monotonic):
        self._stop, self._look, self._clock = stop, look, clock
        self._looked = float("-inf")
        self.why: str | None = None

    @property
    def asked(self) -> str | None:
        if self._stop.asked:
            return self._stop.asked
        if self.why is None and self._clock() - self._looked >= EVERY:
            self._looked = self._clock()
            self.why = self._look()
        return PRUNED if self.why else None

    def deferred(self) -> AbstractContextManager[None]:
        return self._stop.deferred()
