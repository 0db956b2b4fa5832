"""What a cluster puts on the machine outside its folder (processes, cgroups, names, networks), and its removal.

Run as a program this is a cluster's guard: it waits until its parent is gone, however that ended, and removes all of
the cluster, with its folder, which nobody is left to read.
"""

from __future__ import annotations

import fcntl
import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

HOSTS = Path("/etc/hosts")
CGROUPS = Path("/sys/fs/cgroup")
PATH = f"{os.environ.get('PATH', '/usr/bin:/bin')}:/usr/sbin:/sbin"


def clear(cluster: str, conf: str, nodes: list[str]) -> None:
    """Remove all that is left of a cluster; what is already gone is no error."""
    kill(lambda: processes(nodes, f"SLURM_CONF={conf}"))
    for node in nodes:
        remove_cgroups(node)
    Network(cluster, nodes).remove()
    remove_hosts(cluster)


# Processes


def processes(nodes: Iterable[str], *marks: str) -> set[int]:
    """All that runs on these nodes, and whatever else has one of the marks in its environment, with all descendants.

    SLURM gives every task the name of its node; the cluster gives it to slurmd, whose step daemons inherit it. The
    cgroups know those tasks too that have cleaned their environment.
    """
    wanted = {mark.encode() for mark in (*marks, *(f"SLURMD_NODENAME={node}" for node in nodes))}
    found, children = set[int](), dict[int, list[int]]()
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            with suppress(OSError):
                state, parent = (folder / "stat").read_text(errors="replace").rpartition(")")[2].split()[:2]
                if state != "Z":
                    children.setdefault(int(parent), []).append(int(folder.name))
                if not wanted.isdisjoint((folder / "environ").read_bytes().split(b"\0")):
                    found.add(int(folder.name))
    for node in nodes:
        for path in CGROUPS.glob(f"*/slurm_{node}/**/cgroup.procs"):
            with suppress(OSError):
                found.update(int(pid) for pid in path.read_text().split())
    todo = list(found)
    while todo:
        more = set(children.get(todo.pop(), [])) - found
        found |= more
        todo += more
    return found - {os.getpid()}


def kill(find: Callable[[], set[int]]) -> None:
    """SIGKILL until nothing is found. All are stopped before the first dies, so that none sees another one's death."""
    end = time.monotonic() + 10
    while pids := find():
        if time.monotonic() > end:
            raise TimeoutError(f"not to be killed: {sorted(pids)}")
        send(signal.SIGSTOP, pids)
        while new := find() - pids:
            send(signal.SIGSTOP, new)
            pids |= new
        send(signal.SIGKILL, pids)
        time.sleep(0.02)


def send(number: signal.Signals, pids: Iterable[int]) -> None:
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, number)


# Cgroups


def cgroups_writable() -> bool:
    """Whether SLURM can follow its jobs in cgroups (v1), which decides who gets a signal."""
    for controller in ("freezer", "memory"):
        probe = CGROUPS / controller / f"probe-{secrets.token_hex(4)}"
        try:
            probe.mkdir()
            probe.rmdir()
        except OSError:
            return False
    return True


def remove_cgroups(node: str) -> None:
    end = time.monotonic() + 5
    while tops := list(CGROUPS.glob(f"*/slurm_{node}")):
        for top in tops:
            for folder, _, _ in os.walk(top, topdown=False):
                with suppress(OSError):  # busy for the moment in which a killed process still goes
                    os.rmdir(folder)
        if time.monotonic() > end:
            raise TimeoutError(f"not to be removed: {tops}")
        time.sleep(0.01)


# Names


def add_hosts(cluster: str, addresses: dict[str, str]) -> None:
    """Let the nodes' names resolve. One write at the end of the file: no reader sees half of it."""
    with open(HOSTS, "a+") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        stream.seek(0)
        text = stream.read()
        lines = (f"{address} {node} # cluster {cluster}\n" for node, address in addresses.items())
        stream.write("\n" * (not text.endswith("\n")) + "".join(lines))


def remove_hosts(cluster: str) -> None:
    """In place, for in a container the file is often a mount; the lock keeps other clusters' lines."""
    with open(HOSTS, "r+") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        before = stream.readlines()
        after = [line for line in before if not line.endswith(f"# cluster {cluster}\n")]
        if after != before:
            stream.seek(0)
            stream.writelines(after)
            stream.truncate()


# Networks


class Network:
    """A bridge, and for every node a network namespace of the node's name on a cable of its own."""

    def __init__(self, cluster: str, nodes: list[str]) -> None:
        self.bridge = f"br-{cluster}"
        self.cables = {node: f"{cluster}-{number}" for number, node in enumerate(nodes, 1)}

    def make(self) -> tuple[str, dict[str, str]]:
        """The address of the machine in it, and those of the nodes, out of a range that is reserved for tests."""
        used = ip("-4", "-o", "address")
        nets = [
            net for net in (f"198.{high}.{low}" for high in (18, 19) for low in range(256)) if f" {net}." not in used
        ]
        net = secrets.choice(nets)
        ip("link", "add", self.bridge, "type", "bridge")
        ip("address", "add", f"{net}.1/24", "dev", self.bridge)
        ip("link", "set", self.bridge, "up")
        addresses = {node: f"{net}.{number}" for number, node in enumerate(self.cables, 11)}
        for node, cable in self.cables.items():
            ip("netns", "add", node)
            ip("link", "add", cable, "type", "veth", "peer", "name", "eth0", "netns", node)
            ip("link", "set", cable, "master", self.bridge, "up")
            ip("-n", node, "address", "add", f"{addresses[node]}/24", "dev", "eth0")
            ip("-n", node, "link", "set", "eth0", "up")
            ip("-n", node, "link", "set", "lo", "up")
        return f"{net}.1", addresses

    def remove(self) -> None:
        for node, cable in self.cables.items():
            if Path("/run/netns", node).exists():
                ip("netns", "delete", node)
            if Path("/sys/class/net", cable).exists():
                ip("link", "delete", cable, check=False)  # it may go with its namespace at this moment
        if Path("/sys/class/net", self.bridge).exists():
            ip("link", "delete", self.bridge)

    def inside(self, node: str) -> list[str]:
        """The words in front of a command that runs on this node: its network, and its host name."""
        named = ["sh", "-c", 'hostname "$1" && shift && exec "$@"', "-", node]
        return ["nsenter", f"--net=/run/netns/{node}", "unshare", "--uts", *named]


def ip(*arguments: str, check: bool = True) -> str:
    done = subprocess.run(
        ["ip", *arguments], env={**os.environ, "PATH": PATH}, capture_output=True, text=True, check=False
    )
    if check and done.returncode:
        raise OSError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")
    return done.stdout


def networks_refused() -> str | None:
    """One line that says why nodes cannot have networks of their own here; None: they can."""
    probe = Network(secrets.token_hex(3), [f"probe-{secrets.token_hex(3)}"])
    try:
        probe.make()
        subprocess.run([*probe.inside(*probe.cables), "true"], check=True, capture_output=True)
    except (OSError, subprocess.SubprocessError) as error:
        return f"no network of a node's own: {error}"
    finally:
        with suppress(OSError):
            probe.remove()
    return None


if __name__ == "__main__":
    sys.stdin.read()
    clear(sys.argv[1], sys.argv[2], sys.argv[3:])
    shutil.rmtree(Path(sys.argv[2]).parent)
