"""The scripts that would be submitted. SLURM is not asked; tests/slurm submits them to a real one."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import alignment
from alignment.config.compose import compose
from alignment.config.launchers import Container
from alignment.launchers import srun
from alignment.launchers.base import Job
from alignment.pipeline import identity, snapshot, submission
from alignment.pipeline.runner import Run
from alignment.pipeline.submission import Submission

LAUNCHER = ["launcher=slurm", "engine=zero2", "stage.sft.global_batch_size=64", "stage.dpo.global_batch_size=64"]


@pytest.fixture
def composed(tmp_path: Path, tiny_settings: list[str]) -> Any:
    def of(*settings: str) -> Run:
        given = [*tiny_settings, "pipeline=sft_dpo", *LAUNCHER, f"store={tmp_path / 'a store'}", *settings]
        return Run(compose(given), "")

    return of


def scripts(*runs: Run, queued: dict[str, str] | None = None) -> dict[str, dict[str, str | None]]:
    """Stage -> option -> value, of each script."""
    made = Submission(runs, "mine", queued or {})
    found = {}
    for batch, text in zip(made.batches, made.scripts(), strict=True):
        options = dict(re.findall(r"^#SBATCH --([a-z-]+)(?:=(.*))?$", text, re.M))
        found[next(iter(batch.elements.values())).name] = {**options, "text": text}
    return found


def test_a_stage_that_trains_asks_for_what_the_launcher_says(composed: Any, tmp_path: Path) -> None:
    wanted = (
        "launcher.nodes=4", "launcher.cpus_per_process=6", "launcher.memory=900G", "launcher.partition=train",
        "launcher.account=lab", "launcher.qos=high", "launcher.constraint='a100&ib'", "launcher.exclude='n[1-2]'",
        "launcher.comment='our run'", "launcher.time_limit=1-02:00:30", "+launcher.options.reservation=camp",
        "+launcher.options.exclusive=true", "launcher.setup=['module load cuda/12.8']", "launcher.interface=ib0",
    )  # fmt: skip
    sft = scripts(composed(*wanted))["sft"]
    told = {name: value for name, value in sft.items() if name not in ("text", "output", "chdir", "dependency")}
    assert told == {
        "job-name": "mine.sft", "kill-on-invalid-dep": "yes", "nodes": "4", "ntasks-per-node": "1",
        "cpus-per-task": "48", "gpus-per-node": "8", "mem": "900G", "time": "1561", "partition": "train",
        "account": "lab", "qos": "high", "constraint": "a100&ib", "exclude": "n[1-2]", "comment": '"our run"',
        "requeue": "", "open-mode": "append", "signal": "B:USR1@120", "reservation": "camp", "exclusive": "",
    }  # fmt: skip
    assert str(sft["output"]).startswith(f'"{tmp_path}/a store/jobs/')
    text = str(sft["text"])
    assert "\nmodule load cuda/12.8\n" in text
    assert "export GLOO_SOCKET_IFNAME=ib0\n" in text and "export NCCL_SOCKET_IFNAME=ib0\n" in text
    assert re.search(rf"^exec {re.escape(sys.executable)} -m alignment.job '{tmp_path}/a store/jobs/", text, re.M)
    assert sft["dependency"] == "afterok:<001-rows>"


def test_what_trains_online_asks_as_what_trains_and_a_merge_for_one_process(
    tmp_path: Path, tiny_settings: list[str]
) -> None:
    """Jobs wait for their parents' jobs: RLOO for the reward model that judges its answers, a merge for both models."""
    merge = ["+stage@stage.merge=merge", "+pipeline.nodes.merged={stage: merge, inputs: {model: sft, other: rloo}}"]
    merge += ["pipeline.final=merged", "+launcher.stages.rloo.processes=4", "+launcher.stages.merge.gpus_per_node=0"]
    own = [one for one in tiny_settings if "relevance" not in one]
    found = scripts(Run(compose(["experiment=rlhf", *own, *LAUNCHER[:2], *merge, f"store={tmp_path / 'store'}"]), ""))
    told = {name: [one[key] for key in ("nodes", "gpus-per-node")] for name, one in found.items()}
    assert told["reward_model"] == ["1", "8"] and told["rloo"] == ["1", "4"]
    assert told["merged"] == ["1", "0"] and told["best_of_n"] == told["start"] == ["1", "1"]
    waits = {name: set(re.findall(r"<\d+-(\w+)>", str(one.get("dependency", "")))) for name, one in found.items()}
    assert waits["rloo"] == {"reward_model"}, "which waits for SFT itself"
    assert waits["merged"] == {"rloo"}
    assert {"best_of_n", "evaluate_rloo"} & waits["verdict"] and waits["best_of_n"] == {"reward_model"}


