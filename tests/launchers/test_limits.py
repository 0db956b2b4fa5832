"""What is read of scontrol's answers, and what could never start by them.

The answers are made up, in the forms that versions 20.02 and 24.11 print; tests/slurm asks a real 22.05 or later.
"""

from __future__ import annotations

from typing import Any

import pytest

from alignment.config.launchers import Resources
from alignment.errors import ConfigError, MachineError
from alignment.launchers import facts, limits, slurm
from alignment.launchers.facts import Cluster
from alignment.launchers.limits import Ask

# 20.02: CPUTot only, * and + in states, a Reason that looks like fields.
OLD = """\
NodeName=c1 Arch=x86_64 CoresPerSocket=16 CPUAlloc=0 CPUTot=32 CPULoad=0.01 AvailableFeatures=skylake,ib \
ActiveFeatures=skylake,ib Gres=(null) NodeAddr=c1 NodeHostName=c1 Version=20.02.5 OS=Linux 3.10.0 #1 SMP Tue Mar 31 \
RealMemory=190000 AllocMem=0 FreeMem=1 Sockets=2 Boards=1 State=IDLE ThreadsPerCore=1 TmpDisk=0 Weight=1 Owner=N/A \
MCS_label=N/A Partitions=cpu,gpu BootTime=2020-10-01T10:00:00 CfgTRES=cpu=32,mem=190000M,billing=32 AllocTRES=
NodeName=g1 CPUAlloc=0 CPUTot=48 CPULoad=N/A AvailableFeatures=v100,ib Gres=gpu:v100:4(S:0-1),mps:400 NodeAddr=g1 \
RealMemory=380000 State=DOWN*+DRAIN Partitions=gpu Reason=Memory State=IDLE CPUTot=1 errors [root@2020-10-01T10:00:00]
NodeName=g2 CPUAlloc=0 CPUTot=48 AvailableFeatures=v100,ib Gres=gpu:v100:4(S:0-1),mps:400 RealMemory=380000 \
State=MIXED Partitions=gpu
"""
OLD_PARTITIONS = """\
PartitionName=cpu AllowGroups=ALL AllowAccounts=ALL AllowQos=ALL AllocNodes=ALL Default=YES QoS=N/A \
DefaultTime=01:00:00 DisableRootJobs=NO GraceTime=0 Hidden=NO MaxNodes=1 MaxTime=7-00:00:00 MinNodes=1 LLN=NO \
MaxCPUsPerNode=UNLIMITED Nodes=c1 PriorityJobFactor=1 PreemptMode=OFF State=UP TotalNodes=1 JobDefaults=(null) \
DefMemPerCPU=2000 MaxMemPerNode=UNLIMITED
PartitionName=gpu AllowGroups=ALL DenyAccounts=guests AllowQos=normal,long AllocNodes=ALL Default=NO QoS=N/A \
DefaultTime=NONE MaxNodes=UNLIMITED MaxTime=2-00:00:00 MinNodes=0 MaxCPUsPerNode=40 Nodes=c1,g[1-2] State=UP \
TotalNodes=3 JobDefaults=DefCpuPerGPU=8,DefMemPerGPU=60000 DefMemPerNode=UNLIMITED MaxMemPerNode=UNLIMITED
PartitionName=old AllowGroups=ALL AllowAccounts=ALL AllowQos=ALL Default=NO MaxTime=UNLIMITED Nodes=c1 State=DOWN
"""
# 23.11 and 24.11: CPUEfctv, MemSpecLimit, cloud nodes that sleep, words after + only, several kinds of GPU.
NEW = """\
NodeName=h1 Arch=x86_64 CoresPerSocket=64 CPUAlloc=0 CPUEfctv=120 CPUTot=128 CPULoad=0.10 AvailableFeatures=h100,efa \
Gres=gpu:h100:8(S:0-1),shard:32 NodeAddr=10.0.0.1 Version=24.11.0 OS=Linux 6.8.0-1045-aws #47~22.04.1-Ubuntu SMP Thu \
RealMemory=2000000 AllocMem=0 State=IDLE+CLOUD+POWERED_DOWN Partitions=ml CoreSpecCount=4 MemSpecLimit=16000 \
LastBusyTime=Unknown ResumeAfterTime=None CfgTRES=cpu=120,mem=2000000M,billing=120,gres/gpu=8
NodeName=h2 CPUEfctv=120 CPUTot=128 AvailableFeatures=h100 Gres=gpu:h100:7,gpu:1g.10gb:7 RealMemory=2000000 \
State=IDLE+CLOUD+NOT_RESPONDING+POWERING_UP Partitions=ml
NodeName=h3 CPUEfctv=128 CPUTot=128 AvailableFeatures=(null) Gres=gpu:8 RealMemory=1000000 \
State=IDLE+NOT_RESPONDING Partitions=ml
NodeName=h4 CPUEfctv=128 CPUTot=128 Gres=gpu RealMemory=1000000 State=IDLE+MAINTENANCE+RESERVED Partitions=ml
"""
NEW_PARTITIONS = """\
PartitionName=ml AllowGroups=ALL AllowAccounts=vision,Speech AllowQos=ALL AllocNodes=ALL Default=NO QoS=N/A \
DefaultTime=NONE ExclusiveTopo=NO MaxNodes=UNLIMITED MaxTime=UNLIMITED MinNodes=2 MaxCPUsPerSocket=UNLIMITED \
NodeSets=ALL Nodes=h[1-4] State=UP JobDefaults=(null) DefMemPerNode=UNLIMITED MaxMemPerNode=1500000 TRES=cpu=512
"""
CONFIG = "DefMemPerCPU            = 1000\nJobSubmitPlugins        = (null)\nMaxMemPerNode           = UNLIMITED\n"
PLAIN = dict.fromkeys(Resources.model_fields) | {"nodes": 1, "processes": 1}


