"""What the terminal shows: plans, runs, the line that moves while a stage works, and the end of a run."""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

from rich import box
from rich.console import Console, Group, RenderableType
from rich.markup import escape
from rich.panel import Panel
from rich.progress import BarColumn, Progress, ProgressColumn, SpinnerColumn, Task, TaskID, TextColumn
from rich.table import Table
from rich.text import Text

from alignment.files import near, program
from alignment.reporting import words
from alignment.reporting.gather import Row
from alignment.reporting.status import UNKNOWN, facts_text

STYLES = {
    "done": "green", "reused": "cyan", "running": "bold yellow", "waiting": "dim", "failed": "bold red",
    "interrupted": "red", "preempted": "yellow", "unreadable": "red", "gone": "magenta", "run": "bold yellow",
    "reuse": "cyan", "wait": "magenta", "queued": "blue", "new": "bold yellow", "at work": "magenta",
    "cancelled": "red", "pruned": "magenta", "good": "green", "bad": "red", "moved": "bold", "same": "dim",
    "better": "bold green", "worse": "bold red", "broken": "bold red", "no measurable difference": "bold",
    "missing": "dim",
}  # fmt: skip
MARKS = {"done": "✓", "reused": "↺", "failed": "✗", "interrupted": "✗", "preempted": "‖"}
EVERY = 15.0  # seconds between two lines of a stage where nothing can move (a log file)


def styled(word: str, style: str | None = None) -> Text:
    return Text(word, style=STYLES.get(style or word, ""))


# --- tables ----------------------------------------------------------------------------------------------------------


def comparison_table(verdict: Row) -> Table:
    """The verdict's table: metrics down, models across; differences whose interval excludes 0 stand out. 80 columns."""
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    table.add_column("", no_wrap=True, min_width=19)
    for name in verdict["models"]:
        table.add_column(words.label(name), justify="right")
    for row in verdict["table"]:
        kind = words.metric(row["metric"])
        cells = [_comparison_cell(row, name) for name in verdict["models"]]
        better = row.get("higher_is_better")
        arrow = "" if better is None else " ↑" if better else " ↓"
        unit = f"\n{kind.unit}" if kind.unit.startswith(("nats", "tokens")) else ""
        fewer = words.of_prompts(row, verdict.get("prompts"))
        table.add_row(Text.assemble(kind.title + arrow, (unit, "dim"), (f"\n{fewer}" if fewer else "", "dim")), *cells)
    return table


def _comparison_cell(row: Row, model: str) -> Text:
    name = row["metric"]
    cell = Text(words.metric_value(name, (row["values"].get(model) or {}).get("mean")))
    difference = (row.get("difference") or {}).get(model)
    if difference:
        text = words.metric_value(name, difference.get("mean"), sign=True)
        mark = {"good": " ✓", "bad": " ✗"}
        kind = words.change_class(difference, row.get("higher_is_better"))
        cell.append(f"\n{text} {words.interval(name, difference)}{mark.get(kind, '')}", STYLES[kind])
    return cell


