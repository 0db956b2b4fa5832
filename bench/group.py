"""One group: its arms warmed up, TRL's micro-batch found, then the repeats, interleaved arm by arm."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from bench.plan import ARMS, CURVE_RATE, CURVE_ROWS, CURVE_STEPS, WARM, Clock, Group, micro_batches
from bench.pool import Pool, WorkerError
from bench.summary import BF16_TOLERANCE, LOSS_TOLERANCE, arm_summary, group_summary, loss_difference
from bench.workloads import LEARNING_RATE, Workload

FEWEST_REPEATS = 3
HOPELESS = 1.3  # times the best so far: a micro-batch that takes longer ends the search for larger ones
OPTIONS = ("micro_batch", "padding_free", "reference_batch")  # of TRL tuned; what is not given is TRL's default
Options = dict[str, dict[str, Any]]  # dpo | sft | reward -> some of OPTIONS


@dataclass
class Session:
    """What lasts over the groups. best: (task, lengths) -> TRL's best options and all that were tried."""

    pool: Pool
    clock: Clock
    say: Callable[[str], None]
    machine: dict[str, Any]
    peak: float | None = None
    limit: float = math.inf  # seconds, after which a group ends with the repeats it has, if they are enough
    best: dict[tuple[str, str], dict[str, Any]] = field(default_factory=dict)

    @property
    def on_gpu(self) -> bool:
        return bool(self.machine["device"] == "cuda")

    @property
    def precision(self) -> str:
        return "bf16" if self.on_gpu else "fp32"


def order(
    workload: Workload, options: Options, precision: str, flops: bool = False, learning_rate: float = LEARNING_RATE
) -> dict[str, Any]:
    return {
        "kind": "run", "workload": workload.to_json(), "options": options, "precision": precision, "flops": flops,
        "learning_rate": learning_rate,
    }  # fmt: skip


def ask(session: Session, arm: str, what: dict[str, Any]) -> dict[str, Any]:
    """The answer; a worker's death is an answer with `error`."""
    try:
        return session.pool.ask(arm, what)
    except WorkerError as error:
        return {"error": str(error)}


def find_best(session: Session, workload: Workload) -> dict[str, Any]:
    """TRL's fastest micro-batch (for SFT also padded or padding-free): a step of each, and of the best two two more."""
    key = (workload.task, workload.lengths)
    if key not in session.best:
        tried = _trials(session, replace(workload, steps=1))
        fastest = sorted(tried, key=lambda one: one["seconds"])[:2]
        contest = [one for one in fastest if one["seconds"] < HOPELESS * fastest[0]["seconds"]]
        if len(contest) == 2:  # one step is noisy
            taken = [[one["seconds"]] for one in contest]
            for _ in range(2):
                for one, times in zip(contest, taken, strict=True):
                    times.append(_trial(session, replace(workload, steps=1), one).get("seconds", math.inf))
            for one, times in zip(contest, taken, strict=True):
                one["seconds"] = statistics.median(times)
        best = min(contest or tried, key=lambda one: one["seconds"])
        seconds = [{**one, "seconds": one["seconds"] if one["seconds"] < math.inf else None} for one in tried]
        session.best[key] = {**{name: best[name] for name in OPTIONS if name in best}, "tried": seconds}
    return session.best[key]


def _trials(session: Session, step: Workload) -> list[dict[str, Any]]:
    """Options with the seconds of one step; infinite for those that fail or whose loss is another."""
    tried: list[dict[str, Any]] = []
    sizes = micro_batches(step.rows)
    # Untimed, or the first candidate would pay for the first allocations
    reference = _trial(session, step, {"micro_batch": sizes[0]}).get("losses")

    def search(candidates: list[dict[str, Any]], best: float = math.inf) -> None:
        """From small to large, until one is hopeless beside the best."""
        nonlocal reference
        for options in candidates:
            answer = _trial(session, step, options)
            reference = reference or answer.get("losses")
            same = loss_difference(answer.get("losses", []), reference or []) <= tolerance(session)
            seconds = answer["seconds"] if same else math.inf
            tried.append({**options, "seconds": seconds})
            best = min(best, seconds)
            if seconds > HOPELESS * best:
                break

    for padding_free in (False, True) if step.task == "sft" else (False,):
        search([{"micro_batch": size, "padding_free": padding_free} for size in sizes])
    if step.task == "dpo":  # TRL's reference pass takes the micro-batch of training unless told otherwise
        fastest = min(tried, key=lambda one: one["seconds"])
        chosen = {name: fastest[name] for name in ("micro_batch", "padding_free")}
        larger = [size for size in sizes if size > chosen["micro_batch"]][:2]
        search([{**chosen, "reference_batch": size} for size in larger], fastest["seconds"])
    return tried


def _trial(session: Session, step: Workload, options: dict[str, Any]) -> dict[str, Any]:
    given = {name: value for name, value in options.items() if name in OPTIONS}
    return ask(session, "trl_tuned", order(step, {step.task: given}, session.precision))


