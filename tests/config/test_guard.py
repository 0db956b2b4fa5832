"""A folder of configs cannot make Hydra run code, whichever of Hydra's keys it sets; installed plugins still work."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

MARK = "made"  # a folder in the working directory: there if a config got something run
CALL = f"{{_target_: os.mkdir, path: {MARK}}}"
LOG = f'root: {{handlers: [x]}}, handlers: {{x: {{"()": os.mkdir, path: {MARK}}}}}'
DOORS = {
    "callbacks": (f"hydra: {{callbacks: {{x: {CALL}}}}}", "hydra.callbacks.x._target_"),
    "callbacks, referred to": (f"hidden: {{x: {CALL}}}\nhydra: {{callbacks: '${{hidden}}'}}", "hydra.callbacks"),
    "job logging": (f"hydra: {{job_logging: {{{LOG}}}}}", "hydra.job_logging.root.handlers"),
    "Hydra's logging": (f"hydra: {{hydra_logging: {{{LOG}}}}}", "hydra.hydra_logging.root.handlers"),
    "log handlers by class": (
        f"hydra: {{job_logging: {{{LOG.replace('()', 'class').replace('os.', 'logging.os.')}}}}}",
        "hydra.job_logging.root.handlers",
    ),
    "environment": ("hydra: {job: {env_set: {PYTHONPATH: mine}}}", "hydra.job.env_set.PYTHONPATH"),
    "sweeper": ("defaults: [override /hydra/sweeper: evil]", "hydra.sweeper._target_"),
    "launcher": ("defaults: [override /hydra/launcher: evil]", "hydra.launcher._target_"),
    "in a sweeper": ("defaults: [override /hydra/sweeper: hollow]", "hydra.sweeper.params._target_"),
}


def alignment(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "alignment.cli", *arguments],
        cwd=cwd, env={**os.environ, "ALIGNMENT_STORE": str(cwd / "store")}, capture_output=True, text=True,
        timeout=120, check=False,
    )  # fmt: skip


def refused(*arguments: str, line: str, cwd: Path) -> str:
    """What it says. No disk has so much room: what is not refused ends before anything is made, with another code."""
    done = alignment(*arguments, "min_free_gb=1e9", cwd=cwd)
    assert done.returncode == 2, done.stdout + done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert line in done.stderr
    assert not (cwd / MARK).exists()
    return done.stderr


@pytest.mark.parametrize("how", [[], ["-m", "seed=0,1"]], ids=["run", "sweep"])
@pytest.mark.parametrize("door", DOORS)
def test_a_shared_experiment_runs_no_code(door: str, how: list[str], tmp_path: Path) -> None:
    text, key = DOORS[door]
    for group in ("sweeper", "launcher"):  # one that Hydra's typed default does not stand in the way of
        (tmp_path / "mine" / "hydra" / group).mkdir(parents=True)
        (tmp_path / "mine" / "hydra" / group / "evil.yaml").write_text(f"_target_: os.mkdir\npath: {MARK}\n")
    basic = "_target_: hydra._internal.core_plugins.basic_sweeper.BasicSweeper\nmax_batch_size: null\n"
    (tmp_path / "mine" / "hydra" / "sweeper" / "hollow.yaml").write_text(f"{basic}params: {CALL}\n")
    (tmp_path / "mine" / "experiment").mkdir()
    (tmp_path / "mine" / "experiment" / "evil.yaml").write_text(f"# @package _global_\n{text}\n")
    said = refused("run", "--config-dir", "mine", *how, "experiment=evil", line=f"`{key}` ", cwd=tmp_path)
    assert f"error: {tmp_path / 'mine'}" in said


@pytest.mark.parametrize("asked", ["run --help", "run -m seed=0,1", "plan", "run --cfg job"])
def test_a_callback_on_the_command_line_is_refused_whatever_is_asked(asked: str, tmp_path: Path) -> None:
    call = ["+hydra.callbacks.x._target_=os.mkdir", f"+hydra.callbacks.x.path={MARK}"]
    refused(*asked.split(), *call, line="command line: `hydra.callbacks.x._target_`", cwd=tmp_path)


def test_one_job_of_a_sweep_cannot_run_code_either(tmp_path: Path) -> None:
    (tmp_path / "mine" / "experiment").mkdir(parents=True)
    text = DOORS["job logging"][0]
    (tmp_path / "mine" / "experiment" / "evil.yaml").write_text(f"# @package _global_\n{text}\n")
    line = "evil.yaml:2: `hydra.job_logging.root.handlers`"
    refused("run", "-m", "--config-dir", "mine", "experiment=quickstart,evil", line=line, cwd=tmp_path)


def test_code_reached_through_hydras_own_modules_is_refused(tmp_path: Path) -> None:
    call = ["hydra.launcher._target_=hydra._internal.utils.os.mkdir", f"+hydra.launcher.path={MARK}"]
    refused("run", "-m", "seed=0,1", *call, line="names hydra._internal.utils.os.mkdir", cwd=tmp_path)


PLUGIN = """
from dataclasses import dataclass, field
from hydra.core.config_store import ConfigStore
from hydra.plugins.sweeper import Sweeper