@pytest.fixture
def old() -> Cluster:
    return facts.read(OLD_PARTITIONS, OLD, CONFIG)


@pytest.fixture
def new() -> Cluster:
    return facts.read(NEW_PARTITIONS, NEW, CONFIG.replace("(null)", "lua"))


@pytest.fixture(autouse=True)
def _no_accounting(monkeypatch: pytest.MonkeyPatch) -> None:
    answers(monkeypatch, {})


def answers(monkeypatch: pytest.MonkeyPatch, said: dict[str, str]) -> None:
    """By the thing that is asked for."""

    def call(*command: str, patience: float = 0.0) -> str:
        for word, text in said.items():
            if word in command:
                return text
        raise MachineError("no accounting")

    monkeypatch.setattr(slurm, "call", call)


def ask(grace: int = 120, options: dict[str, Any] | None = None, **asked: Any) -> Ask:
    return Ask("sft", Resources(**{**PLAIN, **asked}), grace, {}, tuple((options or {}).items()))


def test_nodes_are_read_in_the_words_of_all_versions(old: Cluster, new: Cluster) -> None:
    nodes = {**old.machines, **new.machines}
    assert {name: node.cpus for name, node in nodes.items()} == {
        "c1": 32, "g1": 48, "g2": 48, "h1": 120, "h2": 120, "h3": 128, "h4": 128,
    }  # fmt: skip
    assert [node.gpus for node in nodes.values()] == [0, 4, 4, 8, 14, 8, 1]
    assert {name for name, node in nodes.items() if node.up} == {"c1", "g2", "h1", "h2"}
    assert (nodes["h1"].memory, nodes["h2"].memory) == (1_984_000, 2_000_000)
    assert nodes["c1"].features == {"skylake", "ib"} and nodes["h3"].features == set()
    assert [node.name for node in old.of("gpu")] == ["c1", "g1", "g2"]


def test_partitions_are_read_in_the_words_of_all_versions(old: Cluster, new: Cluster) -> None:
    cpu, gpu, ml = old.partitions["cpu"], old.partitions["gpu"], new.partitions["ml"]
    assert (cpu.default, cpu.max_nodes, cpu.max_time, cpu.default_time) == (True, 1, 7 * 86400, 3600)
    assert (gpu.default, gpu.max_nodes, gpu.max_time, gpu.default_time) == (False, None, 2 * 86400, None)
    assert (cpu.usual, gpu.usual, ml.usual) == ({"CPU": 2000}, {"GPU": 60000}, {"CPU": 1000})
    assert (gpu.cpus, ml.min_nodes, ml.max_time, ml.memory) == (40, 2, None, 1_500_000)
    assert gpu.accounts.take("me") and not gpu.accounts.take("Guests") and ml.accounts.take("SPEECH")
    assert gpu.qos.take("long") and not gpu.qos.take("urgent")
    assert new.routed and not old.routed


