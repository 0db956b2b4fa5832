"""A look around on a node before stages are queued: `python -m alignment.probe <order.json> <0 | step> [head]`.

It is started as stages are: 0 by a job's script, as their driver is; `step` by srun, on each node and in the container,
as their processes are. The order says what is to be found; the result lies beside it, and all of it is in the log, too.
Only the standard library is needed to say what is missing.
"""

from __future__ import annotations

import fcntl
import os
import platform
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

import alignment
from alignment.files import read_json, sha256, write_json

PATIENCE = 150.0  # seconds for the step: the job has a little more
FOLDERS = ("work", "store", "locks", "runs", "reference")  # of the store, where stages write
Problem = dict[str, Any]  # what, where, fix; config: whether a setting is wrong rather than the machine
Order = dict[str, Any]


def main(arguments: list[str]) -> int:
    path, mode = Path(arguments[0]), arguments[1]
    order = read_json(path)
    if mode == "step":
        found = look(order, [*LOOKS, _imports("alignment.worker"), _gpus, _resolves(*arguments[2:])])
        write_json(_of_step(path, os.environ.get("SLURM_PROCID", "0")), found)
        return 0
    driver = look(order, [*LOOKS, _imports("alignment.job"), _folder])
    everywhere = [driver, *([] if driver["problems"] else _steps(order, path))]
    for one in everywhere:
        for kind in ("problems", "warnings"):
            for problem in one[kind]:
                print(f"{kind[:-1]} on {one['node']}: {problem['what']} ({problem['where']}; {problem['fix']})")
    sys.stdout.flush()
    write_json(Path(order["result"]), {"token": order["token"], "found": everywhere})
    return 0


def look(order: Order, looks: list[Callable[[Order], Iterator[Problem]]]) -> dict[str, Any]:
    """What this process finds. A look that fails itself is a problem, too."""
    found: dict[str, Any] = {"node": _node(), "python": platform.python_version(), "problems": [], "warnings": []}
    for one in looks:
        try:
            for problem in one(order):
                found["warnings" if problem.pop("warning", False) else "problems"].append(problem)
        except Exception as error:
            name = getattr(one, "__name__", "look").strip("_")
            found["problems"].append(_problem(f"{name}: {type(error).__name__}: {error}", None, "see the log"))
    return found


def _node() -> str:
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def _problem(what: str, where: str | None, fix: str, **more: Any) -> Problem:
    return {"what": what, "where": where, "fix": fix, **more}


def _of_step(order: Path, process: str) -> Path:
    return order.with_suffix(f".step-{process}.json")


# --- what is looked at ------------------------------------------------------------------------------------------------


def _python(order: Order) -> Iterator[Problem]:
    if sys.version_info < (3, 11):  # noqa: UP036 - whose python it is, is what is asked
        what = f"python is {platform.python_version()}, and 3.11 or newer is needed"
        yield _problem(what, "launcher.python", "name another interpreter", config=True)
    here = Path(alignment.__file__).resolve().parent.parent
    if here != Path(order["code"]).resolve():
        fix = "an interpreter that PYTHONPATH reaches; in a container: pass it on"
        yield _problem(f"the code that runs is not what was submitted, {order['code']}", str(here), fix)


def _packages(order: Order) -> Iterator[Problem]:
    """Versions without their local part: a CPU and a CUDA build count as one."""
    wrong = []
    for name, wanted in order["packages"].items():
        try:
            found = metadata.version(name).split("+")[0]
        except metadata.PackageNotFoundError:
            found = "missing"
        if found != wanted:
            wrong.append((f"{name} is {found} instead of {wanted}", f"{name}=={wanted}"))
    if wrong:
        what, wanted = (", ".join(words) for words in zip(*wrong, strict=True))
        fix = f"the same packages there as here ({wanted}), or another launcher.python or launcher.setup"
        yield _problem(what, sys.executable, fix)


def _store(order: Order) -> Iterator[Problem]:
    root = Path(order["store"])
    for folder in (root, *(root / name for name in FOLDERS)):
        if folder.is_dir():
            try:
                with tempfile.NamedTemporaryFile(dir=folder, prefix=".probe-") as stream:
                    stream.write(b"probe")
            except OSError as error:
                fix = "a store on a file system that nodes write to: store=..."
                yield _problem(f"the store cannot be written: {error.strerror}", str(folder), fix)
                return
    free = shutil.disk_usage(root).free / 1e9
    if free < order["min_free_gb"]:
        what = f"{free:.1f} GB of disk are free, {order['min_free_gb']:g} GB are asked for"
        yield _problem(what, str(root), "free some space, or set store=... or min_free_gb=...")


