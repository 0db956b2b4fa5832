"""A few real steps of a stage, timed, against what is predicted for the very same steps: their ratio scales what is
predicted for all. It is kept in the store, for stages of the same shape, engine and machine."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from alignment.config.execution import Engine
from alignment.estimating.hardware import Processor
from alignment.estimating.time import Stage
from alignment.files import digest, read_json, write_json
from alignment.training.shape import shape_of

FOLDER = "estimates"  # in the store
WITHOUT = ("adapt", "watchdog_s")  # of the engine: they take no time


class Calibration(NamedTuple):
    """device: as it was known then. scale: seconds measured over predicted by it. steps: how many were timed. around:
    seconds from the launch to the first step, and from the last one to the end."""

    device: Processor
    scale: float
    steps: int
    around: float

    def told(self) -> str:
        share = self.device.utilisation / self.scale
        return f"{self.steps} steps timed on this machine, at {share:.0%} of {self.device.told}"


def calibrated(stage: Stage, seconds: Sequence[float], device: Processor, around: float = 0.0) -> Calibration | None:
    """stage: as it ran, with the rows that it had. seconds: of its steps after the first, which warms up. The median
    ratio: others may have had the machine for a step."""
    if not seconds:
        return None
    predicted = [stage.step(one, device) for one in stage.loads(len(seconds) + 1, device.on_gpu)[1:]]
    ratios = [took / step.seconds for took, step in zip(seconds, predicted, strict=True) if step is not None]
    return Calibration(device, median(ratios), len(seconds), around) if ratios else None


def place(store: Path, stage: Stage, engine: Engine, device: Processor) -> Path:
    """Where the calibration of such stages lies: what decides how fast a step is, beside its rows."""
    settings, layout = stage.settings, stage.layout
    lora = getattr(settings, "lora", None)
    facts = {
        "shape": shape_of(stage.config)._asdict(),
        "kind": settings.kind,  # type: ignore[union-attr]
        "precision": settings.precision,
        "lora": None if lora is None else lora.model_dump(),
        "engine": {key: value for key, value in engine.model_dump().items() if key not in WITHOUT},
        "layout": [layout.tokens, layout.checkpointing, layout.nodes, layout.load.world_size],
        "device": device.name,
        "machine": _machine(),
    }
    return store / FOLDER / f"{digest(facts)[:16]}.json"


def _machine() -> str:
    import platform
    import socket

    return f"{socket.gethostname()} {platform.processor()}"


def keep(path: Path, calibration: Calibration) -> None:
    """Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {**calibration._asdict(), "device": calibration.device._asdict()}, durable=False)


def kept(path: Path) -> Calibration | None:
    """None where there is none that can be read."""
    try:
        told: dict[str, Any] = read_json(path)
        numbers = float(told["scale"]), int(told["steps"]), float(told["around"])
        return Calibration(Processor(**told["device"]), *numbers)
    except (OSError, ValueError, KeyError, TypeError):
        return None