def tolerance(session: Session) -> float:
    return BF16_TOLERANCE if session.on_gpu else LOSS_TOLERANCE


def tuned_options(session: Session, group: Group) -> Options:
    """For the tasks inside the group: the sweep has two."""
    tasks = ("sft", "dpo") if group.workload.task == "sweep" else (group.workload.task,)
    return {task: find_best(session, replace(group.workload, task=task)) for task in tasks}


def measure(session: Session, number: int, group: Group) -> dict[str, Any]:
    """The group's row of results.json; arms that cannot run or fail are in its `missing`, with the reason."""
    options = tuned_options(session, group) if any(ARMS[arm].tuned for arm in group.arms) else {}
    chosen = {task: {name: found[name] for name in OPTIONS if name in found} for task, found in options.items()}
    missing: dict[str, str] = {}
    warm = {}
    curves: dict[str, list[float]] = {}
    for arm in group.arms:
        answer = warm_up(session, arm, group, chosen)
        curve = (
            answer if group.workload.task == "sweep" or "seconds" not in answer else draw(session, arm, group, chosen)
        )
        if "seconds" in curve:
            warm[arm], curves[arm] = answer, curve["losses"]
        else:
            missing[arm] = str(curve.get("unavailable") or "failed: " + curve.get("error", ""))
            session.clock.done(number, arm)
            session.say(f"  {arm}: {missing[arm]}")
    runs = repeat(session, number, group, chosen, list(warm), missing)
    group = replace(group, repeats=max(map(len, runs.values()), default=0))
    arms = {}
    for arm in runs:
        curve_difference = None
        if group.workload.task != "sweep":
            curve_difference = loss_difference(curves[arm], curves.get(group.reference, []))
        apart = difference(session, arm, group, warm, runs)
        arms[arm] = arm_summary(
            runs[arm], warm[arm], group, apart, LOSS_TOLERANCE, session.peak, curve_difference=curve_difference
        )
    session.clock.done(number)
    return {**group_summary(group, arms, options), "missing": missing}


def repeat(
    session: Session, number: int, group: Group, options: Options, arms: list[str], missing: dict[str, str]
) -> dict[str, list[dict[str, Any]]]:
    """The timed runs of the arms, in turn. Those that fail go to `missing`."""
    runs: dict[str, list[dict[str, Any]]] = {arm: [] for arm in arms}
    for done in range(group.repeats):
        for arm in [arm for arm in runs if done < group.repeats_of(arm)]:
            answer = ask(session, arm, order(group.workload, options, session.precision))
            session.clock.done(number, arm, 1 / (group.repeats_of(arm) - done))
            if "seconds" in answer:
                runs[arm].append(answer)
            else:
                missing[arm] = "failed: " + str(answer.get("error") or answer.get("unavailable"))
                del runs[arm]
        session.say(f"  repeat {done + 1} of {group.repeats}")
        if session.clock.seconds() > session.limit and done + 1 >= FEWEST_REPEATS:
            break
    return runs


def draw(session: Session, arm: str, group: Group, options: Options) -> dict[str, Any]:
    """An untimed fp32 run of the tiny model, long and fast enough for losses to move."""
    workload = replace(group.workload, size="tiny", rows=CURVE_ROWS, steps=CURVE_STEPS)
    return ask(session, arm, order(workload, options, "fp32", learning_rate=CURVE_RATE))


def warm_up(session: Session, arm: str, group: Group, options: Options) -> dict[str, Any]:
    """An untimed fp32 run that counts FLOPs: one step, or all to fill a store or, on a GPU, to compare losses.

    The sweep's on a CPU is a step of its DPO without a count: a step of each of its runs would take minutes.
    """
    whole = arm in WARM or session.on_gpu
    workload = group.workload if whole else replace(group.workload, steps=1)
    if group.workload.task == "sweep" and not whole:
        return ask(session, arm, order(replace(workload, task="dpo"), options, "fp32"))
    if arm in WARM:  # the first fills the store, the one that is counted finds it
        filled = ask(session, arm, order(workload, options, session.precision))
        if "seconds" not in filled:
            return filled
    answer = ask(session, arm, order(workload, options, "fp32", flops=True))
    return {**answer, "steps": workload.steps}


def difference(
    session: Session, arm: str, group: Group, warm: dict[str, dict[str, Any]], runs: dict[str, list[dict[str, Any]]]
) -> float:
    """From the reference arm's losses, the largest in any repeat; infinite where the reference arm did not run.

    On a GPU the timed runs are in bf16, where rounding alone moves a loss by more than 1e-4: there the fp32 warm-up is
    compared, and the bf16 runs have only to agree within BF16_TOLERANCE.
    """
    reference = runs.get(group.reference)
    if not reference:
        return math.inf
    timed = max(loss_difference(run["losses"], reference[0]["losses"]) for run in runs[arm])
    first = loss_difference(warm[arm]["losses"], warm[group.reference]["losses"])
    if not session.on_gpu:  # warm-ups may have unequal steps, the repeats have all of them
        return timed
    return first if timed <= BF16_TOLERANCE else max(first, timed)
