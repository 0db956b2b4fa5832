"""What a cluster says of itself: partitions and nodes, read from scontrol's lines of NAME=VALUE.

Versions differ in which names there are, and in what stands for "any". A name that is missing means no limit: what this
does not understand is for SLURM to refuse.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from alignment.errors import MachineError
from alignment.launchers import slurm

UNREACHED = "contact slurm controller|establish config|fetching config|SRV lookup|connection refused|resolve"
ANY = {"", "UNLIMITED", "INFINITE", "NONE", "N/A", "n/a", "(null)", "NO_VAL", "ALL"}
# Words of a node's state that keep jobs off it until somebody acts.
NOT_UP = {"DOWN", "DRAIN", "DRAINED", "DRAINING", "FAIL", "FAILING", "ERROR", "UNKNOWN", "INVAL", "INVALID_REG"}
NOT_UP |= {"MAINT", "MAINTENANCE", "FUTURE"}
SILENT, WAKES = {"NOT_RESPONDING", "NO_RESPOND"}, {"POWERING_UP", "POWER_UP", "POWERED_DOWN", "POWER"}
FIELD = re.compile(r"(?:^|\s)([A-Z][A-Za-z/:_]*)=(\S*)")


@dataclass(frozen=True)
class Machine:
    """A node of the cluster. memory: MB that jobs can have."""

    name: str
    cpus: int
    memory: int
    gpus: int
    features: frozenset[str]
    partitions: frozenset[str]
    up: bool


@dataclass(frozen=True)
class Partition:
    """Limits of None: none. Times are seconds, memory is MB. default: whether jobs that name none go there. cpus,
    memory: most of a node that a job may have. usual: MB for each Node, CPU or GPU of a job that asks for none, as
    per_gpu: CPUs for each GPU. whole: jobs get all CPUs of their nodes."""

    name: str
    default: bool
    state: str
    max_time: int | None
    default_time: int | None
    min_nodes: int
    max_nodes: int | None
    cpus: int | None
    memory: int | None
    usual: Mapping[str, int]
    per_gpu: int | None
    whole: bool
    accounts: Names
    qos: Names


@dataclass(frozen=True)
class Names:
    """Who may use a partition: those that are allowed (None: all), without those that are denied."""

    allowed: frozenset[str] | None = None
    denied: frozenset[str] = frozenset()

    def take(self, name: str) -> bool:
        return name.lower() not in self.denied and (self.allowed is None or name.lower() in self.allowed)


@dataclass(frozen=True)
class Cluster:
    """routed: a plugin of the site may choose another partition than the default one."""

    partitions: Mapping[str, Partition]
    machines: Mapping[str, Machine] = field(default_factory=dict)
    routed: bool = False

    def of(self, partition: str) -> list[Machine]:
        return [machine for machine in self.machines.values() if partition in machine.partitions]


def ask() -> Cluster:
    """Three short questions. Raises MachineError."""
    show = ("scontrol", "--oneliner", "--all", "show")
    try:
        return read(slurm.call(*show, "partition"), slurm.call(*show, "node"), slurm.call("scontrol", "show", "config"))
    except MachineError as error:
        if not re.search(UNREACHED, error.what, re.I):
            raise
        what, fix = "SLURM's controller cannot be reached", "run this on a login node; `scontrol ping` says more"
        raise MachineError(what, where=error.where, fix=fix) from error


def overruling() -> dict[str, set[str]]:
    """QOS -> the limits of a partition that it overrules, in SLURM's words. None are known without accounting."""
    try:
        said = slurm.call("sacctmgr", "--noheader", "--parsable2", "show", "qos", "format=name,flags", patience=5.0)
    except MachineError:
        return {}
    lines = [line.split("|") for line in said.splitlines() if line.count("|") == 1]
    return {name: set(flags.split(",")) for name, flags in lines}


def above(account: str) -> list[str] | None:
    """The accounts that this one belongs to, up to root. None: accounting does not tell. Newer versions let those in
    that belong to an account which is let in. Without accounting there are none."""
    try:
        form = ("--noheader", "--parsable2", "show", "associations", "format=account,parentname")
        said = slurm.call("sacctmgr", *form, patience=5.0).lower()
    except MachineError:
        return []
    parents = dict(line.split("|") for line in said.splitlines() if re.fullmatch(r"[^|]+\|[^|]+", line))
    chain, name = list[str](), account.lower()
    while (name := parents.get(name, "")) and name not in chain:
        chain.append(name)
    return chain if chain[-1:] == ["root"] else None


def expand(nodes: str) -> list[str]:
    """The names in a list of SLURM's, as a[1-3],b."""
    plain = nodes.split(",") if "[" not in nodes else slurm.call("scontrol", "show", "hostnames", nodes).split()
    return [name.strip() for name in plain if name.strip()]


