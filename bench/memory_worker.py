"""One process of a case of bench.memory: `python -m bench.memory_worker <case.json>`, in the environment of its rank.

Runs the stage as a run would, and says what its memory came to at most, in bytes, as a line of JSON.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from bench.measure import status


def main(path: Path) -> int:
    case = json.loads(path.read_text())
    from alignment import imports

    with imports.kept():
        import importlib

        from alignment.config.schema import Experiment
        from alignment.stages.context import StageContext

        experiment = Experiment.model_validate(case["experiment"])
        settings = experiment.stage[case["stage"]]
        stage = importlib.import_module(f"alignment.stages.{settings.kind}")
    context = StageContext(
        name=case["stage"], run="bench", key="0" * 64, folder=Path(case["folder"]), settings=settings,
        experiment=experiment, inputs={role: Path(place) for role, place in case["inputs"].items()},
        rank=int(os.environ.get("RANK", 0)), world_size=int(os.environ.get("WORLD_SIZE", 1)),
    )  # fmt: skip
    runtime = status("VmRSS")
    stage.run(context)
    print("FOUND " + json.dumps({"runtime": runtime, "peak": status("VmHWM")}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
