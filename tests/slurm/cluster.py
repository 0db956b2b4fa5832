"""A real SLURM on one machine: munged, slurmctld and a slurmd for every node, in one folder and with names of its own.

Any number of clusters can run at once. All that a cluster is made of ends with the process that started it, however
that process ends: the kernel kills the daemons, a guard clears up the rest.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import secrets
import shutil
import signal
import socket
import string
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

from tests.slurm import machine

PACKAGES = ("munge", "slurmctld", "slurmd", "slurm-client", "iproute2")
PROGRAMS = ("munged", "slurmctld", "slurmd", "srun", "sbatch", "ip")
CHECKOUT = Path(__file__).parents[2]
FOR_GOOD = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "OUT_OF_MEMORY", "DEADLINE", "BOOT_FAIL"}
PR_SET_PDEATHSIG = 1

libc = ctypes.CDLL(None, use_errno=True)


def install() -> str | None:
    """Install SLURM where that is possible. One line that says why no cluster can run here; None: it can."""
    if os.geteuid():
        return "a cluster for tests needs root: its nodes' names go into /etc/hosts"
    with open("/tmp/alignment-slurm.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the tests run in two processes
        return _install()


def _install() -> str | None:
    if missing() and shutil.which("apt-get"):
        options = ("-qq", "-o", "DPkg::Lock::Timeout=120")
        for command in (["update"], ["install", "-y", "--no-install-recommends", *PACKAGES]):
            done = subprocess.run(
                ["apt-get", *options, *command],
                env={**os.environ, "DEBIAN_FRONTEND": "noninteractive"}, capture_output=True, text=True, check=False,
            )  # fmt: skip
            if done.returncode:
                last = (done.stderr.strip() or done.stdout.strip()).rpartition("\n")[2]
                return f"apt-get {command[0]} ended with code {done.returncode}: {last}"
    return f"not installed: {', '.join(missing())}" if missing() else None


def missing() -> list[str]:
    return [program for program in PROGRAMS if shutil.which(program, path=machine.PATH) is None]


class Cluster:
    """A cluster that runs inside `with`, in a folder of its own. Its daemons die with the thread that started it.

    gpus: that many pretended ones on every node. network: every node has its own address and host name, and a cable
    that can be pulled; without, all nodes are names of this machine. settings: lines of slurm.conf to set otherwise.
    """

    def __init__(
        self,
        folder: Path,
        nodes: int = 4,
        cpus: int = 4,
        memory_mb: int = 6000,
        gpus: int = 0,
        network: bool = False,
        settings: Mapping[str, str] | None = None,
    ) -> None:
        self.folder, self.cpus, self.memory_mb, self.gpus = folder.resolve(), cpus, memory_mb, gpus
        self.settings = dict(settings or {})
        self.name = "".join(secrets.choice(string.ascii_lowercase) for _ in range(5))
        self.nodes = [f"node-{self.name}-{number}" for number in range(1, nodes + 1)]
        self.network = machine.Network(self.name, self.nodes) if network else None
        self.addresses = dict.fromkeys(self.nodes, "127.0.0.1")
        self.conf = self.folder / "slurm.conf"
        self.logs = self.folder / "logs"
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}
        self._guard: subprocess.Popen[bytes] | None = None

    # Start and stop

    def __enter__(self) -> Self:
        try:
            self._start()
        except BaseException as error:
            told = self._tails()
            self.stop()
            if isinstance(error, Exception):
                raise RuntimeError(f"the cluster did not start: {error}\n{told}") from error
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    def _start(self) -> None:
        if len(str(self.folder)) > 40:
            raise ValueError(f"too long for the path of a socket: {self.folder}")
        for name in ("logs", "state", "spool"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        guard = [sys.executable, "-m", "tests.slurm.machine", self.name, str(self.conf), *self.nodes]
        self._guard = subprocess.Popen(guard, cwd=CHECKOUT, stdin=subprocess.PIPE, start_new_session=True)
        here = "127.0.0.1"
        if self.network:
            here, self.addresses = self.network.make()
        machine.add_hosts(self.name, self.addresses)
        self._write_settings(here)
        key, munge = self.folder / "munge.key", self.folder / "munge"
        key.touch(mode=0o600)
        key.write_bytes(secrets.token_bytes(128))
        files = [f"--key-file={key}", f"--socket={munge}", f"--pid-file={munge}.pid", f"--seed-file={munge}.seed"]
        # --force: the folder need not be open to all users of the machine.
        self._daemon("munged", "munged", "--foreground", "--force", "--num-threads=2", *files)
        self._until(munge.is_socket, "munged's socket")
        self._daemon("slurmctld", "slurmctld", "-D")
        self._until(lambda: self._client("scontrol", "ping").returncode == 0, "slurmctld's answer")
        for node in self.nodes:
            self._daemon_of(node)
        self._until(lambda: set(self.node_states().values()) == {"idle"}, "idle nodes")

    def stop(self) -> None:
        """End all jobs and daemons and what they left; may be called at any time, and again."""
        machine.clear(self.name, str(self.conf), self.nodes)
        for process in self._daemons.values():
            process.wait(10)
        self._daemons.clear()
        if self._guard is not None:
            self._guard.kill()  # the folder stays, for whoever wants to read the logs
            self._guard.communicate()
            self._guard = None

    def reset(self) -> None:
        """No jobs, all nodes there, all cables plugged: what the next test expects, whatever the last one did."""
        for node in self.nodes:
            self.start_node(node)
            if self.network:
                self.plug_cable(node)
        jobs = self.run("squeue", "-h", "-o", "%A").stdout.split()
        if jobs:
            self.run("scancel", *jobs, check=False)  # one may end just now
        self._until(lambda: not self.run("squeue", "-h").stdout, "the end of all jobs", 90)
        self._until(lambda: set(self.node_states().values()) == {"idle"}, "idle nodes", 90)

    def _until(self, true: Callable[[], bool], what: str, timeout: float = 30) -> None:
        end = time.monotonic() + timeout
        while not true():
            for name, process in self._daemons.items():
                if process.poll() is not None:
                    raise RuntimeError(f"{name} ended with code {process.returncode}")
            if time.monotonic() > end:
                raise TimeoutError(f"waited {timeout:g} s for {what}")
            time.sleep(0.03)

    def _tails(self) -> str:
        """The last lines of every log."""
        logs = sorted(self.logs.glob("*")) if self.logs.is_dir() else []
        return "\n".join(f"== {log.name}\n" + "\n".join(_lines(log)[-8:]) for log in logs if log.stat().st_size)

    # Daemons

    def _daemon(self, name: str, *command: str, **environment: str) -> None:
        with open(self.logs / f"{name}.out", "ab") as out:
            self._daemons[name] = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, cwd=self.folder,
                env={"PATH": machine.PATH, **self.environment(), **environment},
                start_new_session=True, preexec_fn=_die_with_parent,
            )  # fmt: skip

    def _daemon_of(self, node: str) -> None:
        inside = self.network.inside(node) if self.network else []
        self._daemon(node, *inside, "slurmd", "-D", "-N", node, SLURMD_NODENAME=node)

    def kill_daemon(self, node: str) -> None:
        """SIGKILL to slurmd alone: the node's jobs go on."""
        if daemon := self._daemons.pop(node, None):
            daemon.kill()
            daemon.wait(10)

    def kill_node(self, node: str) -> None:
        """As when the power fails: slurmd, the step daemons and all tasks are gone at once."""
        machine.kill(lambda: machine.processes([node]))
        self.kill_daemon(node)
        machine.remove_cgroups(node)

    def start_node(self, node: str) -> None:
        """After a kill. A node that lost its power and is back before SLURM called it "down*" (`wait_node`) is believed
        to run its jobs for another minute: wait for that first.
        """
        if node not in self._daemons:
            self._daemon_of(node)

    def pull_cable(self, node: str) -> None:
        """The node goes on, but hears and is heard by nobody."""
        self._cable(node, "down")

    def plug_cable(self, node: str) -> None:
        self._cable(node, "up")

    def _cable(self, node: str, to: str) -> None:
        if self.network is None:
            raise ValueError("only a cluster with network=True has cables")
        machine.ip("link", "set", self.network.cables[node], to)

    # Use

    def environment(self) -> dict[str, str]:
        """What points SLURM's commands, and all that calls them, at this cluster."""
        return {"SLURM_CONF": str(self.conf)}

    def run(self, *command: str, **kw: Any) -> subprocess.CompletedProcess[str]:
        """A command in the cluster's folder; `env` adds to its environment. An exit code other than 0 is an error."""
        check = kw.pop("check", True)
        done = self._client(*command, **kw)
        if check and done.returncode:
            raise RuntimeError(f"{' '.join(command)}: code {done.returncode}\n{done.stdout}{done.stderr}")
        return done

    def _client(self, *command: str, **kw: Any) -> subprocess.CompletedProcess[str]:
        outside = {name: value for name, value in os.environ.items() if not name.startswith("SLURM")}
        given = {**outside, "PATH": machine.PATH, **self.environment(), **kw.pop("env", {})}
        default: dict[str, Any] = {"cwd": self.folder, "capture_output": True, "text": True, "timeout": 120}
        return subprocess.run(command, env=given, **{**default, **kw}, check=False)

    def submit(self, *options: str) -> str:
        """sbatch with these options and script; the job's id. Output goes to slurm-<id>.out in the cluster's folder."""
        return self.run("sbatch", "--parsable", *options).stdout.strip()

    def states(self, job: str) -> dict[str, str]:
        """The state of a job by its id, or of all elements of an array; of ended ones too, for ten minutes."""
        lines = self.run("squeue", "-h", "-r", "-t", "all", "-j", job, "-o", "%i %T").stdout.splitlines()
        return dict(line.split() for line in lines)

    def wait(self, job: str, until: Collection[str] = frozenset({"COMPLETED"}), timeout: float = 60) -> str:
        """Poll until the job, or every element of the array, is in one of these states; returns it, or them.

        An error when time is up, or when the job has ended in another way that no requeue follows.
        """
        end = time.monotonic() + timeout
        while True:
            states = self.states(job)
            seen = sorted(set(states.values()))
            if seen and set(seen) <= set(until):
                return ",".join(seen)
            lost = set(seen) & FOR_GOOD - set(until)
            if lost or time.monotonic() > end:
                said = self.run("scontrol", "show", "job", job, check=False).stdout
                raise AssertionError(f"waited for {', '.join(sorted(until))}, but {states}\n{said}")
            time.sleep(0.2)

    def node_states(self) -> dict[str, str]:
        """As sinfo names them: "idle", "mixed", "allocated", "down"; with a * when the node does not answer."""
        lines = self._client("sinfo", "-h", "-N", "-p", "main", "-o", "%N %T").stdout.splitlines()
        return dict(line.split() for line in lines)

    def wait_node(self, node: str, until: Collection[str] = frozenset({"idle"}), timeout: float = 60) -> str:
        self._until(lambda: self.node_states().get(node) in until, f"{node} to be {' or '.join(until)}", timeout)
        return self.node_states()[node]

    # Settings

    def _write_settings(self, here: str) -> None:
        cgroups = machine.cgroups_writable()
        ports = free_ports(1 + len(self.nodes))
        host = socket.gethostname().partition(".")[0]
        settings = {
            "ClusterName": self.name,
            "SlurmctldHost": f"{host}({here})",
            "SlurmctldPort": f"{ports[0]}",
            "SlurmctldPidFile": f"{self.folder}/state/pid",
            "SlurmctldLogFile": f"{self.logs}/slurmctld.log",
            "StateSaveLocation": f"{self.folder}/state",
            "SlurmdPidFile": f"{self.folder}/spool/%n.pid",
            "SlurmdSpoolDir": f"{self.folder}/spool/%n",
            "SlurmdLogFile": f"{self.logs}/%n.log",
            "AuthInfo": f"socket={self.folder}/munge,cred_expire=5",
            "PluginDir": str(plugins()),
            **SETTINGS,
            "ProctrackType": "proctrack/cgroup" if cgroups else "proctrack/linuxproc",
            "TaskPlugin": "task/cgroup" if cgroups else "task/none",
            "DefMemPerCPU": f"{self.memory_mb // self.cpus}",
            **({"GresTypes": "gpu"} if self.gpus else {}),
            **self.settings,
        }
        text = "".join(f"{name}={value}\n" for name, value in settings.items() if value)
        each = f"CPUs={self.cpus} RealMemory={self.memory_mb}" + f" Gres=gpu:{self.gpus}" * bool(self.gpus)
        for node, port in zip(self.nodes, ports[1:], strict=True):
            where = f"NodeHostname={node if self.network else host} NodeAddr={self.addresses[node]} Port={port}"
            text += f"NodeName={node} {where} {each}\n"
        for partition, limits in PARTITIONS.items():
            text += f"PartitionName={partition} Nodes={','.join(self.nodes)} {limits}\n"
        self.conf.write_text(text)
        if cgroups:
            (self.folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\nConstrainRAMSpace=yes\n")
        for number in range(self.gpus):  # a gpu must be a character device: these are like /dev/null
            os.mknod(self.folder / f"gpu{number}", 0o020666, os.makedev(1, 3))
        if self.gpus:
            (self.folder / "gres.conf").write_text(f"Name=gpu File={self.folder}/gpu[0-{self.gpus - 1}]\n")


SETTINGS = {
    "SlurmUser": "root",
    "SlurmdUser": "root",
    "AuthType": "auth/munge",
    "CredType": "cred/munge",
    "MpiDefault": "none",
    "SwitchType": "switch/none",
    "JobAcctGatherType": "jobacct_gather/linux",
    "SelectType": "select/cons_tres",
    "SelectTypeParameters": "CR_Core_Memory",
    "SlurmdParameters": "config_overrides",  # the nodes have what slurm.conf says, not what the machine has
    "SchedulerType": "sched/backfill",
    "SchedulerParameters": "batch_sched_delay=0,sched_interval=1,sched_min_interval=0,bf_interval=1",
    "PreemptType": "preempt/partition_prio",
    "PreemptMode": "REQUEUE",
    "SlurmctldParameters": "preempt_send_user_signal",  # preemption sends the signal of sbatch --signal
    "JobRequeue": "1",
    "KillWait": "5",
    "SlurmdTimeout": "10",
    "MessageTimeout": "10",
    "TCPTimeout": "2",
    "MinJobAge": "600",
    "ReturnToService": "2",
}
PARTITIONS = {
    "main": "Default=YES MaxTime=INFINITE PriorityTier=1 PreemptMode=REQUEUE GraceTime=10 State=UP",
    "urgent": "MaxTime=INFINITE PriorityTier=10 PreemptMode=OFF State=UP",
    "short": "MaxTime=5 PriorityTier=1 PreemptMode=REQUEUE State=UP",
}


def plugins() -> Path:
    """Where Debian puts SLURM's plugins; its programs look for them there only when told to."""
    return next(path.parent for path in Path("/usr/lib").glob("**/auth_munge.so"))


def free_ports(count: int) -> list[int]:
    """Below those that the kernel gives to outgoing connections, which would take one before its daemon does."""
    ports: list[int] = []
    with ExitStack() as stack:
        while len(ports) < count:
            port = 15000 + secrets.randbelow(17000)
            probe = stack.enter_context(socket.socket())
            try:
                probe.bind(("", port))
            except OSError:
                continue
            ports.append(port)
    return ports


def _die_with_parent() -> None:
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _lines(path: Path) -> list[str]:
    return path.read_text(errors="replace").splitlines()
