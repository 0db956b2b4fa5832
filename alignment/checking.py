"""`alignment check` and `alignment data check`: what would stop a run, found in a minute instead of after a queue.

What needs a tokenizer is looked at by a process of its own (alignment/preflight/), as no torch is imported here.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from alignment.calibrating import Calibrations
from alignment.config.hardware import AUTO
from alignment.config.schema import Experiment
from alignment.config.stages.preparing import Prepare
from alignment.errors import BY_CODE, AlignmentError, ConfigError, Finding, InputError, MachineError
from alignment.files import program, write_json
from alignment.pipeline.runner import Run

ROWS = 2000  # of each data set, unless it is the data that is checked
SECONDS = 3.0  # for the tracker's server to answer
ENDS = 5.0  # for a process to end that was asked to
MARKS = {"ok": "✓", "note": " ", "warning": "!", "failed": "✗"}


def check(experiment: Experiment, *, as_json: bool = False, calibrate: bool = False) -> int:
    """Look at everything, say it, and raise the first failure as the error that the run would have ended with.

    calibrate: run some steps of each stage that trains, for the estimate of its time."""
    return _tell(_all(experiment, calibrate), as_json)


def check_data(experiment: Experiment, *, as_json: bool = False, dropped: Path | None = None) -> int:
    """As `check`, of all rows and what they need. dropped: a file to come for all rows that would be dropped. Raises
    ConfigError where it is there already, or its folder is not."""
    if dropped is not None and os.path.lexists(dropped):
        raise ConfigError(
            "there is such a file already", where=f"--dropped {dropped}", fix="another name, or remove it"
        )
    if dropped is not None and not dropped.absolute().parent.is_dir():
        raise ConfigError("there is no such folder", where=f"--dropped {dropped}", fix="make it")
    return _tell(_data(experiment, None, dropped=dropped), as_json)


def _tell(looks: Iterator[Finding], as_json: bool) -> int:
    found: list[Finding] = []
    for finding in looks:
        found.append(finding)
        if not as_json:
            say(finding)
    failed = [finding for finding in found if finding["state"] == "failed"]
    if as_json:
        print(json.dumps({"ok": not failed, "findings": found}, indent=1))
        return int(failed[0]["code"]) if failed else 0
    _raise(failed)
    return 0


def show(experiment: Experiment, rows: int, page: Path | None) -> int:
    """Rows of each prepare stage as the model sees them, here and as a page. Raises the first failure, at the end."""
    from alignment.reporting import rows as rendering

    findings: list[Finding] = []
    for finding in _data(experiment, ROWS, rows):
        findings.append(finding)
        if finding["state"] == "row":
            rendering.show(finding["row"])
        elif finding["state"] != "lengths":
            say(finding)
    if page is not None:
        rendering.write_page(findings, page)
        print(page)
    _raise([finding for finding in findings if finding["state"] == "failed"])
    return 0


def suggest(experiment: Experiment) -> int:
    """The smallest change with which the run fits into memory, as overrides for its command, one a line on stdout; what
    else is found goes to stderr. Raises MachineError if nothing that is tried makes it fit, and the first failure of
    model or data."""
    found: list[Finding] = []
    for finding in _data(experiment, ROWS, fit="suggest"):
        found.append(finding)
        if finding["check"] != "suggest":
            say(finding, partial(print, file=sys.stderr, flush=True))
    last = found[-1]
    _raise([one for one in found if one["state"] == "failed" and not one["check"].startswith("memory")])
    if last["check"] != "suggest":
        raise MachineError("memory is not estimated of this start model", where="model.source")
    if last["facts"]["overrides"] is None:
        raise MachineError(last["what"], where="engine")
    print("\n".join(last["facts"]["overrides"]), end="\n" if last["facts"]["overrides"] else "")
    return 0


def _raise(failed: list[Finding]) -> None:
    if failed:
        raise error_of(failed)


def error_of(failed: list[Finding]) -> AlignmentError:
    """The first failure, as what the run would have ended with; and how many more there are."""
    first, more = failed[0], f" (and {len(failed) - 1} more)" if len(failed) > 1 else ""
    kind = BY_CODE.get(first["code"], AlignmentError)
    return kind(f"{first['check']}: {first['what']}{more}", where=first.get("where"), fix=first.get("fix"))


def _all(experiment: Experiment, calibrate: bool) -> Iterator[Finding]:
    yield _finding(
        "config", "ok", f"{len(experiment.pipeline.nodes)} stages, pipeline ends in {experiment.pipeline.final}"
    )
    try:
        run = Run(experiment, "")
    except AlignmentError as error:
        yield _without_keys(error)
        return
    if not calibrate:
        yield from findings(run, estimate=True)
        return
    with closing(Calibrations(experiment)) as calibrations:  # whose rows are looked at, too
        yield from calibrations.run()
        yield from findings(run, estimate=True, timed=calibrations.timed)


def findings(
    run: Run, estimate: bool = False, timed: dict[str, Any] | None = None, only: Sequence[str] | None = None
) -> Iterator[Finding]:
    """All that is to be looked at of a run, as soon as it is known. estimate: and how long training will take; timed:
    node -> what was measured of its steps. only: nodes that a launch makes, which is judged by the machines that it is
    for, not by those that `hardware` says; None: all."""
    experiment = run.experiment
    if only is not None and experiment.launcher.kind != "slurm":
        here = experiment.hardware.model_copy(update={"name": AUTO, "memory_gb": None})
        experiment = experiment.model_copy(update={"hardware": here})
    try:
        packages = {name: version for node in run.nodes for name, version in node.identity["packages"].items()}
        yield _finding("packages", "ok", ", ".join(f"{name} {version}" for name, version in sorted(packages.items())))
        yield from _store(run)
    except AlignmentError as error:
        yield _without_keys(error)
        return
    yield from _tracker(experiment)
    if only is None and experiment.launcher.kind == "slurm":  # a launch asks by itself
        yield from _cluster(run)
    fresh = [node.name for node in run.nodes] if only is None else only
    stored = {node.name: str(run.store.result(node.key)) for node in run.nodes if node.name not in fresh}
    more: dict[str, Any] = {"estimate": estimate, "timed": timed, "only": only, "stored": stored}
    yield from _data(experiment, ROWS, fit="look", **more)


def _without_keys(error: AlignmentError) -> Finding:
    """Of stages that have no key: the content of a model or of data is part of it, and the versions of packages."""
    check = "sources" if isinstance(error, InputError) else "packages"
    return _finding(check, "failed", error.what, where=error.where, fix=error.fix, code=error.exit_code)


def _finding(check: str, state: str, what: str, **more: Any) -> Finding:
    return {"check": check, "state": state, "what": what, **more}


def _store(run: Run) -> Iterator[Finding]:
    root = run.store.root
    try:
        run.store.require_space(run.experiment.min_free_gb)
        with tempfile.NamedTemporaryFile(dir=root, prefix=".check-") as stream:
            stream.write(b"check")
    except AlignmentError as error:
        yield _finding("store", "failed", error.what, where=error.where, fix=error.fix, code=error.exit_code)
    except OSError as error:
        what = f"cannot be written: {error.strerror}"
        yield _finding("store", "failed", what, where=str(root), fix="set store=...", code=MachineError.exit_code)
    else:
        yield _finding("store", "ok", f"{root} can be written, and has {run.experiment.min_free_gb:g} GB free or more")


def _cluster(run: Run) -> Iterator[Finding]:
    """Whether it has what the jobs ask for. One that does not answer here is a warning: it may do so elsewhere."""
    from alignment.pipeline import sanity

    try:
        warned = sanity.look(run)
    except ConfigError as error:
        yield _finding("cluster", "failed", error.what, where=error.where, fix=error.fix, code=error.exit_code)
    except MachineError as error:
        yield _finding("cluster", "warning", error.what, where=error.where, fix=error.fix)
    else:
        yield from (_finding("cluster", "warning", line) for line in warned)
        if not warned:
            yield _finding("cluster", "ok", "has what the jobs ask for, by its own lists")


def _tracker(experiment: Experiment) -> Iterator[Finding]:
    """Whether the server of W&B answers. A run goes on without it, so it is a warning."""
    if experiment.tracking.kind != "wandb" or experiment.tracking.mode != "online":
        yield _finding("tracking", "ok", f"{experiment.tracking.kind}, {experiment.tracking.mode}: no server is asked")
        return
    address = urlsplit(os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai")
    port = address.port or (80 if address.scheme == "http" else 443)
    try:
        socket.create_connection((address.hostname or "", port), SECONDS).close()
    except OSError as error:
        what = f"W&B does not answer at {address.hostname}:{port}: {error}; metrics would be kept here until it does"
        yield _finding("tracking", "warning", what, where="tracking.mode", fix="tracking=wandb_offline")
    else:
        yield _finding("tracking", "ok", f"W&B answers at {address.hostname}")


def _data(
    experiment: Experiment,
    rows: int | None,
    show: int = 0,
    fit: str = "",
    estimate: bool = False,
    timed: dict[str, Any] | None = None,
    only: Sequence[str] | None = None,
    stored: Mapping[str, str] | None = None,
    dropped: Path | None = None,
) -> Iterator[Finding]:
    """rows: of each data set; None: all of them. show: of each stage's rows, token by token. fit: look whether
    memory and disk are enough; `suggest`: and what would help. estimate, timed, only: as of `findings`. stored:
    node -> result, of those that the store has, whose sources are read no more. dropped: as of `check_data`."""
    nodes = experiment.pipeline.nodes
    stages = {name: experiment.stage[node.stage] for name, node in nodes.items()}
    stored = stored or {}
    reading = {name for name, stage in stages.items() if isinstance(stage, Prepare) and stage.datasets}
    prepare = [name for name in nodes if name in reading - stored.keys()]
    order = {"experiment": experiment.model_dump(), "prepare": prepare, "rows": rows or sys.maxsize, "show": show}
    order |= {"fit": fit, "estimate": estimate, "timed": timed or {}, "only": only, "stored": stored}
    order["dropped"] = dropped and str(dropped)
    with tempfile.TemporaryDirectory(prefix=".check-", dir=_room(experiment)) as folder:
        path = Path(folder) / "order.json"
        write_json(path, order)
        command = [sys.executable, "-m", "alignment.preflight", str(path)]
        with open(Path(folder) / "stderr", "w+", encoding="utf-8") as errors:
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, encoding="utf-8")
            assert process.stdout is not None
            try:
                yield from (json.loads(line) for line in process.stdout if line.startswith("{"))
                process.wait()
            finally:  # nobody may read on, and it have hours of rows before it
                process.stdout.close()
                _end(process)
            if process.returncode:
                errors.seek(0)
                last = (errors.read().strip().splitlines() or ["without a word"])[-1]
                what = f"the look at model and data ended with code {process.returncode}: {last}"
                fix = f"try {program('alignment')} plan, and the stage itself"
                yield _finding("model", "failed", what, fix=fix, code=1)


def _room(experiment: Experiment) -> Path | None:
    """Where tables of rows may lie, which are as large as the data: the store if it is there, else where the system
    keeps temporary files."""
    root = Path(experiment.store)
    return root if root.is_dir() and os.access(root, os.W_OK | os.X_OK) else None


def _end(process: subprocess.Popen[str]) -> None:
    """Ask it to end, if it has not, and make it."""
    if process.poll() is not None:
        return
    process.terminate()
    try:
        process.wait(ENDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def say(finding: Finding, out: Callable[[str], None] | None = None) -> None:
    out = out or partial(print, flush=True)
    where = f" ({finding['where']})" if finding.get("where") and finding["state"] != "ok" else ""
    out(f"{MARKS[finding['state']]} {finding['check']:<12} {finding['what']}{where}")
    if finding["state"] in ("failed", "warning") and finding.get("fix"):
        out(f"  {'':<12} fix: {finding['fix']}")
