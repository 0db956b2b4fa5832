"""What the terminal shows of jobs of a cluster: what was submitted, how it changes, and how to watch it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from rich import box
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from alignment.config.launchers import SlurmLauncher
from alignment.errors import ConfigError, MachineError
from alignment.files import near, program
from alignment.pipeline import ledger, sanity
from alignment.pipeline.runner import Run
from alignment.pipeline.submission import Submission
from alignment.reporting import words
from alignment.reporting.gather import Row
from alignment.reporting.status import facts_text
from alignment.reporting.terminal import log_lines, progress_line, silence_text, status_table, styled, unknown_lines

MANY = 8  # runs: of more, only how many of their stages are in which state
SHOWN = 12  # stages that work or failed
LOGS = 3  # of these with the last lines of their logs
PLANNED = ("new", "at work", "queued", "reused")  # what a stage is before a sweep begins
ORDER = (
    *("done", "reused", "running", "queued", "waiting", "preempted", "interrupted"),
    *("pruned", "cancelled", "failed", "gone"),
)


def say(text: str) -> None:
    Console(highlight=False).print(Text(text), soft_wrap=True)


def note(text: str) -> None:
    """Beside what a command says on stdout, which others may read."""
    Console(highlight=False, stderr=True).print(Text(text), soft_wrap=True)


def note_lost(lines: Sequence[str]) -> None:
    for line in lines:
        note(f"warning: {line}")


def say_begun(sweep: str) -> None:
    say(f"sweep {sweep}: {program('alignment')} status {sweep}")


def say_ended(sweep: str, points: int, failed: int, pruned: int) -> None:
    counts = {f"point{'s' * (points > 1)}": points, "failed": failed, "pruned": pruned}
    told = ", ".join(f"{count} {word}" for word, count in counts.items() if count)
    say(f"sweep {sweep}: {told}: {program('alignment')} compare {sweep}")


def say_alike(runs: Sequence[Run]) -> None:
    """Points of a sweep that are one run: they stand for one, in its lists too."""
    if (count := len({run.place for run in runs})) < len(runs):
        note(f"{len(runs)} points are {count} run{'s' * (count > 1)}: some differ in nothing that changes a result")


def say_unread(few: Sequence[Sequence[str]]) -> None:
    """few: of each point the settings that nothing of it reads; where another point reads one, all is well."""
    for key in few[0] if few else []:
        if all(key in others for others in few[1:]):
            say(f"warning: `{key}` changes nothing: as the other settings stand, nothing reads it")


def show_submission(name: str, runs: int, queued: Submission) -> None:
    """How many stages the runs have together, each counted once; the graph with its job numbers; what to type next."""
    console = Console(highlight=False)
    fresh, missing = sum(len(batch.elements) for batch in queued.batches), len(queued.owners)
    counts = {"submitted": fresh, "queued already": missing - fresh, "in the store": queued.count - missing}
    told = ", ".join(f"{count} {what}" for what, count in counts.items() if count)
    many = f"{runs} runs, " if runs > 1 else ""
    console.print(Text.assemble((name, "bold"), f"  {many}{queued.count} stages: {told}"), soft_wrap=True)
    if queued.batches:
        console.print(_table(queued))
    mine = program("alignment")
    for label, command in (
        ("watch it", f"{mine} status {name} --watch"),
        ("logs", f"{mine} logs {name} [stage] [--follow]"),
        ("end it", f"{mine} cancel {name}"),
        ("scripts", near(queued.folder)),
    ):
        if missing and (fresh or label != "scripts"):
            console.print(Text.assemble((f"{label:<10}", "dim"), command), soft_wrap=True)


def _table(queued: Submission) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold")
    for column in ("job", "stage", "jobs", "waits for"):
        table.add_column(column, no_wrap=column != "waits for")
    for batch in queued.batches:
        first = next(iter(batch.elements.values()))
        number = queued.jobs[first.key].split("_")[0]
        table.add_row(number, first.name, str(len(batch.elements)), queued.waits_for(batch))
    return table


def table(runs: Sequence[Row]) -> RenderableType:
    """Of runs that were asked for by name."""
    return status_table(list(runs)) if len(runs) <= MANY else overview(runs)


def overview(runs: Sequence[Row]) -> RenderableType:
    """Of many runs: how many stages of each name are in which state, each stage once; those that work or failed; and
    runs that cannot be read."""
    nodes = {node["key"]: node for run in runs for node in run["nodes"]}
    states = list(dict.fromkeys(state for state in ORDER for node in nodes.values() if node["state"] == state))
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold")
    table.add_column("stage", no_wrap=True)
    for state in states:
        table.add_column(styled(state), justify="right")
    for name in dict.fromkeys(node["name"] for node in nodes.values()):
        counts = Counter(node["state"] for node in nodes.values() if node["name"] == name)
        table.add_row(words.label(name), *(str(counts[state] or "") for state in states))
    failed, running = ([n for n in nodes.values() if n["state"] == state] for state in ("failed", "running"))
    found = failed + sorted(running, key=lambda node: not silence_text(node))  # the silent first: they are few
    lines = [
        line
        for node in found[:SHOWN]
        for line in [_line(node, runs), *(log_lines(node) if node in found[:LOGS] else [])]
    ]
    more = [Text(f"and {len(found) - SHOWN} more", "dim")] if len(found) > SHOWN else []
    unread = [line for run in runs if run["state"] == "unreadable" for line in unknown_lines(run)]
    missing = sum(run["state"] == "missing" for run in runs)
    not_begun = [Text(f"{missing} not begun yet, or deleted", "dim")] if missing else []
    return Group(Text(f"{len(runs)} runs, {len(nodes)} stages", "bold"), table, *lines, *more, *not_begun, *unread)


def _line(node: Row, runs: Sequence[Row]) -> Text:
    """What there is to say of a stage that works or failed; if it is one run's alone, of which."""
    mine = [run for run in runs if any(other["key"] == node["key"] for other in run["nodes"])]
    whose = str(mine[0].get("own") or mine[0]["run"]) if len(mine) == 1 else ""
    job = f"job {node['job']}" if node.get("job") else ""
    on = f"on {node['on']}" if node.get("on") else ""
    parts = [whose, job, on, node.get("error") or "", silence_text(node) or progress_line(node)]
    return Text.assemble(styled(node["state"]), f"  {words.label(node['name'])}  ", "  ".join(filter(None, parts)))


