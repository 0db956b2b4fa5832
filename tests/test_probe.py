"""What the probe finds on a node, as far as that needs no cluster: tests/slurm/test_sanity.py has the rest."""

from __future__ import annotations

import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

import alignment
from alignment import probe
from alignment.config.compose import compose
from alignment.config.launchers import Resources
from alignment.errors import ConfigError
from alignment.files import read_json, write_json
from alignment.pipeline import probing
from alignment.pipeline.runner import Run
from alignment.pipeline.store import Lock
from alignment.pipeline.submission import Owner


@pytest.fixture
def order(tmp_path: Path) -> dict[str, Any]:
    """All of which is there."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    lock = Lock(tmp_path / "probe.lock")
    assert lock.acquire("test")
    return {
        "code": str(Path(alignment.__file__).parent.parent),
        "packages": {"numpy": metadata.version("numpy")},
        "store": str(tmp_path),
        "min_free_gb": 0.0,
        "locked": str(lock.path),
        "held": lock,
        "sources": [{"path": str(tmp_path / "model"), "files": {"config.json": [2, None]}}],
        "inside": False,
        "cwd": str(tmp_path),
        "gpus": None,
    }


def found(order: dict[str, Any], kind: str = "problems") -> str:
    looks = [*probe.LOOKS, probe._folder, probe._gpus, probe._imports("alignment.job"), probe._resolves("localhost")]
    return "\n".join(f"{one['where']}: {one['what']}" for one in probe.look(order, looks)[kind])


def test_where_all_is_there_nothing_is_found(order: dict[str, Any]) -> None:
    assert (found(order), found(order, "warnings")) == ("", "")


def test_what_is_missing_is_named(order: dict[str, Any], tmp_path: Path) -> None:
    order |= {"code": str(tmp_path), "min_free_gb": 1e9, "packages": {"numpy": "0.1", "no-such": "2"}}
    said = found(order)
    assert f"the code that runs is not what was submitted, {tmp_path}" in said
    assert f"numpy is {metadata.version('numpy')} instead of 0.1, no-such is missing instead of 2" in said
    assert "GB of disk are free, 1e+09 GB are asked for" in said
    assert "cannot be imported" not in said


def test_files_are_compared(order: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "model" / "config.json"
    order["sources"][0]["files"] = {"config.json": [2, "0" * 64]}
    assert found(order) == f"{file}: is another file there than here"
    order["sources"][0]["files"] = {"config.json": [3, None], "tokenizer.json": [1, None]}
    assert found(order) == f"{file}: is another file there than here"
    file.unlink()
    assert found(order) == f"{file}: cannot be read there: No such file or directory"


def test_locks_that_nobody_else_sees(order: dict[str, Any], tmp_path: Path) -> None:
    """As on a file system that locks for each node alone: what is held elsewhere is free here."""
    order["held"].release()
    assert "what is locked elsewhere is free here" in found(order, "warnings")
    assert found(order) == ""
    order["cwd"] = str(tmp_path / "gone")
    assert "the folder of the command is not there" in found(order, "warnings")


def test_a_name_that_means_nothing_and_a_look_that_fails(order: dict[str, Any]) -> None:
    looks = [probe._resolves("no-such-host.invalid"), probe._imports("alignment.nothing")]
    first, second = probe.look(order, looks)["problems"]
    assert first["what"].startswith("the name of the first node, no-such-host.invalid, means nothing here")
    assert second["what"] == "alignment.nothing cannot be imported: No module named 'alignment.nothing'"
    del order["packages"]
    assert "packages: KeyError: 'packages'" in found(order)


def test_its_first_word_needs_the_standard_library_alone(order: dict[str, Any], tmp_path: Path) -> None:
    """A python without any package says what it lacks."""
    del order["held"]
    order |= {"token": "t", "result": str(tmp_path / "result.json"), "packages": {"pydantic": "2"}}
    write_json(tmp_path / "order.json", order)
    command = [sys.executable, "-S", "-m", "alignment.probe", str(tmp_path / "order.json"), "0"]
    done = subprocess.run(command, cwd=order["code"], capture_output=True, text=True, check=True)
    assert "pydantic is missing instead of 2" in done.stdout
    (driver,) = read_json(tmp_path / "result.json")["found"]
    assert driver["problems"][0]["what"] == "pydantic is missing instead of 2"
    assert "alignment.job cannot be imported: No module named" in driver["problems"][1]["what"]


EXECVE = """printf 'slurmstepd: error: execve(): apptainer: No such file or directory\n' >&2
printf 'srun: error: n1: task 0: Exited with exit code 2\n' >&2; exit 2"""


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (r"printf 'refus\351\n' >&2; exit 1", "srun has ended with code 1: refus\ufffd"),
        (EXECVE, "apptainer is not installed on node n1"),
    ],
    ids=["in another encoding", "without a container's program"],
)
def test_what_a_step_says_is_told(
    text: str, said: str, order: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, script in {"scontrol": "echo n1", "srun": text}.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    launcher = compose(["experiment=quickstart", "launcher=slurm", "engine=zero2"], ()).launcher
    held = order.pop("held")
    order |= {"token": "t", "result": str(tmp_path / "result.json"), "nodes": 1, "launcher": launcher.model_dump()}
    write_json(tmp_path / "order.json", order)
    assert probe.main([str(tmp_path / "order.json"), "0"]) == 0
    step = read_json(tmp_path / "result.json")["found"][-1]
    assert [problem["what"] for problem in step["problems"]] == [said]
    held.release()


def test_it_looks_for_what_the_whole_graph_needs(
    tiny_settings: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ALIGNMENT_STORE", str(tmp_path / "store"))
    template = tmp_path / "mine.jinja"
    template.write_text("{{ messages }}")
    run = Run(compose([*tiny_settings, "pipeline=sft", f"model.chat_template={template}"], ()), "")
    owners = [Owner(run, run.node("verdict"))]
    assert {"torch", "trl", "numpy", "datasets"} <= set(probing.packages(owners))
    files = {Path(one["path"]).name: one["files"] for one in probing.sources(owners)}
    assert set(files) >= {"rows.jsonl", "mine.jinja"}
    assert any("model.safetensors" in names for names in files.values())
    size, digest = files["mine.jinja"][""]
    assert size == 14 and len(str(digest)) == 64


# Prints where SLURM would: %j is the job's number, %% a %.
SBATCH = r"""#!/bin/sh
out=$(sed -n 's/^#SBATCH --output=//p' | sed 's/%%/\n/g; s/%j/7/g; s/\n/%/g')
echo 'line 9: exec: python4: not found' > "$out"
echo 7
"""


def test_its_log_is_found_in_a_store_whose_path_has_a_per_cent_sign(
    tiny_settings: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, text in {"sbatch": SBATCH, "squeue": "echo '7|FAILED|None|n1|N/A|N/A'", "scancel": "true"}.items():
        (tmp_path / name).write_text(text if text == SBATCH else f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setenv("ALIGNMENT_STORE", str(tmp_path / "100%jobs"))
    run = Run(compose([*tiny_settings, "pipeline=sft", "launcher=slurm", "launcher.processes=1"], ()), "")
    with pytest.raises(ConfigError, match="probe on n1: python4: not found"):
        probing.probe([Owner(run, run.node("sft"))], "mine", lambda text: None)


def test_it_asks_for_little() -> None:
    plain: dict[str, Any] = dict.fromkeys(Resources.model_fields) | {"processes": 8, "time_limit": 86400}
    stages = [
        Resources(**{**plain, "nodes": 4, "gpus_per_node": 8, "memory": "0", "cpus_per_process": 8}),
        Resources(**{**plain, "nodes": 1, "gpus_per_node": 1, "memory": "2G", "time_limit": 100}),
    ]
    asks = probing._asks(stages)
    assert (asks.nodes, asks.gpus_per_node, asks.memory, asks.time_limit) == (2, 8, "2048M", 100)
    assert (asks.processes, asks.cpus_per_process) == (1, None)
    assert probing._asks(stages[:1]).memory is None


@pytest.mark.parametrize(
    ("log", "said"),
    [
        ("line 9: /no/python: No such file or directory", "ConfigError launcher.python: probe on n1: /no/python: No"),
        ("line 9: exec: python4: not found", "ConfigError launcher.python: probe on n1: python4: not found"),
        (
            "/usr/bin/python: No module named alignment",
            "MachineError {folder}: probe on n1: the code in the store is not",
        ),
        (
            "alignment: error: launcher.setup: `source x` has ended with code 1 (mend the line) [code 4]",
            "MachineError launcher.setup: probe on n1: `source x` has ended with code 1 (mend the line; log: {log})",
        ),
        ("slurmstepd: error: killed", "MachineError {log}: probe on n1: it has FAILED, and said last: slurmstepd"),
        (None, "MachineError {folder}: probe on n1: no log of it, and it has FAILED"),
    ],
)
def test_a_job_without_an_answer(log: str | None, said: str, tmp_path: Path) -> None:
    one = probing.Probe("7", tmp_path / "probe-0", None, "partition main", "t", Lock(tmp_path / "lock"))
    if log is not None:
        one.log.write_text(f"some line\n{log}\n\n")
    error = probing._without(one, "FAILED", "n1")
    expected = said.format(folder=tmp_path, log=one.log)
    assert f"{type(error).__name__} {error}".startswith(expected)
    assert error.fix
