"""Two clusters that start when the first test asks for them and run until the last one is done."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster, install
from tests.slurm.machine import networks_refused


@pytest.fixture(scope="session")
def slurm() -> Iterator[Cluster]:
    """Four nodes that share this machine's name and network."""
    yield from running(install())


@pytest.fixture(scope="session")
def slurm_network() -> Iterator[Cluster]:
    """Four nodes, each with an address and a host name of its own, and a cable that can be pulled."""
    yield from running(install() or networks_refused(), network=True)


@pytest.fixture(autouse=True)
def _reset(request: pytest.FixtureRequest) -> Iterator[None]:
    """A test may leave jobs running and nodes dead."""
    clusters = [request.getfixturevalue(name) for name in ("slurm", "slurm_network") if name in request.fixturenames]
    yield
    for cluster in clusters:
        cluster.reset()


def running(refused: str | None, network: bool = False) -> Iterator[Cluster]:
    if refused and (os.environ.get("CI") or os.environ.get("ALIGNMENT_SLURM_MUST_RUN") == "1"):
        pytest.fail(refused)
    if refused:
        pytest.skip(refused)
    with (
        # Not pytest's own folder: a socket's path must be short.
        tempfile.TemporaryDirectory(prefix="slurm-", dir="/tmp", ignore_cleanup_errors=True) as folder,
        Cluster(Path(folder), network=network) as cluster,
    ):
        yield cluster


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.slurm)
