"""The submitting side of the probe: a job of seconds for each kind of place that stages will run in, and its answer."""

from __future__ import annotations

import os
import re
import secrets
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from alignment.config.launchers import Resources
from alignment.config.sources import Dataset, Model, PathSource
from alignment.config.stages.preparing import Prepare
from alignment.errors import AlignmentError, ConfigError, MachineError
from alignment.files import LATE, model_files, read_json, sha256, write_json, write_text
from alignment.launchers import facts, slurm
from alignment.pipeline import snapshot
from alignment.pipeline.ledger import JOBS
from alignment.pipeline.runner import Run
from alignment.pipeline.store import Lock
from alignment.pipeline.submission import Owner, asked, literal, script
from alignment.places import expand, is_url

Say = Callable[[str], None]
PATIENCE = 600.0  # seconds in the queue
LIMIT = 180  # seconds on the node
EVERY = 30.0  # seconds between two lines while it waits
SMALL = 16 << 20  # bytes of a file that is compared by its content; larger ones by their size
MEMORY = 4096  # MB: what it asks for at most
NOT_NOW = {"hold", "begin", "mail-type"}  # options of sbatch that are for the stages' jobs alone


@dataclass
class Probe:
    """One job on its way. partition: in words."""

    job: str
    path: Path  # of its files, without their ending
    python: str | None
    partition: str
    token: str
    lock: Lock
    result: dict[str, Any] | None = None

    @property
    def log(self) -> Path:
        return self.path.with_suffix(".out")


def probe(owners: Sequence[Owner], name: str, say: Say) -> None:
    """Look around where these stages will run. Raises what is missing first, as ConfigError or MachineError."""
    store = owners[0].run.store
    code = snapshot.take(store.root)
    folder = store.root / JOBS / f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}-probe"
    wanted = {"packages": packages(owners), "sources": list(sources(owners))}
    sent: list[Probe] = []
    try:
        for group in _groups(owners):
            sent.append(_send(group, folder / f"probe-{len(sent)}", code, wanted, name))
            say(f"probe: job {sent[-1].job} on {sent[-1].partition} (launcher.probe=false skips it)")
        for one in sent:
            _await(one, say)
    finally:
        with suppress(MachineError):  # one that has ended, and is forgotten
            slurm.cancel([one.job for one in sent if one.result is None])
        for one in sent:
            one.lock.release()
    shutil.rmtree(folder, ignore_errors=True)


def _groups(owners: Iterable[Owner]) -> list[list[Owner]]:
    """Those that run in the same place, by the same set-up."""
    found: dict[Any, list[Owner]] = {}
    for owner in owners:
        asks, launcher = owner.resources, owner.launcher
        place = (asks.partition, asks.account, asks.qos, asks.constraint, asks.exclude)
        how = launcher.model_dump_json(include={"options", "setup", "python", "container", "interface"})
        found.setdefault((place, how), []).append(owner)
    return list(found.values())


def _send(group: Sequence[Owner], path: Path, code: Path, wanted: dict[str, Any], name: str) -> Probe:
    first = group[0]
    launcher, store, asks = first.launcher, first.run.store, _asks([owner.resources for owner in group])
    lock, token = Lock(path.with_suffix(".lock")), secrets.token_hex(8)
    lock.acquire("probe")
    order = {
        "token": token,
        "result": str(path.with_suffix(".result.json")),
        "store": str(store.root),
        "code": str(code),
        "cwd": os.getcwd(),
        "locked": str(lock.path),
        "gpus": asks.gpus_per_node,
        "nodes": asks.nodes,
        "inside": launcher.container is not None,
        "min_free_gb": max(owner.run.experiment.min_free_gb for owner in group),
        "launcher": launcher.model_dump(),
        **wanted,
    }
    write_json(path.with_suffix(".json"), order)
    options = {"job-name": f"{name}.probe", **asked(asks), "no-requeue": True}
    options |= {"output": literal(path.with_suffix(".out")), "chdir": os.getcwd()}
    options |= {key: value for key, value in launcher.options.items() if value is not False and key not in NOT_NOW}
    text = script(f"{path.name} of {name}", options, launcher, code, "alignment.probe", path.with_suffix(".json"))
    write_text(path.with_suffix(".sbatch"), text)
    partition = f"partition {asks.partition}" if asks.partition else "the default partition"
    return Probe(slurm.submit(text), path, launcher.python, partition, token, lock)


