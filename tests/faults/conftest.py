"""The ground that all runs share, and a file of what each one came to."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.faults.runs import Case, Ground, write_inputs
from tests.tracking.conftest import closed_url, server, silent_url  # noqa: F401 - fixtures

RESULTS: list[dict[str, Any]] = []


@pytest.fixture(scope="session")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Ground:
    folder = tmp_path_factory.mktemp("ground")
    return Ground(folder, write_inputs(folder))


@pytest.fixture
def make(ground: Ground, tmp_path: Path) -> Iterator[Callable[..., Case]]:
    """make(kind, engine, *settings, store=...): a case in the test's own folder; its processes end with the test."""
    made: list[Case] = []

    def make(kind: str, engine: str, *settings: str, store: Path | None = None) -> Case:
        made.append(ground.case(kind, engine, tmp_path / f"case-{len(made)}", *settings, store=store))
        return made[-1]

    yield make
    for case in made:
        case.end()


@pytest.fixture(autouse=True)
def told(request: pytest.FixtureRequest) -> None:
    """What the file of results says of this test: its marker `fault`, with the parameters put in."""
    marker, call = request.node.get_closest_marker("fault"), getattr(request.node, "callspec", None)
    if marker is not None:
        given = call.params if call is not None else {}
        request.node.user_properties.append(("fault", marker.args[0].format(**given)))
        for name in ("kind", "engine"):
            request.node.user_properties.append((name, given.get(name) or marker.kwargs.get(name, "")))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What is not marked quick, or not with these parameters, is for the whole matrix only."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            quick, call = item.get_closest_marker("quick"), getattr(item, "callspec", None)
            if quick is None or (quick.args and call is not None and call.id not in quick.args):
                item.add_marker(pytest.mark.faults)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when == "call" or (report.when == "setup" and not report.passed):
        told = dict(report.user_properties)
        if "fault" in told:
            why = "" if report.passed else str(report.longrepr)[-2000:]
            RESULTS.append({**told, "outcome": report.outcome, "seconds": round(report.duration, 1), "why": why})


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Written by the process that hears all reports."""
    if (path := os.environ.get("FAULTS_RESULTS")) and RESULTS and not hasattr(session.config, "workerinput"):
        Path(path).write_text(json.dumps(RESULTS, indent=1) + "\n")
