"""What a real cluster is asked before anything is queued, and that what was submitted is what runs."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from alignment.config.compose import compose
from alignment.errors import ConfigError, MachineError
from alignment.files import read_json
from alignment.pipeline import probing, sanity
from alignment.pipeline.identity import package_root, source_digest
from alignment.pipeline.runner import Run
from tests.conftest import Command, tiny_stages
from tests.slurm import machine
from tests.slurm.cluster import CHECKOUT, Cluster

QUICK = ["launcher=slurm", "launcher.processes=1", "launcher.gpus_per_node=null", "launcher.memory=1G", "pipeline=sft"]
Prepare = Callable[..., Run]


def use(monkeypatch: pytest.MonkeyPatch, cluster: Cluster) -> None:
    monkeypatch.setenv("PATH", machine.PATH)
    for name, value in cluster.environment().items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def settings(tiny_settings: list[str]) -> list[str]:
    return [*tiny_settings, *QUICK, *tiny_stages("prepare_sft", "sft", "evaluate", "compare"), "engine=ddp"]


@pytest.fixture
def prepare(settings: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Prepare:
    """A run with further settings, whose store is empty."""
    monkeypatch.setenv("ALIGNMENT_STORE", str(tmp_path / "store"))
    monkeypatch.setenv("ALIGNMENT_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return lambda *more: Run(compose([*settings, *more], ()), "")


def queue(cluster: Cluster) -> str:
    return cluster.run("squeue", "-h", "-o", "%i %T").stdout


REFUSED = {
    "launcher.partition=shrt": "launcher.partition: the cluster has no partition `shrt` .did you mean `short`",
    "launcher.partition=short launcher.time_limit=10:00": r"launcher.time_limit: start asks for 0:10:00, and `short` "
    "gives 0:05:00 at most .*partitions that could: main, urgent",
    "+launcher.stages.sft.nodes=99 stage.sft.global_batch_size=99": "launcher.stages.sft.nodes: sft asks for 99 nodes, "
    "and `main` has 4",
    "+launcher.stages.evaluate_sft.memory=99G": "launcher.stages.evaluate_sft.memory: evaluate_sft asks for 1 node "
    r"with 99G of memory, and none of the 4 nodes of `main` is such \(the largest has 6000 MB\)",
    "launcher.cpus_per_process=9": "launcher.cpus_per_process: start asks for 1 node with 9 CPUs, and none",
    "launcher.gpus_per_node=1": "launcher.gpus_per_node: start asks for 1 node with 1 GPU, and none",
    "launcher.constraint=a100": "launcher.constraint: start asks for the feature `a100`, which no node has",
    "launcher.exclude=nobody": "launcher.exclude: the cluster has no node `nobody`",
    "+launcher.options.nonsense=foo": "launcher.options: SLURM would refuse the job of start: .*unrecognized option",
    "+launcher.options.nodelist=nobody": "launcher.exclude: SLURM would refuse the job of start: Invalid node name",
}


@pytest.mark.parametrize("wrong", REFUSED)
def test_what_could_never_start_is_refused(
    wrong: str, slurm: Cluster, prepare: Prepare, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, slurm)
    with pytest.raises(ConfigError, match=REFUSED[wrong]):
        sanity.check([prepare(*wrong.split())], "t", print)
    assert not queue(slurm)


def test_a_place_that_no_script_can_name_is_refused(
    slurm: Cluster, prepare: Prepare, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, slurm)
    (tmp_path / "it's").mkdir()
    monkeypatch.chdir(tmp_path / "it's")
    with pytest.raises(ConfigError, match=r"the directory of this command: .*it's has a"):
        sanity.check([prepare()], "t", print)


def test_a_refusal_is_one_line_and_nothing_is_written(
    slurm: Cluster, settings: list[str], tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, slurm)
    done = command(tmp_path / "store", "run", *settings, "launcher.partition=short", code=2)
    assert done.stderr.startswith("alignment: error: launcher.time_limit: start asks for 1-0:00:00, and `short` gives")
    assert done.stderr.count("\n") == 1
    assert not queue(slurm)
    assert not (tmp_path / "store" / "runs").exists()
    done = command(tmp_path / "store", "plan", "--check", *settings, "launcher.memory=null")
    assert "warning: launcher.memory is null: start gets 1500 MB of each node (DefMemPerCPU=1500)" in done.stderr
    assert not queue(slurm)


SUBMITS = """
import sys
from pathlib import Path
from alignment.launchers import slurm
print(slurm.submit(Path(sys.argv[1]).read_text()))
"""


def test_a_command_that_is_given_inside_a_job_submits_what_it_would_outside(slurm: Cluster, tmp_path: Path) -> None:
    script = tmp_path / "script"
    options = f"#SBATCH --mem=100M\n#SBATCH --output={tmp_path}/out\n"
    script.write_text(f"#!/bin/bash\n{options}export -p\nsrun echo the step has run\n")
    around = ["srun", "--cpus-per-task=3", "--mem-per-cpu=50M", "--cpu-bind=none"]
    said = slurm.run(*around, sys.executable, "-c", SUBMITS, str(script), env={"PYTHONPATH": str(CHECKOUT)}).stdout
    job = said.split()[-1]
    slurm.wait(job, {"COMPLETED", "FAILED"})
    found = (tmp_path / "out").read_text()
    assert "the step has run" in found
    assert f'SLURM_JOB_ID="{job}"' in found and 'SLURM_MEM_PER_NODE="100"' in found
    assert not re.findall("SLURM_CPUS_PER_TASK|SLURM_MEM_PER_CPU|SLURM_CPU_BIND|SRUN_", found)


def test_nodes_that_are_down_may_come_back(slurm: Cluster, prepare: Prepare, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, slurm)
    run, said, nodes = prepare("+launcher.stages.sft.nodes=3"), list[str](), ",".join(slurm.nodes[1:])
    slurm.run("scontrol", "update", f"nodename={nodes}", "state=drain", "reason=State=IDLE tests")
    try:
        sanity.check([run], "t", said.append)
    finally:
        slurm.run("scontrol", "update", f"nodename={nodes}", "state=resume")
    assert said[0] == "warning: sft asks for 3 nodes, and of those in `main` that fit 1 are up now: it waits for others"
    assert len(said) == 1
    for node in slurm.nodes:
        slurm.wait_node(node)
    began, said = time.monotonic(), []
    sanity.check([run], "t", said.append)
    assert time.monotonic() - began < 1.0
    assert said == []
    slurm.run("scontrol", "update", "partition=urgent", "state=down")
    try:
        with pytest.raises(ConfigError, match=r"launcher.partition: start would wait in `urgent`, which is down"):
            sanity.check([prepare("launcher.partition=urgent")], "t", print)
    finally:
        slurm.run("scontrol", "update", "partition=urgent", "state=up")


# --- the probe --------------------------------------------------------------------------------------------------------


def test_a_probe_looks_around_on_two_nodes(
    slurm: Cluster, settings: list[str], tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, slurm)
    more = ["launcher.probe=true", "launcher.nodes=2", "+launcher.options.hold=true"]
    done = command(tmp_path / "store", "run", *settings, *more)
    first, second = (line for line in done.stdout.splitlines() if "probe" in line)
    assert first.endswith("on the default partition (launcher.probe=false skips it)")
    assert f"probe on {slurm.nodes[0]}, {slurm.nodes[1]}: ok (python 3.1" in second
    assert ", store writable)" in second
    assert "warning" not in done.stdout
    assert not list((tmp_path / "store" / "jobs").glob("*-probe"))
    assert queue(slurm).count("PENDING") == len(compose([*settings, *more], ()).pipeline.nodes)


def test_a_probe_names_what_is_missing(
    slurm: Cluster, prepare: Prepare, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, slurm)
    with pytest.raises(ConfigError, match=r"launcher.python: probe on node-\S+: /nonexistent/python: No such file"):
        sanity.check([prepare("launcher.probe=true", "launcher.python=/nonexistent/python")], "t", print)
    with pytest.raises(MachineError, match=r"launcher.setup: probe on node-\S+: `source /nowhere` has ended with"):
        sanity.check([prepare("launcher.probe=true", "launcher.setup=['source /nowhere']")], "t", print)
    shim = tmp_path / "shim" / "numpy-0.0.1.dist-info"
    shim.mkdir(parents=True)
    (shim / "METADATA").write_text("Metadata-Version: 2.1\nName: numpy\nVersion: 0.0.1\n")
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH=$PYTHONPATH:{shim.parent} exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    with pytest.raises(MachineError, match=r"probe on node-\S+: numpy is 0.0.1 instead of .*numpy==") as caught:
        sanity.check([prepare("launcher.probe=true", f"launcher.python={python}")], "t", print)
    log = Path(str(caught.value.fix).rpartition("log: ")[2])
    assert "problem on node-" in log.read_text()


def test_a_probe_does_not_wait_for_ever(slurm: Cluster, prepare: Prepare, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, slurm)
    job = slurm.submit("-N4", "--exclusive", "--wrap=sleep 300")
    slurm.wait(job, {"RUNNING"})
    monkeypatch.setattr(probing, "PATIENCE", 3.0)
    monkeypatch.setattr(probing, "EVERY", 1.0)
    said: list[str] = []
    with pytest.raises(MachineError, match=r"has not started in .*launcher.probe=false skips it"):
        sanity.check([prepare("launcher.probe=true")], "t", said.append)
    assert any("pending" in line and "launcher.probe=false" in line for line in said)
    assert queue(slurm) == f"{job} RUNNING\n"


@pytest.fixture
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="slurm-", dir="/tmp", ignore_cleanup_errors=True) as name:
        yield Path(name)


@pytest.mark.usefixtures("slurm")
def test_a_probe_counts_gpus(folder: Path, prepare: Prepare, monkeypatch: pytest.MonkeyPatch) -> None:
    """SLURM's are pretended: torch sees none of them."""
    with Cluster(folder, nodes=1, gpus=2) as cluster:
        use(monkeypatch, cluster)
        with pytest.raises(ConfigError, match=r"asks for 1 node with 3 GPUs, and none .*the largest has 2"):
            sanity.check([prepare("launcher.processes=3", "launcher.gpus_per_node=3")], "t", print)
        with pytest.raises(
            MachineError, match=r"launcher.gpus_per_node: probe on node-\S+: torch \S+ sees 0 GPUs of 2"
        ):
            sanity.check([prepare("launcher.gpus_per_node=2", "launcher.probe=true")], "t", print)