def read(partitions: str, nodes: str, config: str) -> Cluster:
    """Of what scontrol prints of each: partitions and nodes one on a line."""
    settings = dict(re.findall(r"^(\w+)\s*=\s*(\S*)", config, re.M))
    found = [_partition(values, settings) for line in partitions.splitlines() if (values := _values(line))]
    machines = [_machine(values) for line in nodes.splitlines() if (values := _values(line))]
    return Cluster(
        {partition.name: partition for partition in found if partition.name},
        {machine.name: machine for machine in machines if machine.name},
        settings.get("JobSubmitPlugins", "") not in ANY,
    )


def _values(line: str) -> dict[str, str]:
    """The first of each name: what people write into Reason and Comment comes last."""
    values: dict[str, str] = {}
    for name, value in FIELD.findall(line):
        values.setdefault(name, value)
    return values


def _machine(values: Mapping[str, str]) -> Machine:
    features = values.get("AvailableFeatures", values.get("Features", ""))
    state = values.get("State", "UNKNOWN").upper()
    words = set(re.split(r"[+*~#!%$@^-]+", state))
    silent = "*" in state or bool(SILENT & words)
    return Machine(
        name=values.get("NodeName", ""),
        cpus=_number(values.get("CPUEfctv")) or _number(values.get("CPUTot")) or 0,
        memory=(megabytes(values.get("RealMemory")) or 0) - (megabytes(values.get("MemSpecLimit")) or 0),
        gpus=gpus(values.get("Gres", "")),
        features=frozenset() if features in ANY else frozenset(features.split(",")),
        partitions=frozenset(values.get("Partitions", "").split(",")) - {""},
        up=not NOT_UP & words and (not silent or bool(WAKES & words)),  # a job wakes those that save power
    )


def _partition(values: Mapping[str, str], settings: Mapping[str, str]) -> Partition:
    """settings: the cluster's, which hold where a partition has none of its own."""
    usual = {name: megabytes(values.get(f"DefMemPer{name}")) for name in ("Node", "CPU")}
    if not any(usual.values()):
        usual = {name: megabytes(settings.get(f"DefMemPer{name}")) for name in ("Node", "CPU")}
    defaults = values.get("JobDefaults", "") + "," + settings.get("JobDefaults", "")
    per_gpu = {name: int(value) for name, value in reversed(re.findall(r"Def(Mem|Cpu)PerGPU=(\d+)", defaults))}
    if "Mem" in per_gpu:
        usual = {"GPU": per_gpu["Mem"]}
    return Partition(
        name=values.get("PartitionName", ""),
        default=values.get("Default") == "YES",
        state=values.get("State", "UP").upper(),
        max_time=seconds(values.get("MaxTime")),
        default_time=seconds(values.get("DefaultTime")),
        min_nodes=_number(values.get("MinNodes")) or 0,
        max_nodes=_number(values.get("MaxNodes")),
        cpus=_number(values.get("MaxCPUsPerNode")),
        memory=megabytes(values.get("MaxMemPerNode")) or megabytes(settings.get("MaxMemPerNode")),
        usual={name: value for name, value in usual.items() if value},
        per_gpu=per_gpu.get("Cpu"),
        whole=values.get("OverSubscribe") == "EXCLUSIVE" or settings.get("SelectType") == "select/linear",
        accounts=Names(_names(values.get("AllowAccounts")), _names(values.get("DenyAccounts")) or frozenset()),
        qos=Names(_names(values.get("AllowQos")), _names(values.get("DenyQos")) or frozenset()),
    )


def _names(text: str | None) -> frozenset[str] | None:
    return None if text is None or text in ANY else frozenset(text.lower().split(","))


def _number(text: str | None) -> int | None:
    return int(text) if text and text.isdecimal() else None


def megabytes(text: str | None) -> int | None:
    """Of SLURM's memory, in MB where no unit is given. None: no limit, or none that this understands."""
    found = re.fullmatch(r"(\d+)([KMGT]?)B?", text or "")
    if not found:
        return None
    factor = {"K": 1 / 1024, "": 1, "M": 1, "G": 1024, "T": 1024**2}[found[2]]
    return int(int(found[1]) * factor)


def seconds(text: str | None) -> int | None:
    """Of a time as SLURM prints it, [days-][[hours:]minutes:]seconds. None: any."""
    found = re.fullmatch(r"(?:(\d+)-)?(?:(?:(\d+):)?(\d+):)?(\d+)", text or "")
    if not found:
        return None
    days, hours, minutes, rest = (int(part or 0) for part in found.groups())
    return ((days * 24 + hours) * 60 + minutes) * 60 + rest


def gpus(gres: str) -> int:
    """How many, of whatever type, of gpu:a100:4(S:0-1),gpu:3090:2,gpu,shard:8. A number that is alone is a count."""
    items = (item.split(":") for item in re.sub(r"\([^)]*\)", "", gres).split(","))
    return sum(int(rest[-1]) if rest and rest[-1].isdecimal() else 1 for kind, *rest in items if kind == "gpu")
