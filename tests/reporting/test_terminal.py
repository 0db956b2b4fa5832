from __future__ import annotations

import io
import json
import re
from collections.abc import Callable
from pathlib import Path

from rich.console import Console

from alignment.reporting import terminal
from alignment.reporting.gather import summarise
from alignment.reporting.status import read_runs

MakeRun = Callable[..., tuple[Path, Path]]
FACTS = {"step": 4, "total": 13, "elapsed_s": 28.0, "left_s": 63.0, "loss": 1.7321, "tokens_per_s": 241.3}


def console(terminal_: bool = False, width: int = 80) -> Console:
    return Console(file=io.StringIO(), width=width, force_terminal=terminal_, highlight=False, color_system=None)


def written(screen: Console) -> str:
    assert isinstance(screen.file, io.StringIO)
    return screen.file.getvalue()


def test_the_end_of_a_run_fits_eighty_columns_and_says_all_there_is_to_do_next(make_run: MakeRun) -> None:
    folder, store = make_run(states={"start": "reused"})
    run = json.loads((folder / "run.json").read_text())
    screen = console()
    terminal.show_summary(summarise(run, store), folder / "report.html", screen)
    text = written(screen)
    assert "dpo is better than start and sft" in text
    assert re.search(rf"talk to it   \S*alignment chat {re.escape(str(folder))}$", text, re.M)
    assert "1 reused, 10 done; 6 min 56 s of work" in text
    assert "report.html" in text
    stop = text[text.index("Stop rate") :].splitlines()
    assert stop[0].split() == ["Stop", "rate", "↑", "43.3", "%", "100.0", "%", "100.0", "%"]
    assert stop[1].split() == ["+56.7", "pts", "[44.0,", "69.3]", "✓"] * 2
    assert "…" not in text, "nothing is cut"


def test_failed_gates_are_named_at_the_end(make_run: MakeRun) -> None:
    folder, store = make_run()
    summary = summarise(json.loads((folder / "run.json").read_text()), store)
    summary["verdict"]["reasons"] = [{"gate": "relevance_holds", "passed": False, "detail": "fell by 0.2"}]
    screen = console()
    terminal.show_summary(summary, None, screen)
    assert "✗ relevance holds: fell by 0.2" in written(screen)


def test_a_plan_says_what_will_be_done_and_why() -> None:
    rows = [
        {"name": "rows", "kind": "prepare", "key": "ab" * 32, "action": "reuse", "why": "the store has it"},
        {"name": "sft", "kind": "sft", "key": "cd" * 32, "action": "run", "why": "not in the store"},
    ]
    screen = console()
    terminal.announce("quick-1", Path("/x"), rows, table=True, console=screen)
    lines = written(screen).splitlines()
    assert lines[0].startswith("quick-1  2 stages: 1 to reuse, 1 to run")
    assert [line.split() for line in lines if line.startswith((" sft", "sft"))] == [
        ["sft", "sft", "run", "not", "in", "the", "store", "cd" * 8]
    ]


def test_status_lists_states_times_and_keys(make_run: MakeRun) -> None:
    _, store = make_run(states={"dpo": "failed", "start": "reused"})
    screen = console(width=120)
    terminal.show_runs(read_runs(store, lambda key: False), store, screen)
    lines = written(screen).splitlines()
    assert lines[0].startswith("quickstart-1f0c9a2b  failed  4 min 57 s of work")
    assert lines[3].split()[:5] == ["sft", "done", "1", "min", "33"]
    runs = read_runs(store, lambda key: False)
    (node,) = [one for run in runs for one in run["nodes"] if one["name"] == "dpo"]
    node["error"] = path = f"/a/{'long/' * 20}path"
    terminal.show_runs(runs, store, narrow := console(width=80))
    assert path in "".join(written(narrow).split()), "a path is shown whole"
    empty = console()
    terminal.show_runs([], store, empty)
    assert written(empty).startswith("no runs in")


def test_where_nothing_can_move_lines_come_at_the_start_the_end_and_every_fifteen_seconds() -> None:
    now = [0.0]
    screen = console()
    with terminal.StageProgress(screen, clock=lambda: now[0]) as observer:
        observer.started("sft", "sft")
        for second in range(1, 41):
            now[0] = float(second)
            observer.progress("sft", {**FACTS, "step": second})
        observer.done("sft", "done", 40.0, {"loss": 1.69, "code": "no number"})
    lines = written(screen).splitlines()
    assert lines == [
        "… SFT  started (sft)",
        "  SFT  15/13  loss 1.732  241 tokens/s  0:28 elapsed  1:03 left",
        "  SFT  30/13  loss 1.732  241 tokens/s  0:28 elapsed  1:03 left",
        f"✓ {'SFT':<16}{'done':<8}{'40.0 s':>12}  last loss 1.69",
    ]


def test_waiting_for_another_run_is_said_once_in_fifteen_seconds_with_its_name() -> None:
    now = [0.0]
    screen = console()
    observer = terminal.StageProgress(screen, clock=lambda: now[0])
    for second in (0.0, 0.5, 14.0, 16.0):
        now[0] = second
        observer.waiting("sft", {"who": "other-1/sft", "pid": 12, "host": "node-7"})
    assert written(screen).splitlines() == ["  SFT  waiting for other-1/sft (process 12 on node-7)"] * 2


def test_a_note_is_said_once_whether_there_is_a_count_yet_or_not() -> None:
    for moves in (True, False):
        for facts in ({"step": 0, "total": 0, "note": "loading the model"}, {**FACTS, "note": "loading the model"}):
            screen = console(terminal_=moves, width=200)
            with terminal.StageProgress(screen) as observer:
                observer.progress("sft", facts)
                if observer._live:
                    observer._live.stop()
            frames = re.split(r"\r|\n", written(screen))
            assert max(frame.count("loading the model") for frame in frames) == 1, (moves, facts)


def test_on_a_terminal_one_line_moves_and_only_the_end_stays() -> None:
    screen = console(terminal_=True, width=120)
    with terminal.StageProgress(screen) as observer:
        observer.started("sft", "sft")
        observer.progress("sft", FACTS)
        observer._live.refresh()  # type: ignore[union-attr]
        observer.done("sft", "done", 91.0, {"loss": 1.69})
    text = written(screen)
    assert "4/13 loss 1.732  241 tokens/s" in text
    assert "1:03 left" in text
    assert "✓ SFT" in text
    assert "1 min 31 s" in text
