"""One stage in one process group: `python -m alignment.worker <work folder>`, alone or under torchrun.

The settings come from stage.json in the folder, never from the command line. Rank 0 commits the result.
"""

from __future__ import annotations

import errno
import gc
import hashlib
import importlib
import os
import pickle
import platform
import re
import socket
import sys
import time
import traceback
from collections.abc import Callable, Collection
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alignment import imports
from alignment.allocation import allocation
from alignment.errors import (
    AlignmentError,
    InputError,
    LostError,
    MachineError,
    PreemptedError,
    is_out_of_memory,
    unusable,
)
from alignment.files import canonical, digest, read_json
from alignment.life import REPLACED, WORD, Pulse, die_with_parent, word
from alignment.pipeline import attempts
from alignment.pipeline.store import CHECKPOINTS, JOINED, OUTCOME, Lock, Store
from alignment.signals import Listener, Stopped

if TYPE_CHECKING:  # imported, like all that takes long, once signals are heard
    from alignment.stages.context import StageContext

TORCHRUN = "TORCHELASTIC_RUN_ID"  # set in the processes that it starts
NO_SPACE = r"os error (28|122)\b|No space left on device|Disk quota exceeded"  # safetensors has its own error class
# What a process hears of another one that has died: gloo's words, NCCL's, and PyTorch's store's.
FROM_GROUP = r"gloo|nccl|c10d|ProcessGroup|TCPStore|torch\.distributed|torch/csrc/distributed"
LONGEST_START = 60.0  # seconds from a launch to a worker that runs
PEER_GONE = (
    r"closed by peer|peer closed|reset by peer|connection refused"
    r"|broken pipe|timed? ?out|remote process exited|connection (was )?(aborted|closed)"
)


def main(folder: Path) -> int:
    """Run the stage that the folder describes; the exit code is that of its error class."""
    stop, pulse, replaced = Listener(), None, _fence(folder)
    deferred = ExitStack()  # of several processes none may leave alone: to its end each only notes a request
    deferred.enter_context(stop.deferred())
    try:
        stop.listen(again=lambda: _end_at_once(folder))
        if TORCHRUN in os.environ:
            die_with_parent(os.getppid())  # torchrun's workers outlive a killed torchrun otherwise
        order = read_json(folder / "stage.json")
        if not _launcher_lives(order):  # it died before it could say so
            print("nobody holds the lock of this stage: its launcher is gone", flush=True)
            return 1
        pulse = Pulse(folder, _rank(), replaced)
        _reserve(folder)
        if int(os.environ.get("WORLD_SIZE", 1)) == 1:
            deferred.close()
            if stop.asked:
                raise Stopped(stop.asked)
        _run(folder, order, stop, pulse, replaced)
        return 0
    except (Stopped, PreemptedError) as why:
        if replaced():
            return REPLACED
        return _preempted(folder, str(why), getattr(why, "kept", False))
    except Exception as error:
        if replaced():  # a word of this one would be taken for the other attempt's
            return REPLACED
        with stop.deferred():
            if stop.raised:  # a library has caught it (an import that then failed): this error is what came of it
                traceback.print_exc()
                return _preempted(folder, str(stop.asked), False)
            known = _known(error, folder)
            retry = bool(getattr(error, "retry", known.retry))
            _tell(folder, known, traceback.format_exc(), retry, stop.asked)
            traceback.print_exc()
            return known.exit_code
    finally:
        if pulse is not None:
            pulse.end()


def _launcher_lives(order: dict[str, Any]) -> bool:
    """Only a lock that was taken on this host is asked for: a file system may keep locks to one host."""
    if joined := os.environ.get(JOINED):
        return Lock(Path(joined)).is_held()
    return order["host"] != socket.gethostname() or Store(Path(order["store"])).is_held(order["key"])


def _end_at_once(folder: Path) -> None:
    """Asked a second time: the driver, which was not, hears why; unless what was asked for first is done.

    Not in a cluster's job: SLURM itself signals more than once, and kills whom it wants to be gone.
    """
    if allocation() is not None:
        return
    if (folder / OUTCOME).exists():
        os._exit(_code_of_a_stop())
    _tell(folder, LostError(f"rank {_rank()} was asked to stop a second time, and ended at once"), "", retry=True)
    os._exit(130)


