"""Jobs that are preempted, run out of time, lose a node or a process: the model is the same, or the reason is said."""

from __future__ import annotations

import json
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import tiny_stages
from tests.slurm.cluster import Cluster
from tests.slurm.project import ON_SLURM, Project, losses, weights

TWO_NODES = (*ON_SLURM, "engine=zero2", "launcher.nodes=2", "launcher.grace=10")
STEPS = 400
Make = Callable[[Cluster | None], Project]


@pytest.fixture(scope="module")
def settings(tiny_settings: list[str]) -> list[str]:
    train = [f"stage.sft.max_steps={STEPS}", "checkpoint.every_minutes=null", "checkpoint.every_steps=20"]
    return [*tiny_settings, "pipeline=only_sft", *tiny_stages("prepare_sft", "sft"), *train]


@pytest.fixture(scope="module")
def undisturbed(settings: list[str], tmp_path_factory: pytest.TempPathFactory) -> Project:
    """The same two processes, on this machine, never interrupted."""
    project = Project(tmp_path_factory.mktemp("undisturbed"), settings, None)
    project.run("launcher=torchrun", "engine=zero2")
    return project


@pytest.fixture(scope="module")
def patience(undisturbed: Project) -> int:
    """Seconds in which a job starts, trains for a while and saves, on this machine, be it as busy as it may."""
    return max(40, round(3 * undisturbed.record("sft")["seconds"]))


@pytest.fixture
def make(undisturbed: Project, settings: list[str], tmp_path: Path) -> Make:
    """A project in whose store all is done but the training."""

    def project(cluster: Cluster | None) -> Project:
        made = Project(tmp_path, settings, cluster)
        for name in ("start", "rows"):
            result = undisturbed.result(name)
            shutil.copytree(result, made.store / "store" / result.name)
        return made

    return project


@pytest.fixture
def as_most_are() -> Iterator[Cluster]:
    """At a preemption it says nothing to batch scripts, only TERM to the processes of their steps."""
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="slurm-", dir="/tmp"))
        yield stack.enter_context(Cluster(Path(folder), settings={"SlurmctldParameters": ""}))


def job_of(project: Project) -> str:
    return str(project.node("sft")["job"])


def same_as(project: Project, undisturbed: Project) -> None:
    assert losses(project.result("sft")) == losses(undisturbed.result("sft"))
    assert len(losses(project.result("sft"))) == STEPS, "each step once"
    assert weights(project.result("sft")) == weights(undisturbed.result("sft"))


def attempts(project: Project) -> list[tuple[Any, ...]]:
    return [(row["outcome"], row["job"]["restarts"]) for row in project.record("sft")["attempts"]]


def done(project: Project, seconds: float = 240.0) -> None:
    project.until(lambda: project.node("sft")["state"] == "done", "the stage is done", seconds)


@pytest.mark.parametrize("told", ["the batch script", "its steps only"])
def test_a_preempted_job_goes_on(told: str, make: Make, undisturbed: Project, request: pytest.FixtureRequest) -> None:
    cluster = request.getfixturevalue("slurm" if told == "the batch script" else "as_most_are")
    project = make(cluster)
    project.run(*TWO_NODES, "tracking=wandb_offline")
    project.until(lambda: project.step("sft") > 10, "it trains")
    (tracked,) = (path.read_text() for path in project.store.glob("work/*/wandb_run_id"))
    urgent = cluster.submit("--partition=urgent", "--nodes=4", "--exclusive", "--wrap", "sleep 1")
    cluster.wait(urgent, timeout=90)
    done(project)
    same_as(project, undisturbed)
    assert attempts(project) == [("preempted", 0), ("done", 1)]
    assert (project.result("sft") / "wandb_run_id").read_text() == tracked, "the same W&B run"
    assert project.node("sft")["restarts"] == 1


def test_a_job_that_runs_out_of_time_goes_on(slurm: Cluster, make: Make, undisturbed: Project, patience: int) -> None:
    """It ends by itself, `patience` after its start; SLURM, which counts in minutes, would ask it later."""
    project = make(slurm)
    project.run(*TWO_NODES, f"launcher.time_limit={46 + patience}", "launcher.grace=46")
    project.until(lambda: project.step("sft") > 10, "it trains")
    stood_still(project, until=stage(project)["started"] + patience + 2)
    done(project)
    same_as(project, undisturbed)
    *before, last = attempts(project)  # on a busy machine the next one's time may be over, too
    assert before == [("preempted", number) for number in range(len(before))]
    assert before and last == ("done", len(before))
    assert "launcher.time_limit: saved at step" in project.record("sft")["attempts"][0]["cause"]


