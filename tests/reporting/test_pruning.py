"""The rule for hopeless trials: equal to Optuna's own pruners, and fair to trials that are ahead or share a stage."""

from __future__ import annotations

import json
import math
import os
import random
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest

from alignment.config.compose import compose
from alignment.config.execution import PercentilePruning
from alignment.pipeline.runner import Run
from alignment.reporting import pruning
from alignment.signals import PRUNED, Listener

DIRECTIONS = ("minimize", "maximize")


def rule(percentile: float = 50.0, warmup: int = 0, trials: int = 1, way: str = "minimize") -> PercentilePruning:
    facts = {"metric": "loss", "direction": way, "node": None, "percentile": percentile}
    return PercentilePruning.model_validate(
        {"kind": "percentile", **facts, "warmup_steps": warmup, "min_trials": trials}
    )


def curve(chance: random.Random, steps: int) -> pruning.Curve:
    """Of few different values, so that some are equal; steps may be missing."""
    return {step: chance.choice((0.1, 0.25, 1 / 3, 1.0, 2.5)) for step in range(steps) if chance.random() < 0.9}


def optunas(own: pruning.Curve, others: list[pruning.Curve], pruner: optuna.pruners.BasePruner, way: str) -> bool:
    """Whether Optuna prunes the trial at its last step, the others being complete."""
    study = optuna.create_study(direction=way, pruner=pruner)
    for values in others:
        done = optuna.trial.create_trial(value=0.0, intermediate_values=values)
        study.add_trial(done)
    trial = study.ask()
    for step, value in own.items():
        trial.report(value, step)
    return trial.should_prune()


@pytest.mark.parametrize("way", DIRECTIONS)
def test_it_decides_as_optunas_percentile_pruner_on_the_same_data(way: str) -> None:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    chance, seen = random.Random(1), []
    for _ in range(400):
        own = curve(chance, length := chance.randrange(1, 8))
        others = [curve(chance, length + chance.randrange(2)) for _ in range(chance.randrange(1, 7))]
        percent, warmup, trials = chance.choice((0.0, 10.0, 25.0, 50.0, 62.5, 100.0)), chance.randrange(4), 1
        if not own or sum(max(own) in other for other in others) < (trials := chance.randrange(1, 4)):
            continue  # then Optuna lets it go on, and ours looks at an earlier step: see below
        theirs = optuna.pruners.PercentilePruner(percent, 0, warmup, n_min_trials=trials)
        ours = pruning.hopeless(own, others, rule(percent, warmup, trials, way))
        if max(own) < warmup:
            assert ours is None
        assert (ours is not None) == optunas(own, others, theirs, way)
        seen.append(ours is not None)
    assert 20 < sum(seen) < len(seen) - 20


@pytest.mark.parametrize("way", DIRECTIONS)
def test_the_median_is_optunas_median_pruner(way: str) -> None:
    chance = random.Random(2)
    for _ in range(100):
        others = [{3: chance.random()} for _ in range(chance.randrange(1, 6))]
        own = {2: chance.random(), 3: chance.random()}
        theirs = optunas(own, others, optuna.pruners.MedianPruner(0), way)
        assert (pruning.hopeless(own, others, rule(way=way)) is not None) == theirs


def test_percentiles_are_numpys_to_the_last_bit() -> None:
    chance = random.Random(3)
    for _ in range(500):
        values = [chance.gauss(0, 10 ** chance.randrange(-8, 8)) for _ in range(chance.randrange(1, 9))]
        percent = chance.choice((0.0, 100.0, 50.0, chance.uniform(0, 100)))
        assert pruning.percentile(values, percent) == np.percentile(values, percent)


def test_a_trial_that_is_ahead_is_compared_where_enough_others_are() -> None:
    others = [{1: 1.0, 2: 0.9}, {1: 1.0, 2: 0.8}, {1: 1.0}]
    behind = {1: 3.0, 2: 2.0, 3: 1.5}
    assert "at step 2" in str(pruning.hopeless(behind, others, rule(trials=2)))
    assert "at step 1" in str(pruning.hopeless(behind, others, rule(trials=3)))
    assert pruning.hopeless(behind, others, rule(trials=4)) is None
    assert pruning.hopeless(behind, others, rule(trials=2, warmup=3)) is None
    assert pruning.hopeless({**behind, 4: 0.8}, others, rule(trials=2)) is None, "it has caught up since"
    assert pruning.hopeless({1: 1.0}, others, rule()) is None, "as good as the median is not worse"


# --- trials ----------------------------------------------------------------------------------------------------------


MEDIAN = ("pruning=median", "pruning.min_trials=2", "pruning.warmup_steps=1")


