"""Functions of TRL that are others while something of it runs: each for what no argument of TRL can say."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import trl.trainer.dpo_trainer as dpo_module
import trl.trainer.utils as trl_utils


@contextmanager
def labelled_positions_only() -> Iterator[None]:
    """Let TRL's fused head score trained positions only. On CPU it scores all, prompt and padding included."""
    stock = trl_utils._use_triton
    trl_utils._use_triton = lambda device: True
    try:
        yield
    finally:
        trl_utils._use_triton = stock


@contextmanager
def nothing_hashed() -> Iterator[None]:
    """TRL digests all weights to name its cache of reference sums, which is not used."""
    stock = dpo_module.hash_module
    dpo_module.hash_module = lambda module: ""
    try:
        yield
    finally:
        dpo_module.hash_module = stock
