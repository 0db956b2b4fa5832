"""One group: its arms warmed up, TRL's micro-batch found, then the repeats, interleaved arm by arm."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from bench.plan import ARMS, WARM, Clock, Group, micro_batches
from bench.pool import Pool, WorkerError
from bench.summary import BF16_TOLERANCE, LOSS_TOLERANCE, arm_summary, group_summary, loss_difference
from bench.workloads import Workload

FEWEST_REPEATS = 3
Options = dict[str, dict[str, Any]]  # dpo | sft | reward -> micro_batch, padding_free


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


def order(workload: Workload, options: Options, precision: str, flops: bool = False) -> dict[str, Any]:
    return {
        "kind": "run", "workload": workload.to_json(), "options": options, "precision": precision, "flops": flops,
    }  # fmt: skip


def ask(session: Session, arm: str, what: dict[str, Any]) -> dict[str, Any]:
    """The answer; a worker's death is an answer with `error`."""
    try:
        return session.pool.ask(arm, what)
    except WorkerError as error:
        return {"error": str(error)}


def find_best(session: Session, workload: Workload) -> dict[str, Any]:
    """TRL's fastest micro-batch (for SFT also padded or padding-free) by one step of each; those that fail are out."""
    key = (workload.task, workload.lengths)
    if key not in session.best:
        step = replace(workload, steps=1)
        tried: list[dict[str, Any]] = []
        reference: list[float] | None = None
        for padding_free in (False, True) if workload.task == "sft" else (False,):
            for size in micro_batches(workload.rows):
                options = {"micro_batch": size, "padding_free": padding_free}
                answer = ask(session, "trl_tuned", order(step, {workload.task: options}, session.precision))
                if "seconds" not in answer:
                    tried.append({**options, "seconds": math.inf})
                    continue
                reference = reference or answer["losses"]
                same = loss_difference(answer["losses"], reference) <= tolerance(session)
                tried.append({**options, "seconds": answer["seconds"] if same else math.inf})
        best = min(tried, key=lambda one: one["seconds"])
        seconds = [{**one, "seconds": one["seconds"] if one["seconds"] < math.inf else None} for one in tried]
        session.best[key] = {"micro_batch": best["micro_batch"], "padding_free": best["padding_free"], "tried": seconds}
    return session.best[key]


def tolerance(session: Session) -> float:
    return BF16_TOLERANCE if session.on_gpu else LOSS_TOLERANCE


def tuned_options(session: Session, group: Group) -> Options:
    """For the tasks inside the group: the sweep has two."""
    tasks = ("sft", "dpo") if group.workload.task == "sweep" else (group.workload.task,)
    return {task: find_best(session, replace(group.workload, task=task)) for task in tasks}


def measure(session: Session, number: int, group: Group) -> dict[str, Any]:
    """The group's row of results.json; arms that cannot run or fail are in its `missing`, with the reason."""
    missing: dict[str, str] = {}
    options = tuned_options(session, group) if any(ARMS[arm].tuned for arm in group.arms) else {}
    chosen = {task: {name: found[name] for name in ("micro_batch", "padding_free")} for task, found in options.items()}
    warm = {}
    for arm in group.arms:
        answer = warm_up(session, arm, group, chosen)
        if "seconds" in answer:
            warm[arm] = answer
        else:
            missing[arm] = str(answer.get("unavailable") or "failed: " + answer.get("error", ""))
            session.clock.done(number, arm)
            session.say(f"  {arm}: {missing[arm]}")
    runs: dict[str, list[dict[str, Any]]] = {arm: [] for arm in warm}
    for repeat in range(group.repeats):
        for arm in [arm for arm in warm if arm not in missing]:
            answer = ask(session, arm, order(group.workload, chosen, session.precision))
            session.clock.done(number, arm, 1 / (group.repeats - repeat))
            if "seconds" in answer:
                runs[arm].append(answer)
            else:
                missing[arm] = "failed: " + str(answer.get("error") or answer.get("unavailable"))
        session.say(f"  repeat {repeat + 1} of {group.repeats}")
        if session.clock.seconds() > session.limit and repeat + 1 >= FEWEST_REPEATS:
            break
    group = replace(group, repeats=max(map(len, runs.values()), default=0))
    arms = {
        arm: arm_summary(
            runs[arm], warm[arm], group, difference(session, arm, group, warm, runs), LOSS_TOLERANCE, session.peak
        )
        for arm in warm
        if arm not in missing
    }
    session.clock.done(number)
    return {**group_summary(group, arms, options), "missing": missing}


def warm_up(session: Session, arm: str, group: Group, options: Options) -> dict[str, Any]:
    """An untimed fp32 run that counts FLOPs: one step, or all to fill a store or, on a GPU, to compare losses."""
    whole = arm in WARM or session.on_gpu
    workload = group.workload if whole else replace(group.workload, steps=1)
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
