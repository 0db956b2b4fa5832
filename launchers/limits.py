"""Whether a cluster could ever start what stages ask for: found out before anything is queued, and said by key.

SLURM itself takes much that never starts, and its words for the rest ("configuration is not available") name no cause.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from alignment.config.launchers import Resources
from alignment.config.nearest import closest
from alignment.errors import ConfigError
from alignment.launchers import facts
from alignment.launchers.facts import Cluster, Machine, Partition

ENOUGH = 8 * 1024  # MB for each process: a cluster's default that is less is worth a line
CPUS = {"cpus-per-task", "cpus-per-gpu", "mincpus"}  # options of sbatch that ask for them
OVERRULED = {"time_limit": "PartitionTimeLimit", "max_nodes": "PartitionMaxNodes", "min_nodes": "PartitionMinNodes"}


@dataclass(frozen=True)
class Ask:
    """What the job of a stage asks for. keys: of Resources -> where the config says it. options: further ones of
    sbatch."""

    stage: str
    asked: Resources
    grace: int
    keys: Mapping[str, str] = field(default_factory=dict, compare=False)
    options: tuple[tuple[str, Any], ...] = ()

    def where(self, key: str) -> str:
        return self.keys.get(key, f"launcher.{key}")

    @property
    def cpus(self) -> int:
        each = self.asked.cpus_per_process
        return self.asked.processes * each if each else 1


@dataclass(frozen=True)
class Fault:
    """kind: of what does not hold for all users of a partition."""

    key: str
    what: str
    fix: str
    kind: str = ""


def check(asks: Iterable[Ask], cluster: Cluster) -> list[str]:
    """What people should know. Raises ConfigError for the first that could never start."""
    said: list[str] = []
    for ask in asks:
        if not cluster.partitions:
            continue  # it tells this user nothing
        said += [line for line in _check(ask, cluster) if line not in said]
    return said


def _check(ask: Ask, cluster: Cluster) -> Iterator[str]:
    partitions = _partitions(ask, cluster)
    excluded = _excluded(ask, cluster)
    faults = [_fault(ask, cluster, partition, excluded) for partition in partitions]
    first = faults[0]
    free = [partition for partition, fault in zip(partitions, faults, strict=True) if fault is None]
    if first is not None and None not in faults:
        if not _exempt(ask, first, partitions):
            others = [p for p in cluster.partitions.values() if p not in partitions]
            able = [p.name for p in others if _fault(ask, cluster, p, excluded) is None]
            fix = first.fix + (f"; partitions that could: {', '.join(able)}" if able else "")
            raise ConfigError(f"{ask.stage} {first.what}", where=ask.where(first.key), fix=fix)
        yield f"{ask.stage} {first.what}, but may be exempt: SLURM will tell"
    yield from _down(ask, cluster, free, excluded)
    if ask.asked.memory is None and free:
        yield from _memory(ask, free[0])
    if ask.asked.cpus_per_process is None and free:
        yield from _cpus(ask, free[0])


def _partitions(ask: Ask, cluster: Cluster) -> list[Partition]:
    """Those that the job may run in: it starts in whichever is first free."""
    if ask.asked.partition is None:
        usual = [partition for partition in cluster.partitions.values() if partition.default]
        if cluster.routed:
            return [*usual, *(p for p in cluster.partitions.values() if not p.default)]
        if not usual:
            fix = f"launcher.partition=..., one of: {', '.join(cluster.partitions)}"
            raise ConfigError("the cluster has no default partition", where=ask.where("partition"), fix=fix)
        return usual
    names = [name.strip() for name in ask.asked.partition.split(",") if name.strip()]
    if not names:
        what = f"`{ask.asked.partition}` names no partition"
        raise ConfigError(what, where=ask.where("partition"), fix=f"one of: {', '.join(cluster.partitions)}")
    for name in names:
        if name not in cluster.partitions:
            fix = closest(name, cluster.partitions)
            raise ConfigError(f"the cluster has no partition `{name}`", where=ask.where("partition"), fix=fix)
    return [cluster.partitions[name] for name in names]


def _excluded(ask: Ask, cluster: Cluster) -> set[str]:
    if not ask.asked.exclude or "/" in ask.asked.exclude:  # SLURM takes a file of names, too
        return set()
    names = facts.expand(ask.asked.exclude)
    for name in names if cluster.machines else ():
        if name not in cluster.machines:
            fix = closest(name, cluster.machines)
            raise ConfigError(f"the cluster has no node `{name}`", where=ask.where("exclude"), fix=fix)
    return set(names)


def _fault(ask: Ask, cluster: Cluster, partition: Partition, excluded: set[str]) -> Fault | None:
    """The first reason for which the job could not start in this partition."""
    found = (_barred, _time, _nodes)
    if fault := next((fault for look in found if (fault := look(ask, partition))), None):
        return fault
    if not cluster.machines:
        return None
    return _constraint(ask, cluster) or _room(ask, cluster.of(partition.name), partition, excluded)


def _barred(ask: Ask, partition: Partition) -> Fault | None:
    if partition.state != "UP":
        what = f"would wait in `{partition.name}`, which is {partition.state.lower()}"
        return Fault("partition", what, "take another partition, or wait until it is up again")
    for key, names in (("account", partition.accounts), ("qos", partition.qos)):
        if (mine := getattr(ask.asked, key)) and not names.take(mine):
            what = f"asks for {key} `{mine}`, which `{partition.name}` does not take"
            allowed = f": {', '.join(sorted(names.allowed))}" if names.allowed else ""
            return Fault(key, what, f"one that it takes{allowed}", key)
    return None


def _time(ask: Ask, partition: Partition) -> Fault | None:
    limit, most = ask.asked.time_limit, partition.max_time
    if limit is not None and most is not None and -(-limit // 60) * 60 > most:
        what = f"asks for {_duration(limit)}, and `{partition.name}` gives {_duration(most)} at most"
        fix = f"{_duration(most)} or less: a stage that takes longer is saved, queued again and goes on"
        return Fault("time_limit", what, fix, "time_limit")
    usual = partition.default_time or most
    got = limit if limit is not None else usual
    if got is not None and got <= ask.grace:
        whose = "" if limit is not None else f", the default of `{partition.name}`"
        what = f"has {_duration(got)}{whose}, of which launcher.grace={ask.grace} s are for saving"
        return Fault("time_limit", what, "raise the time limit, or lower launcher.grace")
    return None


def _nodes(ask: Ask, partition: Partition) -> Fault | None:
    count = ask.asked.nodes
    if partition.max_nodes is not None and count > partition.max_nodes:
        what = f"asks for {count} nodes, and `{partition.name}` gives a job {partition.max_nodes} at most"
        return Fault("nodes", what, f"{partition.max_nodes} or fewer", "max_nodes")
    if count < partition.min_nodes:
        what = f"asks for {_count(count, 'node')}, and `{partition.name}` wants {partition.min_nodes} at least"
        return Fault("partition", what, "take another partition", "min_nodes")
    for key, mine, most, unit in (
        ("cpus_per_process", ask.cpus, partition.cpus, " CPUs"),
        ("memory", _wanted(ask), partition.memory, " MB"),
    ):
        if most is not None and mine > most:
            what = f"asks for {mine}{unit} of each node, and `{partition.name}` gives a job {most}{unit} at most"
            return Fault(key, what, "ask for less")
    return None


def _constraint(ask: Ask, cluster: Cluster) -> Fault | None:
    known = sorted({feature for machine in cluster.machines.values() for feature in machine.features})
    for name in _features(ask.asked.constraint):
        if name not in known:
            return Fault("constraint", f"asks for the feature `{name}`, which no node has", closest(name, known))
    return None


def _features(constraint: str | None) -> list[str]:
    """Names in an expression of features: a&b, [a|b], (a|b)&c, a*2."""
    words = re.split(r"[&|,()\[\]]+", constraint or "")
    return [name for word in words if (name := word.strip().partition("*")[0]) and not name.isdecimal()]


def _matches(constraint: str | None) -> Callable[[Machine], bool]:
    """Whether a node may be one of the job's. Of expressions that mix operators: if it has any of the features."""
    names = set(_features(constraint))
    if not names:
        return lambda machine: True
    if re.search(r"[|(\[*]", constraint or ""):
        return lambda machine: bool(names & machine.features)
    return lambda machine: names <= machine.features


