"""Side effects of a training loop: what is told to whoever watches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback

# Trainer's own bookkeeping, of no meaning where one item of the loader is one step.
HIDDEN = {"epoch"}


class Before(TrainerCallback):
    """act() once, when model and engine are ready and no step was made."""

    def __init__(self, act: Callable[[], None]) -> None:
        self._act = act

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._act()


class Reporter(TrainerCallback):
    """on_step(step, total, metrics) after every optimiser step; metrics are there at logging steps and at the last."""

    def __init__(self, on_step: Callable[[int, int, dict[str, float]], None]) -> None:
        self._on_step = on_step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        if state.global_step >= state.max_steps:
            control.should_log = True
        if not control.should_log:
            self._on_step(state.global_step, state.max_steps, {})
        return control

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if logs and "learning_rate" in logs:  # not Trainer's summary at the end
            metrics = {name: float(value) for name, value in logs.items() if name not in HIDDEN}
            self._on_step(state.global_step, state.max_steps, metrics)