def _preempted(folder: Path, why: str, kept: bool | None) -> int:
    _leave(folder, OUTCOME, {"outcome": "preempted", "why": why, "kept": kept})
    return _code_of_a_stop()


def _code_of_a_stop() -> int:
    # torchrun ends the others of a rank that ends otherwise, while they may still be closing their files.
    return 0 if TORCHRUN in os.environ else PreemptedError.exit_code


def _rank() -> int:
    return int(os.environ.get("RANK", 0))


def _fence(folder: Path) -> Callable[[], bool]:
    """Whether another attempt has begun meanwhile. A cluster starts a stage again elsewhere if it cannot reach a node,
    whose processes may live on: they must not write into what is the new attempt's."""
    path = folder / "stage.json"

    def look() -> tuple[int, int] | None:
        try:
            found = path.stat()
        except OSError:  # the folder is being renewed, or is a result by now
            return None
        return found.st_ino, found.st_mtime_ns

    mine = look()
    return lambda: (now := look()) is not None and now != mine


def _run(folder: Path, order: dict[str, Any], stop: Listener, pulse: Pulse, replaced: Callable[[], bool]) -> None:
    store = Store(Path(order["store"]))
    with imports.kept():
        context = _context(folder, order, store, stop)
        # A Literal of the schema, not free text.
        stage = importlib.import_module(f"alignment.stages.{context.settings.kind}")
    pulse.got_on = context.got_on
    _require_parents(store, order, context.settings.ordering, stop)
    _look_at_inputs(context, order)
    if not (folder / CHECKPOINTS).exists():  # it begins anew; who has looked for checkpoints knows better
        context.rewind(-1)
    with ExitStack() as deferred:
        with _tracked(context, order, store) as tracker:
            if order["distributed"]:  # it looks at `stop` itself, where all its processes can
                deferred.enter_context(stop.deferred())
            metrics = stage.run(context)
            deferred.enter_context(stop.deferred())  # what is done is not lost to a signal now
            _all_done(context)
            if context.is_main:
                tracker.result(order["name"], order["key"], metrics)
        if context.is_main:
            with context.busy("storing the result"):
                _require_same_input(context, order, "while it ran: the result is of neither")
                if replaced():
                    raise LostError("another attempt has taken the place of this one")
                require_whole(folder)
                try:
                    store.commit(order["key"], _record(store, context, order, metrics))
                except OSError as error:
                    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.EXDEV):
                        raise unusable(error) from error
                    raise


def require_whole(folder: Path) -> None:
    """Raises MachineError if the work folder was emptied meanwhile: metrics would begin in the middle."""
    if not (folder / "stage.json").exists():
        what = "files were removed from its work folder while it ran: what is left is not whole"
        raise MachineError(what, where=str(folder), fix="run the same command again")


def _context(folder: Path, order: dict[str, Any], store: Store, stop: Listener) -> StageContext:
    from alignment.config.schema import Experiment
    from alignment.stages.context import StageContext

    experiment = Experiment.model_validate(order["experiment"])
    left = order["time_left"]
    if left is not None:
        # Seconds that the attempt has taken already are told by the wall clock, once, and believed within reason: it
        # may have been set meanwhile, or be another host's. From here on the monotonic one counts.
        left -= min(max(time.time() - order["started"], 0.0), LONGEST_START)
    return StageContext(
        name=order["name"],
        run=order["run"],
        key=order["key"],
        folder=folder,
        settings=experiment.stage[order["stage"]],
        experiment=experiment,
        inputs={role: store.result(parent["key"]) for role, parent in order["parents"].items()},
        rank=_rank(),
        world_size=int(os.environ.get("WORLD_SIZE", 1)),
        shared=store.root,
        stop=stop,
        deadline=None if left is None else time.monotonic() + left,
    )


