"""Two machines that are joined by hand, each with a network and a host name of its own, and their store in common."""

from __future__ import annotations

import json
import os
import re
import secrets
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from alignment.life import beats
from tests.faults.runs import Case, Ground, until, write_inputs
from tests.slurm.machine import Network, networks_refused

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
PORT = 29500
STEPS = 40  # so many that a signal comes in their midst
ONE_PROCESS = 1e-5  # as tests.distributed.test_engines_agree


class Command(subprocess.Popen[bytes]):
    """`alignment run` on a machine. told_in: the file that takes what it says."""

    def __init__(self, words: list[str], arguments: list[str], told_in: Path, environment: dict[str, str]):
        self.told_in = told_in
        command = [*words, sys.executable, "-m", "alignment.cli", "run", *arguments]
        with open(told_in, "wb") as stream:
            super().__init__(command, stdout=stream, stderr=stream, env=environment, cwd=told_in.parent)

    def ends(self, code: int, seconds: float = 240) -> str:
        """What it has said, once it has ended with this code."""
        found = None
        with suppress(subprocess.TimeoutExpired):
            found = self.wait(seconds)
        assert found == code, f"{found} instead of {code}: {self.told[-3000:]}"
        return self.told

    @property
    def told(self) -> str:
        return self.told_in.read_text(errors="replace")


@dataclass
class Site:
    """Two machines; where nobody may make networks, two commands on this one."""

    network: Network | None
    addresses: dict[str, str]
    mark: dict[str, str]  # a variable by which its guard knows all that runs there
    started: list[Command] = field(default_factory=list)

    def start(self, case: Case, rank: int, *settings: str) -> Command:
        head = f"launcher.head={next(iter(self.addresses.values()))}:{PORT}"
        joined = ["launcher.processes=1", "launcher.nodes=2", f"launcher.rank={rank}", head]
        words = self.network.inside(list(self.addresses)[rank]) if self.network else []
        return self.run(case, words, [*joined, *settings], GLOO_SOCKET_IFNAME="eth0" if self.network else "lo")

    def pair(self, case: Case) -> list[Command]:
        return [self.start(case, rank) for rank in (0, 1)]

    def run(self, case: Case, words: list[str], settings: list[str], **more: str) -> Command:
        more |= self.mark | {
            "ALIGNMENT_STORE": str(case.store),
            "ALIGNMENT_CACHE": str(case.folder / "cache"),
            "COLUMNS": "1000",
        }
        told = case.folder / f"said-{len(self.started)}.txt"
        self.started.append(Command(words, case.arguments(*settings), told, {**os.environ, **more}))
        return self.started[-1]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    tag, mark = secrets.token_hex(2), tmp_path_factory.mktemp("site") / "mark"
    nodes = [f"joined-{tag}-{number}" for number in (0, 1)]
    guard = [sys.executable, "-m", "tests.slurm.machine", tag, str(mark), *nodes]
    with subprocess.Popen(guard, stdin=subprocess.PIPE, cwd=ROOT, start_new_session=True):  # removes all, at our end
        network = None if networks_refused() else Network(tag, nodes)
        addresses = network.make()[1] if network else dict.fromkeys(nodes, "127.0.0.1")
        yield Site(network, addresses, {"SLURM_CONF": str(mark)})


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Ground:
    folder = tmp_path_factory.mktemp("joined")
    return Ground(folder, write_inputs(folder))


def a_case(ground: Ground, folder: Path) -> Case:
    """Whose start model and rows are in the store."""
    return ground.case("sft", "zero2", folder, f"stage.sft.max_steps={STEPS}", "checkpoint.every_steps=2")


@pytest.fixture(scope="module")
def whole(ground: Ground, site: Site, tmp_path_factory: pytest.TempPathFactory) -> Case:
    """The uninterrupted run on both machines."""
    case = a_case(ground, tmp_path_factory.mktemp("whole"))
    leads, follows = site.pair(case)
    leads.ends(0)
    assert "done" in follows.ends(0, 20).splitlines()[-1]
    return case


def weights(case: Case) -> dict[str, Any]:
    return dict(load_file(case.place / "model" / "model.safetensors"))


def is_at(case: Case, step: int, attempt: int = 1) -> bool:
    """Whether this attempt has told of that step."""
    with suppress(OSError, ValueError):
        begun = json.loads((case.work / "stage.json").read_text())["attempt"] if case.work else 0
        return bool(begun == attempt and case.progress().get("step", 0) >= step)
    return False