def test_what_a_profile_says_to_sbatch_is_the_default(composed: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PARTITION", "ACCOUNT", "QOS", "CONSTRAINT"):
        monkeypatch.setenv(f"SBATCH_{name}", f"my-{name.lower()}")
    told = scripts(composed("launcher.partition=train", "launcher.qos=null"))["rows"]
    assert [told.get(key) for key in ("partition", "account", "qos", "constraint")] == [
        "train", "my-account", None, "my-constraint"
    ]  # fmt: skip


def test_a_stage_that_does_not_train_takes_one_process_and_any_stage_may_ask_for_something_else(composed: Any) -> None:
    asked = (
        "launcher.nodes=2", "launcher.cpus_per_process=4", "+launcher.stages.evaluate.time_limit=600",
        "+launcher.stages.evaluate_sft.gpus_per_node=2", "+launcher.stages.sft.nodes=8",
    )  # fmt: skip
    told = scripts(composed(*asked))
    layout = {
        name: tuple(o.get(k) for k in ("nodes", "gpus-per-node", "cpus-per-task", "time")) for name, o in told.items()
    }
    assert layout["evaluate_dpo"] == ("1", "1", "4", "10")
    assert layout["evaluate_sft"] == ("1", "2", "4", "10")
    assert layout["rows"] == ("1", "1", "4", "1440")
    assert (layout["sft"], layout["dpo"]) == (("8", "8", "32", "1440"), ("2", "8", "32", "1440"))


@pytest.fixture
def node(tmp_path: Path) -> Any:
    """A job's script, run as on a node, but for python: a file that prints its environment takes its place."""

    def run(composed: Any, *settings: str, **outer: str) -> subprocess.CompletedProcess[str]:
        python = tmp_path / "python"
        python.write_text("#!/bin/sh\nexec env\n")
        python.chmod(0o755)
        script = tmp_path / "script.sbatch"
        script.write_text(str(scripts(composed(f"launcher.python={python}", *settings))["sft"]["text"]))
        kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
        return subprocess.run(
            ["bash", script], env={**kept, **outer}, cwd=tmp_path, stdin=subprocess.DEVNULL,
            capture_output=True, text=True, check=False,
        )  # fmt: skip

    return run


@pytest.mark.parametrize(
    ("interface", "nccl", "gloo"),
    [("ib0", "ib0", "ib0"), ("=ib0,ib1.8002", "=ib0,ib1.8002", "ib0,ib1.8002"), ("^docker,lo", "^docker,lo", None)],
)
def test_interfaces_are_said_to_each_library_in_its_own_form(
    interface: str, nccl: str, gloo: str | None, composed: Any, node: Any
) -> None:
    said = node(composed, f"launcher.interface='{interface}'").stdout
    found = dict(line.partition("=")[::2] for line in said.splitlines())
    assert (found["NCCL_SOCKET_IFNAME"], found.get("GLOO_SOCKET_IFNAME")) == (nccl, gloo)


def test_a_value_is_no_code_of_the_jobs_shell(composed: Any, node: Any, tmp_path: Path) -> None:
    """The template quotes what it is given, also where a setting's type would let it through."""
    launcher = composed().experiment.launcher
    odd = launcher.model_copy(update={"interface": "ib0; touch ran $(touch ran)"})
    text = submission.script("odd", {}, odd, tmp_path / "a code $(touch ran)", "alignment.job", tmp_path / "told")
    script = tmp_path / "script.sbatch"
    script.write_text(text.replace(f"exec {sys.executable}", "exec env #"))
    said = subprocess.run(["bash", script], cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    assert "NCCL_SOCKET_IFNAME=ib0; touch ran $(touch ran)\n" in said
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("setup", "outer", "found"),
    [
        ([], {}, ""),
        ([], {"PYTHONPATH": "/outer"}, ":/outer"),
        (["export PYTHONPATH=/mine:$PYTHONPATH # first"], {"PYTHONPATH": "/outer"}, ":/mine:/outer"),
        (["unset PYTHONPATH"], {"PYTHONPATH": "/outer"}, ""),
        (["source strict"], {"PYTHONPATH": "/outer"}, ":/outer"),
    ],
)
def test_the_code_comes_first_and_what_the_set_up_says_of_python_stays(
    setup: list[str], outer: dict[str, str], found: str, composed: Any, node: Any, tmp_path: Path
) -> None:
    (tmp_path / "strict").write_text("set -eu\n")
    done = node(composed, f"launcher.setup={setup}", PATH=f"{tmp_path}:{os.environ['PATH']}", **outer)
    assert f"PYTHONPATH={tmp_path}/a store/code/CODE{found}\n" in done.stdout, done.stderr


@pytest.mark.parametrize("line", ["source missing", "module load cuda/12.8", "source false", "source exits", "ml #it"])
def test_a_line_of_the_set_up_that_fails_ends_the_job(line: str, composed: Any, node: Any, tmp_path: Path) -> None:
    (tmp_path / "false").write_text("set -e\nfalse\ntrue\n")
    (tmp_path / "exits").write_text("exit 0\n")
    module = {"BASH_FUNC_module%%": "() {  return 1\n}", "BASH_FUNC_ml%%": "() {  return 1\n}"}
    setup = f"launcher.setup=['export A=1','{line}','export B=2']"
    done = node(composed, setup, PATH=f"{tmp_path}:{os.environ['PATH']}", **module)
    assert (done.returncode, done.stdout) == (4, "")
    said = [text for text in done.stderr.splitlines() if "alignment" in text]
    code = 0 if line == "source exits" else 1
    (told,) = said
    assert told.startswith(f"alignment: error: launcher.setup: `{line}` has ended with code {code} (mend the line; ")


def test_alike_stages_are_an_array_of_which_few_run_at_a_time(composed: Any) -> None:
    runs = [composed(f"stage.dpo.beta={beta}", "launcher.max_parallel=2") for beta in (0.1, 0.2, 0.3)]
    told = scripts(*runs)
    assert (told["dpo"]["array"], told["evaluate_dpo"]["array"], told["sft"].get("array")) == ("0-2%2", "0-2%2", None)
    assert told["evaluate_dpo"]["dependency"] == "aftercorr:<008-dpo>"
    assert '"${SLURM_ARRAY_TASK_ID:-0}"' in str(told["dpo"]["text"])


def test_stages_that_ask_for_something_else_by_their_name_share_no_array(composed: Any) -> None:
    queued = dict.fromkeys(("start", "rows", "sft", "pairs", "reference", "dpo", "evaluate_start"), "9")
    run = composed("+launcher.stages.evaluate_dpo.memory=900G")
    told = scripts(run, queued={run.node(name).key: job for name, job in queued.items()})
    assert told["evaluate_dpo"]["mem"] == "900G"
    assert told["evaluate_sft"].get("mem") is None
    alike = composed()
    told = scripts(alike, queued={alike.node(name).key: job for name, job in queued.items()})
    assert "evaluate_dpo" not in told and told["evaluate_sft"]["array"].startswith("0-1")


def test_what_is_queued_is_waited_for(composed: Any) -> None:
    run = composed()
    told = scripts(run, queued={run.node("sft").key: "41_7"})
    assert "sft" not in told
    assert told["pairs"]["dependency"] == "afterok:41_7"


def test_the_code_is_copied_once_and_a_later_edit_does_not_reach_it(tmp_path: Path) -> None:
    """Taken from a checkout of its own, by who runs there. An edit is made in the file itself: a link would show it."""
    checkout = tmp_path / "checkout"
    shutil.copytree(snapshot.package_root(), checkout / "alignment", ignore=shutil.ignore_patterns("__pycache__"))
    program = (
        "import pathlib, sys; from alignment.pipeline import snapshot; print(snapshot.take(pathlib.Path(sys.argv[1])))"
    )

    def take() -> Path:
        command, environment = [sys.executable, "-c", program, str(tmp_path / "store")], {"PYTHONPATH": str(checkout)}
        said = subprocess.run(
            command, env={**os.environ, **environment}, cwd=tmp_path, capture_output=True, text=True, check=True
        ).stdout
        return Path(said.strip()) / "alignment" / "job.py"

    copied = take()
    was = copied.read_text(), copied.stat().st_ino
    assert take() == copied
    assert (copied.read_text(), copied.stat().st_ino) == was, "not copied again"
    with open(checkout / "alignment" / "job.py", "a") as stream:
        stream.write("# edited\n")
    edited = take()
    assert edited != copied and edited.read_text() == f"{was[0]}# edited\n"
    assert (copied.read_text(), copied.stat().st_ino) == was


def test_a_copy_of_the_code_has_all_that_a_job_needs(tmp_path: Path) -> None:
    place = snapshot.take(tmp_path)
    assert (place / "alignment" / "launchers" / "job.sbatch.jinja").is_file()
    assert (place / "alignment" / "conf" / "config.yaml").is_file()
    assert not list(place.glob("**/*.pyc"))
    kinds = {path.suffix for path in Path(snapshot.package_root()).rglob("*") if path.is_file()} - {".pyc"}
    assert kinds <= set(identity.SOURCES), "a report needs its style sheet"


def test_a_copy_of_the_code_that_has_lost_files_is_replaced(tmp_path: Path) -> None:
    place = snapshot.take(tmp_path)
    lost = place / "alignment" / "job.py"
    lost.unlink()
    assert snapshot.take(tmp_path) == place
    assert lost.is_file()


@pytest.mark.parametrize("kind", ["apptainer", "enroot"])
def test_a_container_sees_the_store_the_code_and_the_working_directory(
    kind: str, tmp_path: Path, composed: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command only: neither can be installed where this runs."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", "/of/the/host")
    told: list[list[str]] = []
    monkeypatch.setattr(srun, "Step", lambda command, job: told.append(command))
    launcher = composed().experiment.launcher
    container = Container(kind=kind, image="/images/train.sif", options=["--nv"])
    job = Job("sft", tmp_path / "store" / "work" / "key", 1, 1, 1, None, 0)
    srun.SrunLauncher(launcher.model_copy(update={"container": container})).submit(job)
    (command,) = told
    line = " ".join(command)
    assert line.endswith(f" python3 -m alignment.launchers.agent {job.folder} --nodes 1 --processes 1")
    store, here, code = tmp_path / "store", tmp_path, Path(alignment.__file__).parent.parent
    if kind == "apptainer":
        binds = f"--bind {store} --bind {here} --bind {code}"
        assert f"apptainer exec {binds} --pwd {here} --nv /images/train.sif sh -c" in line
    else:
        mounts = f"{store}:{store},{here}:{here},{code}:{code}"
        assert (
            f"--container-image=/images/train.sif --container-mounts={mounts} --container-workdir={here} --nv" in line
        )


@pytest.mark.parametrize(("image", "found"), [(None, ""), ("/of/the/image", ":/of/the/image")])
@pytest.mark.parametrize("kind", ["apptainer", "enroot"])
def test_in_a_container_the_code_comes_first_and_what_the_image_says_of_python_stays(
    kind: str, image: str | None, found: str, tmp_path: Path, composed: Any
) -> None:
    """The host's is for the host's python. An image's own may replace what it is given, as with Pyxis."""
    python, run = tmp_path / "python", tmp_path / "srun"
    python.write_text("#!/bin/sh\nexec printenv PYTHONPATH\n")
    of_image = f"export PYTHONPATH={image}" if image else ""
    run.write_text(f'#!/bin/sh\nuntil [ "$1" = sh ]; do shift; done\n{of_image}\nexec "$@"\n')
    for file in (python, run):
        file.chmod(0o755)
    container = Container(kind=kind, image="/images/train.sif", options=[])
    launcher = composed(f"launcher.python={python}").experiment.launcher
    command = srun.step(launcher.model_copy(update={"container": container}), "sft", 1, tmp_path)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHONPATH": "/of/the/host"}
    said = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.split(":")
    code = str(Path(alignment.__file__).parent.parent)
    assert ":".join(dict.fromkeys(part.strip() for part in said)) == code + found