def plan_table(plan: list[Row]) -> Table:
    """One row a stage: what would happen, why, and the beginning of its key."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold")
    for column in ("stage", "kind", "will", "because", "key"):
        table.add_column(column, no_wrap=column != "because")
    for row in plan:
        table.add_row(
            escape(row["name"]),
            row["kind"],
            styled(row["action"]),
            escape(row.get("why") or ""),
            Text(row["key"][:16], "dim"),
        )
    return table


def status_table(runs: list[Row]) -> RenderableType:
    """Every run with its stages: state, time, key, and how far the working ones are."""
    return Group(*(_run_table(run) for run in runs))


def unknown_lines(run: Row) -> list[Text]:
    """Of a run of whose run.json nothing can be read: its name, and below it the path and what to do."""
    head = Text.assemble(*_head(str(run["run"]), str(run.get("own") or "")), "  ", styled(run["state"]))
    return [head, Text(f"  {run['error']}")]


def _run_table(run: Row) -> RenderableType:
    if run["state"] in UNKNOWN:
        return Group(*unknown_lines(run), "")
    head = Text.assemble(
        *_head(str(run["run"]), str(run.get("own") or "")), "  ", styled(run["state"]),
        (f"  {words.duration(run.get('seconds'))} of work", "dim"), (f"  {words.moment(run.get('created'))}", "dim"),
    )  # fmt: skip
    nodes = run.get("nodes") or []
    rows = [
        (
            Text(node["name"]),
            styled(node["state"]),
            Text(words.duration(node.get("seconds")) if node.get("seconds") is not None else "", justify="right"),
            Text(node["key"][:16], "dim"),
            Text(_note(node)),
        )
        for node in nodes
    ]
    # Lines of a log run across all columns, so what stands above and below is a table each, all of the same widths.
    widths = [max((row[column].cell_len for row in rows), default=0) for column in range(4)]
    parts: list[RenderableType] = [head]
    table = None
    for node, row in zip(nodes, rows, strict=True):
        if table is None:
            table = _columns(widths)
            parts.append(table)
        table.add_row("", *row)
        if node.get("log"):
            parts += log_lines(node)
            table = None
    return Group(*parts, "")


def _columns(widths: list[int]) -> Table:
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    for width in (2, *widths):
        table.add_column(min_width=width)
    table.add_column(overflow="fold")  # a path is of use only whole
    return table


def log_lines(node: Row) -> list[Text]:
    """The last ones of a stage that has failed, each no longer than the terminal is wide."""
    return [Text(f"      {line}", "dim", no_wrap=True, overflow="ellipsis") for line in node.get("log") or []]


def _note(node: Row) -> str:
    """What there is to say of a stage beside its state: which job, how far, why."""
    state = node["state"]
    note = progress_line(node) if state in ("running", "preempted", "interrupted") else ""
    if state == "waiting" and node.get("held"):
        note = "another run works on it"
    if state in ("failed", "cancelled", "gone"):
        note = node.get("error") or ""
    if state == "queued":
        note = node.get("why") or ""
    note = silence_text(node) or note
    job = f"job {node['job']}" if node.get("job") and state in ("queued", "running", "failed", "cancelled") else ""
    where = f"on {node['on']}" if state == "running" and node.get("on") else ""
    return "; ".join(filter(None, (" ".join(filter(None, (job, where))), note, attempts_text(node))))


def silence_text(node: Row) -> str:
    """Of a stage at work none of whose processes has shown life for long."""
    silent = words.finite(node.get("silent"))
    if not silent:
        return ""
    return f"no sign of life for {words.clock(silent)}: its node may be gone, which SLURM takes a while to see"


def progress_line(node: Row) -> str:
    """12/40  loss 1.69  240 tokens/s  0:31 left, of a stage at work."""
    facts = node.get("progress")
    if not isinstance(facts, dict):
        return ""
    left = words.finite(facts.get("left_s")) if node["state"] == "running" else None
    if node["state"] != "running":
        facts = {**facts, "note": None}  # what it was about to do
    parts = [facts_text(facts), progress_text(facts), f"{words.clock(left)} left" if left is not None else ""]
    return "  ".join(filter(None, parts))


def attempts_text(node: Row) -> str:
    """2 attempts (rank 1 was killed by signal 9): of a stage that the first one did not bring."""
    restarts = int(words.finite(node.get("restarts")) or 0)
    again = f"queued again {restarts} time{'s' if restarts != 1 else ''}" if restarts else ""
    count, causes = int(words.finite(node.get("attempts")) or 0), node.get("causes") or []
    if node["state"] == "failed" and causes and causes[-1] == node.get("error"):
        causes = causes[:-1]  # it stands there already
    if count < 2 and not causes:
        return again
    why = f" ({'; '.join(map(str, causes))})" if causes else ""
    return "; ".join(filter(None, (again, f"{count} attempt{'s' if count != 1 else ''}{why}")))


# --- the end of a run ------------------------------------------------------------------------------------------------


def summary_panel(summary: Row) -> Panel:
    """The end of a run: the models' table, the verdict, what was done."""
    parts: list[RenderableType] = []
    verdict = summary.get("verdict")
    if verdict:
        word = str(verdict.get("verdict") or "")
        parts += [comparison_table(verdict), Text(str(verdict.get("sentence") or word), STYLES.get(word, "bold"))]
        failed = [gate for gate in verdict.get("reasons") or [] if not gate.get("passed")]
        parts += [Text(f"✗ {g.get('gate', '').replace('_', ' ')}: {g.get('detail', '')}", "red") for g in failed]
        parts.append("")
    states = ", ".join(f"{count} {state}" for state, count in summary["states"].items())
    parts.append(Text(f"stages: {states}; {words.duration(summary.get('spent_s'))} of work", "dim"))
    return Panel(
        Group(*parts), title=escape(str(summary.get("run") or "")), title_align="left", box=box.HORIZONTALS, padding=0
    )