@pytest.mark.parametrize(
    ("gres", "count"),
    [
        ("gpu:3090:8", 8), ("gpu:3090:8(S:0-1),gpu:4090:2", 10), ("gpu:8", 8), ("gpu:a100", 1), ("gpu", 1),
        ("gpu:1g.10gb:7,shard:8", 7), ("gpu:a100:0", 0), ("(null)", 0), ("shard:8", 0),
    ],
)  # fmt: skip
def test_gpus(gres: str, count: int) -> None:
    assert facts.gpus(gres) == count


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("5:00", 300), ("00:05:00", 300), ("2-00:00:00", 172800), ("UNLIMITED", None), ("NONE", None), ("30", 30)],
)
def test_times(text: str, seconds: int | None) -> None:
    assert facts.seconds(text) == seconds


OF_OLD = [
    ({"partition": "gpuu"}, "launcher.partition: the cluster has no partition `gpuu` .did you mean `gpu`"),
    ({"partition": "old"}, "launcher.partition: sft would wait in `old`, which is down .*could: cpu"),
    ({"time_limit": 8 * 86400}, "launcher.time_limit: sft asks for 8-0:00:00, and `cpu` gives 7-0:00:00 at most"),
    ({"nodes": 2}, "launcher.nodes: sft asks for 2 nodes, and `cpu` gives a job 1 at most .*could: gpu"),
    ({"gpus_per_node": 1}, "launcher.gpus_per_node: .* none of the 1 node of `cpu` is such .*0.*could: gpu"),
    (
        {"gpus_per_node": 4, "partition": "gpu", "nodes": 3},
        "asks for 3 nodes with 4 GPUs, and only 2 of the 3 nodes of `gpu` are such",
    ),
    (
        {"gpus_per_node": 4, "partition": "gpu", "memory": "500G"},
        "launcher.memory: .* with 500G of memory, and none of the 2 nodes of `gpu` with 4 GPUs is such .*380000 MB",
    ),
    (
        {"constraint": "v100&ib", "exclude": "g1", "partition": "gpu", "nodes": 2},
        "launcher.exclude: .* only 1 of the 2 nodes of `gpu` with `v100&ib` is such",
    ),
    ({"constraint": "v100|a100"}, "launcher.constraint: sft asks for the feature `a100`, which no node has"),
    ({"partition": ", "}, "launcher.partition: `, ` names no partition .one of: cpu, gpu, old"),
    ({"exclude": "c1,g3"}, "launcher.exclude: the cluster has no node `g3`"),
    ({"partition": "gpu", "account": "guests"}, "launcher.account: .* account `guests`, which `gpu` does not take"),
    ({"partition": "gpu", "qos": "urgent"}, "launcher.qos: .* `urgent`, which `gpu` does not take .one .*long, normal"),
    (
        {"partition": "gpu", "processes": 6, "cpus_per_process": 8},
        "asks for 48 CPUs of each node, and `gpu` gives .*40",
    ),
    ({"time_limit": 100}, "launcher.time_limit: sft has 0:01:40, of which launcher.grace=120 s are for saving"),
]


@pytest.mark.parametrize(("asked", "said"), OF_OLD)
def test_what_could_never_start(asked: dict[str, Any], said: str, old: Cluster) -> None:
    with pytest.raises(ConfigError, match=said):
        limits.check([ask(**asked)], old)


@pytest.mark.parametrize(
    "asked",
    [
        {"partition": "cpu,gpu", "gpus_per_node": 4, "memory": "100G"},
        {"partition": "gpu", "constraint": "[v100|skylake]", "nodes": 2, "memory": "0"},
        {"partition": "gpu", "constraint": "v100*1&skylake*1", "nodes": 2, "memory": "1G"},
        {"memory": "190000", "cpus_per_process": 32},
        {"exclude": "/home/me/nodes.txt", "memory": "1G"},
    ],
)
def test_what_could_start(asked: dict[str, Any], old: Cluster) -> None:
    assert limits.check([ask(**asked)], old) == []


def test_the_key_is_that_of_the_stage(old: Cluster) -> None:
    mine = Ask("sft", ask(nodes=3).asked, 120, {"nodes": "launcher.stages.sft.nodes"})
    with pytest.raises(ConfigError, match=r"^launcher.stages.sft.nodes: "):
        limits.check([mine], old)