def test_two_machines_train_what_one_does(ground: Ground, site: Site, whole: Case, tmp_path: Path) -> None:
    one = a_case(ground, tmp_path / "one")
    one.run(code=0)  # two processes
    assert whole.record()["world_size"] == one.record()["world_size"] == 2
    assert whole.result() == one.result()  # bit for bit

    single = ground.case("sft", "single", tmp_path / "single", f"stage.sft.max_steps={STEPS}")
    single.run(code=0)
    for mine, theirs in zip(whole.result().rows, single.result().rows, strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], abs=ONE_PROCESS)
    other = weights(single)
    for name, value in weights(whole).items():
        assert (value - other[name]).abs().max() < ONE_PROCESS, name
    told = [json.loads(path.read_text()) for path in sorted(whole.store.glob("joined/*/rank-*.json"))]
    assert len({machine["host"] for machine in told}) == (2 if site.network else 1)


def test_one_that_is_asked_to_stop_and_one_that_dies(ground: Ground, site: Site, whole: Case, tmp_path: Path) -> None:
    """Asked, the machine that follows has both save and end; the same commands go on. Then its command is killed, with
    all that it has started: it is waited for. One whose settings are not those of rank 0 may not take its place."""
    case = a_case(ground, tmp_path / "case")
    until_75(site, case, 1, attempt=1)
    saved = case.reached()

    leads, follows = site.pair(case)
    until(lambda: is_at(case, saved + 3, attempt=2), 120)
    follows.kill()
    until(lambda: "waits 600 s at most: rank 1 has not joined: run the same command" in leads.told, 120)
    told = site.start(case, 1, "stage.sft.learning_rate=0.5").ends(2).splitlines()
    assert re.search(r"error: .*not the run of rank 0: sft: settings.learning_rate is 0.5 here, and .* there", told[-1])
    other = site.start(case, 1)
    leads.ends(0)
    other.ends(0, 20)
    assert case.result() == whole.result()
    assert case.outcomes() == ["preempted", "lost", "done"]
    assert case.begun()[:2] == [0, saved]


@pytest.mark.faults
def test_rank_0_that_is_asked_to_stop_and_a_process_that_dies(
    ground: Ground, site: Site, whole: Case, tmp_path: Path
) -> None:
    """The other way round, and with a command that lives on, which starts another process by itself."""
    case = a_case(ground, tmp_path / "case")
    until_75(site, case, 0, attempt=1)
    pair = site.pair(case)
    until(lambda: is_at(case, case.reached() + 1, attempt=2), 120)
    os.kill(beats(case.work)[1].pid, signal.SIGKILL)  # type: ignore[arg-type]
    for command in pair:
        command.ends(0)
    assert case.result() == whole.result()
    assert case.outcomes() == ["preempted", "lost", "done"]


@pytest.mark.faults
def test_rank_0_that_dies_may_come_back(ground: Ground, site: Site, whole: Case, tmp_path: Path) -> None:
    case = a_case(ground, tmp_path / "case")
    leads, follows = site.pair(case)
    until(lambda: is_at(case, 3), 120)
    leads.kill()
    site.start(case, 0).ends(0)
    follows.ends(0, 20)
    assert case.result() == whole.result()
    assert case.outcomes() in (["lost", "done"], ["interrupted", "done"])


def until_75(site: Site, case: Case, rank: int, attempt: int) -> None:
    """Both are started, and that of this rank gets SIGTERM in the midst of training."""
    pair = site.pair(case)
    until(lambda: is_at(case, 3, attempt), 120)
    pair[rank].send_signal(signal.SIGTERM)
    for command in pair:
        assert "stopped" in command.ends(75).splitlines()[-1]
    assert 2 < case.reached() < STEPS


def test_who_is_alone_says_so_in_one_line(ground: Ground, site: Site, tmp_path: Path) -> None:
    """As where the store of each machine is its own."""
    cases = [a_case(ground, tmp_path / f"machine-{rank}") for rank in (0, 1)]
    alone = [site.start(case, rank, "launcher.join_s=4") for rank, case in enumerate(cases)]
    for command, case, other in zip(alone, cases, (1, 0), strict=True):
        last = command.ends(4).splitlines()[-1]
        assert last.startswith(f"alignment: error: {case.store}: rank {other} ")
        assert "within 4 s (launcher.join_s)" in last
        assert f"launcher.rank={other}" in last