def changes(runs: Sequence[dict[str, Any]], said: dict[str, str]) -> Iterator[str]:
    """A line for each stage whose state is another one than was said before: key -> state; of one that has failed the
    last ones of its log, too. One that runs share is said once."""
    for run in runs:
        for node in run["nodes"]:
            state = str(node["state"])
            if state in (said.get(node["key"]), "reused"):
                continue
            said[node["key"]] = state
            note = node.get("why") if state == "queued" else node.get("error") or facts_text(node.get("progress"))
            took = words.duration(node["seconds"]) if node.get("seconds") and state == "done" else ""
            job = f"job {node['job']}" if node.get("job") else ""
            yield "  ".join(
                filter(None, [run["run"], run.get("own"), words.label(node["name"]), state, job, took, str(note or "")])
            )
            yield from (f"    {line}" for line in node.get("log") or [])


def plan(runs: Sequence[Run]) -> list[Row]:
    """What `run` would do with the runs of a sweep, each stage once: {"name", "kind", "new", "reused", "queued", "at
    work": how many}, by name in the order of the graph. SLURM is asked for those that a job was ever submitted for."""
    jobs = queued(runs)
    found: dict[str, Row] = {}
    nodes = {(run.store.root, node.key): (run.store, node) for run in runs for node in run.nodes}
    for store, node in nodes.values():
        row = found.setdefault(node.name, {"name": node.name, "kind": node.kind, **dict.fromkeys(PLANNED, 0)})
        if store.record(node.key) is not None:
            row["reused"] += 1
        elif node.key in jobs:
            row["queued"] += 1
        else:
            row["at work" if store.is_held(node.key) else "new"] += 1
    return list(found.values())


def queued(runs: Sequence[Run]) -> dict[str, str]:
    """key -> number of the job that waits or runs for it, as `ledger.queued`; none, with a word, if SLURM is silent."""
    if not isinstance(runs[0].experiment.launcher, SlurmLauncher):
        return {}
    try:
        ledger.recall(runs[0].store)
        return ledger.queued(runs, patience=0.0)
    except MachineError as error:
        _warn(f"warning: what is queued counts as new: {error}")
        return {}


def show_plan(name: str, runs: int, rows: Sequence[Row]) -> None:
    """Of a sweep: a row for the stages of each name, and a column for what there is of them."""
    console = Console(highlight=False)
    counts = {state: sum(row[state] for row in rows) for state in PLANNED}
    told = ", ".join(f"{count} {state}" for state, count in counts.items() if count)
    head = f"  {runs} run{'s' if runs > 1 else ''}, {sum(counts.values())} stages: {told}"
    console.print(Text.assemble((name, "bold"), head), soft_wrap=True)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold")
    for column in ("stage", "kind"):
        table.add_column(column, no_wrap=True)
    for state in (state for state in PLANNED if counts[state]):
        table.add_column(styled(state), justify="right")
    for row in rows:
        table.add_row(row["name"], row["kind"], *(str(row[state] or "") for state in PLANNED if counts[state]))
    console.print(table)


def scripts(runs: Sequence[Run], name: str) -> list[str]:
    """As they would be submitted. Raises ConfigError if these runs are no jobs of a cluster.

    SLURM is not asked: what is queued already is among them, and numbers of jobs that there are none of yet are named.
    """
    if not isinstance(runs[0].experiment.launcher, SlurmLauncher):
        raise ConfigError("there are no scripts to show", where="--show-scripts", fix="add launcher=slurm")
    return Submission(runs, name, {}).scripts()


def check(runs: Sequence[Run], name: str) -> None:
    """Ask SLURM what `run` asks before it queues anything; warnings go to stderr. Raises ConfigError, MachineError."""
    if not isinstance(runs[0].experiment.launcher, SlurmLauncher):
        raise ConfigError("there is no cluster to ask", where="--check", fix="add launcher=slurm")
    if sanity.check(runs, name, _warn, probe=False):
        _warn("checked: the cluster could start these jobs")
    else:
        _warn("nothing to check: all stages are in the store or queued already")


def _warn(text: str) -> None:
    Console(stderr=True, highlight=False).print(Text(text), soft_wrap=True)
