"""One stage in one process group: `python -m alignment.worker <work folder>`, alone or under torchrun.

The settings come from stage.json in the folder, never from the command line. Rank 0 commits the result.
"""

from __future__ import annotations

import errno
import importlib
import os
import platform
import re
import socket
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from alignment.config.schema import Experiment
from alignment.errors import AlignmentError, InputError, MachineError, unusable
from alignment.files import canonical, digest, read_json
from alignment.launchers.local import die_with_parent
from alignment.pipeline.identity import code_digest, stage_identity
from alignment.pipeline.store import Store
from alignment.stages.context import StageContext

NO_SPACE = r"os error (28|122)\b|No space left on device|Disk quota exceeded"  # safetensors has its own error class


def main(folder: Path) -> int:
    """Run the stage that the folder describes; the exit code is that of its error class."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        die_with_parent(os.getppid())  # torchrun's workers outlive a killed torchrun otherwise
    order = read_json(folder / "stage.json")
    if not Store(Path(order["store"])).is_held(order["key"]):  # whoever started this died before it could say so
        print("nobody holds the lock of this stage: its launcher is gone", flush=True)
        return 1
    try:
        _run(folder, order)
        return 0
    except Exception as error:
        known = _known(error, folder)
        _tell(folder, known, traceback.format_exc())
        traceback.print_exc()
        return known.exit_code


def _run(folder: Path, order: dict[str, Any]) -> None:
    started = time.time()
    store = Store(Path(order["store"]))
    experiment = Experiment.model_validate(order["experiment"])
    context = StageContext(
        name=order["name"],
        run=order["run"],
        key=order["key"],
        folder=folder,
        settings=experiment.stage[order["stage"]],
        experiment=experiment,
        inputs={role: store.result(parent["key"]) for role, parent in order["parents"].items()},
        rank=int(os.environ.get("RANK", 0)),
        world_size=int(os.environ.get("WORLD_SIZE", 1)),
        shared=store.root,
    )
    _require_parents(store, order)
    stage = importlib.import_module(
        f"alignment.stages.{context.settings.kind}"
    )  # a Literal of the schema, not free text
    with _tracked(context, order, store) as tracker:
        metrics = stage.run(context)
        _all_done(context)
        if context.is_main:
            tracker.result(order["name"], order["key"], metrics)
    if context.is_main:
        _require_same_input(experiment, context, order)
        store.commit(order["key"], _record(order, metrics, started))


def _tracked(context: StageContext, order: dict[str, Any], store: Store) -> Any:
    from alignment.tracking import Tracker

    tracker = Tracker.start(
        context.experiment.tracking if context.is_main else None,
        folder=context.folder,
        run=order["run"],
        name=order["name"],
        kind=order["kind"],
        config={"identity": order["identity"], "experiment": order["experiment"], "key": order["key"]},
        parents={role: (parent["name"], parent["key"]) for role, parent in order["parents"].items()},
        on_warning=context.warn,
        final_folder=store.result(order["key"]),
    )
    context.listeners.append(tracker.log)
    return tracker


def _require_parents(store: Store, order: dict[str, Any]) -> None:
    for role, parent in order["parents"].items():
        if store.record(parent["key"]) is None:
            raise MachineError(
                f"the result of {parent['name']} (role {role}) is gone or damaged",
                where=str(store.result(parent["key"])),
                fix="run the same command again: it is made anew",
            )


def _require_same_input(experiment: Experiment, context: StageContext, order: dict[str, Any]) -> None:
    """A file that was edited while the stage ran must not lie in the store under the digest of what it was before."""
    parents = {role: parent["key"] for role, parent in order["parents"].items()}
    if digest(stage_identity(experiment, context.settings, parents)) != order["key"]:
        raise InputError(
            "its data, model or packages changed while it ran: the result is of neither",
            where=f"stage {order['name']}",
            fix="run the same command again",
        )


def _all_done(context: StageContext) -> None:
    """No rank may still be writing when rank 0 commits."""
    if context.world_size > 1:
        import torch.distributed as dist

        if dist.is_initialized():
            dist.barrier()


def _record(order: dict[str, Any], metrics: dict[str, Any], started: float) -> dict[str, Any]:
    finished = time.time()
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
        "seconds": finished - started,
        "metrics": metrics,
    }


def _known(error: Exception, folder: Path) -> AlignmentError:
    """Any exception as one with a cause in a person's words."""
    if isinstance(error, AlignmentError):
        return error
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    if full or re.search(NO_SPACE, str(error)):
        return MachineError("no space left on the disk", where=str(folder), fix="free some space, or set store=...")
    if isinstance(error, OSError) and error.filename is not None:
        return unusable(error)
    if isinstance(error, MemoryError) or "out of memory" in str(error).lower():
        return MachineError(
            "out of memory",
            fix="lower engine.tokens_per_micro_batch, or set engine.gradient_checkpointing=true, engine=zero3, or LoRA",
        )
    first = str(error).strip().splitlines()
    return AlignmentError(f"{type(error).__name__}: {first[0] if first else ''}", fix=f"see {folder / 'log.txt'}")


def _tell(folder: Path, error: AlignmentError, trace: str) -> None:
    """Leave the cause for the driver; of several ranks the first one to fail is heard."""
    told = {"code": error.exit_code, "what": error.what, "where": error.where, "fix": error.fix, "message": str(error)}
    aside = folder / f".error.{os.getpid()}"
    try:
        aside.write_text(canonical({**told, "traceback": trace, "rank": int(os.environ.get("RANK", 0))}))
        os.link(aside, folder / "error.json")
    except OSError:
        pass
    finally:
        aside.unlink(missing_ok=True)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
