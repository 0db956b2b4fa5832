"""SLURM's commands, as far as they are needed: submit, ask, cancel, queue again. Raises MachineError if one fails."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime

from alignment.allocation import Allocation, allocation
from alignment.errors import MachineError

PATIENCE = 60.0  # seconds for the controller to answer
WAITING = {"PENDING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT", "RESV_DEL_HOLD"}
AT_WORK = {"RUNNING", "CONFIGURING", "COMPLETING", "SUSPENDED", "STOPPED", "STAGE_OUT", "SIGNALING", "RESIZING"}
CHUNK = 500  # jobs asked about at once
KEPT = {"SLURM_CONF", "SLURM_JWT"}  # where the cluster is, and who asks


@dataclass(frozen=True)
class JobState:
    """What SLURM says of a job or an element of an array. state: its word, such as PENDING. reason: that it waits.
    nodes: that it runs on. end: when it has ended, or by its time limit will; start: when it has started, or started
    again, or is expected to (unix seconds); None: it does not say."""

    job: str
    state: str
    reason: str
    nodes: str
    end: float | None
    start: float | None = None

    @property
    def waits(self) -> bool:
        return self.state in WAITING

    @property
    def lives(self) -> bool:
        return self.state in WAITING or self.state in AT_WORK


def head() -> str:
    """Name of the first node of the job that this process is in: there run the batch script and rank 0."""
    here = allocation()
    assert here is not None
    return call("scontrol", "show", "hostnames", here.nodes).split()[0]


def call(*command: str, patience: float = PATIENCE, stdin: str | None = None) -> str:
    """What the command prints."""
    done = _run(command, patience, stdin)
    if done.returncode:
        raise MachineError(f"{command[0]} refuses: {_said(done)}", where=" ".join(command[:6]))
    return done.stdout


def _run(command: Sequence[str], patience: float, stdin: str | None) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(
            command, capture_output=True, timeout=patience, check=False, input=stdin, env=_plain(),
            encoding="utf-8", errors="replace",  # some of what they print, people have written, in any encoding
            start_new_session=True,  # Ctrl-C is for us: it must not come between SLURM's yes and our hearing it
        )  # fmt: skip
    except FileNotFoundError:
        fix = "run this on a login node of the cluster, or choose launcher=torchrun or launcher=local"
        raise MachineError(f"no {command[0]} here: SLURM's commands are not installed", fix=fix) from None
    except subprocess.TimeoutExpired:
        raise MachineError(f"{command[0]} has not answered in {patience:g} s", fix="see whether SLURM is up") from None


def _said(done: subprocess.CompletedProcess[str]) -> str:
    return " ".join((done.stderr or done.stdout).split()) or f"exit code {done.returncode}"


def _plain() -> dict[str, str]:
    """Our environment without what would change how these commands answer or what they submit: defaults of a profile,
    which overrule #SBATCH lines, and what a job around us has, which sbatch would hand to the next one."""
    theirs = ("SLURM", "SBATCH_", "SRUN_", "SQUEUE_", "SINFO_", "SCANCEL_", "SACCT_", "SALLOC_")
    return {name: value for name, value in os.environ.items() if name in KEPT or not name.startswith(theirs)}


def submit(script: str) -> str:
    """The number of the job, or array, that the script has become."""
    said = call("sbatch", "--parsable", stdin=script)
    # A site's own words may stand before and after it. Of a federation the cluster's name follows.
    if number := re.search(r"^(\d+)(;\S+)?\s*$", said, re.M):
        return number[1]
    told = " ".join(said.split()) or "nothing"
    fix = "give the command again: it asks squeue first whether the job is queued all the same"
    raise MachineError(f"sbatch names no job: {told}", where="sbatch --parsable", fix=fix)


def test(script: str, patience: float) -> tuple[bool, str]:
    """Whether SLURM would take the script now, and its words for when that would start, or why not. Queues nothing."""
    done = _run(("sbatch", "--test-only"), patience, script)
    return not done.returncode, _said(done)


def states(jobs: Iterable[str]) -> dict[str, JobState]:
    """Of these jobs and elements of arrays: those that SLURM still knows."""
    jobs = list(jobs)
    wanted = sorted({job.split("_")[0] for job in jobs})
    found: dict[str, JobState] = {}
    for first in range(0, len(wanted), CHUNK):
        for state in _ask(wanted[first : first + CHUNK]):
            found[state.job] = state
    return found | {job: whole for job in jobs if (whole := _of_array(job, found))}