def next_steps(summary: Row, report: Path | None) -> list[Text]:
    """Where the report and the model are, and the command that talks to it: lines to copy, so never wrapped."""
    lines = [_report_line(report)] if report else []
    if summary.get("model"):
        run = near(report.parent) if report else str(summary["run"])  # a folder is found whatever the store
        command = f"{program('alignment')} chat {shlex.quote(run)}"
        lines.append(Text.assemble(("final model  ", "dim"), near(Path(summary["model"]))))
        if summary.get("talks"):
            lines.append(Text.assemble(("talk to it   ", "dim"), (command, "bold")))
    return lines


def _report_line(report: Path) -> Text:
    return Text.assemble(("report       ", "dim"), near(report))


def show_report(report: Path, console: Console | None = None) -> None:
    (console or Console(highlight=False)).print(_report_line(report), soft_wrap=True)


def announce(
    run: str, folder: Path, plan: list[Row], own: str = "", table: bool = False, console: Console | None = None
) -> None:
    """Say what a run is going to do: one line, or the whole table. own: in what it differs from others of its sweep."""
    console = console or Console(highlight=False)
    actions = [row["action"] for row in plan]
    counts = ", ".join(f"{actions.count(action)} to {action}" for action in dict.fromkeys(actions))
    console.print(
        Text.assemble(*_head(run, own), f"  {len(plan)} stages: {counts}  ", (near(folder), "dim")), soft_wrap=True
    )
    if table:
        console.print(plan_table(plan))


def _head(run: str, own: str) -> list[tuple[str, str]]:
    return [(run, "bold"), *([(f"  {own}", "cyan")] if own else [])]


def show_runs(runs: list[Row], store: Path, console: Console | None = None) -> None:
    console = console or Console(highlight=False)
    if runs:
        console.print(status_table(runs))
    else:
        console.print(f"no runs in {near(store)}", soft_wrap=True)


def show_summary(summary: Row, report: Path | None, console: Console | None = None) -> None:
    console = console or Console(highlight=False)
    console.print(summary_panel(summary))
    for line in next_steps(summary, report):
        console.print(line, soft_wrap=True)


# --- while it works --------------------------------------------------------------------------------------------------


class _Facts(ProgressColumn):
    """loss 1.69  240 tokens/s, as far as the stage tells them."""

    def render(self, task: Task) -> Text:
        return Text(progress_text(task.fields["facts"]))


class _Clock(ProgressColumn):
    """Time since the stage began, and how much is left by its own estimate."""

    max_refresh = 0.5

    def render(self, task: Task) -> Text:
        facts = task.fields["facts"]
        left = words.finite(facts.get("left_s"))
        return Text(words.clock(task.elapsed)) + Text(f"  {words.clock(left)} left" if left is not None else "", "dim")


def progress_text(facts: Row) -> str:
    """Loss, speed and note of progress.json in one short text."""
    loss, speed = words.finite(facts.get("loss")), words.finite(facts.get("tokens_per_s"))
    parts = [
        f"loss {words.number(loss)}" if loss is not None else "",
        f"{speed:,.0f} tokens/s" if speed is not None else "",
        str(facts.get("note") or "") if facts.get("total") else "",  # else `facts_text` has it
    ]
    return "  ".join(part for part in parts if part)