def test_a_cancelled_job_saves_and_the_same_command_at_once_goes_on_from_there(
    slurm: Cluster, make: Make, undisturbed: Project
) -> None:
    project = make(slurm)
    project.run(*TWO_NODES)
    project.until(lambda: project.step("sft") > 10, "it trains")
    (run,), job = project.runs(), job_of(project)
    forget(project)
    assert "1 queued already" in project.run(*TWO_NODES)
    assert f"cancelled sft (job {job})" in project.command("cancel", run["run"])
    project.run(*TWO_NODES)
    assert slurm.states(job)[job] == "CANCELLED", "it is not queued again by itself"
    assert list(project.store.glob("work/*/checkpoints/step-*/manifest.json"))
    done(project)
    same_as(project, undisturbed)
    assert [outcome for outcome, _ in attempts(project)] == ["preempted", "done"]


def forget(project: Project) -> None:
    """As if the command that has submitted it had been killed between SLURM's yes and the note of it."""
    (note,) = project.store.glob("jobs/keys/*.json")
    note.unlink()
    (order,) = project.store.glob("jobs/*/000-*.json")
    order.with_name("begun").touch()


def test_a_job_is_queued_again_no_more_often_than_it_may(slurm: Cluster, make: Make) -> None:
    project = make(slurm)
    project.run(*TWO_NODES, "launcher.max_restarts=0")
    project.until(lambda: project.step("sft") > 10, "it trains")
    job = job_of(project)
    slurm.run("scancel", "--batch", "--signal=USR1", job)
    slurm.wait(job, until={"FAILED"})
    assert "after 0 restarts: it is not queued again" in project.node("sft")["error"]


def test_a_node_whose_daemon_dies_is_left_and_its_processes_end_themselves(
    slurm: Cluster, make: Make, undisturbed: Project
) -> None:
    """SLURM cannot reach them any more: they live on, stand still for a while, and then must not write into what is the
    new attempt's."""
    project = make(slurm)
    project.run(*TWO_NODES, "checkpoint.every_steps=5")
    project.until(lambda: project.step("sft") > 10, "it trains")
    old = beats(project)
    head = slurm.run("scontrol", "show", "hostnames", stage(project)["job"]["nodes"]).stdout.split()[0]
    slurm.kill_daemon(head)
    for beat in old:
        os.kill(beat["pid"], signal.SIGSTOP)
    project.until(lambda: stage(project)["job"]["restarts"] == 1, "it starts again", 90)
    for beat in old:
        with suppress(ProcessLookupError):  # SLURM reaches the other node
            os.kill(beat["pid"], signal.SIGCONT)
    project.until(lambda: not any(alive(beat["pid"]) for beat in old), "the old processes are gone", 15)
    done(project)
    same_as(project, undisturbed)
    assert attempts(project)[-1] == ("done", 1)


def test_a_crashed_rank_takes_all_down_and_is_named(slurm_network: Cluster, make: Make) -> None:
    project = make(slurm_network)
    project.run(*TWO_NODES, "retries=0")
    project.until(lambda: project.step("sft") > 10, "it trains")
    job, ranks = job_of(project), beats(project)
    began = time.monotonic()
    os.kill(next(beat["pid"] for beat in ranks if beat["rank"] == 1), signal.SIGKILL)
    project.until(lambda: not any(alive(beat["pid"]) for beat in ranks), "all are down", 15)
    slurm_network.wait(job, until={"FAILED"}, timeout=15 - (time.monotonic() - began))
    node = project.node("sft")
    assert node["state"] == "failed"
    assert f"rank 1 on {ranks[1]['host']} was killed by signal 9" in node["error"]
    assert "was killed by signal 9" in project.command("logs", project.runs()[0]["run"], "sft")


def stage(project: Project) -> dict[str, Any]:
    for path in project.store.glob("work/*/stage.json"):
        with suppress(OSError):
            return json.loads(path.read_text())  # type: ignore[no-any-return]
    return {"job": {"restarts": -1}}  # it is being renewed


def stood_still(project: Project, until: float) -> None:
    """The ranks do nothing till then: however fast the machine, they are not done before."""
    ranks = [beat["pid"] for beat in beats(project)]
    for pid in ranks:
        os.kill(pid, signal.SIGSTOP)
    time.sleep(max(0.0, until - time.time()))
    for pid in ranks:
        os.kill(pid, signal.SIGCONT)


def beats(project: Project) -> list[dict[str, Any]]:
    found = [json.loads(path.read_text()) for path in sorted(project.store.glob("work/*/beats/rank-*.json"))]
    assert len(found) == 2
    return found


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False
