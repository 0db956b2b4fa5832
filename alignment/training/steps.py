"""The loader's items: whole optimiser steps, on a GPU each made by a thread while the one before it is computed."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch


class Steps(torch.utils.data.Dataset):
    """Step number -> make(step). ahead: while a step is computed a thread makes the next one; `close` ends it."""

    def __init__(self, make: Callable[[int], dict[str, Any]], count: int, ahead: bool):
        self._make, self._count = make, count
        self._thread = ThreadPoolExecutor(1, "collate") if ahead else None
        self._coming: dict[int, Future[dict[str, Any]]] = {}

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, step: int) -> dict[str, Any]:
        coming = self._coming.pop(step, None)
        item = coming.result() if coming else self._make(step)
        if self._thread and step + 1 < len(self):
            self._coming = {step + 1: self._thread.submit(self._make, step + 1)}
        return item

    def close(self) -> None:
        """Nothing is made any more; what is being made is waited for: it may read files that then go."""
        if self._thread:
            self._thread.shutdown(cancel_futures=True)
        self._thread, self._coming = None, {}
