"""Before anything is queued: whether the cluster could start these jobs, and whether they would find what they need.

Errors end the submission with nothing queued; what people should know is said, and the submission goes on.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Container, Iterable, Sequence
from contextlib import suppress
from datetime import datetime
from typing import Any

from alignment.config.launchers import Resources
from alignment.errors import ConfigError, MachineError
from alignment.launchers import facts, limits, slurm
from alignment.launchers.limits import Ask
from alignment.pipeline import ledger, probing, submission
from alignment.pipeline.runner import Run
from alignment.pipeline.submission import Owner

Say = Callable[[str], None]
PATIENCE = 10.0  # seconds for all of SLURM's trials together: a controller with a long queue may think for long
SOON = 60.0  # seconds: a start that is later is worth a line
# Of a trial's refusals those that time does not mend, and where in the config to look.
UNAVAILABLE = "configuration is not available"
FOR_GOOD = rf"invalid|not permitted|denied|violates|{UNAVAILABLE}|inactive or drain|more processors|memory required"
FOR_GOOD += "|unrecognized option|unmatched"
KEYS = {
    "account": "account", "qos": "qos", "partition": "partition", "feature": "constraint", "node name": "exclude",
    "gres": "gpus_per_node", "time limit": "time_limit", "memory": "memory", "processors": "cpus_per_process",
    "unrecognized option": "options",
}  # fmt: skip


def check(runs: Sequence[Run], name: str, say: Say, *, probe: bool = True) -> bool:
    """All of it for what these runs lack and have not queued; whether there is any.

    probe: whether jobs may be sent that look around on the nodes, where `launcher.probe` says so.
    Raises ConfigError and MachineError.
    """
    _require_plain(str(runs[0].store.root), "store")
    _require_plain(os.getcwd(), "the directory of this command")
    ledger.recall(runs[0].store)
    already = ledger.queued(runs, say)
    owners = [owner for key, owner in submission.missing(runs).items() if key not in already]
    if not owners:
        return False
    asks = distinct(owners)
    cluster = facts.ask()
    warned = limits.check(asks, cluster)
    for line in warned:
        say(f"warning: {line}")
    waits = {ask.stage for ask in asks if any(line.startswith(f"{ask.stage} ") for line in warned)}
    _try(asks, waits, say)
    if probe and (wanted := [owner for owner in owners if owner.launcher.probe]):
        probing.probe(wanted, name, say)
    return True


def look(run: Run) -> list[str]:
    """What the cluster's lists say of what this run asks for, in lines that are warnings. Nothing is tried or queued.
    Raises ConfigError for what it cannot give, MachineError where it does not answer."""
    return limits.check(distinct(submission.missing([run]).values()), facts.ask())


def _require_plain(path: str, where: str) -> None:
    """sbatch has no way to write these in a line of a script."""
    if found := re.search(r"[\"'\\\n]", path):
        what = f"{path} has a {found[0]!r} in it, which SLURM does not take"
        raise ConfigError(what, where=where, fix="choose a folder of another name")


def distinct(owners: Iterable[Owner]) -> list[Ask]:
    """One for all stages that ask for the same."""
    found: dict[Any, Ask] = {}
    for owner in owners:
        ask = _ask(owner)
        found.setdefault((ask.asked, ask.grace, ask.options), ask)
    return list(found.values())


def _ask(owner: Owner) -> Ask:
    launcher, keys = owner.launcher, dict[str, str]()
    for name in (owner.node.stage, owner.node.name):  # the more special one last
        keys |= {key: f"launcher.stages.{name}.{key}" for key in launcher.stages.get(name, {})}
    options = tuple(launcher.options.items())
    return Ask(owner.node.name, owner.resources, launcher.grace, keys, options)


def _try(asks: Iterable[Ask], waits: Container[str], say: Say) -> None:
    """SLURM's own word on each, which knows what no list of limits says: accounts, QOS, reservations, plugins.

    waits: stages for which nodes must come back first, as has been said."""
    end = time.monotonic() + PATIENCE
    for ask in asks:
        if (left := end - time.monotonic()) <= 0:
            return
        with suppress(MachineError):  # no answer in time: the submission will get one
            fine, said = slurm.test(_script(ask.asked, ask.options), left)
            if not fine:
                _refused(ask, said, ask.stage in waits, say)
            elif (start := re.search(r"to start at (\S+)", said)) and (late := _later(start[1])):
                say(f"{ask.stage}: by SLURM's estimate such a job starts at {late}")


def _refused(ask: Ask, said: str, waits: bool, say: Say) -> None:
    why = re.sub(r"(sbatch: error: |allocation failure: )", "", said)
    if waits and UNAVAILABLE in why:
        return
    if re.search(FOR_GOOD, why, re.I):
        key = next((ask.where(key) for word, key in KEYS.items() if word in why.lower()), "launcher")
        raise ConfigError(f"SLURM would refuse the job of {ask.stage}: {why}", where=key, fix="ask for something else")
    say(f"warning: SLURM could not start the job of {ask.stage} now: {why}")


def _later(text: str) -> str | None:
    """A start that is not soon, for people."""
    try:
        start = datetime.fromisoformat(text)
    except ValueError:
        return None
    return start.strftime("%Y-%m-%d %H:%M") if start.timestamp() - time.time() > SOON else None


def _script(resources: Resources, options: Iterable[tuple[str, Any]]) -> str:
    """A job that asks for as much and does nothing."""
    lines = submission.directives({**submission.asked(resources), **dict(options)})
    return "\n".join(["#!/bin/bash", *lines, "true", ""])
