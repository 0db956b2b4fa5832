"""The loader's items: whole optimiser steps, on a GPU each made by a thread while the one before it is computed."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch


class Steps(torch.utils.data.Dataset):
    """The steps first, ..., count - 1, each as make(step). ahead: a thread makes the next one; `close` ends it."""

    def __init__(self, make: Callable[[int], dict[str, Any]], count: int, ahead: bool, first: int = 0):
        self._make, self._count, self._first = make, count, first
        self._thread = ThreadPoolExecutor(1, "collate") if ahead else None
        self._coming: dict[int, Future[dict[str, Any]]] = {}

    def __len__(self) -> int:
        return self._count - self._first

    def __getitem__(self, number: int) -> dict[str, Any]:
        step = self._first + number
        coming = self._coming.pop(step, None)
        item = coming.result() if coming else self._make(step)
        if self._thread and step + 1 < self._count:
            self._coming = {step + 1: self._thread.submit(self._make, step + 1)}
        return item

    def close(self) -> None:
        """Nothing is made any more; what is being made is waited for: it may read files that then go."""
        if self._thread:
            self._thread.shutdown(cancel_futures=True)
        self._thread, self._coming = None, {}