def _of_array(job: str, found: Mapping[str, JobState]) -> JobState | None:
    """Of an element of an array that was cancelled as a whole while it waited: of that squeue has one line."""
    state = found.get(job.split("_")[0])
    return None if job in found or state is None or state.lives else replace(state, job=job)


def _ask(jobs: Sequence[str]) -> list[JobState]:
    form = "%i|%T|%r|%N|%e|%S"
    try:
        said = call("squeue", "--noheader", "--states=all", "--array", f"--jobs={','.join(jobs)}", f"--format={form}")
    except MachineError as error:
        if "Invalid job id" not in error.what:
            raise
        # One that it has forgotten: alone that is an answer, among others squeue may refuse them all.
        return [state for job in jobs for state in _ask([job])] if len(jobs) > 1 else []
    lines = [line.split("|") for line in said.splitlines() if line.count("|") == 5]
    return [
        JobState(job, state, reason, nodes, _moment(end), _moment(start))
        for job, state, reason, nodes, end, start in (map(str.strip, line) for line in lines)
    ]


def living() -> set[str]:
    """Jobs of this user, and elements of arrays, that wait or run."""
    lines = call("squeue", "--me", "--noheader", "--array", "--format=%i|%T").splitlines()
    told = [line.strip().split("|")[:2] for line in lines if "|" in line]
    return {job for job, state in told if state in WAITING | AT_WORK}


def outputs() -> dict[str, str]:
    """File that the jobs of this user print into, as it was asked for, with %j or %A_%a in it -> number of the job."""
    wide = 4096  # characters
    said = call("squeue", "--me", "--noheader", "--states=all", f"--Format=ArrayJobID:20,StdOut:{wide}")
    return {line[20:].strip(): line[:20].strip() for line in said.splitlines() if line.strip()}


def _moment(text: str) -> float | None:
    """2026-11-26T10:00:00 of this machine's time zone, as these commands write it; N/A and Unknown are none."""
    try:
        return datetime.fromisoformat(text).timestamp()
    except ValueError:
        return None


def accounted(jobs: Iterable[str]) -> dict[str, JobState]:
    """Of jobs that the controller has forgotten, those that the accounting still knows; none where there is none."""
    wanted = sorted(set(jobs))
    if not wanted or shutil.which("sacct") is None:
        return {}
    form = "JobID,State,NodeList,End"
    found: dict[str, JobState] = {}
    for first in range(0, len(wanted), CHUNK):
        asked = ",".join(wanted[first : first + CHUNK])
        try:
            said = call("sacct", "--noheader", "--parsable2", "--allocations", f"--jobs={asked}", f"--format={form}")
        except MachineError:  # "Slurm accounting storage is disabled"
            return {}
        for line in said.splitlines():
            if line.count("|") == 3:
                job, word, nodes, end = line.split("|")
                # "CANCELLED by 1000"
                found[job] = JobState(job, word.split()[0] if word else "", "None", nodes, _moment(end))
    return found


def state(job: str) -> str | None:
    """SLURM's word for the state of one job; None if it knows none."""
    found = states([job]).get(job)
    return found.state if found else None


def restarts(job: str) -> int:
    """Times that it was queued again so far."""
    found = re.search(r"\bRestarts=(\d+)", call("scontrol", "show", "job", job))
    return int(found[1]) if found else 0


def cancel(jobs: Iterable[str]) -> None:
    names = sorted(set(jobs))
    for first in range(0, len(names), CHUNK):
        call("scancel", *names[first : first + CHUNK])


def kill_steps(here: Allocation) -> None:
    """All steps of the job, not its batch script; unless it has started again elsewhere, and they are not ours."""
    try:
        if restarts(here.job) == here.restarts:
            call("scancel", "--signal=KILL", here.job, patience=20.0)
    except MachineError:
        pass  # it has no step any more, or the job itself has ended


def requeue(job: str) -> None:
    call("scontrol", "requeue", job)


def largest_array() -> int:
    """One more than the highest index of an element. 1, so that each job stands alone, where arrays are off (0)."""
    found = re.search(r"^MaxArraySize\s*=\s*(\d+)", call("scontrol", "show", "config"), re.M)
    return max(1, int(found[1])) if found else 1001


def silent_nodes(nodes: str) -> list[str]:
    """Those of these nodes that do not answer, or are down. nodes: in SLURM's short form."""
    said = call("sinfo", "--noheader", "--Node", f"--nodes={nodes}", "--format=%N %T")
    lines = (line.split() for line in said.splitlines())
    return sorted({name for name, state in lines if state.endswith("*") or state.startswith(("down", "fail", "drain"))})