def _asks(stages: Sequence[Resources]) -> Resources:
    """As little as shows what the stages will find: GPUs as they, and a second node if they have several."""
    gpus = [asks.gpus_per_node for asks in stages if asks.gpus_per_node is not None]
    memory = [amount for asks in stages if (amount := facts.megabytes(asks.memory))]
    update = {
        "nodes": min(2, max(asks.nodes for asks in stages)),
        "processes": 1,
        "cpus_per_process": None,
        "gpus_per_node": max(gpus, default=None),
        "memory": f"{min(MEMORY, *memory)}M" if memory else None,
        "time_limit": min([LIMIT, *(asks.time_limit for asks in stages if asks.time_limit)]),
    }
    return stages[0].model_copy(update=update)


# --- what is to be found ----------------------------------------------------------------------------------------------


def packages(owners: Iterable[Owner]) -> dict[str, str]:
    """Name -> version. A job makes the keys of its whole graph anew, so those of all nodes count."""
    found: dict[str, str] = {}
    for run in _runs(owners):
        for node in run.nodes:
            found |= node.identity["packages"]
    return found


def sources(owners: Iterable[Owner]) -> Iterator[dict[str, Any]]:
    """Paths of models, data and templates, each with its files: name -> size and, of small ones, SHA-256."""
    paths = {path: None for run in _runs(owners) for path in _paths_of(run)}
    for path in paths:
        files = model_files(path) if path.is_dir() else [path]
        yield {
            "path": str(path.absolute()),
            "files": {str(file.relative_to(path)) if file != path else "": _facts(file) for file in files},
        }


def _runs(owners: Iterable[Owner]) -> list[Run]:
    return list({owner.run.id: owner.run for owner in owners}.values())


def _facts(file: Path) -> tuple[int, str | None]:
    size = file.stat().st_size
    return size, sha256(file) if size <= SMALL else None


def _paths_of(run: Run) -> Iterator[Path]:
    for node in run.nodes:
        yield from _paths(node.settings)
        for group in node.settings.groups:
            value = getattr(run.experiment, group)
            if group == "data" and isinstance(node.settings, Prepare):
                value = [value[name] for name in node.settings.read]
            yield from _paths(value)


def _paths(value: Any) -> Iterator[Path]:
    if isinstance(value, Dataset) and isinstance(value.source, PathSource):
        yield from (Path(file) for file in expand(value.source.path) if not is_url(file))
    elif isinstance(value, PathSource):
        yield Path(value.path)
    elif isinstance(value, BaseModel):
        if isinstance(value, Model) and value.chat_template.endswith(".jinja"):
            yield Path(value.chat_template)
        for name in type(value).model_fields:
            yield from _paths(getattr(value, name))
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _paths(item)


# --- its answer -------------------------------------------------------------------------------------------------------


def _await(one: Probe, say: Say) -> None:
    began = told = time.monotonic()
    pause = 0.2
    while (result := _result(one)) is None:
        state = slurm.states([one.job]).get(one.job)
        now = time.monotonic()
        if state is None or not state.lives:
            result = _late(one, "COMPLETED" if state is None else state.state)
            if result is None:
                raise _without(one, "vanished" if state is None else state.state, state.nodes if state else "")
            break
        if state.waits and now - began > PATIENCE:
            what = f"the probe has not started in {PATIENCE / 60:g} minutes: {state.reason}"
            fix = "launcher.probe=false skips it, and lets the stages wait"
            raise MachineError(what, where=f"job {one.job} on {one.partition}", fix=fix)
        if now - told > EVERY:
            told = now
            say(f"probe: job {one.job} {state.state.lower()} ({state.reason}); launcher.probe=false skips it")
        time.sleep(pause)
        pause = min(5.0 if state.waits else 1.0, pause * 1.2)
    one.result = result
    _judge(one, result, time.monotonic() - began, say)


