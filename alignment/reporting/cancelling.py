"""`alignment cancel`: ends the jobs of runs, but for those that other runs wait for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path

from alignment.errors import ConfigError
from alignment.launchers import slurm
from alignment.pipeline import claims, ledger
from alignment.pipeline.store import Store
from alignment.reporting import queue, targets, watching, words
from alignment.reporting.gather import Row
from alignment.reporting.status import works
from alignment.signals import Asked

LISTED = 10  # names in an error, jobs in an answer
Jobs = dict[str, Row]  # job -> its node
Needed = dict[str, tuple[Row, list[str]]]  # job -> its node, and who else waits for it
Mine = Callable[[str, str], bool]


def cancel(names: Sequence[str], root: Path) -> int:
    """Raises ConfigError for a name that means nothing, or several that have jobs; MachineError if SLURM refuses; and,
    once the jobs of the others are cancelled, InputError for a run whose run.json is gone or cannot be read."""
    store = Store(root)
    for name in names:
        targets.named(name, store.root)  # what is mistyped is said before anybody is waited for
    with ledger.alone(store, "alignment cancel", queue.say):  # who submits now does so for what is meant, perhaps
        ledger.remember(store)
        return _cancel(names, store)


def _cancel(names: Sequence[str], store: Store) -> int:
    runs = watching.look(store, targets.folders_of_runs(store.root))
    unknown = _unknown(store, runs)
    # Of one whose run.json cannot be read nobody knows: better an error, below, than to say that there is nothing.
    live = {Path(run["folder"]) for run in runs if works(run) or not run["nodes"]} | set(unknown)
    others = _of_others(store, runs)
    meant = [_meant(name, store.root, live, others) for name in names]
    folders = list(dict.fromkeys(folder for _, found in meant for folder in found))
    sweeps = {sweep for sweep, _ in meant if sweep}
    alone = {folder.name for sweep, found in meant if not sweep for folder in found}  # whatever sweeps they are in
    jobs, needed = _cancel_jobs(store, runs, folders, lambda claimant, run: claimant in sweeps or run in alone)
    local = [said for run in runs if Path(run["folder"]) in folders for said in _here(run, store)]
    local += [said for sweep in sorted(sweeps) if (said := _end_command(store, sweep))]
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


def _cancel_jobs(store: Store, runs: Sequence[Row], folders: Sequence[Path], mine: Mine) -> tuple[set[str], Needed]:
    """What was cancelled, and what was not. mine: see `_jobs_of`. Who is among them waits for no job any more."""
    jobs, needed = _jobs_of(store, runs, folders, mine)
    for job, (node, others) in needed.items():
        wait = "waits" if len(others) == 1 else "wait"
        queue.say(f"{node['name']} (job {job}) stays: {words.listed(others, LISTED)} {wait} for it")
    left = _left(store, mine, {*jobs, *needed})
    slurm.cancel([*jobs, *left])
    claims.drop(store, mine)  # not if SLURM refuses: then all is as it was
    ledger.note_cancelled(store, {job: node["key"] for job, node in jobs.items()})
    _tell(jobs)
    for job in left:
        queue.say(f"cancelled job {job}: what it was to make is there")
    return {*jobs, *left}, needed


def _left(store: Store, mine: Mine, known: Collection[str]) -> list[str]:
    """Jobs that nobody else waits for and that wait or run though their stages are made: a command here was faster."""
    waiting = claims.by_job(claims.read(store))
    asked = {job for job, who in waiting.items() if job not in known and all(mine(*one) for one in who)}
    asked -= {note["job"] for note in ledger.unmade(store)}
    return sorted(asked & slurm.living()) if asked else []


def _tell(jobs: dict[str, Row]) -> None:
    if len(jobs) > LISTED:
        for name, count in Counter(node["name"] for node in jobs.values()).items():
            queue.say(f"cancelled {count} x {name}")
    else:
        for job, node in jobs.items():
            queue.say(f"cancelled {node['name']} (job {job})")


def _unknown(store: Store, runs: Sequence[Row]) -> dict[Path, str]:
    """Of runs whose run.json is gone or cannot be read: folder -> a job that was submitted for it and waits or runs."""
    readable = {Path(run["folder"]).name for run in runs if run["nodes"]}
    notes = [note for note in ledger.unmade(store) if note["run"] not in readable]
    states = slurm.states(note["job"] for note in notes) if notes else {}
    living = [note for note in notes if note["job"] in states and states[note["job"]].lives]
    return {store.run_folder(note["run"]): note["job"] for note in living}


def _of_others(store: Store, runs: Sequence[Row]) -> dict[Path, set[str]]:
    """Of runs whose living jobs all have somebody who waits for them: folder -> who. A sweep that was cancelled has the
    folders of its points still, and these may go on for others."""
    waiting = claims.by_job(claims.read(store))
    found: dict[Path, set[str]] = {}
    for run in runs:
        folder = Path(run["folder"])
        who = [{name for name, _ in waiting.get(node["job"], [])} for node in _living([run], [folder])]
        if who and all(who) and not _here(run, store):
            found[folder] = set().union(*who)
    return found


def _meant(name: str, store: Path, live: set[Path], others: Mapping[Path, set[str]]) -> tuple[str | None, list[Path]]:
    """The sweep of that name, or None, and the folders of its runs, or of the run of that name; else of the only one
    whose name begins so and that is `live`, which a sweep is not by runs that go on for `others` (`_of_others`) alone.

    Names begin with the experiment's: most often with that of every run that was ever made of it.
    """
    runs, sweeps = targets.named(name, store)
    if exact := targets.whole(name, runs, sweeps):
        return (name if name in sweeps else None), exact
    found: dict[str, tuple[str | None, list[Path]]] = {
        sweep: (sweep, folders)
        for sweep, folders in sweeps.items()
        if any(sweep in others.get(folder, {sweep}) for folder in live.intersection(folders))
    }
    in_sweeps = {folder for _, folders in found.values() for folder in folders}
    mine = sorted(folder for folder in live if folder.name.startswith(name) and folder not in in_sweeps)
    found |= {folder.name: (None, [folder]) for folder in mine}
    if len(found) > 1:
        what = f"{name!r} is the beginning of several that wait or run: {words.listed([*found], LISTED)}"
        raise ConfigError(what, where="command line", fix="give a whole name; a sweep's means all its runs")
    return next(iter(found.values()), (None, []))


def _end_command(store: Store, sweep: str) -> str | None:
    """Have the command of a sweep begin nothing more, if it is at work: a search would ask for more trials."""
    claims.end(store, sweep)
    lock = store.driver_lock(sweep)
    if not lock.is_held():
        return None
    holder = lock.holder()
    return f"the command of {sweep}, {holder.get('pid')} on {holder.get('host')}, begins nothing more"


def _here(run: Row, store: Store) -> list[str]:
    """Of stages at work that are no jobs: whose process would have to be asked."""
    found = []
    for node in run["nodes"]:
        if node["state"] == "running" and node.get("held"):
            holder = store.lock(node["key"]).holder()
            who = f"runs on {holder.get('host')} and is no job: kill {holder.get('pid')} there has it save and end"
            found.append(f"{node['name']} of {run['run']} {who}")
    return found


def prune(
    store: Store, sweep: str, folders: Sequence[Path], trained: Mapping[Path, str], stop: Asked | None = None
) -> list[Path]:
    """Cancel the jobs of a sweep's runs in these folders, but for those that others wait for, and not of a run whose
    training others wait for. trained: folder -> key of that. Returns the folders of those whose jobs were cancelled.
    Raises MachineError if SLURM refuses, Stopped as `ledger.alone`."""
    with ledger.alone(store, sweep, queue.say, stop):
        runs = watching.look(store, folders)

        def of(some: Sequence[Path]) -> tuple[Jobs, Needed]:
            names = {folder.name for folder in some}
            return _jobs_of(store, runs, some, lambda claimant, run: claimant == sweep and run in names)

        kept = {node["key"] for node, _ in of(folders)[1].values()}
        alone = [folder for folder in folders if trained[folder] not in kept]
        slurm.cancel(jobs := of(alone)[0])
        ledger.note_cancelled(store, {job: node["key"] for job, node in jobs.items()})
        claims.drop(store, lambda claimant, run: claimant == sweep and run in {folder.name for folder in alone})
    return alone


def _jobs_of(store: Store, runs: Sequence[Row], folders: Sequence[Path], mine: Mine) -> tuple[Jobs, Needed]:
    """Of the runs in these folders: what waits or works for them alone; and what others wait for too, with their
    names. mine(claimant, run): whether that one does not count, as it is to wait for nothing any more."""
    waiting = claims.by_job(claims.read(store))
    jobs: Jobs = {}
    needed: Needed = {}
    for node in _living(runs, folders):
        others = [claimant for claimant, run in waiting.get(node["job"], []) if not mine(claimant, run)]
        if others:
            needed[node["job"]] = node, list(dict.fromkeys(others))
        else:
            jobs[node["job"]] = node
    return jobs, needed


def _living(runs: Sequence[Row], folders: Sequence[Path]) -> Iterator[Row]:
    for run in runs:
        if Path(run["folder"]) in folders:
            yield from (node for node in run["nodes"] if node["state"] in ("queued", "running") and node.get("job"))
