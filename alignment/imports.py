"""Imports that last as long as the process."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def kept() -> Iterator[None]:
    """What lives at the end of the block is left out of all garbage collections.

    PyTorch, Transformers and TRL are a million objects that stay. They would be looked at again and again while more is
    imported, whenever Trainer or DeepSpeed collect garbage, and when the interpreter ends: a third of the ten seconds
    that a stage needs to begin and end on a CPU. What is garbage before the block is collected, so as not to be kept.
    """
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if enabled:
            gc.enable()
