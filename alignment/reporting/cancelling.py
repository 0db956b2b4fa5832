"""`alignment cancel`: ends the jobs of runs, but for those that other runs wait for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from alignment.errors import ConfigError
from alignment.launchers import slurm
from alignment.pipeline import ledger
from alignment.pipeline.store import Store
from alignment.reporting import queue, targets, watching
from alignment.reporting.gather import Row
from alignment.reporting.status import is_over

LISTED = 10  # names in an error, jobs in an answer


def cancel(names: Sequence[str], root: Path) -> int:
    """Raises ConfigError for a name that means nothing, or several that have jobs; MachineError if SLURM refuses.

    Raises InputError where the run.json of a run is gone or cannot be read: of one that is meant once the jobs of the
    others are cancelled, of one that may wait for these before any is.
    """
    store = Store(root)
    ledger.recall(store)
    runs = watching.look(store, targets.folders_of_runs(store.root))
    unknown = _unknown(store, runs)
    # Of one whose run.json cannot be read nobody knows: better an error, below, than to say that there is nothing.
    live = {Path(run["folder"]) for run in runs if not is_over(run) or not run["nodes"]} | set(unknown)
    folders = list(dict.fromkeys(folder for name in names for folder in _meant(name, store.root, live)))
    jobs, needed = _jobs_of(runs, folders)
    if jobs:
        _refuse_risk(runs, unknown, folders)
    for node, run in needed:
        queue.say(f"{node['name']} (job {node['job']}) stays: {run} waits for it")
    slurm.cancel(jobs)
    _tell(jobs)
    local = [said for run in runs if Path(run["folder"]) in folders for said in _here(run, store)]
    for said in local:
        queue.say(said)
    readable = {Path(run["folder"]) for run in runs if run["nodes"]}
    # Points of a sweep that works here, and has not come to them yet, have no folder; nor do they have jobs.
    for folder in (path for path in folders if path not in readable and (path.exists() or path in unknown)):
        job = unknown.get(folder)
        goes_on = f", and its job {job} is in the queue" if job and job not in jobs else ""
        raise targets.unreadable(folder / "run.json", goes_on)
    if not jobs and not needed and not local:
        queue.say("nothing to cancel: no job of theirs waits or runs")
    return 0


def _tell(jobs: dict[str, Row]) -> None:
    if len(jobs) > LISTED:
        for name, count in Counter(node["name"] for node in jobs.values()).items():
            queue.say(f"cancelled {count} x {name}")
    else:
        for job, node in jobs.items():
            queue.say(f"cancelled {node['name']} (job {job})")


def _unknown(store: Store, runs: Sequence[Row]) -> dict[Path, str]:
    """Of runs whose run.json is gone or cannot be read: folder -> a job that was submitted for it and waits or runs. Of
    what else they wait for nobody knows."""
    readable = {Path(run["folder"]).name for run in runs if run["nodes"]}
    notes = [note for note in ledger.unmade(store) if note["run"] not in readable]
    states = slurm.states(note["job"] for note in notes) if notes else {}
    living = [note for note in notes if note["job"] in states and states[note["job"]].lives]
    return {store.run_folder(note["run"]): note["job"] for note in living}


def _refuse_risk(runs: Sequence[Row], unknown: dict[Path, str], folders: Sequence[Path]) -> None:
    """Raises InputError if another run than those in these folders may wait for their jobs: one of `_unknown`. One that
    has no job of its own may wait, too, for what others submitted, but most likely is of long ago: it is named."""
    for folder in (path for path in unknown if path not in folders):
        more = f", and its job {unknown[folder]} may wait for what is to be cancelled"
        raise targets.unreadable(folder / "run.json", more)
    others = [run["run"] for run in runs if not run["nodes"] and Path(run["folder"]) not in folders]
    if others:
        more = f" and {len(others) - LISTED} more" if len(others) > LISTED else ""
        queue.say(f"warning: what {', '.join(others[:LISTED])}{more} may wait for is not known: run.json is unreadable")


def _meant(name: str, store: Path, live: set[Path]) -> list[Path]:
    """Folders of the run or sweep of that name; else of the only one whose name begins so and that is `live`.

    Names begin with the experiment's: most often with that of every run that was ever made of it.
    """
    runs, sweeps = targets.named(name, store)
    if exact := targets.whole(name, runs, sweeps):
        return exact
    found = {sweep: folders for sweep, folders in sweeps.items() if live.intersection(folders)}
    in_sweeps = {folder for folders in found.values() for folder in folders}
    mine = sorted(folder for folder in live if folder.name.startswith(name) and folder not in in_sweeps)
    found |= {folder.name: [folder] for folder in mine}
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
    waits for too, with its name. One whose run.json cannot be read, and that has jobs, may wait for any. Raises
    MachineError if SLURM refuses."""
    runs = watching.look(store, None)
    jobs, needed = _jobs_of(runs, folders)
    others = [folder.name for folder in (_unknown(store, runs) if jobs else {}) if folder not in folders]
    return ({}, [*needed, *((node, others[0]) for node in jobs.values())]) if others else (jobs, needed)


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
