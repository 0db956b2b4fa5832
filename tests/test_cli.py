"""The command line: quick, without torch, help and errors for people."""

from __future__ import annotations

import hashlib
import json
import os
import pty
import re
import resource
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from alignment import cli, hydra_app
from alignment.config.compose import compose
from alignment.config.schema import Experiment
from tests.conftest import Command

HEAVY = ("torch", "transformers", "trl", "deepspeed", "accelerate", "peft", "datasets", "wandb", "numpy")


def alignment(*arguments: str, cwd: Path, code: int = 0) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "ALIGNMENT_CACHE": str(cwd / "cache"), "ALIGNMENT_STORE": str(cwd / "store")}
    done = subprocess.run(
        [sys.executable, "-m", "alignment", *arguments],
        cwd=cwd, env=environment, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == code, done.stdout + done.stderr
    return done


Here = Callable[..., tuple[int, str]]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Here:
    """`alignment <arguments>` in this process: its exit code, and what it says to stderr."""

    def run(*arguments: str) -> tuple[int, str]:
        monkeypatch.chdir(tmp_path)
        for name in ("cache", "store"):
            monkeypatch.setenv(f"ALIGNMENT_{name.upper()}", str(tmp_path / name))
        try:
            code = cli.main(list(arguments))
        except SystemExit as end:
            code = int(end.code or 0)
        return code, capsys.readouterr().err

    return run


def spent() -> float:
    """CPU seconds of all processes that this one has waited for."""
    of = resource.getrusage(resource.RUSAGE_CHILDREN)
    return of.ru_utime + of.ru_stime


def seconds(arguments: list[str], cwd: Path, code: int = 0) -> float:
    """Of CPU time, as promises are about the program, not about a busy machine. Nothing heavy is imported."""
    program = (
        "import sys, runpy\n"
        f"sys.argv = ['alignment', *{arguments!r}]\n"
        "try:\n    runpy.run_module('alignment.cli', run_name='__main__')\n"
        f"except SystemExit as end:\n    assert (end.code or 0) == {code}, end.code\n"
        f"assert not set({HEAVY!r}) & set(sys.modules), set({HEAVY!r}) & set(sys.modules)\n"
    )
    environment = {**os.environ, "ALIGNMENT_CACHE": str(cwd / "cache"), "ALIGNMENT_STORE": str(cwd / "store")}
    start = spent()
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return spent() - start


def answers(arguments: list[str], cwd: Path, within: float) -> bool:
    """At one of five tries: a machine that is shared is slow for seconds at a time."""
    for number in range(5):
        time.sleep(2 if number else 0)
        if seconds(arguments, cwd) < within:
            return True
    return False


def test_help_and_errors_of_settings_import_nothing_heavy(tmp_path: Path) -> None:
    for command in (["--help"], ["run", "--help"], ["chat", "--help"], ["compare", "--help"], ["compare"]):
        seconds(command, tmp_path)
    for command in ("plan", "run"):
        seconds([command, "experiment=quickstart", "stage.compare.candidate=dop"], tmp_path, code=2)


def test_plan_answers_in_a_second_and_a_half(tmp_path: Path) -> None:
    assert answers(["plan", "experiment=quickstart"], tmp_path, within=1.5)


@pytest.mark.parametrize("runs", [0, 30])
def test_status_answers_in_a_second_and_a_half_however_many_runs_there_are(runs: int, tmp_path: Path) -> None:
    experiment = compose(["experiment=quickstart"])
    for number in range(runs):
        last = ["done", "reused", "failed", "running"][number % 4]
        write_run(tmp_path / "store", f"run-{number:08x}", experiment, last)
    assert answers(["status"], tmp_path, within=1.5)
    assert len(status(tmp_path)) == runs
    assert len({run["state"] for run in status(tmp_path)}) == min(runs, 3)  # done, failed, and interrupted


def test_status_says_that_there_is_no_store_yet(tmp_path: Path) -> None:
    assert alignment("status", cwd=tmp_path).stdout.startswith(f"no runs: there is no folder {tmp_path / 'store'} (the")
    (tmp_path / "store").mkdir()
    assert alignment("status", cwd=tmp_path).stdout.startswith("no runs in ")


def write_run(store: Path, name: str, experiment: Experiment, last: str) -> None:
    """A run as it lies in the store, all done but the last node, which is in the state `last`."""
    nodes = []
    for node in experiment.pipeline.nodes:
        key, state = hashlib.sha256(f"{name}/{node}".encode()).hexdigest(), last if node == "verdict" else "done"
        nodes.append({"name": node, "kind": "sft", "stage": node, "key": key, "state": state, "seconds": 9.0})
        folder = store / ("store" if state in ("done", "reused") else "work") / key[:16]
        folder.mkdir(parents=True)
        (folder / "progress.json").write_text(json.dumps({"step": 4, "total": 13, "elapsed_s": 28.0}))
        metrics = {f"metric_{number}": number / 3 for number in range(100)}
        (folder / "record.json").write_text(json.dumps({"key": key, "seconds": 9.0, "metrics": metrics, "files": {}}))
        (store / "locks").mkdir(exist_ok=True)
        (store / "locks" / key[:16]).write_text(json.dumps({"who": name, "host": "here", "pid": 1, "since": 0}))
        if state == "failed":
            (folder / "error.json").write_text(json.dumps({"code": 5, "what": "NaN", "where": None, "fix": None}))
        if state in ("failed", "running"):
            (folder / "record.json").unlink()
    run = {"run": name, "name": "run", "created": 1.0, "updated": 2.0, "command": "alignment run", "final": "dpo"}
    (store / "runs" / name).mkdir(parents=True)
    text = json.dumps({**run, "config": experiment.model_dump(), "nodes": nodes})
    (store / "runs" / name / "run.json").write_text(text)


def status(cwd: Path) -> list[dict[str, Any]]:
    return list(json.loads(alignment("status", "--json", cwd=cwd).stdout))


def test_plan_names_every_stage_and_leaves_nothing_behind(tmp_path: Path) -> None:
    out = alignment("plan", "experiment=quickstart", cwd=tmp_path).stdout
    for name in ("start", "rows", "sft", "samples", "judged", "pairs", "dpo", "evaluate_dpo", "verdict"):
        assert name in out
    assert not (tmp_path / "store").exists()


def test_plan_says_from_which_step_a_stage_goes_on(tmp_path: Path) -> None:
    def plan() -> dict[str, Any]:
        nodes = json.loads(alignment("plan", "seed=1", "--json", "pipeline=sft", cwd=tmp_path).stdout)["nodes"]
        return {node["name"]: node for node in nodes}

    before = plan()["sft"]
    saved = tmp_path / "store" / "work" / before["key"][:16] / "checkpoints" / "step-00000007"
    saved.mkdir(parents=True)
    (saved / "manifest.json").write_text(json.dumps({"step": 7, "files": {}}))
    assert [before["why"], plan()["sft"]["why"]] == ["start, rows will be new", "goes on from step 7"]


def test_a_sweep_is_planned_as_the_one_graph_that_run_would_make_of_it(tmp_path: Path) -> None:
    sweep = ("experiment=quickstart", "stage.dpo.beta=0.1,0.5", "seed=0,1")
    out = alignment("plan", "-m", *sweep, cwd=tmp_path).stdout
    assert "  4 runs, 31 stages: 31 new\n" in out
    counts = {line.split()[0]: line.split()[1:] for line in out.splitlines() if len(line.split()) == 3}
    assert (counts["start"], counts["sft"], counts["dpo"]) == (["import_model", "1"], ["sft", "2"], ["dpo", "4"])
    assert list(tmp_path.iterdir()) == []

    alike = alignment("plan", "-m", *sweep, "tracking=none,wandb_offline", cwd=tmp_path)
    assert "8 points are 4 runs: some differ in nothing that changes a result" in alike.stderr
    assert re.search(r"4 runs, \d+ stages", alike.stdout)
    apart = alignment("plan", "-m", *sweep[:2], "store=a,b", cwd=tmp_path)
    assert "are" not in apart.stderr and "4 runs" in apart.stdout, "each store has its own"
    plan = json.loads(alignment("plan", *sweep, "-m", "--json", cwd=tmp_path).stdout)
    alignment("run", "-m", *sweep, "min_free_gb=1e9", cwd=tmp_path, code=4)
    told = json.loads(alignment("plan", "-m", *sweep, "min_free_gb=1e9", "--json", cwd=tmp_path).stdout)
    (file,) = (tmp_path / "store").glob("sweeps/*/sweep.json")
    assert told["sweep"] == file.parent.name
    assert plan["runs"] == [point["run"] for point in json.loads(file.read_text())["points"]]

    (node, *_) = json.loads(alignment("plan", sweep[0], "--json", cwd=tmp_path).stdout)["nodes"]
    record = tmp_path / "store" / "store" / node["key"][:16] / "record.json"
    record.parent.mkdir(parents=True)
    record.write_text(json.dumps({"key": node["key"], "files": {}}))
    again = json.loads(alignment("plan", "-m", *sweep, "--json", cwd=tmp_path).stdout)["stages"]
    assert [(row["new"], row["reused"]) for row in again if row["name"] in ("start", "dpo")] == [(0, 1), (4, 0)]


def test_a_setting_that_nothing_of_a_sweep_reads_is_told(tmp_path: Path) -> None:
    """simpo_gamma is read by one of its points, length_penalty by none."""
    sweep = ["experiment=quickstart", "stage.dpo.loss=sigmoid,simpo", "stage.dpo.simpo_gamma=1.0"]
    for settings in (["-m", *sweep], ["experiment=quickstart"]):
        out = alignment("plan", *settings, "stage.judge.length_penalty=1.0", cwd=tmp_path).stdout
        told = [line for line in out.splitlines() if line.startswith("warning")]
        assert told == [
            "warning: `stage.judge.length_penalty` changes nothing: as the other settings stand, nothing reads it"
        ]


def test_a_sweep_s_scripts_are_arrays(tmp_path: Path) -> None:
    sweep = ("experiment=quickstart", "launcher=slurm", "launcher.processes=1", "stage.dpo.beta=0.1,0.5")
    out = alignment("plan", "-m", *sweep, "--show-scripts", cwd=tmp_path).stdout
    name = out.split()[0]
    assert re.search(rf"^#SBATCH --job-name={name}\.dpo\n#SBATCH --array=0-1$", out, re.M)
    assert "--dependency=aftercorr:<" in out


def test_a_sweep_of_jobs_that_is_refused_is_none(tmp_path: Path) -> None:
    """SLURM takes no script from such a folder: it is the one refusal that no cluster is asked for."""
    here = tmp_path / "it's"
    here.mkdir()
    sweep = ("experiment=quickstart", "seed=0,1", "launcher=slurm", "launcher.processes=1")
    done = alignment("run", "-m", *sweep, cwd=here, code=2)
    assert "which SLURM does not take" in done.stderr
    assert json.loads(alignment("compare", "--json", cwd=here).stdout) == []
    assert not (here / "store" / "sweeps").exists()


@pytest.mark.parametrize(
    ("arguments", "code", "line"),
    [
        (["run", "seed=1", "--config-dir", ".", "pipeline=sft"], 2, "flags before or after all of them"),
        (["run", "stage.dpo.betta=1"], 2, "did you mean `stage.dpo.beta`?"),
        (["plan", "engine=zero4"], 2, "did you mean engine=zero3?"),
        (["rum"], 2, "unknown command 'rum' (did you mean 'run'?)"),
        (["run", "model=path", "model.source.path=/nowhere/model"], 3, "/nowhere/model: no such file or folder"),
        (["run", "model.chat_template=chatmll"], 2, "no chat template 'chatmll'"),
        (["run", "launcher.processes=2"], 2, "`launcher.processes` is not among the settings chosen (it comes with la"),
        (["run", "pipeline=sft", "stage.dpo.beta=1"], 2, "(it comes with pipeline=dpo, pipeline=iterative_dpo, pip"),
        (["run", "store=/dev/null/x"], 4, "/dev/null/x"),
        (["run", "data=path", "data.instructions.source.path=."], 3, "is a folder (give one file"),
        (["run", "experiment=quickstart", "seed=-1"], 2, "command line: `seed` should be greater than or equal to 0"),
        (["run", "stage.dpo.beta=strong"], 2, "command line: `stage.dpo.beta` should be a valid number, got 'strong'"),
        (["run", "launcher.kind=slrm"], 2, "`launcher.kind` should be one of 'local', 'torchrun', 'slurm', got 'slrm'"),
        (["run", "-m", "seed=0,-1"], 2, "command line: the point seed=-1: `seed` should be greater than or equal to 0"),
        (["run", "-m", "model=path", "model.source.path=/a,/b"], 3, "/a: no such file or folder"),
        (["run", "-m", "name=run-${hydra:job.num}", "seed=-2,-1"], 2, "command line: `seed` should be greater than"),
        (["run", "-m", "seed=range(0)"], 2, "the sweep has no points: `seed=range(0)` has no value"),
        (["plan", "-m", "seed=glob(x*)"], 2, "the sweep has no points: `seed=glob(x*)` has no value"),
        (["run", "-m", "seed=range(0,1,0)"], 2, "command line: `seed` has a range in steps of 0"),
        (["run", "-m", "seed=interval(1,9)"], 2, "`seed` is given an interval, which has no values to go through"),
        (["run", "-m", "hydra.sweeper.n_jobs=3"], 2, "the sweeper has no `hydra.sweeper.n_jobs` (hydra/sweeper=optuna"),
        (["run", "--run", "-m"], 2, "Only one of --run, --multirun"),
        (["run", "--foo"], 2, "command line: unrecognized arguments: --foo"),
        (["run", "--experimental-rerun=x.pickle"], 2, "it loads a pickle"),
        (["run", "--ex", "x.pickle"], 2, "it loads a pickle"),
        (["run", "--config-name=mine"], 2, "the first config is conf/config.yaml"),
        (["run", "-cp", "."], 2, "the first config is conf/config.yaml"),
        (["plan", "-m", "seed=0,-1"], 2, "command line: the point seed=-1: `seed` should be greater than or equal"),
        (["plan", "-m", "sweep=optuna_dpo"], 2, "there is no sweep to plan"),
        (["plan", "-m", "launcher=slurm", "launcher.processes=1", "store=a,b"], 2, "share one launcher and one store"),
        (["plan", "-m", "seed=0,1", "--show-scripts"], 2, "there are no scripts to show"),
        (["plan", "-m", "--config-dir", "a", "--config-dir", "b"], 2, "a sweep takes one --config-dir"),
        (["chat", "nothing"], 2, "no run is called 'nothing'"),
        (["status", "store=mine"], 2, "no name of one (--store mine, or ALIGNMENT_STORE=mine)"),
        (["run", "reward=[length,null]"], 2, "`reward=[length,null]` chooses no file"),
        (["run", "-m", "reward=length,null"], 2, "`reward=length,null` chooses no file"),
        (["status", "nothing"], 2, "no run is called 'nothing'"),
        (["status", "--store", "/nowhere"], 2, "--store /nowhere: there is no such folder"),
        (["compare", "--store", "/nowhere"], 2, "--store /nowhere: there is no such folder"),
        (["logs", "nothing", "--lines", "-3"], 2, "command line: --lines is -3 (0 or more; 0 = all)"),
        (["status", "--store", "/dev/null"], 2, "/dev/null: the store is no folder"),
    ],
)
def test_an_error_is_one_line_with_its_exit_code_and_no_traceback(
    arguments: list[str], code: int, line: str, tmp_path: Path, here: Here
) -> None:
    """No disk has so much room: a run that nothing refuses ends before anything is made, in other words than these."""
    guard = ["min_free_gb=1e9"] if arguments[0] == "run" and "store=/dev/null/x" not in arguments else []
    found, said = here(*arguments, *guard)
    assert found == code and line in said, said
    assert len(said.strip().splitlines()) == 1
    assert not list((tmp_path / "store").glob("[!m]*")), "a sweep's folder is Hydra's"


def test_a_disk_without_room_is_said_before_anything_is_stored(tmp_path: Path) -> None:
    done = alignment("run", "experiment=quickstart", "min_free_gb=1e9", cwd=tmp_path, code=4)
    assert "GB of disk are free" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not list((tmp_path / "store").glob("store/*"))


@pytest.mark.parametrize("value", ["é", "a(b)", "a b,c", "a'b", "a#b=c", 'a"$b', "a\\é", "é\\", "~/m"])
def test_a_value_that_hydra_cannot_read_is_answered_with_one_that_a_shell_can_be_given(
    value: str, tmp_path: Path, here: Here
) -> None:
    path = value if value.startswith("~") else f"/nowhere/{value}"
    code, refused = here("plan", "model=path", f"model.source.path={path}")
    assert code == 2 and len(refused.splitlines()) == 1
    assert refused.startswith("alignment: error: command line: `model.source.path` ")
    answer = re.search(r"\((?:write|one value with commas:) (.*?)(?:; a sweep: .*)?\)$", refused.strip())
    assert answer
    typed = f"{shlex.quote(sys.executable)} -m alignment.cli plan model=path {answer[1]}"
    again = subprocess.run(typed, shell=True, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert again.stderr == f"alignment: error: {os.path.expanduser(path)}: no such file or folder\n"


@pytest.mark.parametrize("folder", [["--config-dir", "mine"], ["-cd", "mine"], ["hydra.searchpath=[file://mine]"]])
@pytest.mark.parametrize("vary", [["seed=3"], ["-m", "seed=3,4"]])
def test_the_command_that_is_kept_makes_the_same_again(
    folder: list[str], vary: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also that of a sweep's point, which is made alone then."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine" / "experiment").mkdir(parents=True)
    text = "# @package _global_\ndefaults: [/experiment/quickstart]\nname: own\n"
    (tmp_path / "mine" / "experiment" / "own.yaml").write_text(text)

    def points(arguments: list[str]) -> list[hydra_app.Point]:
        found: list[Any] = []
        hydra_app.main(arguments, lambda points, master: found.extend(points) or [0.0 for _ in points])
        return found

    made = points([*vary[:-1], *folder, "experiment=own", "min_free_gb=1", vary[-1]])
    assert len(made) == (2 if "-m" in vary else 1)
    for point in made:
        assert point.experiment.name == "own"
        (again,) = points(shlex.split(point.command)[2:])
        assert again.experiment == point.experiment
    if "-m" not in vary:
        assert made[0].command == shlex.join(["alignment", "run", *folder, "experiment=own", "min_free_gb=1", *vary])


def importing(cwd: Path) -> list[str]:
    """Settings of a pipeline of one stage, which takes a second."""
    (cwd / "mine" / "pipeline").mkdir(parents=True)
    (cwd / "mine" / "pipeline" / "import.yaml").write_text(
        "# @package _global_\ndefaults:\n  - /stage@stage.import_model: import_model\n  - _self_\n"
        "pipeline: {nodes: {start: {stage: import_model, inputs: {}}}, final: start}\n"
    )
    return ["--config-dir", "mine", "pipeline=import", "tracking=none", "min_free_gb=0", "model=path"]


@pytest.mark.slow
def test_a_damaged_result_is_said_by_plan_status_and_run_and_kept_beside_the_new_one(
    tmp_path: Path, tiny_model: Path, forked: Command
) -> None:
    settings = [*importing(tmp_path), f"model.source.path={tiny_model}"]
    forked(tmp_path / "store", "run", *settings)
    (file,) = (tmp_path / "store").glob("store/*/model/config.json")
    size = file.stat().st_size
    file.write_text("{}")
    folder = file.parents[1]
    wrong = f"damaged: model/config.json has 2 bytes instead of {size} (in {folder})"
    (node,) = json.loads(alignment("plan", *settings, "--json", cwd=tmp_path).stdout)["nodes"]
    assert (node["action"], node["why"]) == ("run", wrong)
    (node,) = status(tmp_path)[0]["nodes"]
    assert (node["state"], node["error"]) == ("gone", wrong)
    said = forked(tmp_path / "store", "run", *settings).stdout
    assert f"its result is {wrong}; it is made again, and what is there stays as {folder.name}.damaged-*" in said
    assert status(tmp_path)[0]["state"] == "done"
    (kept,) = folder.parent.glob(f"{folder.name}.damaged-*/model/config.json")
    assert kept.read_text() == "{}"


@pytest.mark.slow
def test_a_point_that_fails_in_a_sweep_does_not_stop_the_others(
    tmp_path: Path, tiny_model: Path, forked: Command
) -> None:
    """The fourth point needs what has failed for the second: it is not tried again."""
    weightless = shutil.copytree(tiny_model, tmp_path / "weightless")
    (weightless / "model.safetensors").unlink()
    sweep = ("name=a,b", f"model.source.path={tiny_model},{weightless}")
    done = forked(tmp_path / "store", "run", "-m", *importing(tmp_path), *sweep, code=3)
    assert len(done.stderr.strip().splitlines()) == 1
    assert "2 of 4 points failed; the first: " in done.stderr and "weights" in done.stderr
    (name,) = (folder.name for folder in (tmp_path / "store" / "sweeps").iterdir())
    assert re.match(rf"sweep {name}: \S+ status {name}$", done.stdout, re.MULTILINE), "while it works"
    assert re.search(rf"^sweep {name}: 4 points, 2 failed: \S+ compare {name}$", done.stdout, re.MULTILINE)
    runs = status(tmp_path)
    assert {run["command"].partition(" model=path")[0] for run in runs} == {
        "alignment run --config-dir mine pipeline=import tracking=none min_free_gb=0"
    }
    assert sorted(node["state"] for run in runs for node in run["nodes"]) == ["done", "failed", "failed", "reused"]
    assert sum(node.get("attempts", 0) for run in runs for node in run["nodes"]) == 2, "one that works, one that fails"


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    assert "Traceback" in alignment("plan", "--debug", "stage.dpo.betta=1", cwd=tmp_path, code=2).stderr


def test_hydras_own_flags_keep_working(tmp_path: Path) -> None:
    shown = alignment("run", "experiment=quickstart", "stage.dpo.beta=0.25", "--cfg", "job", cwd=tmp_path).stdout
    assert "beta: 0.25" in shown
    shown = alignment("run", "--help", cwd=tmp_path).stdout
    assert "quickstart" in shown and "--wait, for launcher=slurm" in shown
    assert "conf" in alignment("run", "--info", "searchpath", cwd=tmp_path).stdout


def test_a_terminal_that_is_gone_is_spoken_to_without_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before SIGHUP is heard something may be said already."""
    ours, theirs = pty.openpty()
    with os.fdopen(theirs, "w", buffering=1) as plain:
        monkeypatch.setattr(sys, "stdout", plain)
        cli._outlive_reader("stdout")
        print("heard")
        assert os.read(ours, 100).strip() == b"heard"
        os.close(ours)
        print("not heard", flush=True)
        with pytest.raises(OSError, match="Input/output"):
            os.write(theirs, b"what it would be without")


@pytest.mark.parametrize("where", ["a full disk", "a pipe that nobody reads"])
def test_a_run_that_nobody_hears_is_a_run(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    reading, writing = os.pipe() if where != "a full disk" else (None, os.open("/dev/full", os.O_WRONLY))
    if reading is not None:
        os.close(reading)
    with os.fdopen(writing, "w", closefd=False) as plain:
        monkeypatch.setattr(sys, "stdout", plain)
        cli._outlive_reader("stdout")
        print("not heard", flush=True)
        with pytest.raises(OSError, match=r"No space|Broken pipe"):
            os.write(writing, b"what it would be without")
    os.close(writing)