def _tracked(context: StageContext, order: dict[str, Any], store: Store) -> Any:
    from alignment.tracking import Tracker

    tracker = Tracker.start(
        context.experiment.tracking if context.is_main else None,
        folder=context.folder,
        group=order.get("sweep") or order["run"],
        name=order["name"],
        kind=order["kind"],
        config={
            "run": order["run"],
            "identity": order["identity"],
            "experiment": {key: value for key, value in order["experiment"].items() if key != "launcher"},
            "key": order["key"],
        },
        parents={role: (parent["name"], parent["key"]) for role, parent in order["parents"].items()},
        on_warning=context.warn,
        final_folder=store.result(order["key"]),
    )
    context.listeners.append(tracker.log)
    return tracker


def _require_parents(store: Store, order: dict[str, Any], ordering: Collection[str], stop: Listener) -> None:
    for role, parent in order["parents"].items():
        if role in ordering:
            continue
        if store.awaited(parent["key"], lambda: stop.asked) is None:
            if stop.asked:
                raise Stopped(stop.asked)
            raise MachineError(
                f"the result of {parent['name']} (role {role}) is gone or damaged",
                where=str(store.result(parent["key"])),
                fix="run the same command again: it is made anew",
            )


def _look_at_inputs(context: StageContext, order: dict[str, Any]) -> None:
    """That they are those of the key. Code that judges is read here, once, by each process: what judges all along is
    the text that the key is of, whatever is edited meanwhile. Raises InputError."""
    from alignment.config.reward_terms import Python

    if "reward" in context.settings.groups:
        for term in context.experiment.reward.read(context.settings.compares).terms.values():
            if isinstance(term, Python):
                path = Path(term.source.path)
                try:
                    context.code[path] = path.read_bytes()
                except OSError as error:
                    raise InputError(f"cannot be read: {error.strerror or error}", where=str(path)) from error
    if context.is_main or context.code:
        with context.busy("looking at its inputs"):
            _require_same_input(context, order, "since it was planned: this would be another result than its key says")


def _require_same_input(context: StageContext, order: dict[str, Any], since: str) -> None:
    """A file that was edited meanwhile must not lie in the store under the digest of what it was before."""
    from alignment.pipeline.identity import difference, one_look, stage_identity

    parents = {role: parent["key"] for role, parent in order["parents"].items()}
    with one_look({path: hashlib.sha256(text).hexdigest() for path, text in context.code.items()}):
        now = stage_identity(context.experiment, context.settings, parents)
    if digest(now) != order["key"]:
        place, before, after = difference(order["identity"], now)
        what = place.removeprefix("groups.").removesuffix(".sha256")
        was = f" ({str(before)[:12]}, now {str(after)[:12]})" if isinstance(before, str | None) else ""
        fix = "run the same command again; with it as it was, a stage that trains goes on from its last checkpoint"
        raise InputError(f"`{what}`{was} changed {since}", where=f"stage {order['name']}", fix=fix)


def _all_done(context: StageContext) -> None:
    """No rank may still be writing when rank 0 commits."""
    if context.world_size > 1:
        import torch.distributed as dist

        if dist.is_initialized():
            dist.barrier()


def _record(store: Store, context: StageContext, order: dict[str, Any], metrics: dict[str, Any]) -> dict[str, Any]:
    from alignment.pipeline.identity import code_digest

    folder = context.folder
    started, finished = order["started"], time.time()
    row = attempts.row(folder, order, "done", None)
    before = _moved(attempts.read(folder), folder, store.result(order["key"]))
    return {
        "key": order["key"],
        "name": order["name"],
        "kind": order["kind"],
        "settings": order["experiment"]["stage"][order["stage"]],
        "identity": order["identity"],
        "parents": {role: parent["key"] for role, parent in order["parents"].items()},
        "run": order["run"],
        "engine": order["experiment"]["engine"],
        "packages": {**order["identity"]["packages"], "python": platform.python_version()},
        "code_sha256": code_digest(),
        "host": socket.gethostname(),
        "world_size": int(os.environ.get("WORLD_SIZE", 1)),
        "started": started,
        "finished": finished,
        "seconds": finished - started + sum(map(_worked, before)),
        "attempts": [*before, row],
        "checkpoints": context.checkpoints,
        "metrics": metrics,
    }