def trial(store: Path, rate: float, *losses: float, at_work: bool = True, more: tuple[str, ...] = ()) -> Run:
    """A run whose SFT has logged these."""
    run = Run(compose(["pipeline=sft", f"store={store}", f"stage.sft.learning_rate={rate}", *(more or MEDIAN)]), "")
    key = run.node("sft").key
    folder = run.store.work(key) if at_work else run.store.result(key)
    folder.mkdir(parents=True, exist_ok=True)
    rows = [{"step": step, "time": 0.0, "loss": loss} for step, loss in enumerate(losses, start=1)]
    lines = [json.dumps(row) + "\n" for row in [*rows, *([{"step": 9, "time": 0.0}] if losses else [])]]
    (folder / "metrics.jsonl").write_text("".join(lines) + '{"step": 5, "lo')
    return run


def trials(*runs: Run, said: list[str] | None = None) -> pruning.Trials:
    found = pruning.Trials((said if said is not None else []).append)
    for run in runs:
        found.add(run)
    return found


def test_a_trial_is_compared_with_those_at_work_and_those_that_are_done(tmp_path: Path) -> None:
    done, other = trial(tmp_path, 0.1, 1.0, 0.5, at_work=False), trial(tmp_path, 0.2, 1.0, 0.6)
    good, bad = trial(tmp_path, 0.3, 1.0, 0.4), trial(tmp_path, 0.4, 3.0, 2.0)
    assert trials(done, other, good).look(good) is None
    told = trials(done, other, bad).look(bad)
    assert told == "loss 2.000 at best, and of 2 others at step 2 the best 50 % have 0.550 or better"
    assert trials(done, bad).look(bad) is None, "too few others"
    assert trials(done, other).look(bad) is None, "of another sweep"
    assert trials(done, other, good).look(done) is None, "its training has ended"
    known = trials(done, other, bad)
    known.drop(other)
    assert known.look(bad) is None, "one that was stopped is nobody's measure"


def test_a_look_at_many_finds_what_one_at_each_does_and_asks_for_no_file_for_each_trial_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By one who waits for the jobs of a sweep, of which hundreds may be done and dozens at work, every two seconds."""
    losses = ((1.0, 0.5), (1.0, 0.6), (1.0, 0.7), (3.0, 2.0), (4.0, 2.5), (), (1.0, 0.4))
    runs = [trial(tmp_path, 0.1 * (1 + at), *rows, at_work=at > 1) for at, rows in enumerate(losses)]
    mostly = (*MEDIAN, "pruning.percentile=90")
    other, stranger = trial(tmp_path, 0.9, 5.0, 5.0, more=mostly), trial(tmp_path, 0.95, 9.0, 9.0)
    found, asked = trials(*runs, other), (*runs, other, stranger)
    each = {run.id: why for run in asked if (why := found.look(run))}
    looks, stat = Counter[Path](), Path.stat

    def counted(path: Path, **options: Any) -> os.stat_result:
        looks[path] += 1
        return stat(path, **options)

    monkeypatch.setattr(Path, "stat", counted)
    assert found.look_at(asked) == each
    assert set(each) == {run.id for run in (runs[3], runs[4], other)}
    assert looks and max(looks.values()) <= 3, "as another's measure, as its own, and to say what is missing"


def test_trials_that_train_the_same_are_one(tmp_path: Path) -> None:
    bad = trial(tmp_path, 0.4, 3.0, 2.0)
    same = [trial(tmp_path, 0.4, 3.0, 2.0, more=(*MEDIAN, f"stage.evaluate.seed={seed}")) for seed in (5, 6)]
    assert len({run.id for run in (bad, *same)}) == 3
    good = trial(tmp_path, 0.1, 1.0, 0.5)
    assert trials(bad, *same, good).look(bad) is None, "one other"
    found = trials(bad, *same, good, trial(tmp_path, 0.2, 1.0, 0.5))
    assert found.look(bad) and all(found.look(run) for run in same), "they are hopeless together"


def test_a_metric_that_the_stage_does_not_log_is_said_once(tmp_path: Path) -> None:
    said: list[str] = []
    runs = [trial(tmp_path, rate, 1.0, more=(*MEDIAN, "pruning.metric=los")) for rate in (0.1, 0.2, 0.3)]
    found = trials(*runs, said=said)
    assert [found.look(run) for run in runs] == [None] * 3
    assert said == ["warning: pruning.metric: sft logs no los, so nothing is stopped (it logs: loss)"]


def test_without_pruning_nobody_looks(tmp_path: Path) -> None:
    runs = [trial(tmp_path, rate, loss, more=("pruning=none",)) for rate, loss in ((0.1, 1.0), (0.2, 1.0), (0.3, 9.0))]
    assert trials(*runs).look(runs[2]) is None


def test_a_stage_hears_that_its_trial_is_hopeless_and_a_signal_first(tmp_path: Path) -> None:
    stop, looks, now = Listener(), [None, "why", "never asked"], [0.0]
    doomed = pruning.Doomed(stop, lambda: looks.pop(0), lambda: now[0])
    assert [doomed.asked, doomed.asked] == [None, None] and len(looks) == 2, "it does not look at every question"
    now[0] += pruning.EVERY
    assert (doomed.asked, doomed.why) == (PRUNED, "why")
    now[0] = math.inf
    stop.asked = "SIGTERM"
    assert (doomed.asked, looks) == ("SIGTERM", ["never asked"])