def _room(ask: Ask, machines: Sequence[Machine], partition: Partition, excluded: set[str]) -> Fault | None:
    """Whether enough nodes have all of it at once. Each condition is put to those that meet the ones before."""
    asked, place = ask.asked, f"`{partition.name}`"
    left = list(machines)
    if len(left) < asked.nodes:
        return Fault("nodes", f"asks for {asked.nodes} nodes, and {place} has {len(left)}", f"{len(left)} or fewer")
    so_far = ""
    for key, text, meets, amount in _conditions(ask, excluded):
        fit = [machine for machine in left if meets(machine)]
        if len(fit) < asked.nodes:
            few, verb = (f"only {len(fit)}" if fit else "none"), ("is" if len(fit) < 2 else "are")
            most = "" if amount is None else f" (the largest has {max(map(amount, left))}{' MB' * (key == 'memory')})"
            among = f"{few} of the {_count(len(left), 'node')} of {place}{so_far} {verb} such{most}"
            return Fault(key, f"asks for {_count(asked.nodes, 'node')}{text}, and {among}", FIXES[key])
        left, so_far = fit, f"{so_far}{text}"
    return None


Condition = tuple[str, str, Callable[[Machine], bool], Callable[[Machine], int] | None]
FIXES = {
    "gpus_per_node": "ask for fewer; null asks for none",
    "constraint": "ask for other features, or fewer nodes",
    "exclude": "exclude fewer",
    "cpus_per_process": "lower it or launcher.processes",
    "memory": "ask for less; 0 takes all of a node",
}


