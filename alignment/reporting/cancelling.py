"""`alignment cancel`: ends the jobs of runs, but for those that other runs wait for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from alignment.errors import ConfigError, InputError
from alignment.launchers import slurm
from alignment.pipeline import ledger
from alignment.pipeline.store import Store
from alignment.reporting import queue, targets, watching
from alignment.reporting.gather import Row
from alignment.reporting.status import is_over

LISTED = 10  # names in an error, jobs in an answer


def cancel(names: Sequence[str], root: Path) -> int:
    """Raises ConfigError for a name that means nothing, or several that have jobs; MachineError if SLURM refuses."""
    store = Store(root)
    ledger.recall(store)
    runs = watching.look(store, None)
    # Of one whose run.json cannot be read nobody knows: better an error, below, than to say that there is nothing.
    live = {Path(run["folder"]) for run in runs if not is_over(run) or not run["nodes"]}
    folders = list(dict.fromkeys(folder for name in names for folder in _meant(name, store.root, live)))
    for state in runs:
        if Path(state["folder"]) in folders and not state["nodes"]:
            where = str(Path(state["folder"]) / "run.json")
            fix = "its command writes it again; squeue and scancel know its jobs"
            raise InputError("is no run.json that can be read", where=where, fix=fix)
    jobs, needed = _jobs_of(runs, folders)
    for node, run in needed:
        queue.say(f"{node['name']} (job {node['job']}) stays: {run} waits for it")
    slurm.cancel(jobs)
    if len(jobs) > LISTED:
        for name, count in Counter(node["name"] for node in jobs.values()).items():
            queue.say(f"cancelled {count} x {name}")
    else:
        for job, node in jobs.items():
            queue.say(f"cancelled {node['name']} (job {job})")
    local = [said for run in runs if Path(run["folder"]) in folders for said in _here(run, store)]
    for said in local:
        queue.say(said)
    if not jobs and not local:
        queue.say("nothing to cancel: no job of theirs waits or runs")
    return 0


def _meant(name: str, store: Path, live: set[Path]) -> list[Path]:
    """Folders of the run or sweep of that name; else of the only one whose name begins so and that is `live`.

    Names begin with the experiment's: most often with that of every run that was ever made of it.
    """
    runs, sweeps = targets.named(name, store)
    if exact := targets.whole(name, runs, sweeps):
        return exact
    found = {sweep: folders for sweep, folders in sweeps.items() if live.intersection(folders)}
    in_sweeps = {folder for folders in found.values() for folder in folders}
    found |= {folder.name: [folder] for folder in runs if folder in live and folder not in in_sweeps}
    if len(found) > 1:
        more = f" and {len(found) - LISTED} more" if len(found) > LISTED else ""
        what = f"{name!r} is the beginning of several that wait or run: {', '.join([*found][:LISTED])}{more}"
        raise ConfigError(what, where="command line", fix="give a whole name; a sweep's means all its runs")
    return next(iter(found.values()), [])


def _here(run: Row, store: Store) -> list[str]:
    """Of stages at work that are no jobs: whose process would have to be asked."""
    found = []
    for node in run["nodes"]:
        if node["state"] == "running" and not node.get("job"):
            holder = store.lock(node["key"]).holder()
            who = f"runs on {holder.get('host')} and is no job: kill {holder.get('pid')} there has it save and end"
            found.append(f"{node['name']} of {run['run']} {who}")
    return found


def jobs_of(store: Store, folders: Sequence[Path]) -> tuple[dict[str, Row], list[tuple[Row, str]]]:
    """Of the runs in these folders: job -> its node, of what waits or works for them alone; and nodes that another run
    waits for too, with its name."""
    return _jobs_of(watching.look(store, None), folders)


def _jobs_of(runs: Sequence[Row], folders: Sequence[Path]) -> tuple[dict[str, Row], list[tuple[Row, str]]]:
    mine = [run for run in runs if Path(run["folder"]) in folders]
    others = {node["key"]: run["run"] for run in runs if run not in mine and not is_over(run) for node in run["nodes"]}
    jobs: dict[str, Row] = {}
    needed: list[tuple[Row, str]] = []
    for run in mine:
        for node in run["nodes"]:
            if node["state"] not in ("queued", "running") or not node.get("job"):
                continue
            if node["key"] in others:
                needed.append((node, others[node["key"]]))
            else:
                jobs[node["job"]] = node
    return jobs, needed
