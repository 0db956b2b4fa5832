"""How many cores a process may use."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from alignment.cores import usable


@pytest.fixture(autouse=True)
def bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))


def write(folder: Path, **files: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)


def test_cores_are_those_bound_to_and_what_the_tightest_group_pays_for(tmp_path: Path) -> None:
    proc, groups = tmp_path / "proc", tmp_path / "cgroup"
    assert usable(proc, groups) == 8
    write(proc / "self", cgroup="0::/job/step\n")
    write(groups / "job" / "step", cpu__max="max 100000\n")
    assert usable(proc, groups) == 8
    write(groups / "job", cpu__max="350000 100000\n")
    assert usable(proc, groups) == 3, "whole ones"
    write(groups, cpu__max="50000 100000\n")
    assert usable(proc, groups) == 1, "a container sees its own group as the root"


@pytest.mark.parametrize("folder", ["cpu,cpuacct", "cpu"])
def test_cores_in_a_group_of_the_first_version(tmp_path: Path, folder: str) -> None:
    proc, groups = tmp_path / "proc", tmp_path / "cgroup"
    write(proc / "self", cgroup="4:memory:/other\n3:cpu,cpuacct:/job\n0::/\n")
    write(groups / folder, cpu__cfs_quota_us="-1\n", cpu__cfs_period_us="100000\n")
    assert usable(proc, groups) == 8
    write(groups / folder / "job", cpu__cfs_quota_us="200000\n", cpu__cfs_period_us="100000\n")
    assert usable(proc, groups) == 2
