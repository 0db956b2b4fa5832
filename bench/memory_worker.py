"""One process of a case of bench.memory: `python -m bench.memory_worker <case.json>`, in the environment of its rank.

Runs the stage as a run would, and says what its memory came to at most, in bytes, as a line of JSON.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from bench.measure import _status


def main(path: Path) -> int:
    case = json.loads(path.read_text())
    found: dict[str, Any] = {}
    from alignment import imports

    with imports.kept():
        import importlib

        from alignment.config.schema import Experiment
        from alignment.stages.context import StageContext

        experiment = Experiment.model_validate(case["experiment"])
        settings = experiment.stage[case["stage"]]
        stage = importlib.import_module(f"alignment.stages.{settings.kind}")
    if os.environ.get("TRACE"):
        _trace(found)
    context = StageContext(
        name=case["stage"], run="bench", key="0" * 64, folder=Path(case["folder"]), settings=settings,
        experiment=experiment, inputs={role: Path(place) for role, place in case["inputs"].items()},
        rank=int(os.environ.get("RANK", 0)), world_size=int(os.environ.get("WORLD_SIZE", 1)),
    )  # fmt: skip
    found["runtime"] = _status("VmRSS")
    stage.run(context)
    found["peak"] = _status("VmHWM")
    print("FOUND " + json.dumps(found), flush=True)
    os._exit(0)


def _trace(found: dict[str, Any]) -> None:
    """Peaks and what is in use at marks of a stage's life, for whoever mends a formula."""
    from alignment.stages import train
    from alignment.training import trainers

    def mark(name: str) -> None:
        print(name, [_status(one) >> 20 for one in ("VmRSS", "VmHWM", "RssAnon", "RssFile")], len(sys.modules), flush=True)
        Path("/proc/self/clear_refs").write_text("5")

    consolidate, before = train.consolidate, trainers.AlignedTrainer._before_training
    make = train._require_room

    def writing(*args: Any, **named: Any) -> Any:
        mark("trained")
        told = consolidate(*args, **named)
        mark("written")
        return told

    def starting(self: Any) -> Any:
        mark("engine made")
        told = before(self)
        mark("tried")
        return told

    def loaded(*args: Any) -> Any:
        mark("model loaded")
        return make(*args)

    train.consolidate, train._require_room = writing, loaded
    trainers.AlignedTrainer._before_training = starting
    training_step = trainers.AlignedTrainer.training_step

    def step(self: Any, *args: Any, **named: Any) -> Any:
        mark(f"before step {self.state.global_step}")
        told = training_step(self, *args, **named)
        mark(f"after backward {self.state.global_step}")
        return told

    trainers.AlignedTrainer.training_step = step


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
