"""The cluster does what the tests on it take for granted: it schedules, preempts, loses nodes, and leaves no trace."""

from __future__ import annotations

import re
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.slurm.cluster import CHECKOUT, Cluster
from tests.slurm.machine import CGROUPS, HOSTS, networks_refused, processes


@pytest.fixture
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="slurm-", dir="/tmp", ignore_cleanup_errors=True) as name:
        yield Path(name)


def until(true: Callable[[], object], timeout: float = 60) -> None:
    end = time.monotonic() + timeout
    while not true():
        assert time.monotonic() < end
        time.sleep(0.05)


def traces(name: str, conf: Path, nodes: list[str]) -> list[str]:
    """All that a cluster has on the machine outside its folder."""
    found = [f"process {pid}" for pid in processes(nodes, f"SLURM_CONF={conf}")]
    found += [str(path) for path in CGROUPS.glob(f"*/slurm_node-{name}-*")]
    found += [str(path) for top in ("/run/netns", "/sys/class/net") for path in Path(top).glob(f"*{name}*")]
    return found + [line for line in HOSTS.read_text().splitlines() if name in line]


@pytest.mark.usefixtures("slurm")
def test_a_stopped_cluster_leaves_nothing(folder: Path) -> None:
    network = networks_refused() is None
    with Cluster(folder, nodes=2, network=network) as cluster:
        cluster.wait(cluster.submit("--wrap=setsid sleep 300 & env -i setsid sleep 300 & wait"), {"RUNNING"})
        time.sleep(0.5)
        assert len(traces(cluster.name, cluster.conf, cluster.nodes)) > 10
    assert traces(cluster.name, cluster.conf, cluster.nodes) == []
    cluster.stop()


STARTS_ONE = """
import sys, time
from pathlib import Path
from tests.slurm.cluster import Cluster
with Cluster(Path(sys.argv[1]), nodes=2, network=sys.argv[2] == "True") as cluster:
    cluster.wait(cluster.submit("--wrap=sleep 300"), {"RUNNING"})
    print(cluster.name, *cluster.nodes, flush=True)
    time.sleep(300)
"""


@pytest.mark.usefixtures("slurm")
def test_a_killed_starter_leaves_nothing(folder: Path) -> None:
    command = [sys.executable, "-c", STARTS_ONE, str(folder), str(networks_refused() is None)]
    with subprocess.Popen(command, cwd=CHECKOUT, stdout=subprocess.PIPE, text=True) as starter:
        assert starter.stdout is not None
        name, *nodes = starter.stdout.readline().split()
        before = traces(name, folder / "slurm.conf", nodes)
        starter.kill()
    assert len(before) > 10
    until(lambda: not folder.exists())
    assert traces(name, folder / "slurm.conf", nodes) == []


def test_a_cluster_that_cannot_start_says_why(folder: Path, slurm: Cluster) -> None:
    cluster = Cluster(folder, nodes=1, settings={"SchedulerType": "sched/nonsense"})
    with pytest.raises(RuntimeError, match=r"slurmctld ended with code 1\n(.*\n)*.*sched/nonsense"), cluster:
        pass
    assert traces(cluster.name, cluster.conf, cluster.nodes) == []
    assert set(slurm.node_states().values()) == {"idle"}, "another cluster, running all the while"


def test_a_step_runs_on_two_nodes(slurm: Cluster) -> None:
    said = slurm.run("srun", "-N2", "sh", "-c", "echo $SLURMD_NODENAME; getent hosts $SLURMD_NODENAME").stdout
    assert [node for node in slurm.nodes if f"{node}\n" in said] == slurm.nodes[:2]
    assert said.count("127.0.0.1") == 2


def test_an_array_is_waited_for(slurm: Cluster) -> None:
    job = slurm.submit("--array=0-1", "--wrap=exit $SLURM_ARRAY_TASK_ID")
    assert slurm.wait(job, {"COMPLETED", "FAILED"}) == "COMPLETED,FAILED"
    assert slurm.states(job) == {f"{job}_0": "COMPLETED", f"{job}_1": "FAILED"}
    with pytest.raises(AssertionError, match="waited for COMPLETED, but"):
        slurm.wait(job)


def test_an_urgent_job_preempts_and_the_other_starts_again(slurm: Cluster) -> None:
    low = slurm.submit("-N4", "--exclusive", "-p", "short", "--open-mode=append", "--wrap=echo ready; sleep 300")
    output = slurm.folder / f"slurm-{low}.out"
    until(lambda: output.is_file() and "ready" in output.read_text())
    high = slurm.submit("-N4", "--exclusive", "-p", "urgent", "--wrap=true")
    slurm.wait(high)
    until(lambda: output.read_text().count("ready") == 2)
    assert "Restarts=1" in slurm.run("scontrol", "show", "job", low).stdout


def test_a_job_goes_on_elsewhere_when_its_node_loses_power(slurm: Cluster) -> None:
    job = slurm.submit("--open-mode=append", "--wrap=echo $SLURMD_NODENAME; sleep 300")
    output = slurm.folder / f"slurm-{job}.out"
    until(lambda: output.is_file() and output.read_text())
    lost = output.read_text().strip()
    slurm.kill_node(lost)
    assert processes([lost]) == set()
    until(lambda: len(output.read_text().split()) > 1)
    said = output.read_text().split()[1:]
    assert len(said) == 1 and said[0] in set(slurm.nodes) - {lost}, "a shell that had seen its child die would say so"
    assert slurm.node_states()[lost] == "down*"
    slurm.reset()
    assert slurm.states(job) == {job: "CANCELLED"}
    assert set(slurm.node_states().values()) == {"idle"}


def test_a_node_is_cut_off_and_comes_back(slurm_network: Cluster) -> None:
    node = slurm_network.nodes[1]
    assert slurm_network.run("srun", "-w", node, "hostname").stdout.strip() == node
    assert answers(slurm_network, node)
    slurm_network.pull_cable(node)
    assert not answers(slurm_network, node)
    assert answers(slurm_network, slurm_network.nodes[0])
    slurm_network.plug_cable(node)
    until(lambda: answers(slurm_network, node))


def answers(cluster: Cluster, node: str) -> bool:
    """Whether the node's slurmd can be reached."""
    port = re.search(r"Port=(\d+)", cluster.run("scontrol", "show", "node", node).stdout)
    assert port is not None
    try:
        socket.create_connection((node, int(port[1])), timeout=1).close()
    except OSError:
        return False
    return True
