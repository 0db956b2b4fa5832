"""Stages that train, one after the other in one process group.

folder/plan.json: [{"name", "kind", "strategy", "settings": {...}, "engine": {...}}], results in folder/<name>. engine
may have "padded": nothing is packed. The setting "start" names the start model's folder beside the results; "lora": see
tests.training.tiny.adapters. A case may have "stops": attempts that are asked to stop, on the last rank, at so many
steps from their beginning; all but a last null end before the stage does; {"lose": steps} instead breaks an attempt off
on all ranks. "saving" are settings of its checkpoints; its "behind": see tests.distributed.asked, as for "noise".
"reward_model": the case whose result judges an online stage, which must come before any under ZeRO-3, as in a process
there is one stage only; without it: tests.training.letters. "front_end": of the compiler alone, what it makes of layers
is run as it stands. "poison": arguments of tests.training.poison. "no_room": {"rank", "steps"}: there the part of
these checkpoints is refused by the kernel. "fails": the stage raises; what each rank was told is in error-<rank>.txt.
"shared": the folder of what the case shares with others.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import resource
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from torch.distributed import distributed_c10d

import alignment.stages.online as online_stage
import alignment.stages.train as train
import alignment.training.trainers as trainers
from alignment.errors import AlignmentError, PreemptedError
from alignment.training import ranks, tensors
from alignment.training.trainers import Packing
from tests.distributed import asked, bare
from tests.forks import rank_environment, say_into
from tests.training import online, poison, tiny


def work(rank: int, folder: Path, world_size: int, port: int) -> None:
    """Of a process that is a fork."""
    os.environ.update(rank_environment(rank, world_size, port))
    work_alone(folder)


def work_alone(folder: Path) -> None:
    """Of one that nothing has told of others."""
    say_into(folder / f"said-{os.environ.get('RANK', 0)}.txt")
    os.environ["ALIGNMENT_CACHE"] = str(folder / "cache")
    os.environ.pop("TORCH_EXTENSIONS_DIR", None)
    main(folder)


def main(folder: Path) -> None:
    gc.freeze()  # as alignment.imports.kept
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    train.consolidate, trainers.trial = observed(train.consolidate), watched(trainers.trial)
    judge_of = online_stage.judge_of
    for case in json.loads((folder / "plan.json").read_text()):
        lora = tiny.adapters(case["settings"].pop("lora", False))
        start = case["settings"].pop("start", "start")
        kind, padded = case["kind"], case["engine"].pop("padded", False)
        adapters = {} if kind == "reference" else {"lora": lora}
        made = online if kind in online.KINDS else tiny
        settings = getattr(made, "sft" if kind in bare.KINDS else kind)(**adapters, **case["settings"])
        setup = tiny.engine(case["strategy"], **case["engine"])
        data = {"reference": "dpo", **dict.fromkeys(online.KINDS, "prompts")}.get(kind, kind)
        inputs = {"model": folder / start, "data": folder / data}
        judged_by = case.get("reward_model")
        online_stage.judge_of = judge_of if judged_by else lambda context: online.letters()
        if judged_by:
            inputs["reward_model"] = folder / judged_by
        train.Packing = partial(Packing, on=not padded)
        saving = dict(case.get("saving", {}))
        behind = saving.pop("behind", 0)
        saving = tiny.checkpoint(**saving)
        for stop in case.get("stops", [None]):
            where = folder / case["name"]
            context = tiny.context(where, inputs, settings, setup, rank, world_size, saving, online.BY_MODEL)
            # What others computed packed is not read.
            context.shared = None if padded else folder / case.get("shared", "")
            lose = stop["lose"] if isinstance(stop, dict) else None
            stops = stop if lose is None and rank == world_size - 1 else None
            train.Keeper = partial(asked.Asked, stop=stops, lose=lose, behind=behind)
            with pytest.MonkeyPatch.context() as patched:
                if "poison" in case:
                    poison.into(patched, **case["poison"])
                if case.get("noise"):
                    asked.noise(patched)
                if case.get("front_end"):
                    patched.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
                if "no_room" in case and case["no_room"]["rank"] == rank:
                    patched.setattr(tensors, "write", partial(no_room, tensors.write, case["no_room"]["steps"]))
                summary = attempt(kind, context, stop is None, case.get("fails", False))
            if rank == 0:
                (context.folder / "summary.json").write_text(json.dumps({**summary, **seen}))
            AcceleratorState._reset_state(reset_partial_state=True)  # one stage a process is the rule; here several
            GradientState._reset_state()
            if "deepspeed" in sys.modules:  # the groups of engine.hpz
                sys.modules["deepspeed"].utils.groups._ZERO_PARAM_INTRA_PARALLEL_GROUP = None


def no_room(write: Any, steps: list[int], path: Path, *arguments: Any) -> Any:
    """The kernel lets this process write no file of more than a kilobyte."""
    if int(path.parent.name.split("-")[-1]) not in steps:
        return write(path, *arguments)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        return write(path, *arguments)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def attempt(kind: str, context: Any, ends: bool, fails: bool) -> dict[str, Any]:
    if kind in bare.KINDS:
        return bare.run(kind, context)
    if fails:
        with pytest.raises(AlignmentError) as caught:
            importlib.import_module(f"alignment.stages.{kind}").run(context)
        (context.folder / f"error-{context.rank}.txt").write_text(str(caught.value))
        return {"failed": str(caught.value)}
    try:
        summary = importlib.import_module(f"alignment.stages.{kind}").run(context)
    except (PreemptedError, asked.LostError) as stopped:
        if ends:
            raise
        ranks.all_gather(None)  # nobody begins anew while another still writes: those of an attempt end together
        return {"stopped": str(stopped)}
    assert ends, "it was to stop"
    return summary


seen: dict[str, Any] = {}


def observed(consolidate: Any) -> Any:
    """Note what the engine holds at the end of training, before it is brought together."""

    def wrapped(trainer: Any, *arguments: Any) -> None:
        held = [parameter.numel() for parameter in trainer.model.parameters()]
        seen.update(parameters=len(held), empty_parameters=held.count(0))
        seen.update(distributed_type=str(trainer.accelerator.distributed_type))
        groups = [group._get_backend(torch.device("cpu")) for group in distributed_c10d._world.pg_map]
        seen.update(group_timeouts=[group.options._timeout.total_seconds() for group in groups])
        consolidate(trainer, *arguments)

    return wrapped


def watched(trial: Any) -> Any:
    """Note how many parameters the engine still holds gathered after the trial, whatever came of it, and how many
    weights of the second copy that engine.hpz makes."""

    def wrapped(model: Any, *arguments: Any) -> Any:
        found = trial(model, *arguments)
        active = [getattr(parameter, "ds_active_sub_modules", ()) for parameter in model.parameters()]
        second = [getattr(parameter, "ds_secondary_tensor", None) for parameter in model.parameters()]
        seen.update(active_after_trial=sum(map(bool, active)))
        seen.update(second_copy=sum(part.numel() for part in second if part is not None))
        return found

    return wrapped