def _result(one: Probe) -> dict[str, Any] | None:
    """Looks through the folder: a file that was not there a moment ago may be remembered as such for long."""
    path = one.path.with_suffix(".result.json")
    if path.name not in os.listdir(path.parent):
        return None
    try:
        result = read_json(path)
    except (OSError, ValueError):
        return None
    return result if isinstance(result, dict) and result.get("token") == one.token else None


def _late(one: Probe, state: str) -> dict[str, Any] | None:
    """One that has completed has written its answer: it may only not be seen here yet."""
    end = time.monotonic() + (LATE if state == "COMPLETED" else 1.0)
    while (result := _result(one)) is None and time.monotonic() < end:
        time.sleep(0.2)
    return result


def _judge(one: Probe, result: dict[str, Any], seconds: float, say: Say) -> None:
    found = result["found"]
    names = ", ".join(dict.fromkeys(part["node"] for part in found))
    problems = [(part["node"], problem) for part in found for problem in part["problems"]]
    for text in dict.fromkeys(
        f"{problem['where']}: {problem['what']}" for part in found for problem in part["warnings"]
    ):
        say(f"warning: probe on {names}: {text}")
    if problems:
        node, problem = problems[0]
        more = f", and {len(problems) - 1} more" if len(problems) > 1 else ""
        kind: type[AlignmentError] = ConfigError if problem.get("config") else MachineError
        what = f"probe on {node}: {problem['what']}{more}"
        raise kind(what, where=problem["where"], fix=f"{problem['fix']}; log: {one.log}")
    torch = read_json(one.path.with_suffix(".json"))["packages"].get("torch")
    python = ".".join(found[-1]["python"].split(".")[:2])
    facts_found = [f"python {python}", f"torch {torch}" if torch else "", "store writable"]
    say(f"probe on {names}: ok ({', '.join(filter(None, facts_found))}), {seconds:.0f} s")


def _without(one: Probe, state: str, node: str) -> AlignmentError:
    """Why there is no answer, by the job's log."""
    on = f"probe on {node or one.partition}"
    try:
        lines = [line for line in one.log.read_text(errors="replace").splitlines() if line.strip()]
    except OSError:
        fix = f"a store that nodes see and write, by the same path: store=...; scontrol show job {one.job}"
        return MachineError(f"{on}: no log of it, and it has {state}: the store is not to be written there",
                            where=str(one.path.parent), fix=fix)  # fmt: skip
    last = lines[-1].strip() if lines else "nothing"
    if said := re.fullmatch(r"alignment: error: (launcher\.setup): (.*) \((.*)\)(?: \[code \d+\])?", last):
        return MachineError(f"{on}: {said[2]}", where=said[1], fix=f"{said[3]}; log: {one.log}")
    if re.search(r"exec: |line \d+: .*(No such file|not found|Permission denied|cannot execute)", last):
        python = re.sub(r"^.*?line \d+: (exec: )?", "", last)
        fix = f"an interpreter that nodes have, by launcher.python or launcher.setup; log: {one.log}"
        return ConfigError(f"{on}: {python}", where="launcher.python", fix=fix)
    if "No module named" in last:
        fix = f"a store that nodes see, by the same path; log: {one.log}"
        return MachineError(f"{on}: the code in the store is not seen: {last}", where=str(one.path.parent), fix=fix)
    return MachineError(f"{on}: it has {state}, and said last: {last}", where=str(one.log), fix=f"see job {one.job}")