def _worked(row: attempts.Row) -> float:
    """Seconds of an attempt, where it says when it began and ended."""
    began, ended = row.get("started"), row.get("ended")
    known = isinstance(began, int | float) and isinstance(ended, int | float)
    return max(ended - began, 0.0) if known else 0.0  # type: ignore[operator]


def _moved(rows: list[attempts.Row], work: Path, place: Path) -> list[attempts.Row]:
    """Causes name files of the work folder, which is about to be moved."""
    return [
        {**row, "cause": str(row["cause"]).replace(str(work), str(place))} if row.get("cause") else row for row in rows
    ]


def _known(error: Exception, folder: Path) -> AlignmentError:
    """Any exception as one with a cause in a person's words."""
    if isinstance(error, AlignmentError):
        return error
    if isinstance(error, pickle.UnpicklingError):  # torch.load reads weights only, by the environment of a stage
        what = "a file holds a pickle with code: refused"
        return InputError(what, where=_file_loaded(error), fix="use safetensors, or a file that holds tensors only")
    said = f"{type(error).__module__}.{type(error).__name__}: {error}"
    if type(error).__name__.startswith("Dist") or (re.search(FROM_GROUP, said) and re.search(PEER_GONE, said, re.I)):
        return LostError(f"lost contact with another process ({_first_line(error)})", fix=f"see {folder / 'log.txt'}")
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    if full or re.search(NO_SPACE, str(error)):
        return MachineError("no space left on the disk", where=str(folder), fix="free some space, or set store=...")
    if isinstance(error, OSError) and error.filename is not None:
        return unusable(error)
    if is_out_of_memory(error):
        return MachineError(
            "out of memory",
            fix="lower engine.tokens_per_micro_batch, or set engine.gradient_checkpointing=true, engine=zero3, or LoRA",
        )
    return AlignmentError(f"{type(error).__name__}: {_first_line(error)}", fix=f"see {folder / 'log.txt'}")


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [""])[0]


def _file_loaded(error: Exception) -> str | None:
    """The path that torch.load was given, found in its frame: the error does not say."""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        if frame.f_code.co_name == "load" and isinstance(path := frame.f_locals.get("f"), (str, Path)):
            return str(path)
    return None


def _tell(folder: Path, error: AlignmentError, trace: str, retry: bool, asked: str | None = None) -> None:
    """Leave the cause for the driver, and what this process was asked to stop by. That another process is gone is not
    the first cause: it is told elsewhere."""
    told = {"code": error.exit_code, "what": error.what, "where": error.where, "fix": error.fix, "message": str(error)}
    told |= {"asked": asked}
    name = "lost.json" if isinstance(error, LostError) else "error.json"
    _leave(folder, name, {**told, "retry": retry, "traceback": trace})


def _reserve(folder: Path) -> None:
    """Disk for this process's last word, which may be that there is none left."""
    word(folder, _rank()).write_bytes(b" " * WORD)


def _leave(folder: Path, name: str, told: dict[str, Any]) -> None:
    """Say it in a file that the driver looks for; of several ranks the first one is heard."""
    told = {**told, "rank": _rank()}
    while len(text := canonical(told).encode()) > WORD and told.get("traceback"):  # its end says where
        told["traceback"] = told["traceback"][len(told["traceback"]) // 2 + 1 :]
    mine = word(folder, _rank())
    with suppress(OSError):
        with open(os.open(mine, os.O_WRONLY | os.O_CREAT, 0o644), "wb") as stream:
            stream.write(text.ljust(WORD))  # over what is there: JSON may end in blanks
        try:
            os.link(mine, folder / name)
            mine.unlink()
        except FileExistsError:
            return
        except OSError:  # a file system without such links
            mine.rename(folder / name)


if __name__ == "__main__":
    code = main(Path(sys.argv[1]))
    gc.freeze()  # else the interpreter looks at all that lives once more before it ends, for seconds
    sys.exit(code)