def _conditions(ask: Ask, excluded: set[str]) -> Iterator[Condition]:
    """Key, in words, whether a node meets it, how much of it a node has."""
    asked, memory, cpus, gpus = ask.asked, _wanted(ask), ask.cpus, ask.asked.gpus_per_node or 0
    if asked.constraint:
        yield "constraint", f" with `{asked.constraint}`", _matches(asked.constraint), None
    if excluded:
        yield "exclude", " not excluded", lambda machine: machine.name not in excluded, None
    if gpus:
        text = f" with {_count(gpus, 'GPU')}"
        yield "gpus_per_node", text, lambda machine: machine.gpus >= gpus, lambda machine: machine.gpus
    if asked.cpus_per_process:
        text = f" with {_count(cpus, 'CPU')}"
        yield "cpus_per_process", text, lambda machine: machine.cpus >= cpus, lambda machine: machine.cpus
    if memory:
        text = f" with {asked.memory} of memory"
        yield "memory", text, lambda machine: machine.memory >= memory, lambda machine: machine.memory


def _wanted(ask: Ask) -> int:
    return facts.megabytes(ask.asked.memory) or 0


def _exempt(ask: Ask, fault: Fault, partitions: Iterable[Partition]) -> bool:
    """Whether this may not hold for the user: the job's QOS overrules it, or the account belongs to one that is let in.
    A job without a QOS may have any: users have defaults."""
    if fault.kind == "account":
        higher = facts.above(ask.asked.account or "")
        return higher is None or any(name in (p.accounts.allowed or ()) for p in partitions for name in higher)
    if fault.kind not in OVERRULED:
        return False
    known = facts.overruling()
    mine = [known.get(ask.asked.qos, set())] if ask.asked.qos else known.values()
    return any(OVERRULED[fault.kind] in flags for flags in mine)


def _down(ask: Ask, cluster: Cluster, partitions: Sequence[Partition], excluded: set[str]) -> Iterator[str]:
    """A line if there are enough nodes, but not now."""
    if not cluster.machines or not partitions:
        return
    meets = [condition[2] for condition in _conditions(ask, excluded)]
    most = 0
    for partition in partitions:
        fit = [machine for machine in cluster.of(partition.name) if all(true(machine) for true in meets)]
        most = max(most, sum(machine.up for machine in fit))
    if most < ask.asked.nodes:
        name = ",".join(partition.name for partition in partitions)
        wants = _count(ask.asked.nodes, "node")
        yield f"{ask.stage} asks for {wants}, and of those in `{name}` that fit {most} are up now: it waits for others"


def _memory(ask: Ask, partition: Partition) -> Iterator[str]:
    """A line if what the cluster gives to jobs that ask for no memory is little."""
    shares = {"Node": 1, "CPU": _given(ask, partition), "GPU": ask.asked.gpus_per_node or 0}
    given = [(amount * shares[unit], unit, amount) for unit, amount in partition.usual.items() if shares[unit]]
    if given and given[0][0] < ENOUGH * ask.asked.processes:
        total, unit, amount = given[0]
        how = f"DefMemPer{unit}={amount}"
        where = ask.where("memory")
        yield f"{where} is null: {ask.stage} gets {total} MB of each node ({how}), and may be killed for more"


def _cpus(ask: Ask, partition: Partition) -> Iterator[str]:
    """A line if the CPUs that the cluster gives to jobs that ask for none are fewer than the processes."""
    options, given, processes = dict(ask.options), _given(ask, partition), ask.asked.processes
    if partition.whole or options.get("exclusive") is True or CPUS & options.keys() or given >= processes:
        return
    where, gets = ask.where("cpus_per_process"), _count(given, "CPU")
    yield f"{where} is null: {ask.stage} gets {gets} of each node by default, which its {processes} processes share"


def _given(ask: Ask, partition: Partition) -> int:
    """CPUs of each node: what is asked for, else what comes with the GPUs, else that of the one task."""
    if ask.asked.cpus_per_process:
        return ask.cpus
    return (partition.per_gpu or 0) * (ask.asked.gpus_per_node or 0) or 1


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}" if number == 1 else f"{number} {thing}s"


def _duration(seconds: int) -> str:
    days, rest = divmod(seconds, 86400)
    clock = f"{rest // 3600}:{rest // 60 % 60:02d}:{rest % 60:02d}"
    return f"{days}-{clock}" if days else clock