def test_what_holds_for_now_is_a_line(old: Cluster) -> None:
    said = limits.check([ask(partition="gpu", gpus_per_node=4, nodes=2)], old)
    assert said == [
        "sft asks for 2 nodes, and of those in `gpu` that fit 1 are up now: it waits for others",
    ]
    assert limits.check([ask(cpus_per_process=2)], old) == [
        "launcher.memory is null: sft gets 4000 MB of each node (DefMemPerCPU=2000), and may be killed for more"
    ]


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"processes": 8}, "sft gets 1 CPU of each node by default, which its 8 processes share"),
        ({"processes": 8, "partition": "gpu"}, "sft gets 1 CPU of each node by default, which its 8 processes share"),
        ({"processes": 20, "partition": "gpu", "gpus_per_node": 2}, "sft gets 16 CPUs of each node by default, which"),
        ({"processes": 4, "partition": "gpu", "gpus_per_node": 4}, ""),
        ({"processes": 1}, ""),
        ({"processes": 8, "cpus_per_process": 1}, ""),
        ({"processes": 8, "options": {"exclusive": True}}, ""),
        ({"processes": 8, "options": {"cpus-per-task": 8}}, ""),
    ],
)
def test_processes_without_cpus_of_their_own_are_a_line(asked: dict[str, Any], said: str, old: Cluster) -> None:
    lines = limits.check([ask(memory="100G", **asked)], old)
    assert len(lines) == bool(said)
    assert not said or lines[0].startswith(f"launcher.cpus_per_process is null: {said}")


@pytest.mark.parametrize(
    ("partitions", "config"),
    [
        (OLD_PARTITIONS.replace("State=UP", "OverSubscribe=EXCLUSIVE State=UP"), CONFIG),
        (OLD_PARTITIONS, f"{CONFIG}SelectType              = select/linear\n"),
    ],
    ids=["the partition", "the cluster"],
)
def test_where_nodes_are_given_whole_so_are_their_cpus(partitions: str, config: str) -> None:
    assert limits.check([ask(memory="100G", processes=8)], facts.read(partitions, OLD, config)) == []


def test_memory_for_each_cpu_counts_those_that_come_with_gpus() -> None:
    partitions = OLD_PARTITIONS.replace("DefMemPerGPU=60000 DefMemPerNode=UNLIMITED", " DefMemPerCPU=4000")
    asked = {"partition": "gpu", "gpus_per_node": 4, "processes": 4}
    assert limits.check([ask(**asked)], facts.read(partitions, OLD.replace("DOWN*+DRAIN", "IDLE"), CONFIG)) == []


def test_a_qos_may_overrule_a_partition(old: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    answers(monkeypatch, {"qos": "normal|DenyOnLimit\nlong|DenyOnLimit,PartitionTimeLimit\n"})
    week = {"partition": "gpu", "time_limit": 7 * 86400, "memory": "1G"}
    for qos in ("long", None):
        assert "may be exempt" in limits.check([ask(qos=qos, **week)], old)[0]
    with pytest.raises(ConfigError, match="2-0:00:00 at most"):
        limits.check([ask(qos="normal", **week)], old)


def test_an_account_may_belong_to_one_that_is_let_in(new: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = {"partition": "ml", "nodes": 2, "memory": "1G"}
    with pytest.raises(ConfigError, match=r"`video`, which `ml` does not take .one that it takes: speech, vision"):
        limits.check([ask(account="video", **mine)], new)
    answers(monkeypatch, {"associations": "root|\nvision|root\nvideo|vision\nvideo|\nmath|root\n"})
    assert "may be exempt" in limits.check([ask(account="video", **mine)], new)[0]
    with pytest.raises(ConfigError, match="`math`, which `ml` does not take"):
        limits.check([ask(account="math", **mine)], new)


def test_a_site_that_routes_jobs_itself_may_start_them_anywhere(new: Cluster, old: Cluster) -> None:
    assert limits.check([ask(nodes=2, gpus_per_node=8, memory="1G")], new) == []
    silent = Cluster({name: old.partitions[name] for name in ("gpu", "old")}, old.machines)
    with pytest.raises(ConfigError, match=r"launcher.partition: the cluster has no default partition .*gpu, old"):
        limits.check([ask()], silent)


def test_a_cluster_that_tells_nothing_is_not_asked_for_more(old: Cluster) -> None:
    assert limits.check([ask(nodes=99)], facts.read("", "", "")) == []
    hidden = facts.read(OLD_PARTITIONS, "", "")  # PrivateData=nodes
    assert limits.check([ask(gpus_per_node=99, memory="1G")], hidden) == []