class Sampler:
    pass

@dataclass
class SamplerConf:
    _target_: str = "sampling.Sampler"

@dataclass
class Conf:
    defaults: list = field(default_factory=lambda: [{"sampler": "one"}])
    _target_: str = "hydra_plugins.quick.plugin.Quick"
    sampler: dict = field(default_factory=dict)

class Quick(Sweeper):
    def __init__(self, sampler):
        self.sampler = sampler

    def setup(self, *, hydra_context, task_function, config):
        pass

    def sweep(self, arguments):
        print("swept by", type(self.sampler).__name__, *arguments)

ConfigStore.instance().store(group="hydra/sweeper", name="quick", node=Conf, provider="quick")
ConfigStore.instance().store(group="hydra/sweeper/sampler", name="one", node=SamplerConf, provider="quick")
"""


def test_a_sweeper_of_an_installed_plugin_works_with_what_it_registers(tmp_path: Path) -> None:
    """As Optuna's does: its sampler lies in another package."""
    (tmp_path / "hydra_plugins" / "quick").mkdir(parents=True)
    (tmp_path / "hydra_plugins" / "quick" / "__init__.py").touch()
    (tmp_path / "hydra_plugins" / "quick" / "plugin.py").write_text(PLUGIN)
    (tmp_path / "sampling.py").write_text("class Sampler:\n    pass\n")
    done = alignment("run", "-m", "hydra/sweeper=quick", "seed=0,1", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, "swept by Sampler seed=0,1\n"), done.stderr
    call = "hydra.sweeper.sampler._target_=os.getcwd"
    refused("run", "-m", "hydra/sweeper=quick", "seed=0,1", call, line="names os.getcwd", cwd=tmp_path)


def test_optunas_sweeper_calls_no_function_that_a_config_names(tmp_path: Path) -> None:
    (tmp_path / "mine" / "sweep").mkdir(parents=True)
    text = "defaults: [override /hydra/sweeper: optuna]\nhydra: {sweeper: {custom_search_space: os.mkdir}}"
    (tmp_path / "mine" / "sweep" / "evil.yaml").write_text(f"# @package _global_\n{text}\n")
    line = "evil.yaml:3: `hydra.sweeper.custom_search_space` names code"
    refused("run", "-m", "--config-dir", "mine", "sweep=evil", line=line, cwd=tmp_path)


def test_hydras_own_logging_can_be_chosen(tmp_path: Path) -> None:
    line = "`seed` should be greater than or equal to 0"
    refused("run", "hydra/job_logging=stdout", "seed=-1", line=line, cwd=tmp_path)