def _locks(order: Order) -> Iterator[Problem]:
    """Who has submitted holds this one."""
    why = "what is locked elsewhere is free here: the file system has no locks that hold for all nodes"
    try:
        with open(order["locked"], encoding="utf-8") as stream:
            fcntl.flock(stream, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return
    except OSError as error:
        why = f"files cannot be locked: {error.strerror}"
    fix = "runs that share stages must not be submitted from several places at once; or mount it with flock"
    yield _problem(why, order["locked"], fix, warning=True)


def _sources(order: Order) -> Iterator[Problem]:
    for source in order["sources"]:
        path = Path(source["path"])
        for name, (size, digest) in source["files"].items():
            file = path / name if name else path
            fix = "model and data on a file system that nodes see" + "; in a container: bound into it" * order["inside"]
            try:
                same = file.stat().st_size == size and (digest is None or sha256(file) == digest)
            except OSError as error:
                yield _problem(f"cannot be read there: {error.strerror}", str(file), fix)
                break
            if not same:
                yield _problem("is another file there than here", str(file), "the same files on all nodes")
                break


def _folder(order: Order) -> Iterator[Problem]:
    if not Path(order["cwd"]).is_dir():
        fix = "start the command in a folder that nodes see, if the set-up needs it"
        yield _problem("the folder of the command is not there", order["cwd"], fix, warning=True)


def _imports(module: str) -> Callable[[Order], Iterator[Problem]]:
    def look(order: Order) -> Iterator[Problem]:
        try:
            import_module(module)
        except ImportError as error:
            yield _problem(f"{module} cannot be imported: {error}", sys.executable, "install what is missing")

    return look


def _gpus(order: Order) -> Iterator[Problem]:
    if not order["gpus"]:
        return
    import torch

    if (count := torch.cuda.device_count()) < order["gpus"]:
        what = f"torch {torch.__version__} sees {count} GPUs of {order['gpus']}"
        fix = "a build of torch for these GPUs, their driver" + "; launcher.container.options=[--nv]" * order["inside"]
        yield _problem(what, "launcher.gpus_per_node", fix)


def _resolves(head: str = "") -> Callable[[Order], Iterator[Problem]]:
    """That the node where processes meet is known here by name."""

    def look(order: Order) -> Iterator[Problem]:
        try:
            if head:
                socket.getaddrinfo(head, None)
        except OSError as error:
            fix = "names of all nodes in their DNS or /etc/hosts"
            yield _problem(f"the name of the first node, {head}, means nothing here: {error}", _node(), fix)

    return look


LOOKS = [_python, _packages, _store, _locks, _sources]


# --- as the processes of a stage --------------------------------------------------------------------------------------


def _steps(order: Order, path: Path) -> list[dict[str, Any]]:
    """What is found on each node of the job."""
    from alignment.config.launchers import SlurmLauncher
    from alignment.launchers import slurm, srun

    settings = SlurmLauncher.model_validate(order["launcher"])
    command = srun.step(settings, "probe", order["nodes"], Path(order["store"]))
    command += ["-m", "alignment.probe", str(path), "step", slurm.head()]
    try:
        done = subprocess.run(
            command, capture_output=True, encoding="utf-8", errors="replace", timeout=PATIENCE, check=False
        )
        said, code = f"{done.stdout}{done.stderr}".strip(), f"code {done.returncode}"
    except (OSError, subprocess.TimeoutExpired) as error:
        said, code = str(error), "no answer"
    print(said, flush=True)
    files = [_of_step(path, str(number)) for number in range(order["nodes"])]
    found = [read_json(file) for file in files if file.is_file()]
    if len(found) < len(files):
        what = f"srun has ended with {code}: {said.rpartition(chr(10))[2] or 'without a word'}"
        where, fix = ("launcher.container", "try the container by hand") if order["inside"] else ("srun", "see the log")
        problem = _problem(what, where, fix)
        if refused := srun.refused(said):
            problem = _problem(refused.what, refused.where, str(refused.fix))
        found.append({**look(order, []), "problems": [problem]})
    return found


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