class StageProgress:
    """The observer of a run: one moving line for the stage at work and one that stays for each that ended.

    Where nothing can move (stdout is a file or a pipe) it prints plain lines: the start, the end, and how far the stage
    is at most once in 15 seconds.
    """

    def __init__(
        self, console: Console | None = None, clock: Callable[[], float] = time.monotonic, every: float = EVERY
    ):
        self.console = console or Console(highlight=False)
        self._clock, self._every = clock, every
        self._said: dict[str, float] = {}
        self._tasks: dict[str, TaskID] = {}
        columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(24), TextColumn("{task.fields[steps]}"))
        moving = self.console.is_terminal and not self.console.is_dumb_terminal
        self._live = Progress(*columns, _Facts(), _Clock(), console=self.console, transient=True) if moving else None

    def __enter__(self) -> StageProgress:
        if self._live:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live:
            self._live.stop()

    def started(self, name: str, kind: str) -> None:
        self._drop(name)
        if self._live:
            self._show(name, {})
        else:
            self._said[name] = self._clock()
            self._print(f"… {words.label(name)}  started ({kind})")

    def progress(self, name: str, facts: dict[str, Any]) -> None:
        """facts: the content of progress.json."""
        if self._live:
            self._show(name, facts)
        elif self._due(name):
            left = words.finite(facts.get("left_s"))
            parts = [facts_text(facts), progress_text(facts), f"{words.clock(facts.get('elapsed_s'))} elapsed"]
            parts += [f"{words.clock(left)} left"] if left is not None else []
            self._print(f"  {words.label(name)}  {'  '.join(part for part in parts if part)}")

    def waiting(self, name: str, holder: dict[str, Any]) -> None:
        """Another run works on the same stage; holder says which."""
        who = f"waiting for {holder['who']}" if holder.get("who") else "waiting for another run"
        if holder.get("pid"):
            who += f" (process {holder['pid']} on {holder.get('host', '?')})"
        if self._live:
            self._show(name, {"note": who})
        elif name not in self._said or self._due(name):
            self._said.setdefault(name, self._clock())
            self._print(f"  {words.label(name)}  {who}")

    def done(self, name: str, state: str, seconds: float, facts: dict[str, Any]) -> None:
        """facts: the stage's summary metrics. state: done | reused | failed | preempted | interrupted."""
        self._drop(name)
        self._said.pop(name, None)
        style = STYLES.get(state, "")
        text = Text.assemble(
            (MARKS.get(state, " "), style), f" {words.label(name):<16}", (f"{state:<8}", style),
            f"{words.duration(seconds):>12}  ", (words.main_facts(facts), "dim"),
        )  # fmt: skip
        self.console.print(text, soft_wrap=True)

    def warning(self, name: str, text: str) -> None:
        """Something the stage wants people to know, though it went on."""
        self.console.print(Text.assemble(("! ", "yellow"), f"{words.label(name)}  {text}"), soft_wrap=True)

    def _show(self, name: str, facts: Row) -> None:
        assert self._live
        step, total = words.finite(facts.get("step")), words.finite(facts.get("total"))
        if name not in self._tasks:
            self._tasks[name] = self._live.add_task(escape(words.label(name)), total=None, facts={}, steps="")
        steps = facts_text(facts)
        self._live.update(self._tasks[name], completed=step or 0, total=total or None, facts=facts, steps=steps)

    def _drop(self, name: str) -> None:
        if self._live and name in self._tasks:
            self._live.remove_task(self._tasks.pop(name))

    def _due(self, name: str) -> bool:
        """Whether the last plain line of this stage is old enough for another one."""
        now = self._clock()
        if now - self._said.get(name, float("-inf")) < self._every:
            return False
        self._said[name] = now
        return True

    def _print(self, line: str) -> None:
        self.console.print(Text(line), soft_wrap=True)