class ReadOnly(Cluster):
    """Its nodes see one folder, but cannot write to it."""

    store: Path

    def _daemon_of(self, node: str) -> None:
        mounts = 'mount --bind "$0" "$0" && mount -o remount,bind,ro "$0" && exec "$@"'
        inside = ["unshare", "--mount", "sh", "-c", mounts, str(self.store)]
        self._daemon(node, *inside, "slurmd", "-D", "-N", node, SLURMD_NODENAME=node)


@pytest.mark.usefixtures("slurm")
def test_a_probe_finds_a_store_that_nodes_cannot_write(
    folder: Path, prepare: Prepare, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster = ReadOnly(folder, nodes=1)
    cluster.store = tmp_path / "store"
    cluster.store.mkdir()
    if subprocess.run(["unshare", "--mount", "true"], check=False).returncode:
        pytest.skip("a node's own mounts need root")
    with cluster:
        use(monkeypatch, cluster)
        with pytest.raises(
            MachineError, match=r"no log of it, .*: the store is not to be written there .*store=\.\.\."
        ):
            sanity.check([prepare("launcher.probe=true")], "t", print)


# --- the snapshot -----------------------------------------------------------------------------------------------------


def test_what_was_submitted_is_what_runs(
    slurm: Cluster, settings: list[str], tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A checkout that is edited, and broken, while its jobs wait."""
    use(monkeypatch, slurm)
    checkout, store = tmp_path / "checkout" / "alignment", tmp_path / "store"
    shutil.copytree(package_root(), checkout, ignore=shutil.ignore_patterns("__pycache__"))
    before = source_digest(checkout)
    monkeypatch.setenv("PYTHONPATH", str(checkout.parent))
    monkeypatch.setenv("PYTHONSAFEPATH", "1")
    command(store, "run", *settings, "+launcher.options.hold=true")
    for name in ("job.py", "worker.py", "stages/import_model.py", "pipeline/store.py"):
        with open(checkout / name, "a") as stream:
            stream.write("\nthis is no python\n")
    assert source_digest(checkout) != before
    command(store, "status", code=1)  # the checkout itself is broken
    note = next(note for note in map(read_json, (store / "jobs" / "keys").iterdir()) if note["node"] == "start")
    slurm.run("scontrol", "release", note["job"])
    slurm.wait(note["job"])
    (record,) = (store / "store").glob("*/record.json")
    assert read_json(record)["code_sha256"] == before
